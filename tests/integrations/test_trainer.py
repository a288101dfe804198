"""The stock Trainer on the mesh against the stock Trainer in one process with the same global batch."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import parity
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig
from safetensors.torch import load
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training import (
    MESH_1x2,
    MESH_2x2,
    Rows,
    assert_equal_logs,
    assert_equal_weights,
    differences,
    train,
    train_on_mesh,
)
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_tpsp
from hf_tpsp import TPSPConfig


def test_interrupted_and_resumed(ranks, tiny, tmp_path):
    """2x2 with accumulation, clipping, evaluation (before training too): equal to one process, and to itself resumed in
    the middle."""
    expected = train(tiny, str(tmp_path / "one"), 1, steps=12)
    whole = ranks.run(4, train_on_mesh, MESH_2x2, tiny, str(tmp_path / "whole"), steps=12)
    for log in whole:
        assert_equal_logs(log, expected)
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    resumed = ranks.run(4, train_on_mesh, MESH_2x2, tiny, str(tmp_path / "cut"), steps=12, resume=checkpoint)
    resumed[0][0]["before"] = whole[0][0]["before"]  # evaluated before the checkpoint was read
    worst = differences(resumed[0], whole[0], first=7)
    worst.pop("train_loss")  # the Trainer averages it over the steps of this run only
    assert parity.largest(worst.values()) == 0

    one, mesh = (AutoModelForCausalLM.from_pretrained(tmp_path / d / "final") for d in ("whole", "cut"))
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    for a, b in zip(one.parameters(), mesh.parameters(), strict=True):
        assert torch.equal(a, b)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "final")
    for a, b in zip(one.parameters(), alone.parameters(), strict=True):
        assert parity.relative(a, b) < 1e-4


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TPSPConfig(tp_size=4), {}),
        (TPSPConfig(tp_size=2, dp_replicate_size=2), {}),
        (MESH_2x2, {"activation_checkpointing": True, "save_strategy": "no"}),
        (TPSPConfig(tp_size=2, dp_shard_size=2, activation_checkpointing="full"), {"save_strategy": "no"}),
    ],
    ids=["pure TP", "HSDP", "Trainer's activation checkpointing", "TPSPConfig's"],
)
def test_meshes_and_checkpointing(ranks, tiny, expected, tmp_path, config, options):
    assert_equal_logs(ranks.run(4, train_on_mesh, config, tiny, str(tmp_path), **options)[0], expected)


def test_label_smoothing(ranks, tiny, tmp_path):
    options = {"label_smoothing_factor": 0.1, "steps": 4, "save_strategy": "no"}
    expected = train(tiny, str(tmp_path / "one"), 1, **options)
    found = ranks.run(4, train_on_mesh, MESH_2x2, tiny, str(tmp_path / "mesh"), **options)
    assert_equal_logs(found[0], expected)


class Ragged(Rows):
    """Rows of 1 to 17 tokens, the first ones fewer than TP ranks."""

    def __getitem__(self, row):
        return {name: value[: 1 + row * 5 % 17] for name, value in super().__getitem__(row).items()}


def pad(rows: list[dict]) -> dict:
    """Pad `Ragged` rows on the right."""
    values = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in values.items()
    }


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[row] for row in range(len(self.rows)))


def own_loss(outputs, labels, num_items_in_batch=None):
    """A script's own loss, of the logits."""
    logits = outputs.logits[:, :-1].float()
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum")
    return losses / (1 if num_items_in_batch is None else num_items_in_batch)


class OwnLoss(Trainer):
    """A script's own `compute_loss`, which weights the tokens: the same as the model's only if they are whole and right."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        targets = inputs["labels"][:, 1:]
        log_probs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = -(log_probs * (targets >= 0) * torch.linspace(0, 1, targets.shape[1])).sum() / targets.numel()
        return (loss, outputs) if return_outputs else loss


QUICK = {"eval_strategy": "no", "save_strategy": "no", "steps": 3}
FLAT = {"data_collator": DataCollatorWithFlattening(return_tensors="pt"), "train_dataset": Ragged(64, 1)}
# What is run, and on which mesh. Noise and the order by lengths are dealt to data-parallel ranks in their own way,
# as without hf_tpsp.
OPTIONS = {
    "adamw_torch": (MESH_2x2, {"optim": "adamw_torch"}),
    "sgd": (MESH_1x2, {"optim": "sgd"}),
    "adagrad": (MESH_1x2, {"optim": "adagrad"}),
    "rmsprop": (MESH_1x2, {"optim": "rmsprop"}),
    "compute_loss_func": (MESH_2x2, {"given": {"compute_loss_func": own_loss}}),
    "compute_loss": (MESH_2x2, {"cls": OwnLoss, "gradient_accumulation_steps": 1}),
    "streamed": (MESH_1x2, {"given": {"train_dataset": Stream(Rows(64, 1))}}),
    "flattened rows": (MESH_2x2, {"given": {**FLAT}, "include_num_input_tokens_seen": "no"}),
    "single rows": (MESH_1x2, {"given": {"train_dataset": Ragged(64, 1)}, "per_device_train_batch_size": 1}),
    "group_by_length": (
        MESH_1x2,
        {"given": {"train_dataset": Ragged(64, 1), "data_collator": pad}, "train_sampling_strategy": "group_by_length"},
    ),
    "NEFTune": (MESH_1x2, {"neftune_noise_alpha": 5.0}),
    "several train()": (MESH_2x2, {"times": 2}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(ranks, tiny, tmp_path, option):
    """Logs and weights of three steps are those of one process."""
    config, options = OPTIONS[option]
    one, mesh = str(tmp_path / "one"), str(tmp_path / "mesh")
    expected = train(tiny, one, 1, **{**QUICK, **options})
    found = ranks.run(config.world_size, train_on_mesh, config, tiny, mesh, **{**QUICK, **options})[0]
    assert_equal_logs(found, expected)
    assert_equal_weights(mesh, one)


def test_best_model_at_the_end(ranks, tiny, tmp_path):
    """The first of two evaluations is the better one: its weights come back, and its checkpoint is kept."""
    one, mesh = str(tmp_path / "one"), str(tmp_path / "mesh")
    options = {"load_best_model_at_end": True, "save_total_limit": 1}
    expected = train(tiny, one, 1, **options)
    found = ranks.run(4, train_on_mesh, MESH_2x2, tiny, mesh, **options)[0]
    assert_equal_logs(found, expected)
    evaluated = [entry["eval_loss"] for entry in expected if entry.get("step") and "eval_loss" in entry]
    assert evaluated.index(min(evaluated)) < len(evaluated) - 1, "the last one is the best one, which proves nothing"
    assert_equal_weights(mesh, one)
    checkpoints = [sorted(f.name for f in (tmp_path / run).glob("checkpoint-*")) for run in ("one", "mesh")]
    assert checkpoints[0] == checkpoints[1]


def lora_on_mesh(model: str, out: str, **options) -> list[dict]:
    return train_on_mesh(MESH_2x2, model, out, adapter=LoraConfig(r=4, target_modules="all-linear"), **options)


def test_lora_interrupted_and_resumed(ranks, tiny, tmp_path):
    """Equal to one process, and bitwise to itself resumed."""
    adapter = LoraConfig(r=4, target_modules="all-linear")
    expected = train(tiny, str(tmp_path / "one"), 1, adapter=adapter)
    whole = ranks.run(4, lora_on_mesh, tiny, str(tmp_path / "whole"))[0]
    whole[0]["before"], found = expected[0]["before"], whole
    assert_equal_logs(found, expected)
    assert_equal_weights(str(tmp_path / "whole"), str(tmp_path / "one"))
    resumed = ranks.run(4, lora_on_mesh, tiny, str(tmp_path / "cut"), resume=str(tmp_path / "whole" / "checkpoint-2"))[
        0
    ]
    worst = differences(resumed, whole, first=3)
    del worst["train_loss"], worst["before"]
    assert parity.largest(worst.values()) == 0
    assert_equal_weights(str(tmp_path / "cut"), str(tmp_path / "whole"), limit=0)


def pushed(model: str, out: str, dp_size: int, adapter: LoraConfig | None = None) -> dict[str, dict[str, bytes]]:
    """Commit message → the files uploaded with it, in a run that pushes at its checkpoints and at its end."""
    commits, hf_api = {}, transformers.trainer.hf_api

    def upload_folder(folder_path, commit_message, **kwargs):
        names = [name for name in os.listdir(folder_path) if not name.startswith(("checkpoint", "final"))]
        commits[commit_message] = {name: Path(folder_path, name).read_bytes() for name in names}
        return SimpleNamespace(done=lambda: True)

    def create_repo(name, **kwargs):
        return SimpleNamespace(repo_id=f"me/{name}")

    hub = SimpleNamespace(upload_folder=upload_folder, create_repo=create_repo)
    transformers.trainer.hf_api = lambda *args, **kwargs: hub
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})), pad_token="a")
    try:
        train(model, out, dp_size, adapter=adapter, steps=2, push_to_hub=True, given={"processing_class": tokenizer})
    finally:
        transformers.trainer.hf_api = hf_api
    return commits


def pushed_on_mesh(*args) -> dict[str, dict[str, bytes]]:
    with hf_tpsp.enable(MESH_2x2):
        return pushed(*args)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["model", "adapter"])
def test_pushed_folders_are_whole(ranks, tiny, tmp_path, adapter):
    """Weights, config, tokenizer and card, as one process pushes them, from rank 0."""
    expected = pushed(tiny, str(tmp_path / "one"), 1, adapter)
    found, *others = ranks.run(4, pushed_on_mesh, tiny, str(tmp_path / "mesh"), 2, adapter)
    assert not any(others) and len(found) == 3  # two checkpoints, and the end
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    for message, files in expected.items():
        assert files.keys() - {"README.md"} == found[message].keys() - {"README.md"}  # peft writes its card every time
        assert {weights, "tokenizer.json"} <= files.keys() and (
            message != "Model save" or "README.md" in found[message]
        )
        one, mesh = load(files[weights]), load(found[message][weights])
        assert one.keys() == mesh.keys()
        for name, weight in one.items():
            assert parity.relative(mesh[name], weight) < 1e-4, (message, name)


def metrics(model: str, out: str, dp_size: int) -> dict:
    """What `compute_metrics`, `preprocess_logits_for_metrics` and `predict` make of 22 rows, which do not fill the last
    batch, and of the 24 that do."""
    seen = {}

    def compute_metrics(prediction):
        seen.update(logits=prediction.predictions, labels=prediction.label_ids)
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    arguments = TrainingArguments(output_dir=out, per_device_eval_batch_size=4 // dp_size, report_to=[], disable_tqdm=True,
                                  use_cpu=True)  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = Trainer(model=loaded, args=arguments, eval_dataset=Rows(22, 3), compute_metrics=compute_metrics)
    seen["accuracy"] = trainer.evaluate()["eval_accuracy"]
    seen["predicted"] = trainer.predict(Rows(22, 4)).predictions
    trainer.compute_metrics = None
    seen["perplexity"] = math.exp(trainer.evaluate(Rows(24, 3))["eval_loss"])
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    seen["preprocessed"] = trainer.predict(Rows(22, 4)).predictions
    return seen


def metrics_on_mesh(*args) -> dict:
    with hf_tpsp.enable(MESH_2x2):
        return metrics(*args)


def test_evaluation_sees_each_row_once(ranks, tiny, tmp_path):
    expected = metrics(tiny, str(tmp_path), 1)
    found = ranks.run(4, metrics_on_mesh, tiny, str(tmp_path), 2)[0]
    assert (found["labels"] == expected["labels"]).all() and len(found["labels"]) == 22
    for name in ("logits", "predicted"):
        assert found[name].shape == expected[name].shape and abs(found[name] - expected[name]).max() < 1e-5, name
    assert (found["preprocessed"] == expected["preprocessed"]).all() and len(found["preprocessed"]) == 22
    assert found["accuracy"] == expected["accuracy"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


def bf16_on_mesh(model: str, out: str, mixed_precision: str, **options) -> dict:
    with hf_tpsp.enable(TPSPConfig(tp_size=2, dp_shard_size=2, mixed_precision=mixed_precision)):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)  # as a checkpoint in bf16 would
        seen = {}

        class Look(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model, **kwargs):
                seen["weights"] = {p.dtype for p in model.parameters()} | {
                    p.to_local().dtype for p in model.parameters()
                }
                seen["gradients"] = {p.grad.to_local().dtype for p in model.parameters()}

        loaded.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(compute=a[0].dtype))
        log = train(loaded, out, 2, callbacks=[Look()], **options)
    return {"log": log, **seen}


@pytest.fixture(scope="module")
def expected_in_bf16(tiny, tmp_path_factory):
    return train(tiny, str(tmp_path_factory.mktemp("bf16")), 1, bf16=True, **QUICK)


@pytest.mark.parametrize(
    ("mixed_precision", "options"), [("no", {"bf16": True}), ("bf16", {})], ids=["the script's", "the preset's"]
)
def test_bf16_has_fp32_masters(ranks, tiny, expected_in_bf16, tmp_path, mixed_precision, options):
    expected = expected_in_bf16
    for found in ranks.run(4, bf16_on_mesh, tiny, str(tmp_path / "mesh"), mixed_precision, **QUICK, **options):
        assert found["weights"] == found["gradients"] == {torch.float32}
        assert found["compute"] == torch.bfloat16
        losses = [[e["loss"] for e in log if "loss" in e] for log in (found["log"], expected)]
        # bf16 keeps 8 bits; the two runs round at different places, and the masters started from rounded weights.
        assert parity.largest(abs(a / b - 1) for a, b in zip(*losses, strict=True)) < 2e-3
    assert [e["loss"] for e in expected if "loss" in e] != losses[0], "bf16 was not switched on"
