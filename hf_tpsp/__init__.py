"""Tensor, sequence and loss parallelism with FSDP2 for Hugging Face SFT scripts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import enable, parallelize
    from .checkpoint.export import export
    from .config import TPSPConfig
    from .integrations.callback import TPSPCallback
    from .loss.cross_entropy import vocab_parallel_cross_entropy
    from .plan.planner import plan_for
    from .tools.estimate.estimation import estimate
    from .tools.verify.verify import verify

__version__ = "0.1.0"
__all__ = [
    "TPSPCallback",
    "TPSPConfig",
    "enable",
    "estimate",
    "export",
    "parallelize",
    "plan_for",
    "verify",
    "vocab_parallel_cross_entropy",
]

# Public name → the module it is in. Each is imported when first used, because `hf-tpsp config` needs neither torch nor
# transformers, and a training script needs no planner.
_HOMES = {
    "TPSPCallback": "integrations.callback",
    "TPSPConfig": "config",
    "enable": "api",
    "estimate": "tools.estimate.estimation",
    "export": "checkpoint.export",
    "parallelize": "api",
    "plan_for": "plan.planner",
    "verify": "tools.verify.verify",
    "vocab_parallel_cross_entropy": "loss.cross_entropy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
