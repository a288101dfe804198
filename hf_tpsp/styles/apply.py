"""From a plan to a model whose parameters are sharded and whose forwards are wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..collectives import OneShare
from ..config import TPSPConfig
from ..rules import rule_for
from ..state import style_of
from ..structure import own_parameters
from .base import TensorParallel
from .block import ReplicatedPartial, SplitBlock
from .registry import style_for


def apply_plan(model: PreTrainedModel, plan: dict[str, str], tp: TensorParallel, config: TPSPConfig) -> None:
    """Give each module its style, cut its parameters and wrap its forward."""
    styled = {}
    for name, module in model.named_modules():
        if (rule := rule_for(name, plan)) is not None:
            own = {p: rule_for(f"{name}.{p}", plan) for p in own_parameters(module)}
            styled[module] = module._tpsp_style = style_for(rule, config, {p: r for p, r in own.items() if r})
    # All styles exist before the first is installed, because a block looks at the styles of the modules inside it.
    for module, style in styled.items():
        style.shard(module, tp)
        style.install(module, tp)


def share_router_logits(model: PreTrainedModel, tp_size: int) -> None:
    """Count the gradient of an MoE model's auxiliary loss once in its routers, instead of once for each rank.

    All ranks compute the same auxiliary loss from the logits that the decoder returns, but the gradients of a router
    inside a split block are summed over the ranks (`ReplicatedPartial`). So each rank contributes its share of that
    gradient.
    """
    routers = [m for m in model.modules() if isinstance(style_of(m), SplitBlock) and any(_routers(m))]
    if not routers:
        return

    def share(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, dict) and output.get("router_logits") is not None:
            # The logits that a split block returned beside its output are marked, because their gradient is shared
            # already.
            shared = (x if hasattr(x, "_tpsp_shared") else OneShare.apply(x, tp_size) for x in output["router_logits"])
            output["router_logits"] = tuple(shared)

    model.get_decoder().register_forward_hook(share)


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    """The routers inside a block: modules with replicated parameters, in a block that has stacked expert weights."""
    if any(p.dim() == 3 for p in block.parameters()):
        yield from (m for m in block.modules() if type(style_of(m)) is ReplicatedPartial)


def check_sharded(model: nn.Module) -> None:
    plain = [name for name, param in model.named_parameters() if not isinstance(param, DTensor)]
    assert not plain, f"the plan was checked to be complete, yet these parameters are plain tensors: {plain}"
