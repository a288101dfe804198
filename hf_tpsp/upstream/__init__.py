"""Every workaround for a defect of a library we stand on, by library, each with the condition on which it can be deleted.

`tests/upstream/` shows for each that it is still needed. `install` puts the patches in place; what is not a patch, but a
function that uses what is not public, is called where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

from . import accelerate, dtensor, transformers
from .patching import swap


def install() -> Callable[[], None]:
    """Put every patch in place. Returns the function that restores the originals."""
    return swap(*dtensor.PATCHES, *accelerate.PATCHES, *transformers.PATCHES)
