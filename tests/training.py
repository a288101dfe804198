"""An ordinary script on the stock Trainer, in one process and on a mesh, and the comparison of their logs and weights."""

import os

import parity
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_tpsp
from hf_tpsp import TPSPConfig

MESH_1x2, MESH_2x2 = TPSPConfig(tp_size=2), TPSPConfig(tp_size=2, dp_shard_size=2)
LOGGED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "eval_loss",
    "num_input_tokens_seen",
    "epoch",
    "total_flos",
    "train_loss",
)


class Rows(torch.utils.data.Dataset):
    """Rows of 17 tokens whose number of targets differs from row to row."""

    def __init__(self, rows: int, seed: int):
        self.ids = torch.randint(3, 132, (rows, 17), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        labels = self.ids[row].clone()
        labels[: row % 7] = -100
        return {"input_ids": self.ids[row], "labels": labels, "attention_mask": torch.ones_like(labels)}


def train(
    model, out: str, dp_size: int, *, resume=None, callbacks=(), steps=4, cls=Trainer, given=None, adapter=None,
    times=1, **options,
) -> list[dict]:  # fmt: skip
    """An ordinary script: arguments, model, Trainer, train, save. Returns the logged values.

    `given` are further arguments of the Trainer, `options` of its `TrainingArguments`; it trains `times` times.
    """
    per_device = {"per_device_train_batch_size": 4 // dp_size, "per_device_eval_batch_size": 4 // dp_size}
    saving = {"eval_strategy": "steps", "eval_steps": steps // 2, "save_strategy": "steps", "save_steps": steps // 2}
    defaults = {
        "output_dir": out, "max_steps": steps, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "learning_rate": 1e-2,
        "warmup_steps": 3, "seed": 0, "logging_steps": 1, "include_num_input_tokens_seen": "all", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, **per_device, **saving,
    }  # fmt: skip
    arguments = TrainingArguments(**{**defaults, **options})
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) if isinstance(model, str) else model
    if adapter:
        torch.manual_seed(5)
        model = get_peft_model(model, adapter)
    trainer = cls(
        model=model, args=arguments, callbacks=[*callbacks],
        **{"train_dataset": Rows(64, 1), "eval_dataset": Rows(24, 3), **(given or {})},
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    for _ in range(times):
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{out}/final")
    return [{"before": before}, *trainer.state.log_history]


def train_on_mesh(config: TPSPConfig, model: str, out: str, **options) -> list[dict]:
    with hf_tpsp.enable(config):
        return train(model, out, config.dp_size, **options)


def assert_equal_weights(out: str, expected: str, limit: float = 1e-4) -> None:
    """What two runs have saved at their end, the model or an adapter."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if os.path.exists(f"{expected}/final/{name}"):
            found, weights = (load_file(f"{folder}/final/{name}") for folder in (out, expected))
            assert found.keys() == weights.keys()
            errors = {key: parity.relative(found[key], weight) for key, weight in weights.items()}
            assert parity.largest(errors.values()) <= limit, errors


def differences(found: list[dict], expected: list[dict], first: int = 0) -> dict[str, float]:
    """Largest relative difference of each logged value, from step `first` on. The same values must be logged."""
    worst = {}
    for name in ("before", *(name for name in LOGGED if any(name in entry for entry in expected))):
        pairs = [
            [entry[name] for entry in log if name in entry and entry.get("step", first) >= first]
            for log in (found, expected)
        ]
        assert len(pairs[0]) == len(pairs[1]) > 0, f"{name} was logged {len(pairs[0])} times, not {len(pairs[1])}"
        worst[name] = parity.largest(abs(a - b) / (abs(b) or 1) for a, b in zip(*pairs, strict=True))
    return worst


def assert_equal_logs(found, expected, first=0):
    worst = differences(found, expected, first)
    limits = {"grad_norm": 1e-4, "loss": 1e-5, "eval_loss": 1e-5, "before": 1e-5, "train_loss": 1e-5}
    exceeded = {name: value for name, value in worst.items() if not value <= limits.get(name, 0)}
    assert not exceeded, exceeded
