"""The plan: derived for every named model, complete, and refused with names where it is not."""

import models
import pytest
import torch
from torch import nn

from hf_tpsp import TPSPConfig, plan_for
from hf_tpsp.cli import main
from hf_tpsp.plan import rule_for, wildcard

TP2 = TPSPConfig(tp_size=2)


def on_meta(model_type, **settings):
    with torch.device("meta"):
        return models.build(model_type, **settings)


def test_qwen3():
    assert plan_for(on_meta("qwen3"), TP2) == {
        "model.embed_tokens": "embedding",
        "model.layers.0": "enter",
        "model.layers.*.input_layernorm": "norm",
        "model.layers.*.self_attn": "gather",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.q_norm": "replica",
        "model.layers.*.self_attn.k_norm": "replica",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.post_attention_layernorm": "norm",
        "model.layers.*.mlp": "gather",
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
    assert plan["model.layers.*.self_attn"] == "gather_heads"
    assert plan["model.layers.*.self_attn.qkv_proj"] == "packed_uneven:32,16,16"
    assert plan["model.layers.*.mlp.gate_up_proj"] == "packed_colwise:64,64"
    plan = plan_for(on_meta("phi3", num_key_value_heads=8), TP2)
    assert plan["model.layers.*.self_attn.qkv_proj"] == "packed_colwise:32,32,32"


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_every_parameter_is_covered_and_every_rule_used(model_type):
    model = on_meta(model_type)
    plan = plan_for(model, TP2)
    names = {name for name, _ in model.named_modules()}
    assert plan.keys() <= names | {wildcard(name) for name in names}
    for name, _ in model.named_parameters():
        assert rule_for(name.rpartition(".")[0], plan) is not None, name


def test_a_parameter_that_no_rule_covers_is_named():
    model = on_meta("llama")
    for layer in model.model.layers:
        layer.mlp.scale = nn.Parameter(torch.ones(3, device="meta"))
    model.model.layers[1].mlp.extra_proj = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError) as error:
        plan_for(model, TP2)
    for word in ("model.layers.*.mlp.scale (in a LlamaMLP)", "model.layers.*.mlp.extra_proj.weight (in a Linear)"):
        assert word in str(error.value)


def test_a_rule_without_a_layout_is_named():
    model = on_meta("llama")
    model._tp_plan["model.layers.*.mlp.down_proj"] = "moe_tp_experts"
    with pytest.raises(ValueError, match=r"model.layers.\*.mlp.down_proj \(moe_tp_experts\)"):
        plan_for(model, TP2)


def test_a_model_without_a_plan_is_refused():
    with torch.device("meta"):
        import transformers

        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no tensor-parallel plan"):
        plan_for(model, TP2)


def test_heads_that_tp_does_not_divide():
    with pytest.raises(ValueError, match=r"tp_size=3 does not divide .*tp_size can be one of \[1, 2, 4\]"):
        plan_for(on_meta("llama"), TPSPConfig(tp_size=3))


def test_cli_table(tmp_path, capsys):
    models.config("phi3").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(tmp_path), "--tp", "3"])
    assert "tp_size=3 does not divide" in capsys.readouterr().err
    main(["plan", str(tmp_path), "--tp", "2"])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:6]] for cells in lines}
    assert rows["model.layers.*.mlp"] == ["Phi3MLP", "gather", "all-gather", "all-gather, reduce-scatter"]
    assert rows["model.layers.*.mlp.down_proj"] == ["Linear", "rowwise", "reduce-scatter", "all-gather"]
    assert rows["model.norm"] == ["Phi3RMSNorm", "norm", "-", "-"]
    assert rows["lm_head"] == ["Linear", "lazy_head", "all-gather", "reduce-scatter"]
    main(["plan", str(tmp_path), "--no-sequence-parallel"])
    assert "all-reduce" in capsys.readouterr().out


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
