"""The ways to split a block that are worth a try: transformers' own plan, or one read off how the block was called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import nn
from transformers.activations import ACT2CLS

from ..config import TPSPConfig
from ..rules import Rule
from ..sizes import HEADS, KV_HEADS
from ..structure import features, is_depthwise, own, own_parameters
from .record import Call

# Activation functions are elementwise, so they can be computed again on any part. (Some entries of ACT2CLS carry
# arguments.)
ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}


# Names of rules in transformers' plans.
GATHERED, SPLIT_INPUT = "colwise_gather_output", "rowwise_split_input"


def layouts(block: nn.Module, native: dict[str, str], calls: dict[str, Call], hidden: int) -> Iterator[dict[str, str]]:
    """The layouts of `block` that are worth a try: rules by name inside the block, without sizes (`with_sizes` adds
    them).

    Args:
        block: a block of a small copy.
        native: transformers' rules for what is inside the block, by name.
        calls: how the copy's modules were called, by name.
        hidden: the width of the stream.
    """
    inside = dict(block.named_modules())
    rest = {}
    for name, module in inside.items():
        if name and own_parameters(module):
            rest[name] = "replicated_partial"
        elif type(module) in ACTIVATIONS:
            rest[name] = "activation"
    mlps = enclosed_mlps(native, inside, calls)
    bases = list(translated(native, inside)) if native else []
    bases += [{**mlps, **base} for base in bases if mlps]
    bases += derived(block, inside, calls[""])
    convolutions = {name: "depthwise" for name, module in inside.items() if name and is_depthwise(module)}
    bases += [{**base, **convolutions} for base in bases if convolutions]
    bases += [{**mlps, **base} for base in stacked_experts(inside, hidden)]
    for base in bases:
        for variants in ([], ["heads"], ["heads", "widths"]):
            for residual in ([], ["residual"]) if len(calls[""].streams) > 1 else ([],):
                yield {"": str(Rule("split", (*variants, *residual))), **rest, **base}


def packings(closing: str) -> Iterator[str]:
    """Rules to try for a layer that holds several projections: gate and up, or query, key and value of unknown widths.

    `closing` is the name of the linear layer that closes the block.
    """
    yield "pair"
    yield f"qkv:{closing}"


def translated(native: dict[str, str], inside: dict[str, nn.Module]) -> Iterator[dict[str, str]]:
    """Layouts translated from transformers' plan. A gathered output with a split input after it may be a packed
    projection."""
    rules = {}
    closing = [n for n, rule in native.items() if rule == SPLIT_INPUT]
    opened = [n for n, rule in native.items() if rule == GATHERED]
    for name, rule in native.items():
        if name in inside:
            if rule == "colwise" and isinstance(inside[name], nn.Linear):
                rules[name] = "colwise"
            elif rule in ("rowwise", SPLIT_INPUT):
                rules[name] = "rowwise"
        elif rule == "rowwise" and not name.endswith("bias"):
            rules[name] = "shard:-1"
        elif rule in ("packed_rowwise", "packed_colwise") and not name.endswith("bias"):
            rules[name] = f"shard_packed:{-1 if rule == 'packed_rowwise' else -2},2"
        elif rule == "colwise":
            rules[name] = "shard:-2"
    if len(closing) == 1 and len(opened) == 1:
        for packing in packings(closing[0]):
            yield {**rules, opened[0]: packing}
    yield {**rules, **dict.fromkeys(opened, "colwise_gathered"), **dict.fromkeys(closing, "rowwise_sliced")}


def derived(block: nn.Module, inside: dict[str, nn.Module], call: Call) -> Iterator[dict[str, str]]:
    """Layouts read off the call of a block: column-parallel layers first, and the last linear layer row-parallel.

    The column-parallel ones are the linear layers whose input is the block's input, or some of these together with the
    linear layers called after them.
    """
    linears = {name: inside[name] for name in call.linears}
    if not linears:
        return
    *before, last = linears
    entries = [n for n in before if call.linears[n]]
    # Linear layers with another input are, for example, the up-projections of compressed queries, keys and values.
    later = [n for n in before if not call.linears[n]]
    packed = [n for n in entries if features(linears[n])[1] > features(linears[last])[0]]
    heads = own(block, HEADS)
    bare = {n: "shard:0" for n, p in block.named_parameters(recurse=False) if heads and p.shape[:1] == (heads,)}
    choices = [(entries, [])]
    if later:
        choices += [(few, later) for n in range(len(entries), -1, -1) for few in itertools.combinations(entries, n)]
    for opening in (dict.fromkeys([*chosen, *ups], "colwise") for chosen, ups in choices):
        yield {**opening, **bare, last: "rowwise"}
        if len(packed) == 1 and packed[0] in opening:
            for packing in packings(last):
                yield {**opening, **bare, packed[0]: packing, last: "rowwise"}


def stacked_experts(inside: dict[str, nn.Module], hidden: int) -> Iterator[dict[str, str]]:
    """Layouts of stacked expert weights `[experts, …]` and their biases: down, and gate and up (one after the other, or
    interleaved)."""
    for opening in ("shard_packed:{},2", "shard:{}"):
        rules = {}
        for name, module in inside.items():
            stacked = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.dim() in (2, 3)}
            if not any(len(shape) == 3 for shape in stacked.values()):
                continue
            for n, shape in stacked.items():
                full, closes = f"{name}.{n}" if name else n, any(word in n for word in ("down", "w2", "output"))
                if len(shape) == 3 and hidden in shape[1:]:
                    dim = -2 if shape[-1] == hidden else -1
                    rules[full] = f"shard:{dim}" if closes else opening.format(dim)
                elif len(shape) == 2 and "bias" in n:
                    rules[full] = "share" if closes else opening.format(-1)
        if rules:
            yield rules


def enclosed_mlps(native: dict[str, str], inside: dict[str, nn.Module], calls: dict[str, Call]) -> dict[str, str]:
    """Rules for MLPs inside a block that transformers' plan leaves out, such as shared experts."""
    rules = {}
    for name in inside:
        linears = {n: inside[f"{name}.{n}"] for n in calls[name].linears} if name and name in calls else {}
        if len(linears) < 2 or any(f"{name}.{n}" in native for n in linears):
            continue
        *before, last = linears
        width = features(linears[last])[0]
        if all(calls[name].linears[n] and features(linears[n])[1] == width for n in before):
            rules |= {f"{name}.{n}": "colwise" for n in before} | {f"{name}.{last}": "rowwise"}
    return rules


def with_sizes(rules: dict[str, str], block: nn.Module, config: TPSPConfig) -> dict[str, str] | None:
    """Fill `rules` with the sizes of `block`, which has the structure of the block that they were proven on.

    Returns None if the block's heads do not divide over the ranks, or if ranks would have to share kv heads that are
    not found among its projections.
    """
    inside = dict(block.named_modules())
    heads, kv_heads = own(block, HEADS), own(block, KV_HEADS)
    is_attention = hasattr(block, "head_dim") or hasattr(block, "num_key_value_groups")
    shared = kv_heads if is_attention and heads and kv_heads and kv_heads < min(heads, config.tp_size) else None
    if is_attention and heads and (heads % config.tp_size or (kv_heads and not shared and kv_heads % config.tp_size)):
        return None
    sized = dict(rules)
    for name, rule in rules.items():
        kind, closing = Rule.parse(rule)
        if kind in ("pair", "qkv"):
            total = features(inside[name])[1]
            first = total // 2 if kind == "pair" else features(inside[closing[0]])[0]
            parts = [first] if kind == "pair" else [(total - first) // 2] * 2
            sized[name] = packed_rule((first, *parts), inside[name], shared if kind == "qkv" else None, config)
        elif rule == "colwise" and shared and features(inside[name])[1] == shared * (own(block, ("head_dim",)) or 0):
            sized[name] = f"colwise_gathered:{features(inside[name])[1]}@{shared}"
    # With shared heads, a depthwise convolution would have fewer channels than the projection before it returns.
    if shared and ("depthwise" in rules.values() or not any("@" in rule for rule in sized.values())):
        return None
    if shared:
        name, variants = Rule.parse(sized[""])
        sized[""] = str(Rule(name, (*variants, "groups")))
    return sized


def packed_rule(parts: tuple[int, ...], projection: nn.Module, heads: int | None, config: TPSPConfig) -> str:
    """The rule of a linear layer that holds projections of widths `parts`.

    `heads` is the number of heads of each projection but the first, if ranks share these heads; else None.
    """
    named = ",".join(f"{part}@{heads}" if heads and i else str(part) for i, part in enumerate(parts))
    # Strided sharding (`colwise_packed`) leaves FSDP only the input dimension, which it cannot shard unevenly.
    even = len(set(parts)) == 1 and not heads and parts[0] % config.tp_size == 0
    even = even and features(projection)[0] % config.dp_shard_size == 0
    return f"{'colwise_packed' if even else 'colwise_gathered'}:{named}"


def whole_layout(block: nn.Module, native: dict[str, str], call: Call | None) -> dict[str, str]:
    """The layout of a block that every rank computes whole. Linear layers whose output transformers gathers stay
    split."""
    rules = {"": "whole"}
    for name, module in block.named_modules():
        if name and own_parameters(module):
            split = native.get(name) == GATHERED and call is not None and name in call.linears
            rules[name] = "colwise_whole" if split else "replicated"
    return rules
