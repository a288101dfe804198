"""TRL's SFTTrainer on the mesh against one process with the same global batch: everything that it logs."""

import json
import os
import runpy
import sys
from pathlib import Path

import models
import pytest
import torch
import transformers
from transformers import TrainerCallback

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.logits import LazyLogits

trl = pytest.importorskip("trl", minversion="1.16")
sys.path.append(str(Path(__file__).parents[1] / "recipes"))  # last: it has a parity.py too

MESH_2x2 = TPSPConfig(tp_size=2, dp_shard_size=2)
LIMIT = 1e-4
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "epoch")
EVALUATED = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--lora_dropout", "0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> str:
    """A folder with a tiny Qwen2 and its tokenizer, and the shipped conversations in two of TRL's formats."""
    from tiny_model import DATA, train_tokenizer

    folder = tmp_path_factory.mktemp("trl")
    tokenizer = train_tokenizer(600)
    models.build("qwen2", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [[m["content"] for m in json.loads(line)["messages"][:2]] for line in DATA.read_text().splitlines()]
    for name, row_of in (
        ("text", lambda prompt, answer: {"text": f"{prompt} {answer}"}),
        ("pairs", lambda prompt, answer: {"prompt": prompt, "completion": f" {answer}"}),
    ):
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


def on_mesh(*arguments) -> tuple[list[dict], int]:
    end, transformers.Trainer.end = transformers.Trainer.end, lambda self: None  # the pool keeps its process group
    try:
        with hf_tpsp.enable(MESH_2x2):
            return run_script(*arguments)
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
    found, read = ranks.run(4, on_mesh, work, str(tmp_path / "mesh"), data, 2, options)[0]
    if case == "label smoothing":  # its evaluation asks for whole logits
        assert read > 0
    else:
        assert read == 0, "the whole head never runs"
    for names, entries in ((LOGGED, 10), (EVALUATED, 2)):
        for name in names:
            one, mesh = ([entry[name] for entry in log if names[0] in entry] for log in (expected, found))
            assert len(one) == len(mesh) == entries, name
            # Without a number of items, each rank's mean counts alike, as in plain data parallelism.
            limit = 1e-2 if name == "eval_loss" else LIMIT
            assert max(abs(a - b) / (abs(a) or 1) for a, b in zip(one, mesh, strict=True)) < limit, (name, one, mesh)
    saved = "adapter_model.safetensors" if "LoRA" in case else "model.safetensors"
    one, mesh = (transformers.modeling_utils.load_state_dict(str(tmp_path / run / saved)) for run in ("one", "mesh"))
    assert one.keys() == mesh.keys()
    for name, weight in one.items():
        assert torch.linalg.norm(mesh[name] - weight) < 1e-3 * (1e-3 + torch.linalg.norm(weight)), name
