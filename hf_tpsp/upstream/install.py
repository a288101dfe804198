"""The patches that `enable()` puts in place."""

from __future__ import annotations

from collections.abc import Callable

from ..patching import swap
from . import accelerate, transformers
from .torch import c10d, dtensor


def install() -> Callable[[], None]:
    """Put every patch in place. Returns the function that restores the originals."""
    return swap(*c10d.PATCHES, *dtensor.PATCHES, *accelerate.PATCHES, *transformers.PATCHES)
