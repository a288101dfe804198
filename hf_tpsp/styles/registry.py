"""The names of the styles in a plan."""

from __future__ import annotations

from ..config import TPSPConfig
from ..rules import Rule
from .base import Style
from .block import Activation, Replicated, ReplicatedPartial, SplitBlock, WholeBlock
from .head import Head, LazyHead
from .linear import Colwise, ColwiseGathered, ColwisePacked, ColwiseWhole, Depthwise, Rowwise, RowwiseSliced
from .stream import Embedding, Enter, Norm, Stream

STYLES: dict[str, type[Style]] = {
    "embedding": Embedding,
    "enter": Enter,
    "norm": Norm,
    "split": SplitBlock,
    "whole": WholeBlock,
    "replicated_partial": ReplicatedPartial,
    "replicated": Replicated,
    "stream": Stream,
    "activation": Activation,
    "colwise": Colwise,
    "colwise_packed": ColwisePacked,
    "colwise_gathered": ColwiseGathered,
    "colwise_whole": ColwiseWhole,
    "depthwise": Depthwise,
    "rowwise": Rowwise,
    "rowwise_sliced": RowwiseSliced,
    "head": Head,
    "lazy_head": LazyHead,
}
"""Style names as they stand in a plan."""


def style_for(rule: str, config: TPSPConfig, parameter_rules: dict[str, str] | None = None) -> Style:
    """Make the style that a plan's rule names, with the arguments after the colon (`colwise_packed:64,64`).

    Raises:
        ValueError: the rule names no style.
    """
    name, arguments = Rule.parse(rule)
    if name not in STYLES:
        raise ValueError(
            f"{rule!r} names no style; the styles are {', '.join(STYLES)}. Add it to `STYLES` in hf_tpsp/styles/registry.py."
        )
    return STYLES[name](config, *arguments, parameter_rules=parameter_rules)
