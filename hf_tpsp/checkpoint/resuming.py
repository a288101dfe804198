"""Which checkpoint all ranks resume from, and whether it is what was saved."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging

from . import folders, manifest
from .outcome import is_first, settle

logger = logging.get_logger(__name__)


def newest(parent: Path, prefix: str = "checkpoint-") -> Path | None:
    """The last complete checkpoint in `parent`, None if there is none. Rank 0 says in a line which it passed over, and
    why."""
    found, skipped = folders.newest(parent, prefix)
    if skipped and is_first():
        place = (
            f"the last complete checkpoint in {parent} is {found.name}"
            if found
            else f"no checkpoint in {parent} is complete"
        )
        logger.warning_once(f"hf_tpsp: {place}; not {', nor '.join(skipped)}.")
    return found


def newest_of_all(parent: Path, prefix: str = "checkpoint-") -> Path:
    """The last complete checkpoint that rank 0 finds in `parent`, for all ranks. Every rank must call it.

    Raises:
        CheckpointError: there is none.
    """
    found = problem = None
    if is_first():
        folders.recover(parent)
        if (found := newest(parent, prefix)) is None:
            problem = "; ".join(folders.newest(parent, prefix)[1]) or f"there is no {prefix}*"
    # Only rank 0 says it, for all. Another host may have the folder under another name.
    name = found.name if found else None
    return parent / settle(f"{parent} has no complete checkpoint to resume from", problem, name)[0]


def check(folder: Path) -> None:
    """Compare the files of a checkpoint with its manifest, each rank a share of them. Every rank must call it, with the
    same folder, which may have another name on another host: the manifest's checksum says that it is the same.

    One without a manifest is taken if nothing of it seems to be missing, and a line says that it has no checksums.

    Raises:
        CheckpointError: a file is missing, or not as it was saved; a rank does not see the folder, or sees another one.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    known = None
    problem = None if folder.is_dir() else f"{folder} is not there (all ranks read the same folder)"
    if problem is None:
        problem = folders.problem_of(folder)
    if problem is None and (known := manifest.read(folder)) is not None:
        problem = manifest.damage(folder, known["files"], rank, ranks)
    what = "This checkpoint cannot be resumed from"
    mine = known["checksum"] if known else None
    theirs = settle(what, problem, (str(folder.resolve()), mine))
    # Without a manifest, the name is all that there is to compare.
    same = [checksum or path for path, checksum in theirs]
    if differs := [f"rank {i}: {path}" for i, (path, _) in enumerate(theirs) if same[i] != same[0]]:
        settle(what, f"rank 0 was given {theirs[0][0]}, and {', '.join(differs)}")
    if not is_first():
        return
    if (folder / folders.STATE).exists() and not any(path.name.startswith("optimizer") for path in folder.iterdir()):
        logger.warning(
            f"hf_tpsp: {folder} has no optimizer state (save_only_model): optimizer and schedule start anew."
        )
    if known is None:
        logger.warning(
            f"hf_tpsp: {folder} was saved without hf_tpsp's manifest, so that damage to it would not be noticed."
        )
