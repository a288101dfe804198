"""Tensor, sequence and loss parallelism with FSDP2 for Hugging Face SFT scripts."""

from .config import TPSPConfig
from .loss import vocab_parallel_cross_entropy
from .parallelize import parallelize
from .plan import plan_for
from .trainer import TPSPCallback, enable
from .verify import verify

__all__ = [
    "TPSPCallback",
    "TPSPConfig",
    "enable",
    "estimate",
    "parallelize",
    "plan_for",
    "verify",
    "vocab_parallel_cross_entropy",
]


def estimate(model, **settings):
    """Memory, communication and time of a step on each legal mesh, with no GPU: see `hf_tpsp.estimation.estimate`."""
    from .estimation import estimate

    return estimate(model, **settings)
