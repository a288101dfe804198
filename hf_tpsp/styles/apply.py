"""From a plan to a model whose parameters are sharded and whose forwards are wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..collectives import OneShare
from ..config import TPSPConfig
from ..rules import rule_for
from ..structure import own_parameters
from .block import Block, Copy, Gather, Replica
from .gradients import ReplicatedGradients
from .registry import style_for
from .stream import Stream


def apply_plan(
    model: PreTrainedModel, plan: dict[str, str], gradients: ReplicatedGradients, config: TPSPConfig
) -> None:
    for name, module in list(model.named_modules()):
        if (rule := rule_for(name, plan)) is not None:
            style = module._tpsp_style = style_for(rule, config)
            own = {p: rule_for(f"{name}.{p}", plan) for p in own_parameters(module)}
            style.parameter_rules = {p: rule for p, rule in own.items() if rule}
            style.shard(module, gradients)
            style.install(module, gradients)
    _hand_over(model, None)


def _hand_over(module: nn.Module, owner: Block | Stream | None) -> None:
    """Tell each block of the parameters inside it that it makes plain at its entry: those that no style's forward does, for
    their module may be read without being called. Outside the blocks, a layer does."""
    style = vars(module).get("_tpsp_style")
    if isinstance(style, (Block, Stream)):
        owner = style
    elif type(style) in (Replica, Copy) and owner is not None:
        owner.inside.append(module)
    for child in module.children():
        _hand_over(child, owner)


def share_router_logits(model: PreTrainedModel, tp_size: int) -> None:
    """Have the auxiliary loss of an MoE model reach its routers once, and not from each rank.

    A router inside a split block adds up the ranks' gradients (`Replica`). All ranks compute the auxiliary loss alike, from
    the logits that the decoder hands out.
    """
    routers = [m for m in model.modules() if isinstance(vars(m).get("_tpsp_style"), Gather) and any(_routers(m))]
    if not routers:
        return

    def share(module, args, output):
        if isinstance(output, dict) and output.get("router_logits") is not None:
            logits = output[
                "router_logits"
            ]  # those that a block returned, and did not only compute, are shared already
            output["router_logits"] = tuple(
                x if hasattr(x, "_tpsp_shared") else OneShare.apply(x, tp_size) for x in logits
            )

    model.get_decoder().register_forward_hook(share)


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    """What chooses among the experts inside a block: the replicated parameters beside stacked expert weights."""
    if any(p.dim() == 3 for p in block.parameters()):
        yield from (m for m in block.modules() if type(vars(m).get("_tpsp_style")) is Replica)


def check_sharded(model: nn.Module) -> None:
    plain = [name for name, param in model.named_parameters() if not isinstance(param, DTensor)]
    assert not plain, f"the plan was checked to be complete, yet these parameters are plain tensors: {plain}"
