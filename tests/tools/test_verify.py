"""Architectures of distinct structure against one process, and what `hf-tpsp verify` says of a model it has never seen."""

import functools
import json
import textwrap
from dataclasses import replace

import pytest
import transformers

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.cli import main
from hf_tpsp.collectives import OneShare
from hf_tpsp.tools.verify import support
from hf_tpsp.tools.verify.comparison import larger
from hf_tpsp.tools.verify.verify import Result, verify

MESH_1x2, MESH_2x2, MESH_1x4 = TPSPConfig(tp_size=2), TPSPConfig(tp_size=2, dp_shard_size=2), TPSPConfig(tp_size=4)

# Model type → what its structure has that those above it have not.
FAMILIES = {
    "qwen3_moe": "experts, a router, its auxiliary loss",
    "qwen2_moe": "a shared expert with a gate",
    "deepseek_v3": "MLA, groups of experts, a dense layer first",
    "olmo2": "norms over all heads, after the blocks",
    "phi": "attention and MLP beside each other, partly rotary, biases",
    "gpt2": "no plan in transformers: Conv1D, packed q/k/v, learned positions",
    "gpt_neox": "packed q/k/v, interleaved by head",
    "gpt_oss": "attention sinks, interleaved experts with biases",
    "falcon": "one kv head, shared by the ranks",
    "apertus": "parameters in the activation function",
    "llama4_text": "experts that return a flat stream, written into",
    "qwen3_next": "linear attention: every rank computes it whole",
    "jamba": "Mamba, attention and experts",
    "gemma4_unified_text": "heads that are wider in some layers",
    "hrm_text": "two stacks that pass a stream to and fro",
    "deepseek_v4": "hyper-connections: no sequence parallel",
    "gemma3": "a text model inside a multimodal one",
}
WITHOUT_SP = ("deepseek_v4",)
RECURRENT = ("qwen3_next", "deepseek_v4")  # rounding alone exceeds 1e-5: in fp64


def found(result: Result) -> str:
    return (
        result.error
        or f"loss {result.loss:.1e}, {result.parameter} {result.gradient:.1e}, weights {result.weights:.1e}"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(ranks, model_type):
    """An odd vocabulary and length, and the auxiliary loss where there is one."""
    dtype = "float64" if model_type in RECURRENT else "float32"
    result = verify(model_type, MESH_1x2, dtype=dtype, settings={"output_router_logits": True}, pool=ranks)
    assert result.is_equal, found(result)
    assert result.loss_parallel and result.sequence_parallel == (model_type not in WITHOUT_SP)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt2", "doge", "gemma4_text"])
def test_with_fsdp(ranks, model_type):
    """Parameters beside the blocks, streams beside the stream, odd packed widths, all sharded over data parallelism too."""
    settings = {"intermediate_size": 67, "moe_intermediate_size": 67}
    result = verify(model_type, MESH_2x2, settings=settings, pool=ranks)
    assert result.is_equal and result.sequence_parallel, found(result)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3"])
def test_fewer_kv_heads_than_ranks(ranks, model_type):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    result = verify(model_type, MESH_1x4, settings=heads, pool=ranks)
    assert result.is_equal, found(result)


def without_shares(*arguments):
    """The comparison, with the auxiliary loss reaching the routers from every rank."""
    from hf_tpsp.tools.verify.verify import _on_rank

    apply, OneShare.apply = OneShare.apply, lambda x, size: x
    try:
        return _on_rank(*arguments)
    finally:
        OneShare.apply = apply


def test_the_auxiliary_loss_is_seen(ranks):
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    assert verify("mixtral", MESH_1x2, settings=settings, pool=ranks).is_equal
    wrong = ranks.run(2, without_shares, "mixtral", MESH_1x2, 17, 131, "float32", settings)[0]
    assert wrong["gradient"] > 1e-2 and "gate" in wrong["parameter"]


MODIFIED = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

    class MyLlamaConfig(LlamaConfig):
        model_type = "my_llama"

    class MyMLP(torch.nn.Module):
        "A renamed projection, and a norm on what the MLP is given."
        def __init__(self, config):
            super().__init__()
            self.before = LlamaRMSNorm(config.hidden_size)
            self.wide = torch.nn.Linear(config.hidden_size, config.intermediate_size)
            self.narrow = torch.nn.Linear(config.intermediate_size, config.hidden_size)

        def forward(self, x):
            return self.narrow(torch.relu(self.wide(self.before(x))))

    class MyAttention(LlamaAttention):
        "A renamed projection, and what comes after it."
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            self.out = self._modules.pop("o_proj")

        @property
        def o_proj(self):
            return lambda x: LAST

    class MyLlamaForCausalLM(LlamaForCausalLM):
        config_class = MyLlamaConfig

        def __init__(self, config):
            super().__init__(config)
            for i, layer in enumerate(self.model.layers):
                layer.mlp, layer.self_attn = MyMLP(config), MyAttention(config, i)
"""


def folder_of(path, code: str) -> str:
    """A checkpoint folder with code of its own: `config.json` that points to `modeling_mine.py`."""
    (path / "modeling_mine.py").write_text(textwrap.dedent(code))
    config = transformers.LlamaConfig(num_key_value_heads=8, vocab_size=1000, num_hidden_layers=4).to_dict()
    config["auto_map"] = {
        "AutoConfig": "modeling_mine.MyLlamaConfig",
        "AutoModelForCausalLM": "modeling_mine.MyLlamaForCausalLM",
    }
    config["model_type"] = "my_llama"
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("last", ["self.out(x)", "self.out(x).cumsum(1) ** 2"])
def test_a_modified_llama(ranks, tmp_path, last):
    """Code that nobody has seen, with and without something after its last projection that no sum survives."""
    folder = folder_of(tmp_path, MODIFIED.replace("LAST", last))
    result = verify(folder, MESH_1x2, trust_remote_code=True, pool=ranks)
    assert result.is_equal, found(result)
    split = "cumsum" not in last
    attention, mlp = "model.layers.*.self_attn (MyAttention) is not split", "model.layers.*.mlp (MyMLP) is not split"
    assert not any(note.startswith(mlp) for note in result.notes)
    assert any(note.startswith(attention) for note in result.notes) != split


def test_what_the_command_prints(capsys):
    main(["verify", "qwen2", "--tp", "2"])
    text = capsys.readouterr().out
    assert "equal to one process" in text and "sequence parallel on, loss parallel on" in text
    assert "of a decoder layer, forward and backward: 6 all-gather, 4 reduce-scatter" in text
    for arguments, message in (
        (["llamma"], "Did you mean llama"),
        ([], "takes a model type or a folder, or --all"),
        (["--all", "--only", "llamma"], "transformers has no causal LM of type llamma"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["verify", *arguments])
        assert message in capsys.readouterr().err


def test_all_is_resumable(tmp_path, monkeypatch, capsys):
    """A wrong result is called wrong and ends in an error; what is known is not run again."""
    asked = []

    def verify(model_type, config, **options):
        asked.append(model_type)
        result = Result(
            model_type, config.dp_size, config.tp_size, 17, 131, options.get("dtype", "float32"), gradient=1e-7
        )
        return {
            "llama": result,
            "qwen3_next": replace(result, gradient=1e-13 if result.dtype == "float64" else 1e-4),
            "gpt2": replace(result, gradient=0.5, parameter="h.0.attn.weight"),
            "bert": replace(result, error="nothing to split"),
        }[model_type]

    monkeypatch.setattr(support, "verify", verify)
    command = ["verify", "--all", "--results", str(tmp_path / "r.json"), "-o", str(tmp_path / "S.md"), "--only"]
    main([*command, "llama", "qwen3_next", "bert"])
    assert asked == ["llama"] * 2 + ["qwen3_next"] * 4 + ["bert"]
    table = (tmp_path / "S.md").read_text()
    assert "| `llama` | yes | yes | 1.0e-07 | 1.0e-07 |  |  |" in table and "| `bert` | nothing to split |" in table
    assert "| `qwen3_next` | yes | yes | 1.0e-04 | 1.0e-04 | 1.0e-13 |" in table
    asked.clear()
    with pytest.raises(SystemExit, match="not equal, and not refused: gpt2"):
        main([*command, "llama", "gpt2"])
    assert set(asked) == {"gpt2"} and "WRONG in h.0.attn.weight" in (tmp_path / "S.md").read_text()


def test_an_error_that_is_no_number_is_not_lost():
    nan = float("nan")
    for errors in ([nan, 0.1, 0.2], [0.1, nan, 0.2], [0.1, 0.2, nan]):
        assert functools.reduce(larger, errors, 0.0) != functools.reduce(larger, errors, 0.0), errors
    result = Result("llama", 1, 2, 17, 131, "float32", loss=1e-7, gradient=1e-7, weights=1e-7)
    assert result.is_equal
    for name in ("loss", "gradient", "weights"):
        assert not replace(result, **{name: nan}).is_equal, name


def test_verify_is_public():
    assert hf_tpsp.verify is verify
