"""LoRA on sharded layers: gradients of the adapters, what is saved, and what is refused."""

import functools
from unittest import mock

import models
import parity
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.state import parallelized_model
from hf_tpsp.tools.estimate.recorders import CollectiveBytes
from hf_tpsp.tools.verify.verify import build as small_copy

MESH_1x2, MESH_2x2 = TPSPConfig(tp_size=2), TPSPConfig(tp_size=2, dp_shard_size=2)
HSDP = TPSPConfig(tp_size=2, dp_replicate_size=2)


def lora(**options) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **options})


def is_trained(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def randomize(model: torch.nn.Module) -> None:
    """B starts at zero, which would hide A's gradient. The same values whatever the layout."""
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
        for name, parameter in model.named_parameters()
        if "lora_B" in name
    }
    model.load_state_dict(state, strict=False)


def build(model_type: str, dtype: torch.dtype = torch.float32, settings: dict | None = None):
    """One of `models`, or the small copy of any other model type."""
    if model_type in models.ARCHITECTURES:
        return models.build(model_type, dtype=dtype, **(settings or {}))
    return small_copy(model_type, dtype, 131, settings or {})


def adapted(model_type: str, config: TPSPConfig, first: str, dtype, settings=None, **options):
    """A model on the mesh with adapters, added after it was sharded, or before."""
    eager = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # inductor itself would take a minute
    with hf_tpsp.enable(config), mock.patch.object(nn.Module, "compile", eager):
        torch.manual_seed(5 if dist.get_rank() == 0 else 6)  # rank 0's adapters count
        if first == "sharded":
            model = hf_tpsp.parallelize(build(model_type, dtype, settings), config)
            torch.manual_seed(5 if dist.get_rank() == 0 else 6)
            model = get_peft_model(model, lora(**options))
        else:
            base = build(model_type, dtype, settings)
            torch.manual_seed(5 if dist.get_rank() == 0 else 6)
            model = hf_tpsp.parallelize(get_peft_model(base, lora(**options)), config)
    return model


def compare(
    model_type, config, first="sharded", dtype=torch.float32, settings=None, **options
) -> tuple[float, parity.Errors]:
    torch_mode = parity.KeepFp64() if dtype == torch.float64 else parity.contextlib.nullcontext()
    with torch_mode:
        return _compare(model_type, config, first, dtype, settings, options)


def _compare(model_type, config, first, dtype, settings, options):
    base = build(model_type, dtype, settings)
    torch.manual_seed(5)
    reference = get_peft_model(base, lora(**options))
    model = adapted(model_type, config, first, dtype, settings, **options)
    pairs = list(zip(reference.named_parameters(), model.named_parameters(), strict=True))
    init = parity.largest(parity.relative(parity.full(b.detach()), a.detach()) for (_, a), (_, b) in pairs)
    for part in (reference, model):
        randomize(part)
        part.train()
    mesh = parallelized_model(model)._tpsp.mesh
    steps = [[models.batch(4, 17, seed=10 * step + micro) for micro in range(2)] for step in range(3)]  # accumulated
    for (name, a), (_, b) in pairs:
        assert a.requires_grad == b.requires_grad == is_trained(name) and isinstance(b, DTensor), name
    return init, parity.train_beside(reference, model, steps, config, mesh, clip=1.0, every_gradient=True)


@pytest.mark.parametrize(
    ("model_type", "config", "first"),
    [
        ("llama", MESH_1x2, "adapted"),
        ("llama", MESH_2x2, "sharded"),
        ("llama", HSDP, "adapted"),
        ("phi3", MESH_1x2, "sharded"),
        ("phi3", MESH_2x2, "adapted"),
        ("phi3", HSDP, "sharded"),
    ],
    ids=["llama-1x2", "llama-2x2", "llama-hsdp", "phi3-1x2", "phi3-2x2", "phi3-hsdp"],
)
def test_gradients(ranks, model_type, config, first):
    for errors in ranks.run(config.world_size, compare, model_type, config, first):
        check(errors)


def check(result: tuple[float, parity.Errors], limit: float = 1e-5, weights_limit: float = 1e-4) -> None:
    init, errors = result
    assert init == 0 and errors.within(limit, weights_limit), result


def compare_all(cases: list[tuple[str, dict]], config: TPSPConfig) -> dict[str, dict]:
    return {model_type: compare(model_type, config, **options) for model_type, options in cases}


LAYOUTS = [
    ("olmo2", {}),  # outputs gathered, for norms over all heads, and an input that every rank has whole
    ("gpt2", {"use_dora": True}),  # weights [in, out], one of them packed
    ("doge", {"use_dora": True}),  # blocks that every rank computes whole
    ("qwen3_next", {"target_modules": ["in_proj_qkvz", "out_proj", "shared_expert_gate", "q_proj", "o_proj"]}),
    ("deepseek_v3", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"], "use_dora": True}),
]


def test_layouts(ranks):
    for errors in ranks.run(2, compare_all, LAYOUTS, MESH_1x2)[0].values():
        check(errors)


def test_kv_heads_shared_by_ranks(ranks):
    few = {"settings": {"num_key_value_heads": 2}}
    for errors in ranks.run(4, compare_all, [("llama", few), ("phi3", few)], TPSPConfig(tp_size=4))[0].values():
        check(errors)


SAVED = ["embed_tokens", "lm_head", "norm"]  # with every other norm: peft goes by the end of the names


@pytest.mark.parametrize(
    ("model_type", "config", "options"),
    [
        ("llama", MESH_2x2, {"use_dora": True}),
        ("qwen3", MESH_2x2, {"modules_to_save": SAVED}),
        ("qwen2", MESH_1x2, {"modules_to_save": SAVED, "settings": {"tied": True}, "first": "adapted"}),
        ("granite", TPSPConfig(tp_size=2, sequence_parallel=False), {"modules_to_save": SAVED, "use_dora": True}),
    ],
    ids=["dora-2x2", "saved-2x2", "saved-tied-1x2", "both-1x2-no-sp"],
)
def test_dora_and_modules_to_save(ranks, model_type, config, options):
    for errors in ranks.run(config.world_size, compare, model_type, config, **options):
        check(errors)


def test_gradients_fp64(ranks):
    for errors in ranks.run(4, compare, "qwen3", MESH_2x2, dtype=torch.float64):
        check(errors, 1e-12, 1e-12)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        ({"sequence_parallel": False}, {}),
        ({"activation_checkpointing": "full"}, {}),
        pytest.param({"compile": True}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_choices(ranks, settings, options):
    config = TPSPConfig(tp_size=2, dp_shard_size=2, **settings)
    for errors in ranks.run(4, compare, "qwen2", config, **options):
        check(errors)


def dtypes_in_bf16() -> set[torch.dtype]:
    """Of the stream and of the logits, with masters in fp32."""
    config = TPSPConfig(tp_size=2, mixed_precision="bf16")
    model = adapted("qwen2", config, "adapted", torch.float32, modules_to_save=SAVED).train()
    output = model(**models.batch(), output_hidden_states=True)
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return {x.dtype for x in (*output.hidden_states, output.logits)}


def test_copies_compute_in_the_dtype_of_their_originals(ranks):
    assert ranks.run(2, dtypes_in_bf16) == [{torch.bfloat16}] * 2


def collectives() -> dict[str, int]:
    with hf_tpsp.enable(MESH_2x2):
        model = get_peft_model(hf_tpsp.parallelize(models.build("llama"), MESH_2x2), lora())
    model.train()
    model(**models.batch(2, 17)).loss.backward()
    with CollectiveBytes() as sent:
        model(**models.batch(2, 17)).loss.backward()
    return {kind: traffic.count for kind, traffic in sent.traffic.items()}


def test_collectives(ranks):
    """Two layers on a frozen base. All-gathers: the batch's check, the head and the loss (3); two in each layer, again in
    backward, and of the gradients (12); FSDP's of the root and of the layers, of the first one twice (4). Reduce-scatters:
    embedding and head (2), two in each layer (4), and of the gradients, but for the very first, which nobody needs (3).
    All-reduces: the adapters' gradients over TP, and over data parallelism."""
    assert ranks.run(4, collectives) == [{"all-gather": 19, "all-to-all": 9, "all-reduce": 2}] * 4


def saved(folder: str, options: dict) -> float:
    """An adapter, trained a step, saved, merged by one process, and read again on the mesh: largest difference of the
    logits; and that of the model without it."""
    base = models.build("qwen2")
    if dist.get_rank() == 0:
        base.save_pretrained(f"{folder}/base")
    model = adapted("qwen2", MESH_2x2, "sharded", torch.float32, **options)
    randomize(model)
    data = models.batch(4, 17)
    ids = data["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**data).loss.backward()
    optimizer.step()
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            disabled = model(input_ids=ids).logits
    with hf_tpsp.enable(MESH_2x2):
        model.save_pretrained(f"{folder}/adapter")
    dist.barrier()
    merged = PeftModel.from_pretrained(base, f"{folder}/adapter").merge_and_unload().eval()
    with torch.no_grad():
        expected = merged(input_ids=ids).logits
        unadapted = models.build("qwen2").eval()(input_ids=ids).logits
    assert parity.relative(unadapted, expected) > 1e-2
    with hf_tpsp.enable(MESH_2x2):  # and read again, on the mesh
        again = PeftModel.from_pretrained(hf_tpsp.parallelize(models.build("qwen2"), MESH_2x2), f"{folder}/adapter")
    with torch.no_grad():
        reread = again.eval()(input_ids=ids).logits
    return parity.largest(
        parity.relative(x, y) for x, y in ((trained, expected), (reread, expected), (disabled, unadapted))
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "modules_to_save": SAVED}], ids=str)
def test_saved_adapter(ranks, tmp_path, options):
    assert parity.largest(ranks.run(4, saved, str(tmp_path), options)) < 1e-5


def refusals() -> dict[str, str]:
    texts = {}
    for name, (model_type, options) in {
        "dora": ("olmo2", {"use_dora": True}),
        "stream": ("gemma4_text", {}),
        "experts": ("qwen3_moe", {}),
        "head": ("qwen2", {"target_modules": ["lm_head"]}),
        "embedding": ("qwen2", {"target_modules": ["embed_tokens"]}),
        "block": ("qwen2", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
        "bias": ("qwen2", {"lora_bias": True}),
        "pissa": ("qwen2", {"init_lora_weights": "pissa"}),
    }.items():
        model = hf_tpsp.parallelize(build(model_type), MESH_1x2)
        with hf_tpsp.enable(MESH_1x2), pytest.raises(ValueError) as error:
            get_peft_model(model, lora(**options))
        texts[name] = str(error.value)
    model = adapted("qwen2", MESH_1x2, "sharded", torch.float32, use_dora=True)
    with pytest.raises(ValueError) as error:
        model.merge_and_unload()
    return {**texts, "merge": str(error.value)}


def test_refusals(ranks):
    texts = ranks.run(2, refusals)[0]
    assert "self_attn.q_proj: DoRA" in texts["dora"] and "use_dora" in texts["dora"]
    assert "per_layer_input_gate" in texts["stream"] and "exclude_modules" in texts["stream"]
    assert "target_parameters" in texts["experts"] and "all-linear" in texts["experts"]
    assert "lm_head" in texts["head"] and "target_modules" in texts["head"]
    assert "embed_tokens" in texts["embedding"] and "target_modules" in texts["embedding"]
    assert "Qwen2MLP" in texts["block"] and "modules_to_save" in texts["block"]
    assert "lora_bias=True" in texts["bias"]
    assert "init_lora_weights='pissa'" in texts["pissa"]
    assert "merge it in one process" in texts["merge"]
