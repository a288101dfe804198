"""The integrations, and the questions that are asked of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .. import sharding
from ..config import TPSPConfig
from . import session
from .peft import PEFT
from .trainer import TRAINER
from .trl import TRL

INTEGRATIONS = (TRAINER, PEFT, TRL)

Model = TypeVar("Model", bound=nn.Module)


def install(handle: session.Enabled, args: Any = None) -> None:
    """Install the integrations that are always needed, and those of a trainer with these arguments, each once."""
    for integration in INTEGRATIONS:
        if integration.applies is None or (args is not None and integration.applies(args)):
            handle.once(integration.install)


def check_arguments(args: Any) -> None:
    """Raise `ValueError` if a trainer's arguments would not train what one process does."""
    problems = [problem for integration in INTEGRATIONS for problem in integration.refuses(args)]
    if problems:
        raise ValueError("These TrainingArguments do not work with hf_tpsp: " + "; ".join(problems) + ".")


def wraps(model: nn.Module) -> bool:
    """Whether a library has put parameters of its own around the causal LM in `model`, and knows how to shard both."""
    return any(integration.wraps(model) for integration in INTEGRATIONS)


def shard(model: Model, config: TPSPConfig) -> Model:
    """Shard `model` by `sharding.shard`, or by the integration of the library that wraps it."""
    how: Callable[[Any, TPSPConfig], Any] = next((i.shard for i in INTEGRATIONS if i.wraps(model)), sharding.shard)
    return how(model, config)
