"""The simulated step against real ranks, against the whole depth, and against theory."""

import contextlib
import sys
from pathlib import Path

import models
import pytest
from transformers import AutoConfig

from hf_tpsp import TPSPConfig
from hf_tpsp.loss import chunked
from hf_tpsp.tools.estimate import simulate, step
from hf_tpsp.tools.estimate.depth import depths
from hf_tpsp.tools.estimate.simulate import Job, simulate_step, simulated_world
from hf_tpsp.tools.estimate.step import CATEGORIES, Step

sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # last: it has a parity.py too
import estimate_truth


def same_step(a: Step, b: Step) -> None:
    assert (a.start == b.start).all()
    for x, y in zip(a.segments, b.segments, strict=True):
        assert x.name == y.name
        for which in ("change", "rise", "most"):
            assert (getattr(x, which) == getattr(y, which)).all(), (x.name, which)
    assert (a.traffic, a.flops, a.floor, a.layers) == (b.traffic, b.flops, b.floor, b.layers)


@pytest.mark.parametrize(
    ("model_type", "layers", "choices"),
    [
        ("llama", 7, {"activation_checkpointing": "full", "mixed_precision": "bf16"}),
        ("gemma2", 8, {"activation_checkpointing": "selective"}),  # sliding and full attention in turn
        ("qwen3", 6, {"dp_replicate_size": 2, "dp_shard_size": 2}),
    ],
)
def test_shallow_models_make_the_deep_one(model_type, layers, choices):
    """To the byte, in every segment of the step."""
    config = models.config(model_type, num_hidden_layers=layers)
    choices = TPSPConfig(**{"tp_size": 2, "dp_shard_size": 4, **choices})
    job = Job(seq=33, dtype="bf16" if choices.mixed_precision == "bf16" else "fp32", attention="eager")
    with simulated_world(8):
        same_step(simulate.simulate(config, choices, job), simulate_step(config, choices, job))


def test_alike_chunks_are_run_once(monkeypatch):
    """And make the step that all of them make."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1024)  # 3 tokens
    config, job = models.config("llama"), Job(seq=33, dtype="fp32")
    with simulated_world(2):
        few = simulate_step(config, TPSPConfig(tp_size=2), job)
        monkeypatch.setattr(step, "_alike_chunks_once", lambda *counters: contextlib.nullcontext())
        every = simulate_step(config, TPSPConfig(tp_size=2), job)
    assert every.traffic["tp", "all-gather"].count > 20
    same_step(few, every)


TRUTH = [  # one mesh, model, length, loss and checkpointing each; recipes/estimate_truth.py has all of them
    ("llama", TPSPConfig(tp_size=2, loss="loss_parallel"), Job(seq=256, dtype="fp32")),
    ("qwen2", TPSPConfig(tp_size=2, dp_shard_size=2, mixed_precision="bf16"), Job(seq=255, dtype="bf16")),
    (
        "gemma2",
        TPSPConfig(tp_size=2, activation_checkpointing="full"),
        Job(seq=96, batch=2, dtype="fp32", attention="eager", optim="sgd_momentum"),
    ),
]


def truth(cases: list) -> list:
    sizes = {**estimate_truth.SIZES, "num_hidden_layers": 5}
    return [estimate_truth.measured(AutoConfig.for_model(kind, **sizes), choices, job) for kind, choices, job in cases]


def test_truth(ranks):
    """Peak bytes, collectives and FLOPs of a real step on rank 0."""
    sizes = {**estimate_truth.SIZES, "num_hidden_layers": 5}
    for world in (2, 4):
        cases = [case for case in TRUTH if case[1].world_size == world]
        real = ranks.run(world, truth, cases)[0]
        for (kind, choices, job), (recorded, heap) in zip(cases, real, strict=True):
            with simulated_world(world, "gloo"):
                predicted = simulate.simulate(AutoConfig.for_model(kind, **sizes), choices, job)
            found = estimate_truth.compare(predicted, recorded, heap)
            assert found["collectives equal"] and found["FLOPs equal"], (kind, found)
            assert found["/ recorded"] == pytest.approx(1, abs=0.005), (kind, found)
            assert found["/ heap"] == pytest.approx(1, abs=0.05), (kind, found)


def test_sent_is_the_floor():
    """A model without peculiarities sends what theory asks for, on every dim: bytes and, but for the loss's chunks, count. All
    ranks together compare their batch."""
    config = models.config("llama", num_hidden_layers=4, attention_bias=False, mlp_bias=False, vocab_size=128)
    choices = TPSPConfig(tp_size=2, dp_shard_size=4, dp_replicate_size=2, mixed_precision="bf16")
    with simulated_world(16):
        step = simulate_step(config, choices, Job(seq=32))
    assert step.traffic == step.floor
    assert {dim for dim, _ in step.traffic} == {"tp", "dp_shard", "dp_replicate", "world"}


def test_lora_trains_adapters_only():
    config = models.config("llama", num_hidden_layers=2)
    with simulated_world(2):
        lora = simulate_step(config, TPSPConfig(tp_size=2), Job(seq=32, dtype="fp32", lora=2))
        full = simulate_step(config, TPSPConfig(tp_size=2), Job(seq=32, dtype="fp32"))
    gradients, optimizer = (CATEGORIES.index(name) for name in ("gradients", "optimizer"))
    assert 0 < lora.most()[gradients] < full.most()[gradients] / 5
    assert lora.start[optimizer] < full.start[optimizer] / 5


def test_depths():
    assert depths(["a"] * 80) == (3, 4)
    assert depths(["a", "b"] * 20) == (4, 6)
    assert depths(["dense", *["moe"] * 20]) == (4, 5)
    assert depths(["a"] * 4) is None
    assert depths([*"abcdefgh"]) is None
