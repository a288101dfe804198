"""The language of a plan: module names, wildcards, and the rules that stand beside them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from .structure import own_parameters

if TYPE_CHECKING:
    from .plan.trial import Trial


class Plan(dict[str, str]):
    """Module (or parameter) name, with `*` for layer numbers → name in `styles.STYLES`, with arguments after a colon.

    Attributes:
        sequence_parallel: whether the stream is sharded over the sequence. loss_parallel: whether the logits are, over the
            vocabulary.
        notes: what is not as asked for, a sentence each.
        tried: block name, with `*` for layer numbers → the layouts that were tried of it, in order. Blocks of several classes may
            go by one name.
    """

    def __init__(self, sequence_parallel: bool):
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.loss_parallel = False
        self.notes: list[str] = []
        self.tried: dict[str, list[Trial]] = {}


def wildcard(name: str) -> str:
    """`model.layers.3.mlp` → `model.layers.*.mlp`: one rule serves every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def rule_for(name: str, plan: dict[str, str]) -> str | None:
    """The style that `plan` gives the module or parameter `name`: its own rule, else its wildcard's."""
    return plan.get(name) or plan.get(wildcard(name))


def check_complete(model: nn.Module, plan: dict[str, str]) -> None:
    """Raise `ValueError` naming every parameter whose module no rule covers, and the module that owns it."""
    missing: dict[str, str] = {}
    for module_name, module in model.named_modules():
        if rule_for(module_name, plan) is not None:
            continue
        for name in own_parameters(module):
            missing[wildcard(f"{module_name}.{name}" if module_name else name)] = type(module).__name__
    if missing:
        named = "; ".join(f"{name} (in a {owner})" for name, owner in missing.items())
        raise ValueError(
            f"No rule covers these parameters of {type(model).__name__}: {named}. hf_tpsp does not train a model with "
            "a parameter whose layout it does not know; train it with FSDP alone, or add a rule in hf_tpsp/plan/planner.py, "
            "`_Planner.plan_outside`."
        )


def check_used(model: nn.Module, plan: dict[str, str]) -> None:
    """Assert that every rule of the plan is one of a module or a parameter that the model has."""
    named = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    names = {name for name, _ in named}
    unused = plan.keys() - names - set(map(wildcard, names))
    assert not unused, f"these rules of the plan are of nothing that {type(model).__name__} has: {sorted(unused)}"
