"""`hf-tpsp verify --by-module`: a defect in one module is found there, and nothing is found where there is none."""

import functools
import json
from dataclasses import asdict, replace
from unittest import mock

import models
import pytest
import torch
import torch.distributed as dist

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.cli import main
from hf_tpsp.cli.verify import print_result
from hf_tpsp.collectives import CopyToRegion, gather_whole, slice_sequence
from hf_tpsp.sharding import shard
from hf_tpsp.state import build_mesh
from hf_tpsp.styles import stream
from hf_tpsp.tools.verify import by_module
from hf_tpsp.tools.verify import verify as verify_module
from hf_tpsp.tools.verify.by_module import ModuleErrors, off_from, verdict
from hf_tpsp.tools.verify.comparison import Errors, set_training
from hf_tpsp.tools.verify.verify import Result, _on_rank, build, verify

MESH_1x2, MESH_2x2 = TPSPConfig(tp_size=2, check="off"), TPSPConfig(tp_size=2, dp_shard_size=2, check="off")
LIMIT = 1e-5


def style_of(module):
    """Of this module alone: what is set on it, no other module sees."""
    return module._tpsp_style


def own_term(model):
    """A block's exit: one rank's term, as if it were the sum."""
    style_of(model.model.layers[1].mlp).leave_region = slice_sequence


def undivided_bias(model):
    """Each rank adds the whole bias."""
    style_of(model.model.layers[1].self_attn.o_proj).as_partial = lambda name, value, size: value


def own_words(model):
    style_of(model.model.embed_tokens).leave_region = slice_sequence


def own_gradient(model):
    """A block's entry: one rank's term of the input's gradient."""
    style = style_of(model.model.layers[1].self_attn)
    run = style.run

    def wrong(*args):
        with mock.patch("hf_tpsp.styles.block.enter_region", lambda x, mesh: gather_whole(x)):
            return run(*args)

    style.run = wrong


def own_gradient_without_sp(model):
    style = style_of(model.model.layers[1].mlp)
    run = style.run

    class Unreduced(CopyToRegion):
        backward = staticmethod(lambda ctx, grad: (grad, None))

    def wrong(*args):
        with mock.patch("hf_tpsp.styles.block.enter_region", Unreduced.apply):
            return run(*args)

    style.run = wrong


def not_a_number(model):
    """On one rank only, in one layer."""
    if dist.get_rank() == 1:
        style = style_of(model.model.layers[1].input_layernorm)
        run = style.run
        style.run = lambda *args: run(*args) * float("nan")


def whole_norms(model):
    """Nothing: the defect is there when the model is sharded."""


def with_defect(defect, config: TPSPConfig, settings: dict) -> dict:
    """What `verify` finds on this rank of a llama whose sharded copy has a defect."""

    def shard_wrongly(model, config):
        defect(shard(model, config))

    is_partial = functools.partialmethod(lambda self, name: False)
    norms = mock.patch.object(
        stream.Norm, "is_partial", is_partial if defect is whole_norms else stream.Norm.is_partial
    )
    with mock.patch("hf_tpsp.tools.verify.verify.shard", shard_wrongly), norms:
        return _on_rank("llama", config, 17, 131, "float32", settings, True)


def result_of(ranks, defect, config: TPSPConfig = MESH_1x2, **settings) -> Result:
    found = ranks.run(config.world_size, with_defect, defect, config, settings)[0]
    return replace(Result("llama", config.dp_size, config.tp_size, 17, 131, "float32"), **found)


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("defect", "config", "settings", "forward", "backward", "says"),
    [
        (own_term, MESH_1x2, {}, f"{LAYER}.mlp", None, "(LlamaMLP) on: its output is off by"),
        (own_term, MESH_2x2, {}, f"{LAYER}.mlp", None, "(LlamaMLP) on: its output is off by"),
        (undivided_bias, MESH_1x2, {"attention_bias": True}, f"{LAYER}.self_attn", None,
         f"inside it, from {LAYER}.self_attn.o_proj (Linear) on"),
        (own_words, MESH_1x2, {}, "model.embed_tokens", None, "(Embedding) on"),
        (own_gradient, MESH_1x2, {}, "", f"{LAYER}.input_layernorm", f"; it comes from {LAYER}.self_attn"),
        (own_gradient, MESH_2x2, {}, "", f"{LAYER}.input_layernorm", f"; it comes from {LAYER}.self_attn"),
        (own_gradient_without_sp, replace(MESH_1x2, sequence_parallel=False), {}, "", f"{LAYER}.post_attention_layernorm",
         f"; it comes from {LAYER}.mlp"),
        (whole_norms, MESH_1x2, {}, "", "model.norm", "the gradient of model.norm.weight is off by"),
        (not_a_number, MESH_1x2, {}, f"{LAYER}.input_layernorm", None, "its output is off by nan"),
    ],
)  # fmt: skip
def test_a_defect_is_found_where_it_is(ranks, defect, config, settings, forward, backward, says):
    result = result_of(ranks, defect, config, **settings)
    assert not result.error and not result.is_equal
    assert result.off_from[0] == forward and (backward is None or result.off_from[1] == backward), result.verdict
    assert any(says in line for line in result.verdict), result.verdict
    assert len(result.worst) == 10 and not result.worst[0][1] <= LIMIT


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("config", [MESH_1x2, MESH_2x2], ids=["1x2", "2x2"])
def test_nothing_is_found_where_nothing_is_wrong(ranks, model_type, config):
    """Inside the blocks too: features, heads, packed projections, terms, a router."""
    result = verify(model_type, config, by_module=True, pool=ranks)
    assert result.is_equal and result.verdict == [], (result.error, result.verdict)
    for row in result.modules:
        is_compared = config.dp_size == 1 or ".experts." not in row.name  # some rank's tokens may choose others
        assert row.output is not None or not is_compared, row
        assert row.gradient is not None or not is_compared or row.backward is None or row.name == "lm_head", row
        assert not any(error is not None and not error <= LIMIT for error in (row.output, row.gradient)), row
    assert max(row.parameters for row in result.modules if row.parameters is not None) == result.gradient
    assert {name for name, error in result.worst if error == result.gradient} == {result.parameter}


def recorded(config: TPSPConfig) -> list[bool]:
    """Whether a step has the same loss and gradients, bit by bit, after a recording as without one."""
    found = []
    for is_recorded in (False, True):
        reference, model = models.build("llama"), shard(models.build("llama"), config)
        set_training(reference, model)
        batch = models.batch(2 * config.dp_size, 17)
        items = (batch["labels"][:, 1:] != -100).sum()
        if is_recorded:
            recording = by_module.record(reference, model, batch, items, config, build_mesh(config), sums=True)
            assert (recording is not None) == (dist.get_rank() == 0)
            assert recording is None or off_from(recording.errors(), LIMIT) == (None, None)
            assert not any(m._forward_hooks for m in reference.modules())
            assert all(p.grad is None for part in (reference, model) for p in part.parameters())
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.full_tensor() for p in model.parameters())])
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_recording_changes_nothing(ranks, checkpointing):
    for same in ranks.run(2, recorded, replace(MESH_1x2, activation_checkpointing=checkpointing)):
        assert all(same)


def test_what_the_command_prints(ranks, capsys):
    print_result(result_of(ranks, own_term))
    text = " ".join(capsys.readouterr().out.split())
    assert "DIFFERS from one process" in text and "inside, split" in text
    assert f"the forward is off from {LAYER}.mlp (LlamaMLP) on" in text and "the backward is off from" in text
    print_result(replace(result_of(ranks, own_term), modules=[]))
    text = capsys.readouterr().out
    assert "the parameters whose gradients are furthest off" in text and "--by-module says" in text


def test_json(ranks, monkeypatch, capsys):
    monkeypatch.setattr(verify_module, "RankPool", lambda: ranks)
    monkeypatch.setattr(ranks, "stop", lambda: None)
    main(["verify", "llama", "--by-module", "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["is_equal"] and found["forward_off_from"] == found["backward_off_from"] == ""
    assert len(found["worst"]) == 10 and {"model.layers.1.mlp", "lm_head"} <= {row["name"] for row in found["modules"]}
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "--all", "--by-module"])


def test_the_order_of_the_worst():
    errors = Errors()
    for name, error in (("a", 1e-3), ("b", float("nan")), ("c", 0.5), ("d", 0.0)):
        errors.add("gradient", error, name)
    assert [name for name, _ in errors.worst(3)] == ["b", "c", "a"]


def test_what_stands_inside_a_block_is_not_suspected():
    """Its output may have been read the wrong way; the gradients of its parameters are whole."""
    rows = [
        ModuleErrors("attn.q", "Linear", output=1.0, gradient=1.0, parameters=0.0, is_inside=True, backward=1),
        ModuleErrors("attn", "Attention", output=0.0, gradient=0.0, backward=0),
    ]
    assert off_from(rows, LIMIT) == (None, None) and verdict(rows, LIMIT) == []
    wrong = replace(rows[0], parameters=1.0, parameter="attn.q.bias")
    assert off_from([wrong, rows[1]], LIMIT) == (None, wrong)
    assert verdict([wrong, rows[1]], LIMIT) == [
        "the backward is off from attn.q (Linear) on: the gradient of attn.q.bias is off by 1.0e+00"
    ]


def test_a_copy_that_cannot_be_built_says_what_to_extend():
    with pytest.raises(ValueError, match=r"COMPLETED in hf_tpsp/tools/source.py"):
        build("llama", torch.float32, 131, {"hidden_act": "no such function"})


def test_it_is_public():
    assert ModuleErrors(**asdict(ModuleErrors("a", "B"))) == ModuleErrors("a", "B")
    assert hf_tpsp.verify is verify
