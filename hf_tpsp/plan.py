"""From a model to its plan: which style each module gets. No collectives, no devices, no weights read.

The plan is derived, not listed per model, and proven before it is used (`prove.py`):

    base.embed_tokens            embedding         the residual stream begins, sharded over the sequence
    base.layers.*                enter             a stream that came from outside is cut here
    base.layers.*.<norm>         norm              children of a layer whose class is a norm run on the shards
    base.layers.*.<other>        gather, whole     every other child with parameters: a token mixer or an MLP
    base.layers.*.<other>.…      colwise, rowwise, packed_…   where it is split
                                 replica, copy     its other parameters
                                 activation        an activation function, which has no parameters
    base.norm                    norm
    base.<other>, <other>        whole             what else the model computes beside its layers
    lm_head                      head, lazy_head   logits stay sharded over the vocabulary

A block is split by the first layout whose ranks add up to the block, out of: transformers' own tensor-parallel plan; the
linear layers that are fed what the block is fed, and the last one that it calls; each with what the forward may need to
know of its share (`gather:heads`). If none does, every rank computes the block whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from .branches import uncovered
from .config import TPSPConfig, size_of
from .prove import RANKS, TOKENS, Call, Twin
from .styles import Block, features, is_norm

# Elementwise, so they can be computed again on whatever part they were given. (Some entries carry their arguments.)
ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}

GATHERED, SPLIT_INPUT = "colwise_gather_output", "rowwise_split_input"  # of transformers


class Plan(dict[str, str]):
    """Module (or parameter) name, with `*` for layer numbers → name in `styles.STYLES`, with arguments after a colon.

    Attributes:
        sequence_parallel: whether the stream is sharded over the sequence. loss_parallel: whether the logits are, over the
            vocabulary.
        notes: what is not as asked for, a sentence each.
    """

    def __init__(self, sequence_parallel: bool):
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.loss_parallel = False
        self.notes: list[str] = []


def wildcard(name: str) -> str:
    """`model.layers.3.mlp` → `model.layers.*.mlp`: one rule serves every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def rule_for(name: str, plan: dict[str, str]) -> str | None:
    """The style that `plan` gives the module or parameter `name`: its own rule, else its wildcard's."""
    return plan.get(name) or plan.get(wildcard(name))


def own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def layer_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Name → module list, of the decoder layers. One, but for models that run several stacks.

    Raises:
        ValueError: the model has no list of layers.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(m) for m in decoder.modules()} if isinstance(decoder, nn.Module) else {id(m) for m in model.modules()}
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and id(module) in inside and has_parameters(module) and not nested:
            lists[name] = module
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that hf_tpsp could find. Train it with FSDP alone."
        )
    ruled = {rule.split(".*", 1)[0] for rule in (model.tp_plan or {}) if ".*" in rule}
    if ruled & lists.keys():
        return {name: layers for name, layers in lists.items() if name in ruled}
    sizes = {name: sum(p.numel() for p in layers.parameters()) for name, layers in lists.items()}
    kinds = {type(layer) for layer in lists[max(sizes, key=sizes.get)]}
    return {name: layers for name, layers in lists.items() if type(layers[0]) in kinds}


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(itertools.chain.from_iterable(layer_lists(model).values()))


def owners_of_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose forward calls the layers, or calls one that does: `model` and, mostly, `model.model`."""
    parts = [stem.split(".")[:-1] for stem in layer_lists(model)]
    names = sorted({".".join(p[:i]) for p in parts for i in range(len(p) + 1)}, key=len)
    return [model.get_submodule(name) for name in names]


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a lookup is a sum over the ranks of lookups in a part of the vocabulary."""
    return isinstance(module, nn.Embedding) and own_parameters(module) == ["weight"] and not any(module.children())


def own(block: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of the attributes `names` that the block, or its config, has."""
    owners = [block, getattr(block, "config", None)]
    return next((size for owner in owners if owner is not None for n in names if (size := size_of(owner, n))), None)


def layouts(block: nn.Module, native: dict[str, str], calls: dict[str, Call], hidden: int) -> Iterator[dict[str, str]]:
    """The ways to split `block`, a small copy's, that are worth a try: rules by name inside the block, without sizes
    (`with_sizes`).

    Args:
        native: transformers' rules for what is inside the block, by name.
        calls: how the copy's modules were called, by name.
        hidden: the width of the stream.
    """
    inside = dict(block.named_modules())
    rest = {}
    for name, module in inside.items():
        if name and own_parameters(module):
            rest[name] = "replica"
        elif type(module) in ACTIVATIONS:
            rest[name] = "activation"
    mlps = enclosed_mlps(native, inside, calls)
    bases = list(translated(native, inside)) if native else []
    bases += [{**mlps, **base} for base in bases if mlps]
    bases += derived(block, inside, calls[""])
    bases += [{**mlps, **base} for base in stacked_experts(inside, hidden)]
    for base in bases:
        for variants in ([], ["heads"], ["heads", "widths"]):
            for residual in ([], ["residual"]) if len(calls[""].streams) > 1 else ([],):
                named = ",".join([*variants, *residual])
                yield {"": f"gather:{named}" if named else "gather", **rest, **base}


def packings(closing: str) -> Iterator[str]:
    """Rules of a layer that holds several projections: gate and up, or query, key and value of whatever widths."""
    yield "pair"
    yield f"qkv:{closing}"


def translated(native: dict[str, str], inside: dict[str, nn.Module]) -> Iterator[dict[str, str]]:
    """transformers' plan. A gathered output with a split input after it may be a packed projection."""
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
            rules[name] = "split:-1"
        elif rule in ("packed_rowwise", "packed_colwise") and not name.endswith("bias"):
            rules[name] = f"packed:{-1 if rule == 'packed_rowwise' else -2},2"
        elif rule == "colwise":
            rules[name] = "split:-2"
    if len(closing) == 1 and len(opened) == 1:
        for packing in packings(closing[0]):
            yield {**rules, opened[0]: packing}
    yield {**rules, **dict.fromkeys(opened, "colwise_gathered"), **dict.fromkeys(closing, "rowwise_split")}


def derived(block: nn.Module, inside: dict[str, nn.Module], call: Call) -> Iterator[dict[str, str]]:
    """The linear layers that are fed what the block is fed, or what those make of it, and the last one that it calls."""
    linears = {name: inside[name] for name in call.linears}
    if not linears:
        return
    *before, last = linears
    entries = [n for n in before if call.linears[n]]
    later = [n for n in before if not call.linears[n]]  # up-projections of compressed ones
    packed = [n for n in entries if features(linears[n])[1] > features(linears[last])[0]]
    heads = own(block, Block.HEADS)
    bare = {n: "split:0" for n, p in block.named_parameters(recurse=False) if heads and p.shape[:1] == (heads,)}
    choices = [(entries, [])]
    if later:
        choices += [(few, later) for n in range(len(entries), -1, -1) for few in itertools.combinations(entries, n)]
    for opening in (dict.fromkeys([*chosen, *ups], "colwise") for chosen, ups in choices):
        yield {**opening, **bare, last: "rowwise"}
        if len(packed) == 1 and packed[0] in opening:
            for packing in packings(last):
                yield {**opening, **bare, packed[0]: packing, last: "rowwise"}


def stacked_experts(inside: dict[str, nn.Module], hidden: int) -> Iterator[dict[str, str]]:
    """Expert weights `[experts, …]` and their biases: gate and up, one after the other or interleaved, and down."""
    for opening in ("packed:{},2", "split:{}"):
        rules = {}
        for name, module in inside.items():
            stacked = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.dim() in (2, 3)}
            if not any(len(shape) == 3 for shape in stacked.values()):
                continue
            for n, shape in stacked.items():
                full, closes = f"{name}.{n}" if name else n, any(word in n for word in ("down", "w2", "output"))
                if len(shape) == 3 and hidden in shape[1:]:
                    dim = -2 if shape[-1] == hidden else -1
                    rules[full] = f"split:{dim}" if closes else opening.format(dim)
                elif len(shape) == 2 and "bias" in n:
                    rules[full] = "mean" if closes else opening.format(-1)
        if rules:
            yield rules


def enclosed_mlps(native: dict[str, str], inside: dict[str, nn.Module], calls: dict[str, Call]) -> dict[str, str]:
    """MLPs inside a block that transformers' plan leaves out: shared experts."""
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
    """`rules` for `block`, which has the structure of the one that they were proven on; None if its heads do not divide over
    the ranks, or ranks would have to share kv heads that are not found among its projections."""
    inside = dict(block.named_modules())
    heads, kv_heads = own(block, Block.HEADS), own(block, Block.KV_HEADS)
    is_attention = hasattr(block, "head_dim") or hasattr(block, "num_key_value_groups")
    shared = kv_heads if is_attention and heads and kv_heads and kv_heads < min(heads, config.tp_size) else None
    if is_attention and heads and (heads % config.tp_size or (kv_heads and not shared and kv_heads % config.tp_size)):
        return None
    sized = dict(rules)
    for name, rule in rules.items():
        kind, _, closing = rule.partition(":")
        if kind in ("pair", "qkv"):
            total = features(inside[name])[1]
            first = total // 2 if kind == "pair" else features(inside[closing])[0]
            parts = [first] if kind == "pair" else [(total - first) // 2] * 2
            sized[name] = packed_rule((first, *parts), inside[name], shared if kind == "qkv" else None, config)
        elif rule == "colwise" and shared and features(inside[name])[1] == shared * (own(block, ("head_dim",)) or 0):
            sized[name] = f"colwise_gathered:{features(inside[name])[1]}@{shared}"
    if shared and not any("@" in rule for rule in sized.values()):
        return None
    if shared:
        sized[""] += (":" if ":" not in sized[""] else ",") + "groups"
    return sized


def packed_rule(parts: tuple[int, ...], projection: nn.Module, heads: int | None, config: TPSPConfig) -> str:
    """The rule of a linear layer that holds projections of widths `parts`; `heads`: of all but the first, if ranks share
    them."""
    named = ",".join(f"{part}@{heads}" if heads and i else str(part) for i, part in enumerate(parts))
    # The strided layout of equal parts leaves FSDP only the input dimension, which it cannot shard unevenly.
    even = len(set(parts)) == 1 and not heads and parts[0] % config.tp_size == 0
    even = even and features(projection)[0] % config.dp_shard_size == 0
    return f"{'packed_colwise' if even else 'colwise_gathered'}:{named}"


def whole_layout(block: nn.Module, native: dict[str, str], call: Call | None) -> dict[str, str]:
    """The layout of a block that every rank computes whole. Linear layers whose output transformers gathers stay split."""
    rules = {"": "whole"}
    for name, module in block.named_modules():
        if name and own_parameters(module):
            split = native.get(name) == GATHERED and call is not None and name in call.linears
            rules[name] = "colwise_whole" if split else "copy"
    return rules


class _Planner:
    """The plan of one model, in the making. Names are those of its modules; `twin` is its small copy."""

    def __init__(self, model: PreTrainedModel, config: TPSPConfig):
        self.model, self.config = model, config
        self.native = dict(model.tp_plan or {})
        self.modules = dict(model.named_modules())
        self.lists = layer_lists(model)
        for every_layer in (False, True):  # a pattern of layers may go by fields that `shrink.py` does not know
            self.twin = Twin(model, self.lists, every_layer)
            self.twins = {self.kind(name, module): name for name, module in reversed(self.twin.modules.items())}
            if {self.kind(name, self.modules[name]) for name in self.layers()} <= self.twins.keys():
                break
        self.proofs: dict[tuple, dict[str, str] | None] = {}
        self.local_norms: dict[tuple, bool] = {}
        self.plan = Plan(config.sequence_parallel)
        self.hidden = self.twin.model.config.get_text_config(decoder=True).hidden_size

    def layers(self) -> list[str]:
        return [f"{stem}.{index}" for stem, layers in self.lists.items() for index in range(len(layers))]

    @staticmethod
    def kind(name: str, module: nn.Module) -> tuple:
        """What two modules have in common that are alike but for their sizes."""
        inside = frozenset(wildcard(f".{n}") for n, _ in module.named_parameters())
        return wildcard(name), type(module).__name__, inside

    def twin_of(self, name: str) -> str:
        kind = self.kind(name, self.modules[name])
        if kind not in self.twins:
            same = [k for k in self.twins if k[0] == kind[0]]
            other = sorted(set(kind[2]) - set().union(*(k[2] for k in same)))
            what = f"has parameters ({', '.join(f'{name}{n}' for n in other)})" if same and other else "is"
            raise ValueError(
                f"{name} ({kind[1]}) {what} not in a small copy built from the model's config, so hf_tpsp cannot prove how to "
                "split it. Make what changes the model part of its class (a folder with its own code works), or train it "
                "with FSDP alone."
            )
        return self.twins[kind]

    def computes_before_layers(self) -> bool:
        """Whether the model needs the whole sequence between the embedding and the first layer."""
        calls = {name: self.twin.calls.get(name) for name in self.above()}
        order = list(self.twin.calls)
        first = min((i for i, n in enumerate(order) if n.startswith(self.twin.stems)), default=0)
        before = [n for parent in self.above() for n in self.children(parent) if n in order[:first]]
        return any(c is not None and c.beyond_pointwise(before_layers=True) for c in calls.values()) or any(
            self.modules[n] is not self.model.get_input_embeddings() for n in before
        )

    def make(self) -> Plan:
        self.plain = self.computes_before_layers()
        if self.plain:
            self.twin.calls = self.twin.record(from_embedding=False)
        if (reader := self.twin.reads_embedding) is not None:
            raise ValueError(
                f"{type(self.model).__name__} takes rows of its embedding's weight by itself (in {reader or 'its forward'}), "
                "which a vocabulary-sharded embedding does not have on every rank. Train its text model alone, or with FSDP."
            )
        if self.plan.sequence_parallel and (reason := self.stream_reason()):
            self.plan.sequence_parallel = False
            self.plan.notes.append(f"no sequence parallel: {reason}")
        self.split_together()
        for name in self.layers():
            self.plan_layer(name, self.modules[name])
            for child in self.children(name):
                self.plan_child(child)
        self.plan_outside()
        check_complete(self.model, self.plan)
        if not self.plan.loss_parallel and not any(self.proofs.values()):
            raise ValueError(
                f"hf_tpsp found nothing in {type(self.model).__name__} that tensor parallelism can split: "
                f"{'; '.join(self.plan.notes)}. Train it with FSDP alone."
            )
        return self.plan

    def split_together(self) -> None:
        """Blocks of one class in one place split all or none: they may hand each other their heads' keys and values."""
        for name in (child for layer in self.layers() for child in self.children(layer)):
            if self.call(name) is not None and not (is_norm(self.modules[name]) and self.is_local(name)):
                self.proof(name, self.inside(name))
        whole = {key[:2] for key, rules in self.proofs.items() if rules is None}
        for key in self.proofs:
            if key[:2] in whole:
                self.proofs[key] = None
        self.plan.notes += [f"{name} ({cls}) is not split" for name, cls in sorted(whole)]

    def plan_layer(self, name: str, layer: nn.Module) -> None:
        call = self.call(name)
        along = call.meets() if call is not None else []
        if self.plan.sequence_parallel:  # each of them, for those before it may be skipped
            self.set(name, f"enter:{','.join(along)}" if along else "enter")
        elif own_parameters(layer) or any(self.call(child) is None for child in self.children(name)):
            self.set(name, "stream")

    def children(self, name: str) -> Iterator[str]:
        """The modules with parameters below `name` whose forward is called from there."""
        for child_name, child in self.modules[name].named_children():
            full = f"{name}.{child_name}" if name else child_name
            if not has_parameters(child) or full not in self.modules:
                continue
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield from self.children(full)
            else:
                yield full

    def call(self, name: str) -> Call | None:
        return self.twin.calls.get(self.twin_of(name))

    def stream_reason(self) -> str | None:
        """Why the stream cannot be sharded over the sequence, or None."""
        head = self.model.get_output_embeddings()
        if head is not None and not any(
            self.modules.get(name) is head for above in self.above() for name in self.children(above)
        ):
            return "its head is part of a larger module"
        stream = torch.Size((2, TOKENS, self.hidden))
        for name in self.above():
            if self.plain and own_parameters(self.modules[name]):
                return f"{name or 'the model'} has parameters of its own, and computes before its layers"
            call = self.twin.calls.get(name)
            if call is not None and (found := call.beyond_pointwise()):
                return f"{name or 'the model'} does more than add and scale between its layers ({found})"
        for name in self.layers():
            layer = self.call(name)
            if layer is None or not layer.streams:
                continue
            if layer.streams[0].shape != stream:
                return f"{wildcard(name)} is given a stream {list(layer.streams[0].shape)}, not [batch, seq, hidden]"
            if found := layer.beyond_pointwise():
                return f"{wildcard(name)} does more than add and scale beside its blocks ({found})"
            for child in self.children(name):
                call = self.call(child)
                if call is None:
                    return f"{wildcard(child)} is used without being called"
                if not call.is_sequence:
                    return f"{wildcard(child)} is not given [batch, seq, hidden]"
        return None

    def above(self) -> list[str]:
        """The modules that the layer lists are in, outermost first."""
        parts = [stem.split(".")[:-1] for stem in self.lists]
        return sorted({".".join(p[:i]) for p in parts for i in range(len(p) + 1)}, key=len)

    def set(self, name: str, rule: str) -> None:
        """One rule for all layers, if the others agree; else this layer's own."""
        if self.plan.setdefault(wildcard(name), rule) != rule:
            self.plan[name] = rule

    def plan_child(self, name: str) -> None:
        """A child of a decoder layer: a norm, or a block."""
        block, call = self.modules[name], self.call(name)
        if is_norm(block) and self.is_local(name):
            self.note_branches(name)
            return self.set(name, "norm")
        native, rules = self.inside(name), None
        if call is not None and (proven := self.proof(name, native)) is not None:
            rules = with_sizes(proven, block, self.config)
            if rules is not None:
                self.note_branches(name)
            else:
                note = f"{wildcard(name)} ({type(block).__name__}) is not split: its heads do not divide over {self.config.tp_size} ranks"
                self.plan.notes += [note] if note not in self.plan.notes else []
        rules = rules or whole_layout(block, native, call)
        if call is None:  # its parameters are read by whoever uses it
            rules[""] = "copy"
        for part, rule in rules.items():
            self.set(f"{name}.{part}" if part else name, rule)

    def proof(self, name: str, native: dict[str, str]) -> dict[str, str] | None:
        """The first of the block's layouts whose ranks add up to it on the small copy, or None."""
        key = self.kind(name, self.modules[name])
        if key not in self.proofs:
            twin = self.twin_of(name)
            block = self.twin.modules[twin]
            tries = layouts(block, native, self.calls_in(twin), self.hidden)
            sized = ((rules, with_sizes(rules, block, TPSPConfig(tp_size=RANKS))) for rules in tries)
            self.proofs[key] = next((rules for rules, sizes in sized if sizes and self.twin.adds_up(twin, sizes)), None)
        return self.proofs[key]

    def is_local(self, name: str) -> bool:
        """Whether the norm `name` can run on a part of the sequence, as it must if the stream is sharded; proven on the copy."""
        twin = self.twin_of(name)
        if not self.plan.sequence_parallel or self.twin.calls.get(twin) is None:
            return True
        key = self.kind(name, self.modules[name])
        if key not in self.local_norms:
            self.local_norms[key] = self.twin.is_local(twin)
            if not self.local_norms[key]:
                self.note(
                    f"{wildcard(name)} ({type(self.modules[name]).__name__}) is no norm of single positions, or writes into its "
                    "input: it is given the whole sequence"
                )
        return self.local_norms[key]

    def note(self, sentence: str) -> None:
        if sentence not in self.plan.notes:
            self.plan.notes.append(sentence)

    def note_branches(self, name: str) -> None:
        """Name the branches of the module `name` on sizes that the copy has not."""
        for branch in uncovered(self.modules[name], self.twin.modules[self.twin_of(name)]):
            self.note(f"the proof of {wildcard(name)} on a small copy does not cover {branch}")

    def calls_in(self, twin: str) -> dict[str, Call]:
        """How the modules in the block `twin` were called, by name inside it."""
        prefix = f"{twin}."
        return {
            n.removeprefix(prefix) if n != twin else "": c
            for n, c in self.twin.calls.items()
            if n == twin or n.startswith(prefix)
        }

    def inside(self, name: str) -> dict[str, str]:
        """transformers' rules for what is in the block `name`, by name inside it."""
        block = self.modules[name]
        names = [n for n, _ in itertools.chain(block.named_modules(), block.named_parameters())]
        return {n: rule for n in names if (rule := self.native.get(wildcard(f"{name}.{n}" if n else name)))}

    def plan_outside(self) -> None:
        """What is beside the layers."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.modules.items()}
        others = []
        for parent in self.above():
            for name in self.children(parent):
                module = self.modules[name]
                if module is embedding or module is head or self.is_around_layers(name):
                    continue
                if is_norm(module) and self.is_last(name, parent) and self.is_local(name):
                    self.plan[name] = "norm"
                else:
                    others.append(f"{name}.")
                    for part, rule in whole_layout(module, {}, None).items():
                        self.plan[f"{name}.{part}" if part else name] = rule
            if own_parameters(self.modules[parent]):
                self.plan[parent] = "stream"
        if not self.twin.calls_loss_function:
            self.plan.notes.append("no loss parallel: the model computes its cross entropy itself")
        elif head is not None and names[id(head)].startswith(tuple(others)):
            self.plan.notes.append(f"no loss parallel: the head {names[id(head)]} is part of a larger module")
        elif head is not None:
            self.plan[names[id(head)]] = "lazy_head" if self.config.loss == "chunked" else "head"
            self.plan.loss_parallel, head = True, None
        if embedding is not None and head is None and is_plain_embedding(embedding):
            plain = self.plain and self.plan.sequence_parallel
            self.plan[names[id(embedding)]] = "embedding:plain" if plain else "embedding"
            embedding = None
        for module in (head, embedding):  # what is left is whole: the two may be one
            if module is not None:
                name = names[id(module)]
                for part, rule in whole_layout(module, {}, None).items():
                    self.plan[f"{name}.{part}" if part else name] = rule

    def is_around_layers(self, name: str) -> bool:
        """Whether the module holds a list of layers, or is in one."""
        return any(f"{stem}.".startswith(f"{name}.") or name.startswith(f"{stem}.") for stem in self.lists)

    def is_last(self, name: str, parent: str) -> bool:
        """Whether the module comes after the layers that are in `parent`."""
        order = list(self.twin.calls)  # by the end of each call
        stems = tuple(f"{stem}." for stem in self.lists if f"{stem}.".startswith(f"{parent}." if parent else ""))
        return name in order and order.index(name) > max(
            (i for i, n in enumerate(order) if n.startswith(stems)), default=len(order)
        )


def plan_for(model: PreTrainedModel, config: TPSPConfig) -> Plan:
    """The plan of `model` under `config`: module name, with `*` for layer numbers → name in `styles.STYLES`.

    A small random copy of the model is built from its config and run on the CPU, to prove the layouts.

    Raises:
        ValueError: the sizes do not divide the model; it has no list of layers; no small copy can be built of it; or
            it has a module that the copy has not (each is named).
    """
    config.check_model(model.config)
    return _Planner(model, config).make()


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
            "a parameter whose layout it does not know; train it with FSDP alone."
        )
