"""Compares what all ranks must hold alike before they depend on each other: each leaves it in the job's store.

A collective would hang if the ranks differed in what it stands on, their mesh. The store needs neither mesh nor device,
and whoever waits for a rank there sees that it has ended, and why.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from . import departure
from .upstream.torch import c10d

Value = TypeVar("Value")

ERRORS = {kind.__name__: kind for kind in (departure.RankEnded, TimeoutError)}

# Process group → the number of comparisons so far, which is the same on all ranks.
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def agree(stage: str, given: Mapping[str, str]) -> None:
    """Raise `ValueError` on all ranks, naming rank, field and both values, unless all of them are `given` the same.

    Every rank must call it.

    Args:
        stage: where the script is, for the message.
        given: field → value, in words.
    """
    decide(stage, dict(given), _difference)


def decide(stage: str, value: Value, judge: Callable[[list[Value]], str | None]) -> None:
    """Raise `ValueError` on all ranks with the sentence that `judge` finds about the values of all ranks, in their
    order; if it returns None, nothing happens. Every rank must call it.

    Args:
        value: this rank's; what JSON can hold.

    Raises:
        RankEnded: a rank ended before it came here.
        TimeoutError: a rank did not come here within the default process group's timeout.
    """
    store, timeout = c10d.store(), c10d.default_timeout()
    if store is None or timeout is None or dist.get_world_size() == 1:
        if (sentence := judge([value])) is not None:
            raise ValueError(sentence)
        return
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    number = _numbers[world] = _numbers.get(world, 0) + 1
    rank, size = dist.get_rank(), dist.get_world_size()
    keys = [f"hf_tpsp/{number}/{r}" for r in range(size)]
    verdict, seen = f"hf_tpsp/{number}/verdict", f"hf_tpsp/{number}/seen"
    store.set(keys[rank], json.dumps([stage, value]))
    if rank == 0:
        try:
            _wait(store, keys, timeout, stage)
            found = [json.loads(store.get(key)) for key in keys]
            store.set(verdict, json.dumps([None, _elsewhere(found) or judge([v for _, v in found])]))
        except Exception as error:
            store.set(verdict, json.dumps([type(error).__name__, str(error)]))
    # The first rank's own wait ends first.
    _wait(store, [verdict], timeout + timedelta(seconds=10), stage)
    kind, sentence = json.loads(store.get(verdict))
    if store.add(seen, 1) == size:
        for key in (*keys, verdict, seen):
            store.delete_key(key)
    if sentence is not None:
        raise ERRORS.get(kind, ValueError)(sentence)


def _wait(store: dist.Store, keys: list[str], timeout: timedelta, stage: str) -> None:
    """Wait until all `keys` are there. Each look is one short message, because a wait that blocks would not see that a
    rank has ended."""
    begin, pause = time.monotonic(), 0.001
    while not departure.in_time(lambda: store.check(keys), timeout.total_seconds()):
        if words := departure.first():
            raise departure.RankEnded(f"hf_tpsp: {stage}: {words}")
        if time.monotonic() - begin > timeout.total_seconds():
            missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
            raise TimeoutError(
                f"hf_tpsp: rank {', '.join(missing)} did not come to {stage} within {timeout.total_seconds():.0f} s (ddp_timeout), "
                "where the others wait for it."
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _elsewhere(found: list[tuple[str, Any]]) -> str | None:
    for rank, (stage, _) in enumerate(found):
        if stage != found[0][0]:
            return (
                f"hf_tpsp: rank {rank} is at {stage}, but rank 0 at {found[0][0]}. All ranks must run the same script, "
                "in the same order."
            )
    return None


def _difference(everyones: list[dict[str, str]]) -> str | None:
    for rank, theirs in enumerate(everyones):
        for name in dict.fromkeys([*everyones[0], *theirs]):
            mine, other = everyones[0].get(name, "not given"), theirs.get(name, "not given")
            if mine != other:
                values = [a if len(a) < 80 else _first_difference(a, b) for a, b in ((other, mine), (mine, other))]
                return (
                    f"hf_tpsp: {name} is {values[0]} on rank {rank}, but {values[1]} on rank 0. All ranks must run the same script "
                    "in the same environment."
                )
    return None


def _first_difference(text: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return f"…{text[max(0, at - 20) : at + 40]}…"
