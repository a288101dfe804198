"""The names of the styles in a plan."""

from __future__ import annotations

from ..config import TPSPConfig
from .base import Style
from .block import Activation, Copy, Gather, Replica, Whole
from .head import Head, LazyHead
from .linear import Colwise, GatheredColwise, PackedColwise, Rowwise, SplitRowwise, WholeColwise
from .stream import Embedding, Enter, Norm, Stream

STYLES: dict[str, type[Style]] = {
    "embedding": Embedding,
    "enter": Enter,
    "norm": Norm,
    "gather": Gather,
    "whole": Whole,
    "replica": Replica,
    "copy": Copy,
    "stream": Stream,
    "activation": Activation,
    "colwise": Colwise,
    "packed_colwise": PackedColwise,
    "colwise_gathered": GatheredColwise,
    "colwise_whole": WholeColwise,
    "rowwise": Rowwise,
    "rowwise_split": SplitRowwise,
    "head": Head,
    "lazy_head": LazyHead,
}
"""Style names as they stand in a plan."""


def style_for(rule: str, config: TPSPConfig, parameter_rules: dict[str, str] | None = None) -> Style:
    """The style that a rule of a plan names; what follows a colon are its arguments (`packed_colwise:64,64`).

    Raises:
        ValueError: the rule names no style.
    """
    name, _, arguments = rule.partition(":")
    if name not in STYLES:
        raise ValueError(f"{rule!r} names no style; the styles are {', '.join(STYLES)}.")
    return STYLES[name](config, *(a for a in arguments.split(",") if a), parameter_rules=parameter_rules)
