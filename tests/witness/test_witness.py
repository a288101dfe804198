"""The run-time check of the first step: what it catches, what it leaves alone, and what it costs."""

import functools
from unittest import mock

import models
import pytest
import torch
import torch.distributed as dist
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import hf_tpsp
import hf_tpsp.witness.alike
from hf_tpsp import TPSPConfig, collectives
from hf_tpsp.loss import chunked
from hf_tpsp.styles import base, linear, stream
from hf_tpsp.tools.estimate.recorders import CollectiveBytes

MESH_1x2, MESH_2x2 = TPSPConfig(tp_size=2), TPSPConfig(tp_size=2, dp_shard_size=2)


def parallelized(config: TPSPConfig, model_type: str = "llama", **settings):
    return hf_tpsp.parallelize(models.build(model_type, **settings), config).train()


def step(model, rows: int = 2, length: int = 17) -> str:
    """One training step up to the optimizer; what it raised."""
    try:
        model(**models.batch(rows, length)).loss.backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def without_reduction(style: str, config: TPSPConfig) -> str:
    """Train with a layout whose ranks' terms are not added up, in forward or in backward."""
    if style == "Norm.is_partial":  # gradients of a part of the sequence; decided when the model is sharded
        with mock.patch.object(stream.Norm, "is_partial", lambda self, name: False):
            return step(parallelized(config))
    model = parallelized(config)  # the proof would not let the others through: this is a defect that only the run has
    if style == "Rowwise.as_partial":  # each rank adds the whole bias
        patch = mock.patch.object(linear.Rowwise, "as_partial", lambda self, name, value, size: value)
    elif style == "Gather.leave_region":  # one rank's term, as if it were the sum
        patch = mock.patch.object(base, "scatter_sequence", collectives.slice_sequence)
    elif style == "Embedding":
        patch = mock.patch.object(
            stream.Embedding, "leave_region", lambda self, x, mesh: collectives.slice_sequence(x, mesh)
        )
    elif style == "Head":  # the gradient of the hidden states
        own = lambda self, partial: collectives.own_part(partial.view(self.shape), self.mesh)  # noqa: E731
        patch = mock.patch.object(chunked.ChunkedHead, "scatter", own)
    elif style == "Gather.enter_region":  # the input's gradient
        patch = mock.patch.object(collectives, "gather_sequence", collectives.gather_whole)
    else:
        assert style == "without_sp.all_reduce"
        patch = mock.patch.object(collectives.CopyToRegion, "backward", staticmethod(lambda ctx, grad: (grad, None)))
    with patch:
        return step(model)


@pytest.mark.parametrize(
    ("style", "says"),
    [
        ("Rowwise.as_partial", "self_attn (LlamaAttention, laid out as 'split:heads'"),
        (
            "Norm.is_partial",
            "the gradient of model.layers.0.input_layernorm.weight is another on rank 1 than on rank 0",
        ),
        ("Gather.leave_region", "the output is off by"),
        ("Head", "lm_head (Linear, laid out as 'lazy_head')"),
        ("Embedding", "model.embed_tokens (Embedding, laid out as 'embedding')"),
        ("Gather.enter_region", "the gradient of its input is off by"),
    ],
)
def test_reduction_removed(ranks, style, says):
    for text in ranks.run(2, without_reduction, style, MESH_1x2):
        assert text.startswith("hf_tpsp's check of training forward 1: ") and says.partition(",")[0] in text, text


def test_reduction_removed_without_sequence_parallel(ranks):
    config = TPSPConfig(tp_size=2, sequence_parallel=False)
    for text in ranks.run(2, without_reduction, "without_sp.all_reduce", config):
        assert "the gradient of its input is off by" in text


def other_weight(config: TPSPConfig) -> str:
    model = parallelized(config)
    if dist.get_rank() == config.world_size - 1:
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight._local_tensor[0] += 1e-3
    return step(model)


@pytest.mark.parametrize("config", [MESH_1x2, MESH_2x2, TPSPConfig(tp_size=2, dp_replicate_size=2)], ids=str)
def test_a_weight_that_one_rank_has_differently(ranks, config):
    last = config.world_size - 1
    for text in ranks.run(config.world_size, other_weight, config):
        assert f"layers.1.input_layernorm.weight has other values on rank {last} than on rank" in text


class MixingRMSNorm(LlamaRMSNorm):
    """By its class's name a norm; it looks at the whole sequence, though not on the lengths of a small copy."""

    def forward(self, hidden_states):
        out = super().forward(hidden_states)
        return out - out.mean(1, keepdim=True) if hidden_states.shape[1] > 24 else out


class SizedMLP(LlamaMLP):
    """Code that depends on a real size: past a length, what comes out is no sum over the ranks any more."""

    def forward(self, x):
        out = super().forward(x)
        return out.tanh() if x.shape[1] > 48 else out


def modified(cls: type, length: int) -> list[str]:
    name = "LlamaRMSNorm" if issubclass(cls, LlamaRMSNorm) else "LlamaMLP"
    with mock.patch(f"transformers.models.llama.modeling_llama.{name}", cls):
        model = parallelized(MESH_1x2)
        return [step(model, length=17), step(parallelized(MESH_1x2), length=length)]


@pytest.mark.parametrize(("cls", "length", "name"), [(MixingRMSNorm, 49, "layernorm"), (SizedMLP, 64, "mlp")])
def test_code_that_the_small_copy_does_not_show(ranks, cls, length, name):
    for short, long in ranks.run(2, modified, cls, length):
        assert short == "" and name in long and f"({cls.__name__}, laid out as" in long and "off by" in long


def other_environment(what: str) -> str:
    rank = dist.get_rank()
    theirs = {"the version of peft": "9.9"} if what == "versions" and rank else {}
    try:
        with mock.patch.object(hf_tpsp.state, "_versions", lambda: theirs or {"the version of peft": "0.21"}):
            model = parallelized(TPSPConfig(tp_size=2, regather_inputs=rank == 0 or what != "config"))
    except ValueError as error:
        return str(error)
    if rank:
        model.config.attention_dropout = 0.1
    return step(model)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("config", "TPSPConfig's regather_inputs is False on rank 1, but True on rank 0"),
        ("versions", "the version of peft is 9.9 on rank 1, but "),
        ("model", "the model's config is …"),
    ],
)
def test_ranks_that_run_something_else(ranks, what, says):
    for text in ranks.run(2, other_environment, what):
        assert says in text


def counted(check: str) -> list[int]:
    model = parallelized(TPSPConfig(tp_size=2, check=check))
    counts = []
    for _ in range(5):
        with CollectiveBytes() as sent:
            assert step(model) == ""
        counts.append(sum(t.count for t in sent.traffic.values()))
    return counts


def test_when_it_runs(ranks):
    (off, _), (first, _), (every, _), (second, _) = (
        ranks.run(2, counted, check) for check in ("off", "first", "every", "every:2")
    )
    assert len(set(off)) == 1 and first[1:] == off[1:] and first[0] > off[0] and every == [first[0]] * 5
    assert second == [first[0], off[0], first[0], off[0], first[0]]


def undisturbed(config: TPSPConfig) -> list[float]:
    """Largest differences of the first step's gradients and of the generators with and without the check."""
    found = []
    for check in ("off", "first"):
        torch.manual_seed(3)
        model = parallelized(functools.partial(TPSPConfig, **{**vars(config), "check": check})(), "gemma2")
        assert step(model) == ""
        found.append([[p.grad.full_tensor() for p in model.parameters()], torch.get_rng_state()])
    (grads, state), (others, other) = found
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True)) and torch.equal(state, other)
    return []


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_it_changes_nothing(ranks, checkpointing):
    ranks.run(2, undisturbed, TPSPConfig(tp_size=2, activation_checkpointing=checkpointing))


def test_wrong_choices():
    for check in ("always", "every:0", "every:x", ""):
        with pytest.raises(ValueError, match="check must be 'first', 'every', 'every:<n>' or 'off'"):
            TPSPConfig(check=check)


def drawing() -> str:
    model = parallelized(MESH_1x2, attention_dropout=0.5)
    return step(model)


def test_dropout_is_left_out(ranks):
    assert ranks.run(2, drawing) == ["", ""]
