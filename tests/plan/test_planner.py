"""The plan: derived for every named model, complete, and refused with names where it is not."""

import re

import models
import pytest
import torch
import transformers
from torch import nn

from hf_tpsp import TPSPConfig, plan_for
from hf_tpsp.cli import main
from hf_tpsp.plan.prove import is_own_mistake
from hf_tpsp.plan.shrink import shrunk_config
from hf_tpsp.plan.trial import Trial, why_not
from hf_tpsp.rules import check_used, rule_for, wildcard
from hf_tpsp.styles.linear import rows_of

TP2 = TPSPConfig(tp_size=2)


def on_meta(model_type, **settings):
    with torch.device("meta"):
        return models.build(model_type, **settings)


def test_qwen3():
    assert plan_for(on_meta("qwen3"), TP2) == {
        "model.embed_tokens": "embedding",
        "model.layers.*": "enter",
        "model.layers.*.input_layernorm": "norm",
        "model.layers.*.self_attn": "split",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.q_norm": "replicated_partial",
        "model.layers.*.self_attn.k_norm": "replicated_partial",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.post_attention_layernorm": "norm",
        "model.layers.*.mlp": "split",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.layers.*.mlp.act_fn": "activation",
        "model.norm": "norm",
        "lm_head": "lazy_head",
    }
    assert plan_for(on_meta("qwen3"), TPSPConfig(tp_size=2, loss="loss_parallel"))["lm_head"] == "head"


def test_phi3_packed_projections():
    plan = plan_for(on_meta("phi3"), TP2)
    assert plan["model.layers.*.self_attn"] == "split:heads"
    assert plan["model.layers.*.self_attn.qkv_proj"] == "colwise_gathered:32,16,16"
    assert plan["model.layers.*.mlp.gate_up_proj"] == "colwise_packed:64,64"
    plan = plan_for(on_meta("phi3", num_key_value_heads=8), TP2)
    assert plan["model.layers.*.self_attn.qkv_proj"] == "colwise_packed:32,32,32"


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_every_parameter_is_covered_and_every_rule_used(model_type):
    model = on_meta(model_type)
    plan = plan_for(model, TP2)
    names = {name for name, _ in model.named_modules()}
    assert plan.keys() <= names | {wildcard(name) for name in names}
    for name, _ in model.named_parameters():
        assert rule_for(name.rpartition(".")[0], plan) is not None, name


def test_a_modification_that_the_config_does_not_know_is_named():
    model = on_meta("llama")
    for layer in model.model.layers:
        layer.mlp.scale = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError) as error:
        plan_for(model, TP2)
    assert "model.layers.0 (LlamaDecoderLayer) has parameters (model.layers.0.mlp.scale) not in a small" in str(
        error.value
    )


def test_a_rule_that_does_not_hold_is_not_used():
    """Swapped rules in transformers' plan do not add up to the block; what its structure says does."""
    model = on_meta("llama")
    right = plan_for(model, TP2)
    model._tp_plan.update({"model.layers.*.mlp.down_proj": "colwise", "model.layers.*.mlp.up_proj": "rowwise"})
    assert plan_for(model, TP2) == right


def from_config(model_type: str, **settings):
    """A small model of any architecture of transformers, on meta."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            shrunk_config(transformers.AutoConfig.for_model(model_type, **settings))
        )


def test_without_a_plan_in_transformers():
    """GPT-2: Conv1D, packed q/k/v that are not interleaved by head, learned positions, biases everywhere."""
    plan = plan_for(from_config("gpt2"), TP2)
    assert plan["transformer.h.*.attn"] == "split:heads,widths"
    assert plan["transformer.h.*.attn.c_attn"] == "colwise_packed:64,64,64"
    assert plan["transformer.h.*.attn.c_proj"] == plan["transformer.h.*.mlp.c_proj"] == "rowwise"
    assert plan["transformer.h.*.mlp.c_fc"] == "colwise"
    assert plan["transformer.wpe"] == "whole" and plan["transformer.wte"] == "embedding:plain"
    # GPT-NeoX interleaves them: its rows are split as they lie.
    assert plan_for(from_config("gpt_neox"), TP2)["gpt_neox.layers.*.attention.query_key_value"] == "colwise"


def test_experts_and_routers():
    plan = plan_for(from_config("qwen2_moe"), TP2)
    inside = {n.removeprefix("model.layers.*.mlp."): rule for n, rule in plan.items() if "layers.*.mlp" in n}
    assert inside["experts"] == inside["gate"] == inside["shared_expert_gate"] == "replicated_partial"
    assert inside["experts.gate_up_proj"] == "shard_packed:-2,2" and inside["experts.down_proj"] == "shard:-1"
    assert inside["shared_expert.gate_proj"] == "colwise" and inside["shared_expert.down_proj"] == "rowwise"


def test_mla():
    plan = plan_for(from_config("deepseek_v3"), TP2)
    inside = {n.removeprefix("model.layers.*.self_attn."): rule for n, rule in plan.items() if "self_attn" in n}
    assert inside["q_b_proj"] == inside["kv_b_proj"] == "colwise" and inside["o_proj"] == "rowwise"
    assert inside["q_a_proj"] == inside["kv_a_proj_with_mqa"] == inside["kv_a_layernorm"] == "replicated_partial"


def test_what_is_not_split_is_noted():
    plan = plan_for(from_config("qwen3_next"), TP2)
    (note,) = plan.notes
    assert note.startswith(
        "model.layers.*.linear_attn (Qwen3NextGatedDeltaNet) is not split: the closest layout, split; "
    )
    assert note.endswith("is off by 1 in evaluation") and plan.sequence_parallel
    assert plan["model.layers.*.linear_attn"] == "whole"
    assert plan["model.layers.*.linear_attn.in_proj_qkvz"] == "colwise_whole"  # transformers gathers its output


NOT_SPLIT = {
    "doge": (
        "model.layers.0.self_attn",
        "split; colwise q_proj, k_proj, v_proj; rowwise o_proj; shard:0 A",
        "RuntimeError in its dt_proj (Linear), linear of [2, 11, 32] and [4, 64]: mat1 and mat2 shapes cannot be multiplied",
    ),
    "bloom": (
        "transformer.h.0.self_attention",
        "split:heads; colwise query_key_value; rowwise dense",
        "RuntimeError in its own forward, baddbmm of [8, 1, 11]: The expanded size of the tensor (4) must match",
    ),
}
"""Model type → its attention, one of the layouts that do not fit it, and what that runs into: a dynamic mask that is made of all
values; ALiBi's bias of all heads."""


@pytest.mark.parametrize("model_type", NOT_SPLIT)
def test_why_a_block_is_not_split(model_type):
    block, layout, reason = NOT_SPLIT[model_type]
    plan = plan_for(from_config(model_type), TP2)
    trials = plan.tried[wildcard(block)]
    (found,) = [trial for trial in trials if str(trial) == layout]
    assert found.error.startswith(reason) and found.place.startswith(f"modeling_{model_type}.py:")
    assert len(trials) > 10 and not any(trial.adds_up for trial in trials)
    (note,) = [note for note in plan.notes if note.startswith(wildcard(block))]
    assert f"is not split: the first layout, {trials[0]}, ends in {trials[0].error}" in note


def test_what_was_tried_of_a_block_that_is_split():
    """BLOOM's MLP adds the residual itself: as a term of each rank it is there twice."""
    first, taken = plan_for(from_config("bloom"), TP2).tried["transformer.h.*.mlp"]
    assert first.layout[""] == "split" and first.off_by.keys() == {"evaluation"} and first.off_by["evaluation"] > 0.1
    assert taken.layout[""] == "split:residual" and taken.adds_up
    assert taken.off_by.keys() == {"evaluation", "training"} and max(taken.off_by.values()) < 1e-6


def test_why_not_names_the_closest():
    far, near = (
        Trial("MLP", {"": "split", "up": rule}, {"evaluation": off}) for rule, off in (("a", 2.0), ("b", 0.25))
    )
    failed = Trial("MLP", {"": "split"}, error="RuntimeError")
    assert why_not([failed, far, near]) == "the closest layout, split; b up, is off by 0.25 in evaluation"
    assert why_not([failed]) == "the first layout, split, ends in RuntimeError"
    assert why_not([]) == "no layout is known for it"
    nan = Trial("MLP", {"": "split"}, {"evaluation": 0.0, "training": float("nan")})
    assert not nan.adds_up and nan.outcome == "off by nan in training"


def test_a_mistake_in_a_style_is_raised(monkeypatch):
    """It is no layout that does not fit. (The same error in the model's own code is.)"""
    monkeypatch.setattr("hf_tpsp.styles.base.local_slice", None)
    with pytest.raises(TypeError, match="not callable"):
        plan_for(on_meta("llama"), TP2)
    with pytest.raises(TypeError) as error:
        len(None)
    assert not is_own_mistake(error.value)


def test_a_rule_of_nothing_is_an_error():
    model = on_meta("llama")
    plan = plan_for(model, TP2)
    check_used(model, plan)
    plan["model.layers.*.mlp.gone"] = "colwise"
    with pytest.raises(AssertionError, match=r"nothing that LlamaForCausalLM has: \['model.layers.\*.mlp.gone'\]"):
        check_used(model, plan)


def test_no_sequence_parallel_is_noted():
    plan = plan_for(from_config("deepseek_v4"), TP2)
    assert not plan.sequence_parallel and plan.loss_parallel
    assert "is given a stream [2, 11, 4, 64], not [batch, seq, hidden]" in plan.notes[0]


def test_nothing_to_split():
    with pytest.raises(ValueError, match="found nothing in BertLMHeadModel that tensor parallelism can split") as error:
        plan_for(from_config("bert", is_decoder=True), TP2)
    assert "layer.*.output (BertOutput) is not split; no loss parallel" in str(error.value)
    assert "add a layout in hf_tpsp/plan/layouts.py, `layouts`" in str(error.value)


def test_rows_of_shared_kv_heads():
    """4 ranks, 2 kv heads: each rank takes its query heads' one."""
    assert [rows_of(("64@2",), rank, 4).tolist() for rank in range(4)] == 2 * [list(range(32))] + 2 * [
        list(range(32, 64))
    ]
    plan = plan_for(from_config("llama", num_key_value_heads=4, num_attention_heads=8), TPSPConfig(tp_size=4))
    assert plan["model.layers.*.self_attn"] == "split:groups"
    assert plan["model.layers.*.self_attn.k_proj"] == "colwise_gathered:32@2"


def test_heads_that_tp_does_not_divide():
    with pytest.raises(ValueError, match=r"tp_size=3 does not divide .*tp_size can be one of \[1, 2, 4, 8\]"):
        plan_for(on_meta("llama"), TPSPConfig(tp_size=3))


def test_heads_that_cannot_be_dealt_out():
    """Falcon's packed projection is interleaved by kv head: no rank can have half of one."""
    settings = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 8}
    plan = plan_for(from_config("falcon", **settings), TP2)
    assert plan["transformer.h.*.self_attention.query_key_value"] == "colwise"
    plan = plan_for(from_config("falcon", **settings), TPSPConfig(tp_size=4))
    assert plan["transformer.h.*.self_attention"] == "whole"
    assert "(FalconAttention) is not split: its heads do not divide over 4 ranks" in plan.notes[0]


def test_cli_table(tmp_path, capsys):
    models.config("phi3").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(tmp_path), "--tp", "3"])
    assert "tp_size=3 does not divide" in capsys.readouterr().err
    main(["plan", str(tmp_path), "--tp", "2"])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:6]] for cells in lines}
    assert rows["model.layers.*.mlp"] == [
        "Phi3MLP",
        "split",
        "all-gather, reduce-scatter",
        "2 all-gathers, reduce-scatter",
    ]
    assert rows["model.layers.*.mlp.down_proj"] == ["Linear", "rowwise", "-", "-"]
    assert rows["model.norm"] == ["Phi3RMSNorm", "norm", "-", "-"]
    assert rows["lm_head"] == ["Linear", "lazy_head", "all-gather", "reduce-scatter"]
    main(["plan", str(tmp_path), "--no-sequence-parallel"])
    assert "all-reduce" in capsys.readouterr().out


def printed(capsys, *arguments) -> str:
    """What the command prints, without borders and line breaks in cells."""
    main(["plan", *arguments])
    return re.sub(r"\s+", " ", re.sub("[│┃─━┏┓┗┛┡┩└┘├┤┼╇┳┴╀]", " ", capsys.readouterr().out))


def test_cli_notes_and_parameters(capsys):
    text = printed(capsys, "qwen3_next")
    assert "- model.layers.*.linear_attn (Qwen3NextGatedDeltaNet) is not split: the closest layout" in text
    assert "model.layers.*.mlp.experts Qwen3NextExperts replica" in text
    assert "model.layers.*.mlp.experts.gate_up_proj Parameter shard_packed:-2,2" in text


@pytest.mark.parametrize("name", ["model.layers.0.self_attn", "model.layers.*.self_attn"])
def test_cli_why(capsys, name):
    text = printed(capsys, "doge", "--why", name)
    assert "model.layers.*.self_attn (DogeAttention), tp 2: whole" in text
    assert "RuntimeError in its own forward, add of [2, 2, 11, 11] and [2, 4, 11," in text
    assert "split; colwise q_proj, k_proj, v_proj" in text and "taken" not in text.partition("- model")[0]
    assert "- model.layers.*.self_attn (DogeAttention) is not split: the first layout" in text


def test_cli_why_of_what_was_taken(capsys):
    text = printed(capsys, "bloom", "--why", "transformer.h.1.mlp")
    assert "(BloomMLP), tp 2: split:residual; colwise dense_h_to_4h; rowwise dense_4h_to_h" in text
    assert re.search(r" 1 split; .* off by 0\.\d+ in evaluation 2 split:residual; .* taken, off by \S+e-\d+ in", text)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "bloom", "--why", "transformer.h.0.self_atention"])
    assert (
        "names no block that a layout was tried of; the nearest are transformer.h.*.self_attention"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "bloom", "--why", "transformer.h.1000.mlp"])


def test_cli_why_nothing_is_split(capsys):
    text = printed(capsys, "bert", "--why", "bert.encoder.layer.0.output")
    assert "BertOutput), tp 2: whole" in text and "linear of [2, 11, 128] and [64, 64] and [64]" in text


def test_cli_why_of_a_name_that_two_classes_bear(tmp_path, capsys):
    """Dense layers and MoE layers: the number says which; `*` means both."""
    shrunk_config(transformers.AutoConfig.for_model("deepseek_v3")).save_pretrained(tmp_path)
    text = printed(capsys, str(tmp_path), "--why", "model.layers.0.mlp")
    assert "model.layers.*.mlp (DeepseekV3MLP)" in text and "DeepseekV3MoE" not in text
    text = printed(capsys, str(tmp_path), "--why", "model.layers.*.mlp")
    assert "model.layers.*.mlp (DeepseekV3MLP)" in text and "model.layers.*.mlp (DeepseekV3MoE)" in text


def test_cli_config(tmp_path, capsys):
    main(["config", "--dp", "2", "--tp", "4"])
    assert "parallelism_config_tp_size: 4" in capsys.readouterr().out
    main(["config", "--tp", "2", "--cpu", "-o", str(tmp_path / "mesh.yaml")])
    assert "use_cpu: true" in (tmp_path / "mesh.yaml").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["config", "--tp", "8", "--hosts", "2"])
    assert "would span hosts" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err
