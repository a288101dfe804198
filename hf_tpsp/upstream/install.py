"""The patches that `enable()` puts in place."""

from __future__ import annotations

from collections.abc import Callable

from . import accelerate, dtensor, transformers
from .patching import swap


def install() -> Callable[[], None]:
    """Put every patch in place. Returns the function that restores the originals."""
    return swap(*dtensor.PATCHES, *accelerate.PATCHES, *transformers.PATCHES)
