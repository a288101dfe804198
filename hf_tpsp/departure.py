"""Which rank ended first, and why.

A rank that raises leaves its last words in the store in which the job's ranks found each other. What the others see of
it is a collective of theirs that breaks, "Connection closed by peer"; they then say whose end that was, and why.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, cast

import torch.distributed as dist

from .patching import WhileUsed
from .upstream.torch import c10d

Answer = TypeVar("Answer")

KEY, HEARD = "hf_tpsp/ended", "hf_tpsp/heard"

PATIENCE = 0.5
"""Seconds for which a rank looks for another's last words. They are there before that one's connections close."""

READING = 2.0
"""Seconds for which the rank that has the store waits for others to read in it."""

ANSWER = 5.0
"""Seconds for which a rank that ends waits for the store, of whose host the network may be gone."""

SYMPTOMS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class RankEnded(RuntimeError):
    """Another rank has ended, so this one cannot go on."""


def in_time(ask: Callable[[], Answer], seconds: float) -> Answer:
    """What `ask` finds in the store.

    torch's client waits for an answer without end where no connection closes: a host that lost its network, or its power.

    Raises:
        DistNetworkError: the store does not answer in `seconds`.
    """
    answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    # It is left behind where it waits.
    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise dist.DistNetworkError(f"the job's store did not answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return cast(Answer, answer)


def tell(why: str) -> None:
    """Leave in the store why this rank ends, unless another rank has ended before."""
    if (store := c10d.store()) is not None:
        store.compare_set(KEY, "", f"rank {dist.get_rank()} ended first: {why}")


def first(patience: float = 0) -> str | None:
    """`rank 2 ended first: ValueError: …`, of another rank than this one; None if none has said so in `patience`
    seconds."""
    if (store := c10d.store()) is None:
        return None
    until = time.monotonic() + patience
    while not store.check([KEY]):
        if time.monotonic() >= until:
            return None
        time.sleep(0.02)
    words = store.get(KEY).decode()
    return None if words.startswith(f"rank {dist.get_rank()} ") else words


def is_symptom(error: BaseException | None) -> bool:
    """Whether `error` is, or comes of, a collective that broke, so that its cause may be another rank's end."""
    while error is not None:
        text = str(error)
        if isinstance(error, (RankEnded, dist.DistError)):
            return True
        if isinstance(error, RuntimeError) and any(symptom in text for symptom in SYMPTOMS):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain(error: BaseException) -> str | None:
    """What an error of this rank says when it comes of another's end; None if it is this rank's own, or nobody has said
    why."""
    if not is_symptom(error):
        with contextlib.suppress(dist.DistError):
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{_place(error)}"
            in_time(lambda: tell(why), ANSWER)
        return None
    try:
        words = in_time(_heard, ANSWER)
    except dist.DistError as failure:
        if "did not answer" in str(failure):
            words = f"{failure}: the network between the hosts, or the first host, has gone"
        elif _agent_has_store():
            words = "the launcher on the first host has ended, and with it the job's store: its output says why"
        else:
            words = "rank 0 has ended, and with it the job's store: its output says why"
    return words and f"hf_tpsp: rank {dist.get_rank()} stops, because {words}"


def _heard() -> str | None:
    words = first(PATIENCE)
    if words and (store := c10d.store()) is not None:
        store.add(HEARD, 1)
    return words


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def end(error: BaseException, show: Callable[[], None]) -> None:
    """What a rank does before an error ends it: says whose end it comes of, or shows it and leaves it for the others."""
    atexit.unregister(_say_goodbye)
    if (said := explain(error)) is not None:
        print(said, file=sys.stderr)
        _wait_for_readers()
        return
    show()
    if is_symptom(error):
        print(
            "hf_tpsp: a collective broke, and no rank has said why: one was killed (its memory?), its host or network has gone, or it "
            "waits elsewhere.",
            file=sys.stderr,
        )


def _say_goodbye() -> None:
    """A script that ends on one rank, with `sys.exit` or because it has less data, leaves the others waiting."""
    # Where the first rank has the store, it may be gone by now.
    if _agent_has_store():
        with contextlib.suppress(dist.DistError):
            in_time(lambda: tell("its script came to its end, without an error"), ANSWER)


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _wait_for_readers() -> None:
    """Keep the store until the others have read another rank's last words, if it is this rank that has it. They cannot
    read this one's: they wait in a collective for it, until it has gone."""
    if _agent_has_store() or (store := c10d.store()) is None or dist.get_rank():
        return
    until = time.monotonic() + READING
    # Neither this rank nor the one that ended first reads.
    while store.add(HEARD, 0) < dist.get_world_size() - 1 and time.monotonic() < until:
        time.sleep(0.02)


def _install() -> Callable[[], None]:
    original, in_place = sys.excepthook, True

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if in_place:
            end(error, lambda: original(kind, error, trace))
        else:
            original(kind, error, trace)

    def undo() -> None:
        nonlocal in_place
        in_place = False
        atexit.unregister(_say_goodbye)
        # torch puts its own hook around this one when the process group is made.
        if sys.excepthook is excepthook:
            sys.excepthook = original

    sys.excepthook = excepthook
    atexit.register(_say_goodbye)
    return undo


# While it is in place, an uncaught error is left for the other ranks, and theirs is explained by it.
LAST_WORDS = WhileUsed(_install)
