"""Whatever a model returns is whole: hidden states, attentions, router logits. A loss on them has one process's gradients."""

import models
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.tools.verify.comparison import full, larger, relative, shard_batch

SMALL = {
    "num_hidden_layers": 2, "vocab_size": 131, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8,
}  # fmt: skip


def on_hidden(out, batch):
    return out.loss + 0.1 * out.hidden_states[1].pow(2).mean() + out.hidden_states[-1][:, 2:].tanh().mean()


def on_first_hidden_in_place(out, batch):
    h = out.hidden_states[0] * 1.0
    h[:, 0] = 0
    return out.loss + torch.stack(list(out.hidden_states[:2])).std() + h.pow(2).sum() * 0.01


def hidden_alone(out, batch):
    return sum(h.float().pow(2).mean() for h in out.hidden_states)


def on_attentions(out, batch):
    return out.loss + sum((a[:, :3] * torch.arange(1.0, 1 + a.shape[-1])).pow(2).mean() for a in out.attentions)


def on_all(out, batch):
    z = sum(r.float().logsumexp(-1).pow(2).mean() for r in out.router_logits)
    return on_hidden(out, batch) + on_attentions(out, batch) + 0.1 * z


LOSSES = {f.__name__: f for f in (on_hidden, on_first_hidden_in_place, hidden_alone, on_attentions, on_all)}


def build(model_type: str, settings: dict):
    if model_type in models.ARCHITECTURES:
        return models.build(model_type, **settings)
    from hf_tpsp.plan.shrink import randomize

    config = __import__("transformers").AutoConfig.for_model(model_type, **{**SMALL, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return randomize(__import__("transformers").AutoModelForCausalLM.from_config(config))


def errors(model_type: str, config: TPSPConfig, losses: list[str], settings: dict, kwargs: dict, rows: int = 2) -> dict:
    """Largest relative errors: of the loss, of every gradient, of every tensor that the model returns."""
    reference, model = build(model_type, settings), build(model_type, settings)
    hf_tpsp.parallelize(model, config)
    mesh = model._tpsp.mesh
    batch = models.batch(rows * config.dp_size, 13)
    worst = {"loss": 0.0, "grad": 0.0, "output": 0.0}
    for name in losses:
        for part in (reference, model):
            part.train()
            part.zero_grad()
        expected, found = 0.0, 0.0
        # One process: the mean over the data-parallel ranks' own losses, as plain data parallelism has it.
        for row in range(config.dp_size):
            mine = {n: v.chunk(config.dp_size)[row] for n, v in batch.items()}
            out = reference(**mine, **kwargs)
            loss = LOSSES[name](out, mine) / config.dp_size
            loss.backward()
            if row == mesh["dp_shard"].get_local_rank():
                expected, wanted = loss.item() * config.dp_size, out
        mine = shard_batch(batch, mesh)
        out = model(**mine, **kwargs)
        for key in ("hidden_states", "attentions", "router_logits"):
            for a, b in zip(out.get(key) or (), wanted.get(key) or (), strict=True):
                assert isinstance(a, Tensor) and not isinstance(a, DTensor) and a.shape == b.shape, (key, a.shape)
        loss = LOSSES[name](out, mine)
        found = loss.item()
        loss.backward()
        worst["loss"] = larger(worst["loss"], abs(found / expected - 1))
        for key in ("hidden_states", "attentions", "router_logits"):
            for a, b in zip(out.get(key) or (), wanted.get(key) or (), strict=True):
                worst["output"] = larger(worst["output"], relative(a.detach(), b.detach()))
        for (path, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (p.grad is None or not full(p.grad).any()) == (q.grad is None or not q.grad.any()), path
            if q.grad is not None and q.grad.any() and not path.endswith("k_proj.bias"):
                worst["grad"] = larger(worst["grad"], relative(full(p.grad), q.grad))
    return worst


def check(ranks, model_type, config, losses, settings=None, **kwargs):
    kwargs = {"output_hidden_states": True, "output_attentions": True, **kwargs}
    for found in ranks.run(config.world_size, errors, model_type, config, losses, settings or {}, kwargs):
        assert all(error <= 1e-5 for error in found.values()), found


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("dp", [1, 2])
def test_a_loss_on_hidden_states_and_attentions(ranks, dp, sequence_parallel):
    config = TPSPConfig(tp_size=2, dp_shard_size=dp, sequence_parallel=sequence_parallel)
    losses = ["on_hidden", "on_first_hidden_in_place", "hidden_alone", "on_attentions"]
    check(ranks, "qwen3", config, losses)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_router_logits(ranks, sequence_parallel):
    config = TPSPConfig(tp_size=2, sequence_parallel=sequence_parallel)
    check(ranks, "mixtral", config, ["on_all"], output_router_logits=True)


def test_shared_kv_heads_checkpointing_and_torchs_loss(ranks):
    config = TPSPConfig(tp_size=4, loss="loss_parallel")
    check(ranks, "llama", config, ["on_hidden", "on_attentions"], {"num_key_value_heads": 2})
    for choice in ("full", "selective"):
        config = TPSPConfig(tp_size=2, activation_checkpointing=choice)
        check(ranks, "phi3", config, ["on_hidden", "on_attentions"])
