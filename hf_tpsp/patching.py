"""Tools for patches: each puts something in place, and returns the function that undoes it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_INHERITED = object()


def swap(*patches: tuple[object, str, Callable]) -> Callable[[], None]:
    """For each `(owner, name, make)`, replace `owner.name` by `make(original)`. Returns the function that undoes it.

    An attribute that `owner` inherited from a base class is inherited again afterwards.
    """
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
    """`swap` as a context manager: the originals are back after it."""
    restore = swap(*patches)
    try:
        yield
    finally:
        restore()


def set_environment(values: dict[str, str]) -> Callable[[], None]:
    """Set environment variables. Returns the function that restores their earlier values."""
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
    """A patch that stays in place as long as at least one sharded model lives, whether or not `enable()` was called or
    undone.

    Args:
        install: puts the patch in place, and returns the function that undoes it. Called for the first user.
    """

    def __init__(self, install: Callable[[], Callable[[], None]]):
        self._install, self._users = install, 0

    def hold(self) -> Callable[[], None]:
        """Keep the patch in place until the function that is returned is called, and all others of the kind."""
        if not self._users:
            self._undo = self._install()
        self._users += 1
        return self._release

    def keep_for(self, user: object) -> None:
        """Keep the patch in place until `user`, and all other users that it is kept for, are gone."""
        weakref.finalize(user, self.hold()).atexit = False

    def _release(self) -> None:
        self._users -= 1
        if not self._users:
            self._undo()
