"""What the ranks of `faults.py` run: a small training, and what happens to it at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.checkpoint import folders, manifest
from hf_tpsp.fingerprint import fingerprint

STEPS = 3


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: int = 16, tokens: int = 12):
        self.rows, self.tokens = rows, tokens

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        ids = torch.randint(3, 90, (self.tokens,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "labels": ids}


def train(config: TPSPConfig, folder: Path, *, resume: bool = False, at_save: Callable[[int], None] | None = None,
          callback: TrainerCallback | None = None, **options) -> dict[str, int]:  # fmt: skip
    """An ordinary script: `STEPS` steps, a checkpoint after each. Returns the fingerprint of each rank's weights.

    Args:
        at_save: is called with the step before each save.
    """
    with hf_tpsp.enable(config):
        given = {"max_steps": STEPS, "save_steps": 1, "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True,
                 "use_cpu": True, "logging_strategy": "no", "per_device_train_batch_size": 4 // config.dp_size}  # fmt: skip
        arguments = TrainingArguments(str(folder / "out"), **{**given, **options})
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback] if callback else None)
        save = trainer._save_checkpoint

        def watched(*args, **kwargs):
            if at_save:
                at_save(trainer.state.global_step)
            save(*args, **kwargs)

        trainer._save_checkpoint = watched
        with quiet():
            trainer.train(resume_from_checkpoint=resume)
        return {name: int(fingerprint(p.to_local())) for name, p in model.named_parameters()}


@contextmanager
def quiet() -> Iterator[None]:
    """The Trainer prints its last metrics; 200 times is too often."""
    with open(os.devnull, "w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = before


class Moments:
    """Calls `then` at the n-th moment of a save: when a file of it is opened, is in the middle of being written, or when
    something is renamed, made or deleted. It is given the path."""

    EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree")

    def __init__(self, folder: Path, n: int, then: Callable[[str], None]):
        self.paths, self.is_saving, self._folder, self._n, self._then = [], False, str(folder / "out"), n, then
        sys.addaudithook(self._event)
        original = manifest._DigestedStream.write

        def write(stream, data):
            if self.is_saving and len(data) > 64:
                half = len(data) // 2
                original(stream, data[:half])
                stream.flush()
                self._moment(str(getattr(stream._stream, "name", "")))
                return half + original(stream, data[half:])
            return original(stream, data)

        manifest._DigestedStream.write = write

    def _event(self, event: str, args: tuple) -> None:
        if self.is_saving and event in self.EVENTS:
            for path in [str(arg) for arg in args if self._folder in str(arg)][:1]:
                self._moment(path)

    def _moment(self, path: str) -> None:
        self.paths.append(path)
        if len(self.paths) == self._n:
            self._then(path)


def note(folder: Path, where: str = "") -> None:
    """Write down that the fault comes now, at this path."""
    (folder / "fault").write_text(f"{time.monotonic()} {where}")


def die(folder: Path, everybody: list[int], where: str) -> None:
    note(folder, where)
    for process in everybody:
        os.kill(process, signal.SIGKILL)


def killed(
    config: TPSPConfig, folder: Path, victim: int = -1, n: int = 0, everybody: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Train, and have rank `victim`, or with it everybody, die at its n-th moment of the second save. Returns what `train`
    does and the path of each moment, if it came to no end."""
    processes = [0] * dist.get_world_size()
    dist.all_gather_object(processes, os.getpid())
    others = [p for p in processes if p != os.getpid()] if everybody else []
    moments = Moments(
        folder, n if dist.get_rank() == victim else 0, lambda where: die(folder, [*others, os.getpid()], where)
    )

    def at_save(step: int) -> None:
        moments.is_saving = step == 2

    weights = train(config, folder, resume=bool(folders.checkpoints(folder / "out")), at_save=at_save)
    return weights, moments.paths


def limited(config: TPSPConfig, folder: Path) -> None:
    """Train; from the second save on, the last rank can write no file of more than 4 KiB."""
    import resource

    def at_save(step: int) -> None:
        if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            note(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    train(config, folder, resume=True, at_save=at_save)


class Terminate(TrainerCallback):
    """Sends this rank SIGTERM at the beginning of the second step."""

    def __init__(self, folder: Path):
        self._folder = folder

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            note(self._folder)
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(config: TPSPConfig, folder: Path, victim: int) -> int:
    """Train; one rank gets SIGTERM in the second step. Returns the last step for which there is a checkpoint."""
    callback = Terminate(folder) if dist.get_rank() == victim else None
    train(config, folder, resume=True, callback=callback, enable_jit_checkpoint=True, save_strategy="no")
    return int(folders.checkpoints(folder / "out")[-1].name.split("-")[1])


def stands_still(config: TPSPConfig, folder: Path) -> None:
    """Train with a timeout of 5 s; the last rank is stopped in the second save."""
    # The pool has made the process group, whose timeout the Trainer's `ddp_timeout` would be in a run of its own.
    distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)

    def stand_still(where: str) -> None:
        note(folder, where)
        os.kill(os.getpid(), signal.SIGSTOP)

    last = dist.get_rank() == dist.get_world_size() - 1
    moments = Moments(folder, 2 if last else 0, stand_still)

    def at_save(step: int) -> None:
        moments.is_saving = step == 2

    train(config, folder, resume=True, at_save=at_save)
