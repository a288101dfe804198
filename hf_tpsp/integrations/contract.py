"""What an integration is: all that hf_tpsp does for one library, in one file, by one contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import sharding
from ..config import TPSPConfig


@dataclass(frozen=True)
class Integration:
    """One library that a script may use. A new one is a file with one of these, and a line in `registry.py`.

    Attributes:
        install: puts what the library needs in place, and returns the function that undoes it.
        applies: tells whether a trainer with these arguments is the library's. The integration is installed when the
            first such trainer is made, because its import may be slow. If None, `enable()` installs it.
        refuses: gives a sentence for each of a trainer's arguments that would not train what one process does.
        wraps: tells whether a model is a causal LM that the library has put parameters of its own around.
        shard: shards such a model, in place, and returns it.
    """

    install: Callable[[], Callable[[], None]]
    applies: Callable[[Any], bool] | None = None
    refuses: Callable[[Any], list[str]] = lambda args: []
    wraps: Callable[[nn.Module], bool] = lambda model: False
    shard: Callable[[Any, TPSPConfig], Any] = sharding.shard
