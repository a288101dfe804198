"""From a model to its plan: which style each module gets. No collectives, no devices, no weights read.

The plan is derived, not listed per model, and proven before it is used (`prove.py`):

    base.embed_tokens            embedding         the residual stream begins, sharded over the sequence
    base.layers.*                enter             a plain stream from outside (`inputs_embeds`) is cut here
    base.layers.*.<norm>         norm              children of a layer whose class is a norm run on the shards
    base.layers.*.<other>        split, whole      every other child with parameters: a token mixer or an MLP
    base.layers.*.<other>.…      colwise, rowwise, colwise_packed, …   the linear layers of a split block
                                 replicated_partial, replicated        its other parameters
                                 activation        an activation function, which has no parameters
    base.norm                    norm
    base.<other>, <other>        whole             other modules beside the layers
    lm_head                      head, lazy_head   logits stay sharded over the vocabulary

A block is split by the first layout whose ranks add up to the block, out of: transformers' own tensor-parallel plan;
the linear layers whose input is the block's input, and the last one that it calls; each of these also with the module's
sizes set to one rank's share (`split:heads`). If no layout adds up, every rank computes the block whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import TPSPConfig
from ..inputs import instance
from ..rules import Plan, check_complete, check_used, wildcard
from ..structure import has_parameters, is_norm, is_plain_embedding, layer_lists, own_parameters
from .branches import uncovered
from .layouts import layouts, whole_layout, with_sizes
from .prove import try_layout, try_norm
from .record import BATCH, TOKENS, Call, SmallCopy
from .trial import Trial, why_not


class NothingToSplit(ValueError):
    """Raised for a model in which tensor parallelism can split nothing. `plan.tried` holds the layouts that were
    tried."""

    # Unpickling passes the message alone, so `plan` has a default.
    def __init__(self, message: str, plan: Plan | None = None):
        super().__init__(message)
        self.plan = plan


class _Planner:
    """Builds the plan of one model. All names are module names of that model, unless they are said to be the copy's.

    Attributes:
        small: the small copy of the model.
        counterparts: `kind` → the name of the module of that kind in the small copy.
        plain: whether the model needs the whole sequence between its embedding and its first layer.
        proofs: `kind` of a block → its layout without sizes, or None if it is not split.
        local_norms: `kind` of a norm → whether it can run on a part of the sequence.
    """

    def __init__(self, model: PreTrainedModel, config: TPSPConfig):
        self.model, self.config = model, config
        self.native = dict(model.tp_plan or {})
        self.modules = dict(model.named_modules())
        self.lists = layer_lists(model)
        # The second try keeps every layer, because the layers' pattern may follow config fields that `shrink.py` does
        # not know.
        for every_layer in (False, True):
            self.small = SmallCopy(model, self.lists, every_layer)
            modules = reversed(self.small.modules.items())
            self.counterparts = {self.kind(name, module): name for name, module in modules}
            if {self.kind(name, self.modules[name]) for name in self.layers()} <= self.counterparts.keys():
                break
        self.proofs: dict[tuple, dict[str, str] | None] = {}
        self.local_norms: dict[tuple, bool] = {}
        self.plan = Plan(config.sequence_parallel)
        self.hidden = self.small.model.config.get_text_config(decoder=True).hidden_size
        self.plain = self.computes_before_layers()
        if self.plain:
            self.small.record(from_embedding=False)

    def layers(self) -> list[str]:
        return [f"{stem}.{index}" for stem, layers in self.lists.items() for index in range(len(layers))]

    @staticmethod
    def kind(name: str, module: nn.Module) -> tuple:
        """A key that two modules share if they differ in nothing but their sizes."""
        inside = frozenset(wildcard(f".{n}") for n, _ in module.named_parameters())
        return wildcard(name), type(module).__name__, inside

    def counterpart(self, name: str) -> str:
        """The name of the module in the small copy that stands for the model's module `name`."""
        kind = self.kind(name, self.modules[name])
        if kind not in self.counterparts:
            same = [k for k in self.counterparts if k[0] == kind[0]]
            other = sorted(set(kind[2]) - set().union(*(k[2] for k in same)))
            what = f"has parameters ({', '.join(f'{name}{n}' for n in other)})" if same and other else "is"
            raise ValueError(
                f"{name} ({kind[1]}) {what} not in a small copy built from the model's config, so hf_tpsp cannot prove how to "
                "split it. Make what changes the model part of its class (a folder with its own code works), or train it "
                "with FSDP alone."
            )
        return self.counterparts[kind]

    def computes_before_layers(self) -> bool:
        """Whether the model needs the whole sequence between the embedding and the first layer."""
        calls = {name: self.small.calls.get(name) for name in self.above()}
        order = list(self.small.calls)
        first = min((i for i, n in enumerate(order) if n.startswith(self.small.stems)), default=0)
        before = [n for parent in self.above() for n in self.children(parent) if n in order[:first]]
        return any(c is not None and c.mixes_sequence(before_layers=True) for c in calls.values()) or any(
            self.modules[n] is not self.model.get_input_embeddings() for n in before
        )

    def make(self) -> Plan:
        if (reader := self.small.reads_embedding) is not None:
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
        check_used(self.model, self.plan)
        if not self.plan.loss_parallel and not any(self.proofs.values()):
            # The reasons are left out here, because they are in `tried`.
            notes = [re.sub(r"( is not split): .*", r"\1", note) for note in self.plan.notes]
            message = (
                f"hf_tpsp found nothing in {type(self.model).__name__} that tensor parallelism can split: {'; '.join(notes)}. "
                "Train it with FSDP alone, or add a layout in hf_tpsp/plan/layouts.py, `layouts`; `hf-tpsp plan MODEL --why NAME` "
                "prints those that were tried."
            )
            raise NothingToSplit(message, self.plan)
        return self.plan

    def split_together(self) -> None:
        """Split all blocks of one class in one place, or none: they may pass each other the keys and values of their
        heads."""
        for name in (child for layer in self.layers() for child in self.children(layer)):
            if self.call(name) is not None and not (is_norm(self.modules[name]) and self.is_local(name)):
                self.proof(name, self.inside(name))
        whole = {key[:2] for key, rules in self.proofs.items() if rules is None}
        for key in self.proofs:
            if key[:2] in whole:
                self.proofs[key] = None
        for name, cls in sorted(whole):
            trials = [trial for trial in self.plan.tried[name] if trial.owner == cls]
            self.note(f"{name} ({cls}) is not split: {why_not(trials)}")

    def plan_layer(self, name: str, layer: nn.Module) -> None:
        call = self.call(name)
        along = call.meets() if call is not None else []
        # Every layer can be the first that is called, because the layers before it may be skipped.
        if self.plan.sequence_parallel:
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
        return self.small.calls.get(self.counterpart(name))

    def stream_reason(self) -> str | None:
        """Why the stream cannot be sharded over the sequence, or None."""
        head = self.model.get_output_embeddings()
        if head is not None and not any(
            self.modules.get(name) is head for above in self.above() for name in self.children(above)
        ):
            return "its head is part of a larger module"
        stream = torch.Size((BATCH, TOKENS, self.hidden))
        for name in self.above():
            if self.plain and own_parameters(self.modules[name]):
                return f"{name or 'the model'} has parameters of its own, and computes before its layers"
            call = self.small.calls.get(name)
            if call is not None and (found := call.mixes_sequence()):
                return f"{name or 'the model'} does more than add and scale between its layers ({found})"
        for name in self.layers():
            layer = self.call(name)
            if layer is None or not layer.streams:
                continue
            if layer.streams[0].shape != stream:
                return f"{wildcard(name)} is given a stream {list(layer.streams[0].shape)}, not [batch, seq, hidden]"
            if found := layer.mixes_sequence():
                return f"{wildcard(name)} does more than add and scale beside its blocks ({found})"
            for child in self.children(name):
                call = self.call(child)
                if call is None:
                    return f"{wildcard(child)} is used without being called"
                if not call.is_sequence:
                    return f"{wildcard(child)} is not given [batch, seq, hidden]"
        return None

    def above(self) -> list[str]:
        """The modules that contain the layer lists, outermost first."""
        parts = [stem.split(".")[:-1] for stem in self.lists]
        return sorted({".".join(p[:i]) for p in parts for i in range(len(p) + 1)}, key=len)

    def set(self, name: str, rule: str) -> None:
        """Give `name` the rule `rule`: for all layers if they agree, else for this layer alone."""
        if self.plan.setdefault(wildcard(name), rule) != rule:
            self.plan[name] = rule

    def plan_child(self, name: str) -> None:
        """Plan a child of a decoder layer: a norm, or a block."""
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
                heads = f"its heads do not divide over {self.config.tp_size} ranks"
                self.note(f"{wildcard(name)} ({type(block).__name__}) is not split: {heads}")
        rules = rules or whole_layout(block, native, call)
        # A module that was never called has its parameters read by the modules around it.
        if call is None:
            rules[""] = "replicated"
        for part, rule in rules.items():
            self.set(f"{name}.{part}" if part else name, rule)

    def proof(self, name: str, native: dict[str, str]) -> dict[str, str] | None:
        """The first layout of the block `name` whose ranks add up to the whole block on the small copy, or None."""
        key = self.kind(name, self.modules[name])
        if key not in self.proofs:
            # The entry exists even if there is no layout to try.
            self.plan.tried.setdefault(wildcard(name), [])
            small = self.counterpart(name)
            tries = layouts(self.small.modules[small], native, self.calls_in(small), self.hidden)
            trials = (self.tried(name, try_layout(self.small, small, layout)) for layout in tries)
            self.proofs[key] = next((trial.layout for trial in trials if trial.adds_up), None)
        return self.proofs[key]

    def tried(self, name: str, trial: Trial) -> Trial:
        self.plan.tried.setdefault(wildcard(name), []).append(trial)
        return trial

    def is_local(self, name: str) -> bool:
        """Whether the norm `name` can run on a part of the sequence, as a sharded stream needs; tried on the small
        copy."""
        small = self.counterpart(name)
        if not self.plan.sequence_parallel or self.small.calls.get(small) is None:
            return True
        key = self.kind(name, self.modules[name])
        if key not in self.local_norms:
            self.local_norms[key] = self.tried(name, try_norm(self.small, small)).adds_up
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
        """Note the branches in the module `name` that depend on sizes and that the small copy may not take."""
        for branch in uncovered(self.modules[name], self.small.modules[self.counterpart(name)]):
            self.note(f"the proof of {wildcard(name)} on a small copy does not cover {branch}")

    def calls_in(self, small: str) -> dict[str, Call]:
        """How the modules in the block `small` of the copy were called, by name inside it."""
        calls = self.small.calls
        inside = {name.removeprefix(f"{small}."): call for name, call in calls.items() if name.startswith(f"{small}.")}
        return {"": calls[small], **inside}

    def inside(self, name: str) -> dict[str, str]:
        """transformers' rules for the modules and parameters in the block `name`, by name inside it."""
        block = self.modules[name]
        names = [n for n, _ in itertools.chain(block.named_modules(), block.named_parameters())]
        return {n: rule for n in names if (rule := self.native.get(wildcard(f"{name}.{n}" if n else name)))}

    def plan_outside(self) -> None:
        """Plan the modules beside the layers: embedding, last norm, head and others."""
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
        if not self.small.calls_loss_function:
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
        # A head or embedding that got no rule above is whole.
        for module in (head, embedding):
            if module is not None:
                name = names[id(module)]
                for part, rule in whole_layout(module, {}, None).items():
                    self.plan[f"{name}.{part}" if part else name] = rule

    def is_around_layers(self, name: str) -> bool:
        """Whether the module `name` contains a list of layers, or is inside one."""
        return any(f"{stem}.".startswith(f"{name}.") or name.startswith(f"{stem}.") for stem in self.lists)

    def is_last(self, name: str, parent: str) -> bool:
        """Whether the module `name` is called after the layers in `parent`."""
        # The calls are in the order in which they ended.
        order = list(self.small.calls)
        stems = tuple(f"{stem}." for stem in self.lists if f"{stem}.".startswith(f"{parent}." if parent else ""))
        return name in order and order.index(name) > max(
            (i for i, n in enumerate(order) if n.startswith(stems)), default=len(order)
        )


def plan_for(model: PreTrainedModel, config: TPSPConfig) -> Plan:
    """The plan of `model` under `config`: module name, with `*` for layer numbers → name in `styles.STYLES`.

    A small random copy of the model is built from its config and run on the CPU, to prove the layouts.

    Raises:
        ValueError: the sizes do not divide the model; it has no list of layers; no small copy can be built of it; it
            has a module that the copy lacks (the message names it); or nothing in it can be split (`NothingToSplit`).
        TypeError: `model` is no model of transformers, or `config` no `TPSPConfig`.
    """
    instance("model", model, PreTrainedModel, "Give it a causal LM of transformers; on meta is enough.")
    instance("config", config, TPSPConfig, "Write plan_for(model, TPSPConfig(tp_size=…)).")
    config.check_model(model.config)
    return _Planner(model, config).make()
