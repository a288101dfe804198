"""TRL's SFTTrainer on the mesh against one process with the same global batch: everything that it logs."""

import json
import os
import runpy
import sys
from pathlib import Path

import datasets
import models
import parity
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig
from transformers import TrainerCallback

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.loss.logits import LazyLogits

trl = pytest.importorskip("trl", minversion="1.16")
sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # last: it has a parity.py too

MESH_2x2 = TPSPConfig(tp_size=2, dp_shard_size=2)
LIMIT = 1e-4
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "epoch")
EVALUATED = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--lora_dropout", "0"]


FORMATS = {
    "text": lambda prompt, answer: {"text": f"{prompt} {answer}"},
    "pairs": lambda prompt, answer: {"prompt": prompt, "completion": f" {answer}"},
    "chat": lambda prompt, answer: {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    },
    "preferences": lambda prompt, answer: {"prompt": prompt, "chosen": f" {answer}", "rejected": f" {answer[::-1]}"},
}
# As tiny_model.py's, with the marks by which TRL finds the assistant's tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> str:
    """A folder with a tiny Qwen2 and its tokenizer, and the shipped conversations in two of TRL's formats."""
    from tiny_model import DATA, train_tokenizer

    folder = tmp_path_factory.mktemp("trl")
    tokenizer = train_tokenizer(600)
    models.build("qwen2", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    rows = [[m["content"] for m in json.loads(line)["messages"][:2]] for line in DATA.read_text().splitlines()]
    for name, row_of in FORMATS.items():
        (folder / name).mkdir()
        for split, part in (("train", rows[:96]), ("test", rows[96:108])):
            lines = [json.dumps(row_of(*row)) for row in part]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


def run_script(work: str, out: str, data: str, dp_size: int, options: list[str]) -> tuple[list[dict], int]:
    """TRL's own `sft.py`, as it is, and what its trainer logged."""
    logs, read = [], []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            logs.extend(state.log_history)

    arguments = [
        "sft.py", "--model_name_or_path", f"{work}/model", "--dataset_name", f"{work}/{data}", "--output_dir", out,
        "--max_steps", "10", "--per_device_train_batch_size", str(4 // dp_size), "--max_length", "64", "--seed", "0",
        "--per_device_eval_batch_size", str(4 // dp_size), "--eval_strategy", "steps", "--eval_steps", "5",
        "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--logging_steps", "1", "--report_to", "none",
        "--save_strategy", "no", "--dtype", "float32", "--bf16", "false", "--use_cpu", "--disable_tqdm", "true",
        "--gradient_checkpointing", "false", "--attn_implementation", "eager", *options,
    ]  # fmt: skip
    before, sys.argv = sys.argv, arguments
    materialize, LazyLogits.materialize = LazyLogits.materialize, lambda self: read.append(1) or materialize(self)
    transformers.trainer.DEFAULT_CALLBACKS.append(Note)
    os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
    try:
        runpy.run_path(str(Path(trl.__file__).parent / "scripts" / "sft.py"), run_name="__main__")
    finally:
        sys.argv = before
        LazyLogits.materialize = materialize
        transformers.trainer.DEFAULT_CALLBACKS.remove(Note)
    return logs, len(read)


def on_mesh(run, *arguments, **options):
    end, transformers.Trainer.end = transformers.Trainer.end, lambda self: None  # the pool keeps its process group
    try:
        with hf_tpsp.enable(MESH_2x2):
            return run(*arguments, **options)
    finally:
        transformers.Trainer.end = end


def as_ddp(*arguments, **options):
    end, transformers.Trainer.end = transformers.Trainer.end, lambda self: None
    try:
        return run_trainer(*arguments, **options)
    finally:
        transformers.Trainer.end = end


CASES = {
    "full": ("text", []),
    "packed": ("text", ["--packing", "true", "--eval_packing", "true"]),
    "completion only, dft": ("pairs", ["--loss_type", "dft"]),
    "label smoothing": ("text", ["--label_smoothing_factor", "0.1"]),
    "LoRA": ("text", LORA),
    "LoRA, packed": ("text", [*LORA, "--packing", "true", "--eval_packing", "true"]),
}


@pytest.mark.parametrize("case", CASES)
def test_unmodified_script(ranks, work, tmp_path, case):
    data, options = CASES[case]
    expected, _ = run_script(work, str(tmp_path / "one"), data, 1, options)
    found, read = ranks.run(4, on_mesh, run_script, work, str(tmp_path / "mesh"), data, 2, options)[0]
    if case == "label smoothing":  # its evaluation asks for whole logits
        assert read > 0
    else:
        assert read == 0, "the whole head never runs"
    # Without a number of items, each rank's mean counts alike, as in plain data parallelism.
    assert_equal_logs(found, expected, LOGGED, 10, {})
    assert_equal_logs(found, expected, EVALUATED, 2, {"eval_loss": 1e-2})
    assert_equal_weights(tmp_path)


def assert_equal_logs(
    found: list[dict], expected: list[dict], names: tuple[str, ...], entries: int, limits: dict[str, float]
) -> None:
    """The values of `names` in the entries that have the first of them."""
    for name in names:
        one, mesh = ([entry[name] for entry in log if names[0] in entry] for log in (expected, found))
        assert len(one) == len(mesh) == entries, name
        worst = parity.largest(abs(a - b) / (abs(a) or 1) for a, b in zip(one, mesh, strict=True))
        assert worst < limits.get(name, LIMIT), (name, one, mesh)


def assert_equal_weights(folder: Path) -> None:
    saved = {path.name for path in (folder / "one").glob("*model.safetensors")}
    assert len(saved) == 1
    one, mesh = (
        transformers.modeling_utils.load_state_dict(str(folder / run / name))
        for run in ("one", "mesh")
        for name in saved
    )
    assert one.keys() == mesh.keys()
    for name, weight in one.items():
        assert torch.linalg.norm(mesh[name] - weight) < 1e-3 * (1e-3 + torch.linalg.norm(weight)), name


def own_loss(outputs, labels, num_items_in_batch=None):
    """A script's own loss, of the logits."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items_in_batch


def run_trainer(
    work: str, out: str, data: str, dp_size: int, options: dict, given: dict, trainer: str = "SFT", rows: int = 96
) -> list[dict]:
    """A script of one's own: one of TRL's trainers, which loads the model itself. What it logged."""
    os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
    train = datasets.load_dataset("json", data_files=f"{work}/{data}/train.jsonl", split="train").select(range(rows))
    defaults = {
        "output_dir": out, "max_steps": 4, "per_device_train_batch_size": 4 // dp_size, "max_length": 64, "seed": 0,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"},
    }  # fmt: skip
    arguments = getattr(trl, f"{trainer}Config")(**{**defaults, **options})
    made = getattr(trl, f"{trainer}Trainer")(model=f"{work}/model", args=arguments, train_dataset=train, **given)
    made.train()
    made.save_model(out)
    return made.state.log_history


# Name → format of the data, options, further arguments of the trainer.
TRAINERS = {
    "padding free": ("text", {"padding_free": True, "max_length": None}, {}),
    "assistant only": ("chat", {"assistant_only_loss": True}, {}),
    "pad_to_multiple_of": ("text", {"pad_to_multiple_of": 8}, {}),
    "compute_loss_func": ("pairs", {}, {"compute_loss_func": own_loss}),
}
PREFERENCE = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "epoch", "logits/chosen", "logits/rejected",
              "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")  # fmt: skip
PREFERENCES = {
    "DPO": {},
    "DPO, LoRA": {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)},
}


@pytest.mark.parametrize("case", TRAINERS)
def test_trainer(ranks, work, tmp_path, case):
    data, options, given = TRAINERS[case]
    expected = run_trainer(work, str(tmp_path / "one"), data, 1, options, given)
    found = ranks.run(4, on_mesh, run_trainer, work, str(tmp_path / "mesh"), data, 2, options, given)[0]
    assert_equal_logs(found, expected, LOGGED, 4, {})
    assert_equal_weights(tmp_path)


def test_packed_rows_over_many_epochs(ranks, work, tmp_path):
    """Packed rows in another order in each of 4 epochs, whose number does not divide by the batch. accelerate then fills up
    the last batch of an epoch with rows of the first one, so that the reference is plain data parallelism (DDP)."""
    options = {"packing": True, "max_steps": -1, "num_train_epochs": 4}
    expected = ranks.run(2, as_ddp, work, str(tmp_path / "one"), "text", 2, options, {}, rows=17)[0]
    found = ranks.run(4, on_mesh, run_trainer, work, str(tmp_path / "mesh"), "text", 2, options, {}, rows=17)[0]
    steps = sum("loss" in entry for entry in expected)
    assert steps == 20 and expected[steps - 1]["epoch"] == 4
    assert_equal_logs(found, expected, LOGGED, steps, {})
    assert_equal_weights(tmp_path)


@pytest.mark.parametrize("case", PREFERENCES)
def test_preferences(ranks, work, tmp_path, case):
    """DPO against a reference model loaded by name, and against the base under the adapter."""
    given, options = PREFERENCES[case], {"learning_rate": 1e-2}
    expected = run_trainer(work, str(tmp_path / "one"), "preferences", 1, options, given, "DPO")
    found = ranks.run(4, on_mesh, run_trainer, work, str(tmp_path / "mesh"), "preferences", 2, options, given, "DPO")[0]
    assert_equal_logs(found, expected, PREFERENCE, 4, {})
    assert_equal_weights(tmp_path)
