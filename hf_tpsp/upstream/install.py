"""The patches that `enable()` puts in place."""

from __future__ import annotations

from collections.abc import Callable

from ..patching import swap
from . import accelerate, transformers
from .torch import dtensor


def install() -> Callable[[], None]:
    """Put every patch in place. Returns the function that restores the originals."""
    return swap(*dtensor.PATCHES, *accelerate.PATCHES, *transformers.PATCHES)
