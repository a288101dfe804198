"""Bad input: every command ends with one line and exit code 2, every function with one clear `ValueError` or `TypeError`."""

import json
import textwrap

import models
import numpy
import pytest
import torch
from transformers import LlamaConfig

import hf_tpsp
from hf_tpsp import TPSPConfig, launch
from hf_tpsp.cli import main

# Folder → what its config.json has beyond a small llama's, or its text.
CONFIGS = {
    "good": {},
    "layers_0": {"num_hidden_layers": 0},
    "layers_two": {"num_hidden_layers": "two"},
    "vocab_null": {"vocab_size": None},
    "heads_0": {"num_attention_heads": 0},
    "heads_float": {"num_attention_heads": 8.0},
    "heads_7": {"num_attention_heads": 7},
    "kv_heads_3": {"num_key_value_heads": 3},
    "hidden_null": {"hidden_size": None},
    "hidden_negative": {"hidden_size": -64},
    "activation": {"hidden_act": "nope"},
    "quantized": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "unknown": {"model_type": "lama"},
    "not_causal": {"model_type": "clip"},
    "no_type": {"model_type": None},
    "own_code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
    "own_class": {"auto_map": {"AutoModelForCausalLM": "mine.M"}},
    "broken": '{"model_type": "llama",',
    "list": "[1]",
    "binary": "\x00",
}
OWN_CODE = """
    import pathlib
    pathlib.Path("FOLDER", "ran").touch()
    raise RuntimeError("my code ran")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders without weights, one wrong thing in each."""
    root = tmp_path_factory.mktemp("folders")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    base = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=131).to_dict()
    for name, change in CONFIGS.items():
        (root / name).mkdir()
        text = change if isinstance(change, str) else json.dumps({**base, **change})
        (root / name / "config.json").write_text(text)
        (root / name / "mine.py").write_text(textwrap.dedent(OWN_CODE).replace("FOLDER", str(root / name)))
    (root / "empty").mkdir()
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    (root / "latin").mkdir()
    (root / "latin" / "config.json").write_bytes(b"\xff\xfe")
    return root


# What a model is given as → what is said of it, by plan, estimate and verify alike.
SOURCES = {
    "good": None,
    "layers_0": "num_hidden_layers must be a whole number of at least 1, got 0",
    "layers_two": "num_hidden_layers must be a whole number of at least 1, got 'two'",
    "vocab_null": "vocab_size must be a whole number of at least 1, got None",
    "heads_0": "num_attention_heads must be a whole number of at least 1, got 0",
    "heads_float": "num_attention_heads must be a whole number of at least 1, got 8.0",
    "heads_7": "hidden size (64) is not a multiple of the number of attention heads (7)",
    "kv_heads_3": "num_key_value_heads=3 must divide num_attention_heads=8",
    "hidden_null": "'hidden_size' expected int, got NoneType",
    "hidden_negative": "hidden_size must be a whole number of at least 1, got -64",
    "activation": "transformers cannot build this llama model from its config: KeyError: 'nope'",
    "quantized": "quantized is quantized (bitsandbytes). hf_tpsp cannot shard quantized weights",
    "unknown": "transformers knows no model type 'lama'. Did you mean llama",
    "not_causal": "'clip' is not a causal language model of transformers",
    "no_type": "has no model_type (such as 'llama')",
    "own_code": "has code of its own (mine.py), which is not run unless you say so",
    "broken": "config.json is not JSON",
    "list": "must hold one object with the fields of a config, got a list",
    "binary": "config.json is not JSON",
    "latin": "config.json is not JSON",
    "empty": "has no config.json",
    "adapter": "holds an adapter: give the folder of the model",
    ".": "has no config.json. There is one in activation, ",
    "nowhere": "'nowhere' is neither a model type of transformers, nor a folder with a config.json",
    "no/such/folder": "There is no folder or file 'no/such/folder' (looked in ",
    "/no/such": "There is no folder or file '/no/such'",
    "some/hub-name": "neither a folder (looked in ",
    "": "'' is neither a model type",
    "lama": "Did you mean llama",
    "Lama-3-8B": "Did you mean Llama-3-8B",
}


def refused(capsys, *arguments: str) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("[transformers]")]
    assert end.value.code == 2 and len(lines) == 1 and not printed.out, (end.value.code, printed)
    assert lines[0].startswith(f"hf-tpsp {arguments[0]}: "), lines
    return lines[0]


@pytest.mark.parametrize("source", [source for source, words in SOURCES.items() if words])
@pytest.mark.parametrize("command", [["plan"], ["estimate", "--gpus=2", "--seq=16"], ["verify"]], ids=lambda c: c[0])
def test_sources(folders, monkeypatch, capsys, no_ranks, command, source):
    monkeypatch.chdir(folders)
    if command == ["verify"] and source == "activation":
        return  # The ranks build it, and give the reason as a result.
    assert SOURCES[source] in refused(capsys, command[0], source, *command[1:])
    assert not (folders / "own_code" / "ran").exists()


# Command and arguments → words of the one line.
COMMANDS = {
    "config --tp 0": "argument --tp: it must be a whole number of at least 1, got 0",
    "config --tp two": "argument --tp: it must be a whole number of at least 1, got 'two'",
    "config --tp 2.0": "got '2.0'",
    "config --dp -1": "--dp: it must be",
    "config --dp-replicate 0": "--dp-replicate: it must be",
    "config --tp 99999999999": "tp_size must be at most",
    "config --hosts 0": "argument --hosts: it must be a whole number of at least 1, got 0",
    "config --hosts -1": "got -1",
    "config --tp 2 --hosts 3": "2 ranks do not spread evenly over 3 hosts; there can be one of [1]",
    "config --tp 4 --dp 2 --hosts 4": "tp_size can be one of [1, 2]",
    "config --mixed-precision bfloat16": "it must be one of 'bf16', 'no', got 'bfloat16'. Did you mean bf16?",
    "config --activation-checkpointing ful": "Did you mean full?",
    "config -o no/such/mesh.yaml": "there is no folder 'no/such' to write 'mesh.yaml' in",
    "config -o .": "'.' is a folder. Name a file in it",
    "config --host 2 --cpus": "there is no '--cpus'. Did you mean --cpu?",
    "config extra": "there is no 'extra'",
    "env extra": "there is no 'extra'",
    "plan": "the following arguments are required: MODEL_TYPE|PATH",
    "plan llama --tp 3": "tp_size can be one of [1, 2, 4, 8, 16, 32]",
    "plan llama --why nope": "the nearest are",
    "estimate Llama-3-8B --gpus 0 --seq 16": "--gpus: it must be",
    "estimate Llama-3-8B --gpus 99999999999 --seq 16": "gpus must be at most",
    "estimate Llama-3-8B --gpus 2 --seq 0": "--seq: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --batch 0": "--batch: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --tp 0": "--tp: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --dp 0": "--dp: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --dp-replicate -1": "--dp-replicate: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --lora 0": "--lora: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --per-host 0": "--per-host: it must be",
    "estimate Llama-3-8B --gpus 2 --seq 16 --loss chunk": "Did you mean chunked?",
    "estimate Llama-3-8B --gpus 2 --seq 16 --optim adam": "Did you mean adamw?",
    "estimate Llama-3-8B --gpus 2 --seq 16 --flops inf": "flops must be a positive number, got inf",
    "estimate Llama-3-8B --gpus 2 --seq 16 --efficiency nan": "efficiency must be a positive number, got nan",
    "estimate Llama-3-8B --gpus 2 --seq 16 --plot no/such.png": "there is no folder 'no'",
    "estimate Llama-3-8B --gpus 2 --seq 16 --plot x.xyz": "a file's name must end in one of",
    "estimate Llama-3-8B --gpus 2 --seq 16 --write-config no/such": "there is no folder 'no'",
    "verify": "verify takes a model type or a folder, or --all",
    "verify llama --all": "verify takes a model type or a folder, or --all",
    "verify llama --seq 0": "--seq: it must be a whole number of at least 2, got 0",
    "verify llama --seq 1": "at least 2, got 1",
    "verify llama --vocab 3": "--vocab: it must be a whole number of at least 4, got 3",
    "verify llama --dtype bf16": "it must be one of 'fp32', 'fp64', got 'bf16'",
    "verify llama --only llama": "--only goes with --all",
    "verify llama --output x.md": "--output goes with --all",
    "verify --all --seq 5": "--seq goes without --all",
    "verify --all --by-module": "--by-module goes without --all",
    "verify --all --only lama": "no causal LM of type lama. Did you mean llama",
    "verify --all --jobs 0": "--jobs: it must be",
    "verify --all --results good/config.json": "holds no results of `hf-tpsp verify --all`",
    "verify --all --output no/such.md": "there is no folder 'no'",
}


@pytest.fixture
def no_ranks(monkeypatch):
    """`verify` says what it would have run in place of starting ranks."""

    def run(self, world_size, function, *arguments, **options):
        raise RuntimeError(f"ran {arguments}")

    monkeypatch.setattr("hf_tpsp.tools.ranks.RankPool.run", run)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(folders, monkeypatch, capsys, no_ranks, command):
    if "--plot x.xyz" in command:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(folders)
    assert COMMANDS[command] in refused(capsys, *command.split())


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written. Name a file in a folder" in refused(capsys, "config", "-o", str(tmp_path / "mesh.yaml"))


def test_no_such_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["confg"])
    assert capsys.readouterr().err.startswith(
        "hf-tpsp: argument COMMAND: invalid choice: 'confg' (choose from 'config', "
    )


def test_verify_all_writes_nothing_without_being_told(tmp_path, monkeypatch, capsys):
    from hf_tpsp.tools.verify import support

    def verify(model_type, config, **options):
        return support.Result(model_type, config.dp_size, config.tp_size, 17, 131, "float32", gradient=1e-7)

    monkeypatch.setattr(support, "verify", verify)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SUPPORT.md").write_text("mine")
    main(["verify", "--all", "--only", "llama"])
    assert "| `llama` | yes | yes | 1.0e-07 |" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["SUPPORT.md"] and (tmp_path / "SUPPORT.md").read_text() == "mine"


def test_own_code_is_run_only_if_it_is_trusted(folders, capsys, no_ranks):
    """A class that transformers has too is transformers' own, and that is said; in Python as on the command line."""
    folder, marks = str(folders / "own_class"), [folders / name / "ran" for name in ("own_code", "own_class")]
    main(["plan", folder])
    assert f"transformers' own llama: the code in {folder} (mine.py) is run only with" in capsys.readouterr().out
    with pytest.raises(ValueError, match="trust_remote_code=True in Python"):
        hf_tpsp.verify(str(folders / "own_code"), TPSPConfig(tp_size=2))
    assert not any(mark.exists() for mark in marks)
    assert "my code ran" in refused(capsys, "plan", folder, "--trust-remote-code") and marks[1].exists()
    with pytest.raises(ValueError, match="my code ran"):
        hf_tpsp.verify(str(folders / "own_code"), TPSPConfig(tp_size=2), trust_remote_code=True)


MODEL = models.build("qwen2")
LOGITS, LABELS = torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long)
SMALL = {"gpus": 2, "seq": 16}


def loss(logits=LOGITS, labels=LABELS, **options):
    return hf_tpsp.vocab_parallel_cross_entropy(logits, labels, **options)


# A call → the error and its words.
CALLS = [
    (lambda: TPSPConfig(tp_size="2"), ValueError, "tp_size must be a whole number of at least 1, got '2'"),
    (lambda: TPSPConfig(dp_shard_size=True), ValueError, "dp_shard_size .* got True"),
    (lambda: TPSPConfig(dp_replicate_size=-1), ValueError, "dp_replicate_size .* got -1"),
    (lambda: TPSPConfig(tp=2), TypeError, "no field 'tp'. Did you mean tp_size?"),
    (lambda: TPSPConfig(compil=True), TypeError, "no field 'compil'. Did you mean compile?"),
    (lambda: TPSPConfig(compile="maybe"), ValueError, "compile must be true or false, got 'maybe'"),
    (lambda: TPSPConfig(sequence_parallel=None), ValueError, "sequence_parallel must be true or false, got None"),
    (lambda: TPSPConfig(loss="chunk"), ValueError, "got 'chunk'. Did you mean chunked?"),
    (lambda: TPSPConfig(check=None), ValueError, "check must be 'first', .* got None"),
    (lambda: TPSPConfig(check="every:0"), ValueError, "check must be"),
    (lambda: hf_tpsp.enable({"tp_size": 2}), TypeError, "config must be of TPSPConfig, got {'tp_size': 2}. Write enable"),
    (lambda: hf_tpsp.TPSPCallback(2), TypeError, "config must be of TPSPConfig, got 2"),
    (lambda: hf_tpsp.parallelize(MODEL, 2), TypeError, "config must be of TPSPConfig, got 2"),
    (lambda: hf_tpsp.parallelize("qwen2", TPSPConfig()), TypeError, "model must be of PreTrainedModel, got 'qwen2'"),
    (lambda: hf_tpsp.parallelize(torch.nn.Linear(2, 2), TPSPConfig()), TypeError, "model must be of PreTrainedModel"),
    (lambda: hf_tpsp.plan_for("qwen2", TPSPConfig()), TypeError, "model must be of PreTrainedModel, got 'qwen2'"),
    (lambda: hf_tpsp.plan_for(MODEL, None), TypeError, "config must be of TPSPConfig, got None"),
    (lambda: loss(logits="x"), TypeError, "logits must be of Tensor, got 'x'"),
    (lambda: loss(labels=None), TypeError, "labels must be of Tensor, got None"),
    (lambda: loss(labels=LABELS.float()), ValueError, "labels must be token ids, of an integer dtype"),
    (lambda: loss(labels=LABELS[:, :3]), ValueError, "do not match"),
    (lambda: loss(labels=LABELS + 7), ValueError, "outside the vocabulary of 7"),
    (lambda: loss(reduction="average"), ValueError, "reduction must be one of 'none', 'sum', 'mean', got 'average'"),
    (lambda: loss(label_smoothing=2), ValueError, "label_smoothing must be between 0 and 1, got 2"),
    (lambda: loss(ignore_index="x"), TypeError, "ignore_index must be of int, got 'x'"),
    (lambda: hf_tpsp.estimate(3, **SMALL), TypeError, "named by a string, a path or a config .* got a int"),
    (lambda: hf_tpsp.estimate("llama", gpus=2.0, seq=16), ValueError, "gpus must be a whole number .* got 2.0"),
    (lambda: hf_tpsp.estimate("llama", gpus=2, seq="16"), ValueError, "seq must be a whole number .* got '16'"),
    (lambda: hf_tpsp.estimate("llama", **SMALL, tp="2"), ValueError, "tp must be a whole number"),
    (lambda: hf_tpsp.estimate("llama", **SMALL, hardware=3), TypeError, "hardware must be of Hardware, got 3"),
    (lambda: hf_tpsp.estimate("llama", **SMALL, backend="mpi"), ValueError, "backend must be one of"),
    (lambda: hf_tpsp.estimate("llama", **SMALL, tp_size=2), TypeError, "not as tp_size"),
    (lambda: hf_tpsp.estimate("llama", **SMALL, compile="yes"), ValueError, "compile=True cannot be simulated"),
    (lambda: hf_tpsp.estimate("llama", **SMALL, los="chunked"), TypeError, "no field 'los'. Did you mean loss?"),
    (lambda: hf_tpsp.verify("llama", 2), TypeError, "config must be of TPSPConfig, got 2"),
    (lambda: hf_tpsp.verify("llama", TPSPConfig(), length=0), ValueError, "length must be .* at least 2, got 0"),
    (lambda: hf_tpsp.verify("llama", TPSPConfig(), vocabulary=3), ValueError, "vocabulary must be .* at least 4, got 3"),
    (lambda: hf_tpsp.verify("llama", TPSPConfig(), dtype="bf16"), ValueError, "dtype must be one of"),
    (lambda: hf_tpsp.verify(None, TPSPConfig()), TypeError, "named by a string"),
    (lambda: launch.accelerate_config(TPSPConfig(), hosts=0), ValueError, "hosts must be .* at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_calls(no_ranks, number):
    call, error, words = CALLS[number]
    with pytest.raises(error, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_values_of_other_types_are_taken():
    """`"false"` was on; numpy's integers were refused."""
    config = TPSPConfig(
        tp_size=numpy.int64(2), sequence_parallel="false", compile="yes", regather_inputs=numpy.bool_(False)
    )
    assert config == TPSPConfig(tp_size=2, sequence_parallel=False, compile=True, regather_inputs=False)
    assert type(config.tp_size) is int and config.sequence_parallel is False


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "The environment variable WORLD_SIZE must be a whole number of at least 1, got 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number of at least 1, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got 0"),
        ({"RANK": "x"}, "RANK must be a whole number of at least 0, got 'x'"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK must be a whole number of at least 0, got '1.5'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number of at least 0, got 'http'"),
        ({"mesh": "", "PARALLELISM_CONFIG_TP_SIZE": "two"}, "PARALLELISM_CONFIG_TP_SIZE must be .* got 'two'"),
        ({"mesh": "", "PARALLELISM_CONFIG_CP_SIZE": "x"}, "PARALLELISM_CONFIG_CP_SIZE must be .* got 'x'"),
        ({"mesh": "", "FSDP_RESHARD_AFTER_FORWARD": "maybe"}, "FSDP_RESHARD_AFTER_FORWARD must be true or false, got 'maybe'"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "maybe"}, "ACCELERATE_USE_PARALLELISM_CONFIG must be true or false"),
        ({"HF_TPSP_LOSS": "chunk"}, "HF_TPSP_LOSS must be one of .* got 'chunk'. Did you mean chunked?"),
        ({"HF_TPSP_CHECK": "x"}, "HF_TPSP_CHECK must be 'first'"),
        ({"HF_TPSP_COMPILE": ""}, "HF_TPSP_COMPILE must be true or false, got ''"),
        ({"HF_TPSP_COMPIL": "true"}, "Did you mean HF_TPSP_COMPILE"),
    ],
)  # fmt: skip
def test_environment(monkeypatch, variables, words):
    if "mesh" in variables:
        variables = {**launch.environment(TPSPConfig(tp_size=2)), **variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        hf_tpsp.enable()


def test_the_launcher_says_what_is_missing(folders, monkeypatch, capsys):
    """`python -m hf_tpsp`, and that its --help is no error."""
    from hf_tpsp import __main__ as command

    monkeypatch.chdir(folders / "good")
    for arguments, words in (
        ([], "no script was given"),
        (["min.py"], "there is no script 'min.py' (looked in "),
        (["min.py"], "Did you mean mine.py?"),
        (["-m", "no.such"], "there is no module 'no.such'"),
    ):
        monkeypatch.setattr("sys.argv", ["hf_tpsp", *arguments])
        with pytest.raises(SystemExit, match="2"):
            command.main()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0]
    monkeypatch.setattr("sys.argv", ["hf_tpsp", "--help"])
    command.main()
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_tokenizer_larger_than_the_model(caplog):
    from hf_tpsp.integrations.trainer import check_tokenizer

    check_tokenizer(MODEL, models.tokenizer(131))
    check_tokenizer(MODEL, None)
    with pytest.raises(
        ValueError, match=r"has 133 tokens, but .* 131 rows: its pad_token '\[PAD\]' is 132. Call .*\(133\)"
    ):
        check_tokenizer(MODEL, models.tokenizer(133))
    chat = models.tokenizer(133, pad_token="w0", chat_template="<|w131|>{{ messages }}")
    chat.add_tokens("<|w131|>")
    with pytest.raises(ValueError, match=r"its chat template's '<\|w131\|>' is 133"):
        check_tokenizer(MODEL, chat)
    # Published models have such tokens (Gemma 3's for images), and their texts do not.
    models_own = models.tokenizer(133, pad_token="w0")
    check_tokenizer(MODEL, models_own)
    resized = models.build("qwen2")
    resized.resize_token_embeddings(133)
    check_tokenizer(resized, models.tokenizer(133))
