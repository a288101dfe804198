"""Random numbers: alike where the ranks of a TP group hold the same, of their own where they hold parts; and the
parameters that a checkpoint lacks."""

import models
import parity
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor, Replicate, Shard

import hf_tpsp
from hf_tpsp import TPSPConfig

SMALL = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.2, "attention_dropout": 0.2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 64, "dropout": 0.2, "attention_dropout": 0.2, "layerdrop": 0.4,
    },
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "router_jitter_noise": 0.3, "attention_dropout": 0.2,
    },
}  # fmt: skip


def build(model_type: str):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **CONFIGS[model_type], attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_config(config)


def alike(x: torch.Tensor, group) -> bool:
    """Whether all ranks of `group` hold the same bits."""
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, x.contiguous(), group=group)
    return all(torch.equal(x, other) for other in everyones)


def trained(model_type: str, apart: bool, **settings) -> dict:
    model = build(model_type)
    config = TPSPConfig(tp_size=2, **settings)
    hf_tpsp.parallelize(model, config)
    group = model._tpsp.mesh["tp"].get_group()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7 + apart * dist.get_rank())
    in_step = True
    for step, length in enumerate((17, 16, 1, 3)):
        batch = parity.shard_batch(models.batch(2, length, seed=step), model._tpsp.mesh)
        batch["labels"] = batch["input_ids"]
        if length > 1:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            model(**batch)
        in_step &= alike(torch.get_rng_state(), group)
    drifted = [
        name
        for name, p in model.named_parameters()
        if all(
            isinstance(x, Replicate) or d != "tp"
            for x, d in zip(p.placements, p.device_mesh.mesh_dim_names, strict=False)
        )
        and not alike(p._local_tensor.detach(), group)
    ]
    model.eval()
    torch.manual_seed(7 + apart * dist.get_rank())
    # The model is far from sure of anything, so other numbers are other tokens.
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=True, temperature=5.0)
    tokens = torch.nn.functional.pad(tokens, (0, 9 - tokens.shape[1]))
    return {"in step": in_step, "drifted": drifted, "same tokens": alike(tokens, group)}


RIGHT = {"in step": True, "drifted": [], "same tokens": True}


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("apart", [True, False])
def test_replicas_and_generators_stay_alike(ranks, model_type, apart):
    for found in ranks.run(2, trained, model_type, apart):
        assert found == RIGHT


@pytest.mark.parametrize(
    "settings",
    [{"sequence_parallel": False}, {"activation_checkpointing": "full"}, {"loss": "loss_parallel"}],
    ids=str,
)
def test_replicas_stay_alike_in_other_settings(ranks, settings):
    for found in ranks.run(2, trained, "gpt2", True, **settings):
        assert found == RIGHT


def masks() -> dict[str, bool]:
    mesh = hf_tpsp.parallelize(build("gpt2"), TPSPConfig(tp_size=2))._tpsp.mesh["tp"]
    ones = DTensor.from_local(torch.ones(2, 32, 64), mesh, [Shard(1)], run_check=False)
    mine = torch.nn.functional.dropout(ones, 0.25, training=True).to_local()
    kept = (mine > 0).float().mean().item()
    copies = DTensor.from_local(torch.ones(2, 8), mesh, [Replicate()], run_check=False)
    copy = torch.nn.functional.dropout(copies, 0.25, training=True).to_local()
    return {
        "own": not alike(mine, mesh.get_group()), "rate": abs(kept - 0.75) < 0.03, "common": alike(copy, mesh.get_group())
    }  # fmt: skip


def test_masks_differ_on_parts_and_agree_on_replicas(ranks):
    assert ranks.run(2, masks) == [{"own": True, "rate": True, "common": True}] * 2


def without_head(apart: bool) -> list[str]:
    """The parameters that differ from one process's when the checkpoint lacks the head and a norm."""
    reference = models.build("qwen2")
    folder = parity.shared_folder()
    if dist.get_rank() == 0:
        state = {n: p for n, p in reference.state_dict().items() if n not in ("lm_head.weight", "model.norm.weight")}
        reference.save_pretrained(folder, state_dict=state)
    dist.barrier()
    torch.manual_seed(11)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(11 + apart * dist.get_rank())
    with hf_tpsp.enable(TPSPConfig(tp_size=2, dp_shard_size=2)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = dict(reference.named_parameters())
    return [n for n, p in model.named_parameters() if not torch.equal(p.full_tensor(), expected[n])]


@pytest.mark.parametrize("apart", [False, True])
def test_missing_parameters_are_one_process_s(ranks, apart):
    assert ranks.run(4, without_head, apart) == [[]] * 4
