"""How configs and modules spell sizes: one table, for all who read them."""

from __future__ import annotations


def size_of(owner: object, name: str) -> int | None:
    """A size that a config or a module names; None if it has none of this name, or not one for all layers."""
    try:
        size = getattr(owner, name, None)
    except Exception:  # transformers raises for sizes that differ from layer to layer
        return None
    return size if isinstance(size, int) and not isinstance(size, bool) else None
