"""What does a checkpoint cost? The seconds of a save, of its checksums, and of the step that it interrupts.

    python recipes/checkpointing.py [--hidden 1024 --layers 6 --vocab 16000] [--ranks 2] [--folder /tmp] [--saves 3]

Gloo ranks on the CPU train a random Qwen2-shaped fp32 model with AdamW, whose checkpoint has 12 bytes per parameter. The
saves are made in every third step, or beside the training (`TPSPConfig(async_save=True)`). The pause of a step is the time
until it goes on. The average is over all steps, those that a save runs beside included: on a machine whose ranks compute
on the same cores, it is not free. `--folder` is on the disk that is to be measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
import torch.distributed as dist
from faulty_ranks import Rows, quiet
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.checkpoint import folders, manifest, resuming
from hf_tpsp.tools.ranks import RankPool

# A save in every third step, so that an asynchronous one has time to end.
EVERY = 3


class StepTimes(TrainerCallback):
    """The moments at which the steps begin, on all ranks."""

    def __init__(self):
        self.begins: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        dist.barrier()
        self.begins.append(time.perf_counter())


@contextmanager
def timed_checksums() -> Iterator[list[float]]:
    """While inside, the seconds that this rank spends on checksums are appended to the list."""
    seconds: list[float] = []
    hasher = manifest.xxhash.xxh3_128

    class Timed:
        def __init__(self):
            self.hash, self.hexdigest = hasher(), lambda: self.hash.hexdigest()

        def update(self, data):
            start = time.perf_counter()
            self.hash.update(data)
            seconds.append(time.perf_counter() - start)

    manifest.xxhash.xxh3_128 = Timed
    try:
        yield seconds
    finally:
        manifest.xxhash.xxh3_128 = hasher


def measure(config: TPSPConfig, folder: Path, saves: int) -> dict[str, float]:
    """This rank's seconds, with the settings of `config`."""
    with hf_tpsp.enable(config), timed_checksums() as checksums, quiet():
        times = StepTimes()
        arguments = TrainingArguments(
            str(folder / "out"), max_steps=EVERY * (saves + 1) + 1, save_steps=EVERY, per_device_train_batch_size=1, report_to=[],
            disable_tqdm=True, use_cpu=True, logging_strategy="no", save_total_limit=1,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        trainer = Trainer(model, arguments, train_dataset=Rows(64, 128), callbacks=[times])
        save, spans = trainer._save_checkpoint, []

        def timed(*args) -> None:
            start = time.perf_counter()
            save(*args)
            spans.append(time.perf_counter() - start)

        trainer._save_checkpoint = timed
        trainer.train()
        hashed = sum(checksums) / len(spans)
        last = folders.checkpoints(folder / "out")[-1]
        start = time.perf_counter()
        resuming.check(last)
        return {
            "pause": statistics.median(spans[1:]), "mean": (times.begins[-1] - times.begins[EVERY]) / (EVERY * saves),
            "checksums": hashed, "check at resume": time.perf_counter() - start,
            "MB": sum(file.size for file in manifest.read(last)["files"].values()) / 1e6,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("layers", 6), ("vocab", 16000), ("ranks", 2), ("saves", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 3 * args.hidden}
    config = Qwen2Config(hidden_size=args.hidden, num_hidden_layers=args.layers, vocab_size=args.vocab, **sizes)
    pool = RankPool(["transformers.models.qwen2.modeling_qwen2"])
    table = Table(
        "save", "MB", "pause of a step s", "a step on the average s", "checksums s", "of the save", "check at resume s"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        Qwen2ForCausalLM(config).save_pretrained(Path(place) / "model")
        try:
            for beside in (False, True):
                choice = TPSPConfig(tp_size=2, dp_shard_size=args.ranks // 2, check="off", async_save=beside)
                # The slowest rank's.
                found = pool.run(args.ranks, measure, choice, Path(place), args.saves, timeout=1800)
                worst = {name: max(each[name] for each in found) for name in found[0]}
                columns = ("pause", "mean", "checksums")
                table.add_row(
                    "beside the training" if beside else "in the step", f"{worst['MB']:.0f}", *(f"{worst[n]:.3f}" for n in columns),
                    "" if beside else f"{worst['checksums'] / worst['pause']:.1%}", f"{worst['check at resume']:.2f}",
                )  # fmt: skip
        finally:
            pool.stop()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
