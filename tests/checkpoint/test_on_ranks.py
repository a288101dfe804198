"""Saves and resumes on two ranks: what the Trainer and accelerate do, and what all ranks say if it fails."""

import contextlib
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from training import Rows
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, trainer_utils

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.checkpoint import folders, manifest
from hf_tpsp.checkpoint.outcome import CheckpointError
from hf_tpsp.fingerprint import fingerprint

CONFIG = TPSPConfig(tp_size=2, check="off")


class AtStep(TrainerCallback):
    """Calls something at the beginning of a step, which the state counts from 0."""

    def __init__(self, step: int, call):
        self.step, self.call = step, call

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


def trainer_for(folder: Path, out: str, *callbacks, **options) -> Trainer:
    given = {
        "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "logging_strategy": "no", "lr_scheduler_type": "constant", "save_total_limit": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    arguments = TrainingArguments(str(folder / out), **{**given, **options})
    return Trainer(model, arguments, train_dataset=Rows(16, 1), eval_dataset=Rows(4, 3), callbacks=list(callbacks))


def weights(trainer: Trainer) -> dict[str, int]:
    return {name: int(fingerprint(p.to_local())) for name, p in trainer.model.named_parameters()}


def refusal(call) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


@contextlib.contextmanager
def full_disk(rank: int):
    """While inside, `rank` can write no file of more than 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shards(checkpoint: Path) -> dict[str, manifest.File]:
    files = manifest.read(checkpoint)["files"]
    return {name: file for name, file in files.items() if name.endswith((".distcp", ".pth", "scheduler.pt"))}


def saves(folder: Path) -> dict:
    """A run that saves in its steps, one that does so beside them, and one that is resumed."""
    found = {}
    with hf_tpsp.enable(CONFIG):
        best = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
        }
        trainer = trainer_for(folder, "out", **best)
        trainer.train()
        whole = weights(trainer)
        found["names"] = sorted(path.name for path in (folder / "out").iterdir())
        found["best"] = trainer.state.best_model_checkpoint
        found["best in file"] = [
            json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"]
            for path in folders.checkpoints(folder / "out")
        ]
    with hf_tpsp.enable(replace(CONFIG, async_save=True)):
        trainer = trainer_for(folder, "beside", **best)
        trainer.train()
        found["beside"] = weights(trainer) == whole
        found["same shards"] = [shards(folder / "beside" / name) == shards(folder / "out" / name) for name in ("checkpoint-1", "checkpoint-3")]  # fmt: skip
        found["shards"] = len(shards(folder / "beside" / "checkpoint-3"))
    with hf_tpsp.enable(CONFIG):
        # The last one is not complete: what is taken is the one before it, by all ranks and by a script that asks.
        if dist.get_rank() == 0:
            (folder / "beside" / "checkpoint-3" / "rng_state_1.pth").unlink()
        dist.barrier()
        found["last"] = trainer_utils.get_last_checkpoint(str(folder / "beside"))
        trainer = trainer_for(folder, "beside", **best)
        trainer.train(resume_from_checkpoint=True)
        found["resumed"] = weights(trainer) == whole and trainer.state.global_step == 3
    return found


def test_saves_and_resumes(ranks, tmp_path):
    models.build("qwen2", tied=True, vocab_size=132).save_pretrained(tmp_path / "model")
    for found in ranks.run(2, saves, tmp_path):
        assert found["names"] == ["checkpoint-1", "checkpoint-3"]
        assert [found["best"]] * 2 == found["best in file"] == [str(tmp_path / "out" / "checkpoint-1")] * 2
        assert found["beside"] and found["same shards"] == [True, True] and found["shards"] == 7
        assert found["last"] == str(tmp_path / "beside" / "checkpoint-1")
        assert found["resumed"]


def fails(folder: Path) -> dict:
    """What each rank says of full disks and damage."""
    found = {}
    with hf_tpsp.enable(CONFIG):
        trainer = trainer_for(folder, "out", max_steps=1)
        trainer.train()
        with full_disk(1):
            trainer = trainer_for(folder, "out", max_steps=2)
            found["full"] = refusal(lambda: trainer.train(resume_from_checkpoint=True))
        with full_disk(0):
            found["weights"] = refusal(lambda: trainer.save_model(str(folder / "weights")))
    with hf_tpsp.enable(replace(CONFIG, async_save=True)), full_disk(1):
        # What is small is written in the step; the shards are not.
        trainer = trainer_for(folder, "out", max_steps=2)
        trainer._save_rng_state = lambda folder: None
        found["full beside"] = refusal(lambda: trainer.train(resume_from_checkpoint=True))
    dist.barrier()
    found["names"] = (
        sorted(path.name for path in folder.iterdir()),
        sorted(path.name for path in (folder / "out").iterdir()),
    )
    with hf_tpsp.enable(CONFIG):
        checkpoint, trainer = folder / "out" / "checkpoint-1", trainer_for(folder, "out")
        found["resume"] = refusal(lambda: trainer.train(resume_from_checkpoint=str(folder / "none")))
        for name in ("optimizer_0/__1_0.distcp", "scheduler.pt"):
            content = bytearray((checkpoint / name).read_bytes())
            content[len(content) // 2] ^= 4
            dist.barrier()
            if dist.get_rank() == 0:
                (checkpoint / name).write_bytes(content)
            dist.barrier()
            found[name] = refusal(lambda: trainer.train(resume_from_checkpoint=True))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(checkpoint / "optimizer_0")
        dist.barrier()
        found["nothing left"] = refusal(lambda: trainer.train(resume_from_checkpoint=True))
    return found


def test_all_ranks_say_the_same_and_the_last_checkpoint_stays(ranks, tmp_path):
    models.build("qwen2", tied=True, vocab_size=132).save_pretrained(tmp_path / "model")
    first, second = ranks.run(2, fails, tmp_path)
    assert first == second
    out = tmp_path / "out"
    for name, words in {
        "full": (f"{out}/checkpoint-2 could not be written", "File too large", "rng_state_1.pth", "(rank 1)"),
        "full beside": (f"{out}/checkpoint-2 could not be written", "File too large", "__1_0.distcp", "(rank 1)"),
        "weights": (f"{tmp_path}/weights could not be written", "File too large", "(rank 0)"),
        "resume": (f"{tmp_path}/none is not there",),
        "optimizer_0/__1_0.distcp": (f"{out}/checkpoint-1/optimizer_0/__1_0.distcp is damaged",),
        "scheduler.pt": ("damaged",),
        "nothing left": (f"{out} has no complete checkpoint", "checkpoint-1", "optimizer_0"),
    }.items():
        assert all(word in first[name] for word in words), (name, first[name])
        assert "\n" not in first[name]
    assert first["names"] == (["model", "out"], ["checkpoint-1"])


def is_preempted(folder: Path) -> tuple:
    """SIGTERM to the second rank in the second step, and what comes of it."""
    before = signal.getsignal(signal.SIGTERM)
    terminate = AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM) if dist.get_rank() else None)
    with hf_tpsp.enable(CONFIG):
        # Each strategy by itself would save another time, or not at all.
        trainer = trainer_for(folder, "out", terminate, max_steps=4, enable_jit_checkpoint=True, save_strategy="epoch")
        saved = []
        save, trainer._save_checkpoint = (
            trainer._save_checkpoint,
            lambda *args: (saved.append(trainer.state.global_step), save(*args)),
        )
        trainer.train()
        assert signal.getsignal(signal.SIGTERM) is before
        stopped = trainer.state.global_step
        trainer = trainer_for(folder, "out", max_steps=3, save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        resumed = weights(trainer)
        trainer = trainer_for(folder, "plain", max_steps=3, save_strategy="no")
        trainer.train()
    return stopped, saved, resumed == weights(trainer)


def test_preemption(ranks, tmp_path):
    models.build("qwen2", tied=True, vocab_size=132).save_pretrained(tmp_path / "model")
    assert ranks.run(2, is_preempted, tmp_path) == [(2, [2], True)] * 2


def saves_by_itself(folder: Path) -> dict:
    """A loop of one's own: folders that accelerate names, and one that has a name."""
    with hf_tpsp.enable(CONFIG):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        project = ProjectConfiguration(str(folder / "project"), automatic_checkpoint_naming=True, total_limit=1)
        accelerator = Accelerator(cpu=True, project_config=project)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for seed in range(2):
            model(**models.batch(2, 8, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            accelerator.save_state()
        before = [p.to_local().clone() for p in model.parameters()]
        checkpoint = folder / "project" / "checkpoints" / "checkpoint_1"
        found = {
            "names": sorted(path.name for path in checkpoint.parent.iterdir()),
            "problem": folders.problem_of(checkpoint),
        }
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        if dist.get_rank() == 0:
            (checkpoint.parent / "checkpoint_7").mkdir()
        dist.barrier()
        accelerator.load_state()
        found["loaded"] = all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
        with full_disk(1):
            found["full"] = refusal(accelerator.save_state)
            project.automatic_checkpoint_naming = False
            found["full, named"] = refusal(lambda: accelerator.save_state(str(folder / "project" / "named")))
        dist.barrier()
        if dist.get_rank() == 0:
            (checkpoint / "random_states_1.pkl").write_bytes(
                bytes(manifest.read(checkpoint)["files"]["random_states_1.pkl"].size)
            )
        dist.barrier()
        found["damaged"] = refusal(lambda: accelerator.load_state(str(checkpoint)))
        found["left"] = sorted(path.name for path in (folder / "project").iterdir())
    return found


def test_accelerate(ranks, tmp_path):
    models.build("qwen2", tied=True, vocab_size=132).save_pretrained(tmp_path / "model")
    first, second = ranks.run(2, saves_by_itself, tmp_path)
    assert first == second
    assert first["names"] == ["checkpoint_1"] and first["problem"] is None and first["loaded"]
    for name, path in {"full": "checkpoints/checkpoint_2", "full, named": "named"}.items():
        assert f"{tmp_path}/project/{path} could not be written" in first[name] and "File too large" in first[name]
        assert "random_states_1.pkl" in first[name]
    assert "random_states_1.pkl is damaged" in first["damaged"] and first["left"] == ["checkpoints"]
