"""One tool for patches: put a function in the place of another, and give back what undoes it."""

from __future__ import annotations

from collections.abc import Callable


def swap(*patches: tuple[object, str, Callable]) -> Callable[[], None]:
    """For each `(owner, name, make)`, put `make(original)` in the place of `owner.name`. Returns the function that puts
    the originals back."""
    originals = []
    for owner, name, make in patches:
        original = vars(owner)[name]
        setattr(owner, name, make(original))
        originals.append((owner, name, original))

    def restore() -> None:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)

    return restore
