"""torch.save: a file whose tensors are written one after another, so that they are never in memory together."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .fake import FakeTensorMode


def save_without_data(value: Any, path: str | os.PathLike) -> Any:
    """`torch.save(value, path)` of nested containers in which tensors (on meta) stand for tensors on the CPU, whose
    contents are left empty in the file.

    torch 2.13 (serialization.py, `skip_data`) calls this a prototype, and the place of a tensor in the file is private.
    The zip's own checksums of the contents are not filled in; `torch.load` does not look at them.

    Returns:
        `value` with the place of its contents in the file, in bytes, for each tensor: see `write_at`.
    """
    with FakeTensorMode():
        empty = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), value)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, path)
        saved = torch.load(path, weights_only=True)
    return tree_map_only(torch.Tensor, lambda t: t.untyped_storage()._checkpoint_offset, saved)


def write_at(file: Any, place: int, tensor: torch.Tensor) -> None:
    """Write a tensor's contents to its `place` in an open file."""
    file.seek(place)
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
