"""What becomes of a run when something goes wrong with its checkpoints? Nothing lost, nothing silent, nothing that hangs.

    python recipes/faults.py [--kills 40] [--flips 200] [--ranks 2] [--seed 0]

Gloo ranks on this machine train a tiny random model. They are killed at random points within a save (kill -9, one of
them or all: before a file is opened, in the middle of one, before a rename, …), meet full disks, flipped bits, missing
files, a rank that is stopped, and SIGTERM. After each fault the run is resumed, and its last weights are compared, bit by
bit, with those of a run that nothing happened to. The defaults take some minutes on two cores.

- lost: the run cannot be resumed, or a checkpoint that was complete before is not any more;
- silent: no error, and other weights; or damage that nobody notices;
- hangs: a rank that does not end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from faulty_ranks import STEPS, killed, limited, preempted, stands_still, train
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_tpsp import TPSPConfig
from hf_tpsp.checkpoint import folders, manifest, resuming
from hf_tpsp.tools.ranks import RankPool

LIMIT = 120

# What a path within a checkpoint belongs to.
PARTS = {
    "pytorch_model": "model", "optimizer": "optimizer", "rng_state": "small files", "scheduler": "small files",
    "trainer_state": "small files", "": "manifest, folders, renames",
}  # fmt: skip

# Status, value and time of a rank's end.
End = tuple[str, object, float]


@dataclass
class Outcome:
    """What became of one fault. `seconds`: from the fault to the end of the last rank, if ranks ended for it."""

    fault: str
    lost: bool = False
    silent: bool = False
    hangs: bool = False
    seconds: float | None = None
    detail: str = ""


# ---- the faults --------------------------------------------------------------------------------------------------------


class Faults:
    """Does damage to runs in a folder of its own, on ranks of `pool`."""

    def __init__(self, pool: RankPool, ranks: int, seed: int, place: Path):
        self.pool, self.ranks, self.place = pool, ranks, place
        self.random = random.Random(seed)
        self.config = TPSPConfig(tp_size=2, dp_shard_size=ranks // 2, check="off")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, num_hidden_layers=2, **sizes))
        model.save_pretrained(place / "model")
        ends = self.attempt(killed, self.config, self.fresh("whole"))
        self.expected, moments = zip(*(value for _, value, _ in ends), strict=True)
        # Part of a checkpoint → the moments of a save that are about it, each a rank and a number.
        self.moments: dict[str, list[tuple[int, int]]] = {}
        for rank, paths in enumerate(moments):
            for n, path in enumerate(paths):
                part = next(part for name, part in PARTS.items() if name in path)
                self.moments.setdefault(part, []).append((rank, n + 1))
        assert len(folders.checkpoints(place / "whole" / "out")) == STEPS

    def fresh(self, name: str, checkpoints: int = 0) -> Path:
        """A folder for a run, with the first `checkpoints` of the run that nothing happened to."""
        folder = self.place / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        (folder / "model").symlink_to(self.place / "model")
        for step in range(1, checkpoints + 1):
            shutil.copytree(self.place / "whole" / "out" / f"checkpoint-{step}", folder / "out" / f"checkpoint-{step}")
        return folder

    def run(self, folder: Path, **options) -> list[dict[str, int]]:
        return self.pool.run(self.ranks, train, self.config, folder, timeout=LIMIT, **options)

    def attempt(
        self, function: Callable, config: TPSPConfig, folder: Path, *args, timeout: float = LIMIT, **options
    ) -> list[End]:
        """How `function` ended on each rank of a world of its own, and when."""
        ends = self.pool.attempt(self.ranks, function, config, folder, *args, timeout=timeout, **options)
        now = time.monotonic()
        self.pool.stop_world(self.ranks)
        started = now - max(seconds for *_, seconds in ends)
        return [(status, value, started + seconds) for status, value, seconds in ends]

    def outcome(self, fault: str, folder: Path, ends: list[End]) -> Outcome:
        """What the ends say. The time is from the fault, or from the first end if nobody has noted when it came."""
        noted = folder / "fault"
        begin = float(noted.read_text().partition(" ")[0]) if noted.exists() else min(at for *_, at in ends)
        return Outcome(
            fault, hangs=any(status == "hangs" for status, *_ in ends), seconds=max(at for *_, at in ends) - begin,
            detail=next((last_line(value) for status, value, _ in ends if status == "error"), ""),
        )  # fmt: skip

    @staticmethod
    def one_line(ends: list[End]) -> str:
        """The last line of each rank's error, if all ranks ended with the same; else nothing."""
        lines = {last_line(value) if status == "error" else "" for status, value, _ in ends}
        return min(lines) if len(lines) == 1 else ""

    def judge(self, fault: str, folder: Path, ends: list[End], complete: int = 1) -> Outcome:
        """Resume the run in `folder`, which had the first `complete` checkpoints, after its ranks came to these `ends`."""
        found = self.outcome(fault, folder, ends)
        # The Trainer would take a step more if it were resumed at its last one.
        shutil.rmtree(folder / "out" / f"checkpoint-{STEPS}", ignore_errors=True)
        there = {int(p.name.split("-")[1]) for p in folders.checkpoints(folder / "out") if not folders.problem_of(p)}
        try:
            again = self.run(folder, resume=True)
        except RuntimeError as error:
            found.lost, found.detail = True, last_line(error)
        else:
            found.silent = tuple(again) != self.expected
        found.lost |= not {*range(1, complete + 1)} <= there
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def kill(self, part: str, everybody: bool, beside: bool) -> Outcome:
        """kill -9 of one rank or of all, at a random moment of the second save, which may be asynchronous."""
        ends = [("ok", None, 0.0)]
        # A save may have some moments fewer than the first.
        while all(status == "ok" for status, *_ in ends):
            folder, (victim, n) = self.fresh("killed", 1), self.random.choice(self.moments[part])
            ends = self.attempt(killed, replace(self.config, async_save=beside), folder, victim, n, everybody)
        who = "all ranks" if everybody else "one rank"
        return self.judge(f"kill -9 of {who} in {'an asynchronous' if beside else 'a'} save: {part}", folder, ends)

    def flip(self, path: Path) -> Outcome:
        """One bit of a file of a complete checkpoint."""
        content = path.read_bytes()
        at = self.random.randrange(len(content) * 8)
        path.write_bytes(content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :])
        try:
            outcome = self.checked(f"a flipped bit in {kind_of(path)}", path)
        finally:
            path.write_bytes(content)
        return outcome

    def checked(self, fault: str, path: Path) -> Outcome:
        """Whether the check, that every resume begins with, names the damaged file."""
        folder = next(parent for parent in path.parents if parent.name.startswith("checkpoint-"))
        start = time.perf_counter()
        try:
            resuming.check(folder)
        except Exception as error:
            named = str(path) in str(error)
            return Outcome(fault, silent=not named, seconds=time.perf_counter() - start, detail=str(error))
        return Outcome(fault, silent=True)

    def flips(self, count: int) -> Iterator[Outcome]:
        folder = self.fresh("flipped", 1)
        files = [path for path in sorted((folder / "out").rglob("*")) if path.is_file()]
        for i in range(count):
            yield self.flip(files[i % len(files)])

    def missing(self) -> Iterator[Outcome]:
        """Each file in turn."""
        folder = self.fresh("missing", 1)
        for path in sorted((folder / "out").rglob("*")):
            if path.is_file() and path.name != manifest.NAME:
                content = path.read_bytes()
                path.unlink()
                yield self.checked(f"missing: {kind_of(path)}", path)
                path.write_bytes(content)

    def damaged(self, name: str, harm: Callable[[Path], None], words: str) -> Outcome:
        """A resume from a damaged checkpoint ends all ranks with the same line, which has these words."""
        folder = self.fresh("damaged", 1)
        harm(folder / "out" / "checkpoint-1")
        ends = self.attempt(train, self.config, folder, resume=str(folder / "out" / "checkpoint-1"))
        found = self.outcome(f"resume: {name}", folder, ends)
        found.silent = words not in self.one_line(ends)
        return found

    def full_disk(self, beside: bool) -> Outcome:
        """One rank's disk is full in the second save."""
        folder = self.fresh("full", 1)
        ends = self.attempt(limited, replace(self.config, async_save=beside), folder)
        found = self.judge(f"full disk of one rank in {'an asynchronous' if beside else 'a'} save", folder, ends)
        found.silent |= "File too large" not in self.one_line(ends)
        return found

    def small_disk(self) -> Outcome | None:
        """A disk on which the first checkpoint has room and the second has not. Needs the right to mount one."""
        folder = self.fresh("small")
        size = sum(p.stat().st_size for p in (self.place / "whole" / "out" / "checkpoint-1").rglob("*") if p.is_file())
        command = ["mount", "-t", "tmpfs", "-o"]
        if subprocess.run(
            [*command, f"size={int(size * 1.7)}", "none", folder / "out"], capture_output=True
        ).returncode:
            return None
        try:
            ends = self.attempt(train, self.config, folder)
            subprocess.run([*command, f"remount,size={size * 5}", "none", folder / "out"], check=True)
            found = self.judge("full disk of all ranks (tmpfs)", folder, ends)
            found.silent |= "No space left on device" not in self.one_line(ends)
            return found
        finally:
            subprocess.run(["umount", folder / "out"], check=True)

    def terminated(self) -> Outcome:
        """SIGTERM to one rank, with `enable_jit_checkpoint`."""
        folder = self.fresh("terminated", 1)
        ends = self.attempt(preempted, self.config, folder, self.random.randrange(self.ranks))
        steps = {value if status == "ok" else None for status, value, _ in ends}
        found = self.judge("SIGTERM with enable_jit_checkpoint", folder, ends, complete=2)
        found.lost |= steps != {2}
        return found

    def stopped(self) -> Outcome:
        """A rank that is stopped in a save, with a timeout of 5 s. Who has stopped it ends it."""
        folder = self.fresh("stopped", 1)
        ends = self.attempt(stands_still, self.config, folder, timeout=20)
        return self.judge("a stopped rank, timeout 5 s", folder, [end for end in ends if end[0] != "hangs"] or ends)


def kind_of(path: Path) -> str:
    """`optimizer_0/__1_0.distcp` → `optimizer_0/*.distcp`."""
    within = path.parent.name if not path.parent.name.startswith("checkpoint-") else ""
    name = f"*{path.suffix}" if path.suffix == ".distcp" else path.name.replace("_0.", "_*.").replace("_1.", "_*.")
    return f"{within}/{name}".lstrip("/")


def last_line(text: object) -> str:
    return str(text).strip().splitlines()[-1] if str(text).strip() else ""


def flip_in(pattern: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        path = min(checkpoint.glob(pattern))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return harm


def outcomes(faults: Faults, kills: int, flips: int) -> Iterator[Outcome]:
    for i in range(kills):
        part = list(faults.moments)[i // 4 % len(faults.moments)]
        yield faults.kill(part, everybody=i % 2 == 1, beside=i // 2 % 2 == 1)
    yield from faults.flips(flips)
    yield from faults.missing()
    yield faults.damaged("a flipped bit in the model", flip_in("pytorch_model_fsdp_0/*.distcp"), "pytorch_model_fsdp_0")
    yield faults.damaged("no optimizer_0", lambda p: shutil.rmtree(p / "optimizer_0"), "optimizer_0")
    yield faults.damaged("no scheduler.pt", lambda p: (p / "scheduler.pt").unlink(), "scheduler.pt")
    for beside in (False, True):
        yield faults.full_disk(beside)
    if (small := faults.small_disk()) is not None:
        yield small
    yield faults.terminated()
    yield faults.stopped()


def report(found: list[Outcome], console: Console) -> None:
    table = Table("fault", "times", "lost", "silent", "hangs", "median s", "longest s")
    kinds: dict[str, list[Outcome]] = {}
    for outcome in found:
        kinds.setdefault(outcome.fault, []).append(outcome)
    for kind, each in [*kinds.items(), ("all", found)]:
        seconds = [o.seconds for o in each if o.seconds is not None]
        times = (f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}") if seconds and kind != "all" else ("", "")
        table.add_row(
            kind, str(len(each)), *(str(sum(getattr(o, n) for o in each)) for n in ("lost", "silent", "hangs")), *times
        )
    console.print(table)
    for outcome in found:
        if outcome.lost or outcome.silent or outcome.hangs:
            console.print(f"NOT AS IT SHOULD BE: {outcome}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="an even number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pool, start, found = RankPool(["transformers.models.qwen2.modeling_qwen2"]), time.monotonic(), []
    with tempfile.TemporaryDirectory() as place:
        try:
            for outcome in outcomes(Faults(pool, args.ranks, args.seed, Path(place)), args.kills, args.flips):
                found.append(outcome)
        finally:
            pool.stop()
    console = Console(width=140)
    report(found, console)
    console.print(f"{time.monotonic() - start:.0f} s")
    sys.exit(any(o.lost or o.silent or o.hangs for o in found))


if __name__ == "__main__":
    main()
