"""One number that stands for a tensor, or for any other value that must be the same on all ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

PIECE = 2**22
"""Number of elements hashed at a time, which limits the memory: hashing takes 16 bytes for each element."""


MULTIPLIER = -7046029254386353131
"""Multiplier of a multiplicative hash modulo 2**64 (Knuth, TAOCP 3, 6.4). It is odd, and far from small and round
numbers."""


def fingerprint(x: Tensor) -> Tensor:
    """One int64 on `x`'s device that depends on each element of `x`, its position, and the shape. No synchronization.

    Integers and booleans are hashed by value, whatever their width; all other dtypes are hashed by their bits.
    """
    flat = x.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.full((), _number(str(tuple(x.shape))), dtype=torch.int64, device=x.device)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].long()
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=x.device)
        mixed = (piece + 1) * places * MULTIPLIER
        total += ((mixed ^ (mixed >> 29)) * -4417276706812531889).sum()
    return total


def fingerprint_of_text(text: str) -> int:
    """One int64 that depends on `text`, computed on the host."""
    return _number(text)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def leaves(given: Any, name: str = "") -> dict[str, Any]:
    """The values inside nested dicts, lists and tuples, by name: `attention_mask.full_attention`, `images.0`. None is
    left out."""
    if isinstance(given, dict):
        parts = ((f"{name}.{key}".lstrip("."), value) for key, value in given.items())
    elif isinstance(given, (list, tuple)):
        parts = ((f"{name}.{i}", value) for i, value in enumerate(given))
    else:
        return {} if given is None else {name: given}
    return {n: leaf for part, value in parts for n, leaf in leaves(value, part).items()}
