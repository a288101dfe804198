"""From a model to its plan: which style each module gets. Pure: no collectives, no devices, no weights read.

The plan is derived, not listed per model. transformers' own tensor-parallel plan says which linear layers open and
close a block; the structure says the rest:

    base.embed_tokens            embedding         the residual stream begins, sharded over the sequence
    base.layers.0                enter             a stream that came from outside is cut here
    base.layers.*.<norm>         norm              children of a layer whose class is a norm run on the shards
    base.layers.*.<other>        gather            every other child with parameters: a token mixer or an MLP
    base.layers.*.<other>.…      colwise, rowwise, replica, packed_…   translated from transformers' plan
                                 activation        an activation function, which has no parameters
    base.norm                    norm
    lm_head                      head, lazy_head   logits stay sharded over the vocabulary
"""

from __future__ import annotations

import re
from collections import Counter

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from .config import TPSPConfig

SPLIT_INPUT = "rowwise_split_input"
# transformers' name of a rule inside a decoder layer → ours. A gathered output with a split input after it is a packed
# projection (`packed_rule`).
TRANSLATION = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    SPLIT_INPUT: "rowwise",
    "replicated_with_grad_allreduce": "replica",
}

# Elementwise, so they can be computed again on whatever part they were given. (Some entries carry their arguments.)
ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}


def wildcard(name: str) -> str:
    """`model.layers.3.mlp` → `model.layers.*.mlp`: one rule serves every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def rule_for(name: str, plan: dict[str, str]) -> str | None:
    """The style that `plan` gives the module `name`: its own rule, else its wildcard's."""
    return plan.get(name) or plan.get(wildcard(name))


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module list of the decoder layers: where most of the rules of transformers' plan apply.

    Raises:
        ValueError: the model has no tensor-parallel plan in transformers.
    """
    stems = Counter(rule.split(".*", 1)[0] for rule in (model.tp_plan or {}) if ".*" in rule)
    for stem, _ in stems.most_common():
        layers = dict(model.named_modules()).get(stem)
        if isinstance(layers, nn.ModuleList):
            return stem, layers
    raise ValueError(
        f"{type(model).__name__} has no tensor-parallel plan in transformers, so hf_tpsp does not know which of its "
        "linear layers open and close a block. Train it with FSDP alone (tp_size=1 without hf_tpsp), or give its "
        "config a `base_model_tp_plan`."
    )


def packed_rule(block: nn.Module, projection: nn.Linear, closing: nn.Linear, config: TPSPConfig) -> str:
    """The rule of a linear layer that packs several projections, from the width `n` that its block's last layer takes.

    Gate and up are `(n, n)`; query, key and value are `(n, k, k)`.
    """
    n, total = closing.in_features, projection.out_features
    is_attention = hasattr(block, "head_dim") or hasattr(block, "num_key_value_groups")
    if is_attention and total > n and (total - n) % 2 == 0:
        parts = (n, (total - n) // 2, (total - n) // 2)
    elif total == 2 * n:
        parts = (n, n)
    else:
        raise ValueError(f"{total} output features against {n} of the closing layer is not a packing known here.")
    if any(part % config.tp_size for part in parts):
        raise ValueError(f"tp_size={config.tp_size} does not divide the packed projections {parts} of {block}.")
    # The strided layout of equal parts leaves FSDP only the input dimension, which it cannot shard unevenly.
    even = len(set(parts)) == 1 and projection.bias is None and projection.in_features % config.dp_shard_size == 0
    return f"{'packed_colwise' if even else 'packed_uneven'}:{','.join(map(str, parts))}"


def plan_for(model: PreTrainedModel, config: TPSPConfig) -> dict[str, str]:
    """The plan of `model` under `config`: module name, with `*` for layer numbers → name in `styles.STYLES`.

    Raises:
        ValueError: the sizes do not divide the model; the model has no plan in transformers; a rule of that plan has
            no sequence-parallel counterpart here; or a parameter is covered by no rule (each is named).
    """
    config.check_model(model.config)
    native = dict(model.tp_plan or {})
    layers_name, layers = decoder_layers(model)
    plan: dict[str, str] = {}
    unknown: dict[str, str] = {}

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if embedding is not None:
        plan[names[embedding]] = "embedding"
    plan[f"{layers_name}.0"] = "enter"

    for index, layer in enumerate(layers):
        for child_name, child in layer.named_children():
            block_name = f"{layers_name}.{index}.{child_name}"
            if not any(True for _ in child.parameters()):
                continue
            if is_norm(child):
                plan[wildcard(block_name)] = "norm"
                continue
            plan[wildcard(block_name)] = "gather"
            closing = [m for n, m in child.named_modules() if native.get(wildcard(f"{block_name}.{n}")) == SPLIT_INPUT]
            for inner_name, inner in child.named_modules():
                name = f"{block_name}.{inner_name}" if inner_name else block_name
                rule = native.get(wildcard(name))
                if rule is None:
                    if type(inner) in ACTIVATIONS and not own_parameters(inner):
                        plan[wildcard(name)] = "activation"
                    continue
                if rule == "colwise_gather_output" and len(closing) == 1:
                    plan[wildcard(name)] = packed_rule(child, inner, closing[0], config)
                    plan[wildcard(block_name)] = "gather_heads" if hasattr(child, "head_dim") else "gather"
                elif rule in TRANSLATION:
                    plan[wildcard(name)] = TRANSLATION[rule]
                else:
                    unknown[wildcard(name)] = rule

    base_name = layers_name.rpartition(".")[0]
    base = model.get_submodule(base_name)
    for child_name, child in base.named_children():
        if is_norm(child) and own_parameters(child):
            plan[f"{base_name}.{child_name}" if base_name else child_name] = "norm"
    if head is not None:
        plan[names[head]] = "lazy_head" if config.loss == "chunked" else "head"

    if unknown:
        rules = ", ".join(f"{name} ({rule})" for name, rule in unknown.items())
        raise ValueError(
            f"{type(model).__name__} uses tensor-parallel rules that hf_tpsp has no layout for yet: {rules}."
        )
    check_complete(model, plan)
    return plan


def check_complete(model: nn.Module, plan: dict[str, str]) -> None:
    """Raise `ValueError` naming every parameter whose module no rule covers, and the module that owns it."""
    missing: dict[str, str] = {}
    for module_name, module in model.named_modules():
        rule = rule_for(module_name, plan)
        if rule not in (None, "gather", "gather_heads", "enter"):  # these lay out no parameters
            continue
        for name in own_parameters(module):
            missing[wildcard(f"{module_name}.{name}" if module_name else name)] = type(module).__name__
    if missing:
        named = "; ".join(f"{name} (in a {owner})" for name, owner in missing.items())
        raise ValueError(
            f"No rule covers these parameters of {type(model).__name__}: {named}. hf_tpsp does not train a model with "
            "a parameter whose layout it does not know. Add the module to the `base_model_tp_plan` of the model's "
            'config ("colwise", "rowwise" or "replicated_with_grad_allreduce"), or train with FSDP alone.'
        )
