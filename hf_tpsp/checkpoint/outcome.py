"""What one rank could not do, all ranks say."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not whole. All ranks raise it with the same sentence."""


def is_first() -> bool:
    """Whether this is rank 0, which does what is done once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def settle(
    what: str, problem: BaseException | str | None, mine: Any = None, group: dist.ProcessGroup | None = None
) -> list:
    """Tell the other ranks of `group` (by default, all) whether this one has a problem. Every rank must call it.

    Returns:
        Every rank's `mine`, in the order of the ranks.

    Raises:
        CheckpointError: a rank has a problem. The sentence begins with `what`, and gives each problem once.
    """
    sentence = reason(problem)
    if not dist.is_initialized():
        reports = [(sentence, mine)]
    else:
        reports = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, (sentence, mine), group=group)
    ranks: dict[str, list[int]] = {}
    for rank, (text, _) in enumerate(reports):
        if text:
            ranks.setdefault(text, []).append(rank)
    if ranks:
        everyone = [*range(len(reports))]
        told = (
            text if where == everyone else f"{text} (rank{'s' if len(where) > 1 else ''} {', '.join(map(str, where))})"
            for text, where in ranks.items()
        )
        # Where an expected reason came up says nothing more.
        is_expected = isinstance(problem, (str, OSError, CheckpointException, CheckpointError))
        raise CheckpointError(f"{what}: {'; '.join(told)}") from (None if is_expected else problem)
    return [theirs for _, theirs in reports]


def reason(problem: BaseException | str | None) -> str:
    """`problem` in one line. A failure that torch has gathered from the ranks, and nested, is its innermost reasons."""
    if problem is None or isinstance(problem, str):
        return problem or ""
    if isinstance(problem, CheckpointException):
        inner = (f"{reason(failure)} (rank {rank})" for rank, (failure, _) in sorted(problem.failures.items()))
        return "; ".join(dict.fromkeys(inner))
    if isinstance(problem, (OSError, CheckpointError)):
        return str(problem)
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"
