"""What the ranks of a Trainer, or of a loop with accelerate, must have alike beside the model: compared before it hangs."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.trainer
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..agreement import agree, decide

OWN = {
    "local_rank", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
    "hub_token", "project", "trackio_space_id", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "skip_memory_metrics", "push_to_hub", "output_dir", "resume_from_checkpoint",
}  # fmt: skip
"""The Trainer's arguments that each rank may have as it likes: where it logs to, how it reads its data, and what the
folders are called on its host. Whether they are the same ones is compared by what is in them."""

MARK = ".hf_tpsp-shared"
"""What rank 0 writes into the output folder, for the others to see, while a Trainer is made."""

SHOWN = 5.0
"""Seconds for which a rank looks for it."""


def compare_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` on all ranks unless their `args` are alike, each can write into the output folder, and it is
    one folder, whatever it is called on each host, if checkpoints are to be saved."""
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    folder = args.output_dir
    given = {name: value for name, value in args.to_dict().items() if name not in OWN}
    agree("the Trainer's set-up", {f"TrainingArguments' {name}": _text(value) for name, value in given.items()})
    refusal = _refusal(folder) if args.should_save or saves else None

    def judge(refusals: list[str | None]) -> str | None:
        for rank, why in enumerate(refusals):
            if why is not None:
                return (
                    f"hf_tpsp: rank {rank} cannot write into output_dir={folder!r}: {why}. Each rank writes its part of a checkpoint; "
                    "choose a folder that all of them can write into."
                )
        return None

    # It is there before the others look for it, which they do when all have come this far.
    mark, mine = Path(folder) / MARK, secrets.token_hex(8)
    leaves = saves and refusal is None and (not dist.is_initialized() or dist.get_rank() == 0)
    try:
        if leaves:
            mark.write_text(mine)
        decide("the output folder", refusal, judge)
        if saves:
            decide("the sharing of the output folder", [folder, mine if leaves else _seen(mark)], _not_shared)
    finally:
        if leaves:
            mark.unlink(missing_ok=True)


def _seen(mark: Path) -> str | None:
    """What is written in `mark`. A network's file system may show it a moment later."""
    until = time.monotonic() + SHOWN
    while True:
        try:
            return mark.read_text()
        except OSError:
            if time.monotonic() > until:
                return None
            time.sleep(0.1)


def _not_shared(seen: list[list]) -> str | None:
    for rank, (folder, found) in enumerate(seen):
        if found != seen[0][1]:
            return (
                f"hf_tpsp: rank {rank} does not see in output_dir={folder!r} what rank 0 has written into output_dir={seen[0][0]!r}. "
                "All ranks write one checkpoint: choose a folder on a file system that all hosts share."
            )
    return None


def _text(value: Any) -> str:
    """`value` in words that are the same in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _refusal(folder: str) -> str | None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


def compare_start(trainer: Trainer, resume: Any) -> None:
    """Raise `ValueError` on all ranks unless they start the same training: from the same checkpoint, over as many rows.

    Args:
        resume: as in `Trainer.train(resume_from_checkpoint=…)`.
    """
    agree(
        "the start of training",
        {
            **{
                f"the number of rows of {name}": str(len(data)) if isinstance(data, Sized) else "unknown"
                for name in ("train_dataset", "eval_dataset")
                for data in (getattr(trainer, name, None),)
            },
            **checkpoint(trainer.args.output_dir, resume),
        },
    )


def checkpoint(output_dir: str, resume: Any) -> dict[str, str]:
    """Which checkpoint a training resumes from, in words: its folder's name, and size and digest of each file that says
    what else is in it."""
    if resume is True:
        # The Trainer asks the same function, whatever is in its place.
        resume = transformers.trainer.get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if not resume:
        return {"the checkpoint to resume from": "none"}
    folder = Path(str(resume))
    found = {"the checkpoint to resume from": folder.name if folder.is_dir() else f"{folder} (not there)"}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/.metadata")]):
        content = path.read_bytes()
        name = f"the checkpoint's {path.relative_to(folder)}"
        found[name] = f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    return found


def compare_prepared(accelerator: Accelerator, args: tuple) -> None:
    """Raise `ValueError` on all ranks unless what they hand to `Accelerator.prepare` with an optimizer is alike."""
    given = {"gradient_accumulation_steps": str(accelerator.gradient_accumulation_steps)}
    for i, arg in enumerate(args):
        if isinstance(arg, torch.optim.Optimizer):
            groups = [{k: v for k, v in group.items() if k != "params"} for group in arg.param_groups]
            given[f"argument {i}, an optimizer's class"] = type(arg).__name__
            given[f"argument {i}, an optimizer's settings"] = _text(groups)
        elif isinstance(arg, DataLoader):
            batches = len(arg) if isinstance(arg, Sized) and isinstance(arg.dataset, Sized) else "unknown"
            given[f"argument {i}, a DataLoader's batches"] = f"{batches} of {arg.batch_size} rows"
    agree("accelerator.prepare", given)
