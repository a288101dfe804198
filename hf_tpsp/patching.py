"""The tools for patches: put something in the place of something else, and give back what undoes it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_INHERITED = object()


def swap(*patches: tuple[object, str, Callable]) -> Callable[[], None]:
    """For each `(owner, name, make)`, put `make(original)` in the place of `owner.name`. Returns the function that puts
    the originals back; what `owner` has of a base class it has of that again."""
    originals = []
    for owner, name, make in patches:
        own = vars(owner).get(name, _INHERITED)
        setattr(owner, name, make(getattr(owner, name) if own is _INHERITED else own))
        originals.append((owner, name, own))

    def restore() -> None:
        for owner, name, own in reversed(originals):
            if own is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    return restore


@contextmanager
def swapped(*patches: tuple[object, str, Callable]) -> Iterator[None]:
    """`swap`, while inside."""
    restore = swap(*patches)
    try:
        yield
    finally:
        restore()


def set_environment(values: dict[str, str]) -> Callable[[], None]:
    """Set environment variables. Returns the function that puts back what they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return restore


class WhileUsed:
    """What a sharded model needs of a library for as long as it lives, whether `enable()` was called, or undone, or not.

    Args:
        install: puts it in place, and returns the function that undoes it. Called with the first user.
    """

    def __init__(self, install: Callable[[], Callable[[], None]]):
        self._install, self._users = install, 0

    def keep_for(self, user: object) -> None:
        """Have it in place until `user`, and all others that it is kept for, are gone."""
        if not self._users:
            self._undo = self._install()
        self._users += 1
        weakref.finalize(user, self._release).atexit = False

    def _release(self) -> None:
        self._users -= 1
        if not self._users:
            self._undo()
