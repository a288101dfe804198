"""The language of a plan: module names, wildcards, and their rules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from .structure import own_parameters

if TYPE_CHECKING:
    from .plan.trial import Trial


class Rule(NamedTuple):
    """The value of one entry in a plan: `name`, or `name:argument,argument`.

    For a module, the name is a style's (`styles.registry.STYLES`), and the arguments are those of its `__init__`:
        colwise, rowwise, replicated, …       a style without arguments
        split:heads,widths                    variants of a block
        colwise_packed:64,64                  widths of the projections in one weight
        colwise_gathered:64,32@2,32@2         with `@h`, a projection of `h` heads, fewer than there are ranks
    For a parameter, which its module's style cuts:
        shard:d                               over its dimension d (negative: from the end)
        shard_packed:d,n                      over dimension d, which holds n parts one after the other; each part is cut by itself
        share                                 replicated; each rank uses its share of the value, and the shares add up to it
    Layouts that are being tried have no sizes yet, and use two more names: `pair` (two equal projections) and
    `qkv:name` (query, key and value, or any three projections of which the last two are equally wide; `name` is the
    layer that closes the block, and the first projection is as wide as its input).
    """

    name: str
    arguments: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Rule:
        name, _, arguments = text.partition(":")
        return cls(name, tuple(argument for argument in arguments.split(",") if argument))

    def __str__(self) -> str:
        return f"{self.name}:{','.join(self.arguments)}" if self.arguments else self.name


class Plan(dict[str, str]):
    """Module (or parameter) name, with `*` for layer numbers → `Rule`, as text.

    Attributes:
        sequence_parallel: whether the stream is sharded over the sequence.
        loss_parallel: whether the logits are sharded over the vocabulary.
        notes: what differs from the config or could not be proven, one sentence each.
        tried: block name, with `*` for layer numbers → the trials of its layouts, in order. Blocks of several classes
            may share one name.
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
    """The rule that `plan` gives the module or parameter `name`: its own rule, else its wildcard's."""
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
    """Assert that every name in the plan is a module or a parameter of the model."""
    named = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    names = {name for name, _ in named}
    unused = plan.keys() - names - set(map(wildcard, names))
    assert not unused, f"these rules of the plan are of nothing that {type(model).__name__} has: {sorted(unused)}"
