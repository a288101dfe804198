"""Folders that are written under a temporary name and put in place when they are whole.

`out/checkpoint-4` is written as `out/_incomplete/checkpoint-4`, on the same file system, and renamed. (`_` keeps it out
of what the Trainer pushes to the hub.) A process may be killed between any two lines: what is at the final name is whole
at all times, or, between two renames, under `_incomplete/replaced-checkpoint-4`, from where `recover` takes it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from . import manifest
from .outcome import is_first, settle

ASIDE = "_incomplete"


STATE, ACCELERATE_STATE = "trainer_state.json", "random_states_0.pkl"


# What the Trainer and accelerate name their checkpoints, each run in a folder of its own.
NUMBERED = re.compile(r"checkpoint[-_]\d+")


# The folders in which the ranks' shards are.
SHARDS = re.compile(r"^(pytorch_model_fsdp|optimizer)_\d+$")


# The files of a model's weights, the index that names them if they are several, and the file of an adapter's.
MODEL_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


ADAPTER_WEIGHTS = re.compile(r"adapter_model\.(safetensors|bin)")


INDEX = re.compile(r"(model|pytorch_model)\.(safetensors|bin)\.index\.json")


def begin(final: Path) -> Path:
    """An empty folder in which `final` can be written. Every rank must call it, and one such folder beside `final` is
    written at a time."""
    problem = None
    if is_first():
        try:
            recover(final.parent, final.name)
            _empty(temporary(final))
        except OSError as error:
            problem = error
    settle(f"{final} could not be written", problem)
    return temporary(final)


def temporary(final: Path) -> Path:
    return final.parent / ASIDE / final.name


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def put_in_place(final: Path) -> None:
    """Rename `temporary(final)`, which is whole, to `final`. What was there is replaced, but for files that somebody else
    has put there."""
    replaced = final.parent / ASIDE / f"replaced-{final.name}"
    if final.exists():
        final.rename(replaced)
    temporary(final).rename(final)
    manifest.sync(final.parent)
    if replaced.exists():
        _take_over(replaced, final)
    _leave(final.parent)


def _take_over(replaced: Path, final: Path) -> None:
    """Move what is in `replaced`, and no part of the checkpoint that it was, to `final`; delete the rest."""
    own = _own_files(replaced)
    for entry in replaced.iterdir():
        if entry.name not in own and not (final / entry.name).exists():
            entry.rename(final / entry.name)
    shutil.rmtree(replaced)


def _own_files(folder: Path) -> set[str]:
    """The names in `folder` that belong to the checkpoint there, by its manifest."""
    with contextlib.suppress(ValueError):
        if known := manifest.read(folder):
            return {manifest.NAME, *(name.partition("/")[0] for name in known["files"])}
    return set()


def _leave(parent: Path) -> None:
    """Delete the folder of temporary folders if nothing is in it."""
    with contextlib.suppress(OSError):
        (parent / ASIDE).rmdir()


def discard(final: Path) -> None:
    """Delete what could not be written whole."""
    shutil.rmtree(temporary(final), ignore_errors=True)
    _leave(final.parent)


def recover(parent: Path, name: str = "") -> None:
    """End what a process that was killed had begun with `parent/name` and the numbered checkpoints: put back one that was
    about to be replaced, finish deletions, delete what is half written. Other names may be another process's."""
    if not (parent / ASIDE).is_dir():
        return
    for entry in (parent / ASIDE).iterdir():
        doing = next((prefix for prefix in ("replaced-", "deleted-") if entry.name.startswith(prefix)), "")
        of = entry.name.removeprefix(doing)
        if of != name and not NUMBERED.fullmatch(of):
            continue
        final = parent / of
        with contextlib.suppress(OSError):
            if doing != "replaced-":
                shutil.rmtree(entry)
            elif final.exists():
                _take_over(entry, final)
            else:
                entry.rename(final)
    _leave(parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint. At no time is a part of one at its name."""
    deleted = folder.parent / ASIDE / f"deleted-{folder.name}"
    with contextlib.suppress(OSError):
        deleted.parent.mkdir(exist_ok=True)
        folder.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)
    _leave(folder.parent)


# ---- which checkpoints there are -----------------------------------------------------------------------------------


def checkpoints(parent: Path, prefix: str = "checkpoint-") -> list[Path]:
    """The folders `parent/checkpoint-N`, by N."""
    found = [p for p in parent.glob(f"{prefix}*") if p.is_dir() and p.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def problem_of(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be resumed from, by its files' names and sizes; None if it can."""
    try:
        known = manifest.read(folder)
    except (OSError, ValueError) as error:
        return str(error)
    return _missing(folder) if known is None else manifest.wrong_size(folder, known["files"])


def _missing(folder: Path) -> str | None:
    """What is missing in a checkpoint without a manifest: one of transformers' or accelerate's own, or of an older
    hf_tpsp."""
    names = os.listdir(folder)
    is_of_accelerate = STATE not in names and ACCELERATE_STATE in names
    if not is_of_accelerate:
        try:
            json.loads((folder / STATE).read_bytes())
        except OSError:
            return f"{folder / STATE}, which is written last, is missing"
        except ValueError:
            return f"{folder / STATE} is damaged: it cannot be read"
    for name in names:
        if SHARDS.search(name) and not (folder / name / ".metadata").is_file():
            return f"{folder / name / '.metadata'} is missing"
    if not any(_is_weights(folder / name) for name in names):
        return f"{folder} has no weights"
    has_optimizer, has_scheduler = (any(n.startswith(prefix) for n in names) for prefix in ("optimizer", "scheduler"))
    # A checkpoint of `save_only_model` has none of the three, and in a loop of one's own there may be no scheduler.
    if not is_of_accelerate and (has_optimizer or has_scheduler or any(n.startswith("rng_state") for n in names)):
        if not has_optimizer:
            return f"{folder / 'optimizer_0'} is missing"
        if not has_scheduler:
            return f"{folder / 'scheduler.pt'} is missing"
    return None


def _is_weights(path: Path) -> bool:
    if path.is_dir() and not path.name.startswith("pytorch_model_fsdp"):
        # Adapters with names of their own have folders of their own.
        return any(ADAPTER_WEIGHTS.fullmatch(inner.name) for inner in path.iterdir())
    return any(p.fullmatch(path.name) for p in (MODEL_WEIGHTS, ADAPTER_WEIGHTS)) or path.name.startswith(
        "pytorch_model_fsdp"
    )


def newest(parent: Path, prefix: str = "checkpoint-") -> tuple[Path | None, list[str]]:
    """The last complete checkpoint in `parent`, None if there is none; and why each later one is not complete."""
    skipped = []
    for folder in reversed(checkpoints(parent, prefix)):
        if (problem := problem_of(folder)) is None:
            return folder, skipped
        skipped.append(f"{folder.name} ({problem})")
    return None, skipped


def rotate(parent: Path, limit: int | None, keep: Collection[Path], prefix: str = "checkpoint-") -> None:
    """Delete the oldest complete checkpoints, until `limit` are left. Those in `keep` stay, even if they are more.

    An incomplete one counts for nothing, and is left to its owner.
    """
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in keep}
    complete = [path for path in checkpoints(parent, prefix) if problem_of(path) is None]
    old = sorted((path for path in complete if path.resolve() not in kept), key=_saved_at)
    for folder in old[: max(0, len(complete) - limit)]:
        remove(folder)


def _saved_at(folder: Path) -> float:
    known = manifest.read(folder)
    return known["saved_at"] if known else (folder / STATE).stat().st_mtime


# ---- a folder of weights, which may hold other things ----------------------------------------------------------------


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `folder` when all of them are written. Every rank must come here.

    While they are moved, `folder` has the weights that it had, or those that it gets, or none that can be loaded.

    Raises:
        CheckpointError: a rank could not write its files. `folder` is as it was.
    """
    within, is_new, problem = folder / ASIDE / "model", not folder.exists(), None
    what = f"{folder} could not be written"
    try:
        if is_first():
            try:
                _empty(within)
            except OSError as error:
                problem = error
        settle(what, problem)
        try:
            yield within
            if is_first():
                for name in manifest.files_in(within):
                    manifest.sync(within / name)
        except Exception as error:
            problem = error
        settle(what, problem)
        if is_first():
            try:
                _move_weights(within, folder)
            except OSError as error:
                problem = error
        settle(what, problem)
    finally:
        if is_first():
            shutil.rmtree(within, ignore_errors=True)
            _leave(folder)
            if is_new and problem:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _move_weights(within: Path, folder: Path) -> None:
    """Move all files, so that no index ever names a file that is not there or is another's. Weights of the model that
    `folder` had under other names are deleted."""
    names, stale = manifest.files_in(within), set()
    if any(MODEL_WEIGHTS.fullmatch(name) for name in names):
        stale = {name for name in os.listdir(folder) if MODEL_WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)} - {
            *names
        }
        for index in (name for name in os.listdir(folder) if INDEX.fullmatch(name)):
            (folder / index).unlink()
    for name in sorted(names, key=lambda name: (bool(INDEX.fullmatch(name)), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (within / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    manifest.sync(folder)
