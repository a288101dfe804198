"""The proof that a block can be split: its ranks are rehearsed one after the other, in one process, on a small copy.

A block is split if its output is a sum of one term for each rank. Then every gradient is right too: the ranks' gradients of
what they share are terms of a sum (`styles.Replica`), by the chain rule, whatever the block computes. So the forward is
all there is to prove. `Twin` builds a small random copy of the model (`shrink.py`), records how each block is called, and
runs the block as rank 0 and as rank 1 would, with the plan's layouts: the two outputs must add up to the whole one. A norm runs
on a part of the sequence: that must give that part of the whole. Both in evaluation and in training mode, without dropout.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..collectives import chunk_of
from ..config import TPSPConfig
from ..structure import DROPOUTS, first_tensor
from ..styles.registry import style_for
from .record import RANKS, TOKENS, Call, OwnOperations, aside, detached, parameter_names
from .shrink import shrunk_like

LIMIT = 1e-4  # relative, in fp32: a wrong layout is off by as much as the output itself


class Twin:
    """A small copy of `model`, whose layers are in the lists `stems`, and how its modules were called.

    Attributes:
        model, modules: the copy. calls: module name → its first call.
        reads_embedding: the module, if any, that takes rows of the embedding's weight by itself.
        calls_loss_function: whether the model leaves its loss to `loss_function`, as most do.
    """

    def __init__(self, model: PreTrainedModel, stems: Iterable[str], every_layer: bool = False):
        self.stems = tuple(f"{stem}." for stem in stems)
        with aside():
            self.model = shrunk_like(model, every_layer).eval()
        self.modules = dict(self.model.named_modules())
        for module in self.modules.values():  # the proof is run in training mode too
            if isinstance(module, DROPOUTS):
                module.p = 0.0
        try:
            self.calls = self.record()
        except Exception as error:
            raise ValueError(
                f"hf_tpsp cannot run a small copy of {type(model).__name__} on the CPU, so it cannot prove a plan for it: {error}"
            ) from error

    def record(self, from_embedding: bool = True) -> dict[str, Call]:
        """Run the copy once. `from_embedding`: the stream starts there, or else at the first layer."""
        calls: dict[str, Call] = {}
        open_calls: list[tuple[str, tuple, dict]] = []
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        glue = OwnOperations(open_calls, embedding)
        for stem in self.stems:  # parameters of the layers, or of what they are in, are laid out for the stream
            parts = stem.split(".")
            for owner in (
                *(".".join(parts[:i]) for i in range(len(parts) - 1)),
                *(f"{stem}{i}" for i in range(len(self.modules[stem[:-1]]))),
            ):
                glue.stream.update({id(p): p for p in self.modules[owner].parameters(recurse=False)})
        hooks = []

        def before(name):
            def hook(module, args, kwargs):
                open_calls.append((name, *detached((args, kwargs))))
                if f"{name.rpartition('.')[0]}." in self.stems:
                    glue.layers_began = True
                    glue.follow(first_tensor([*args, *kwargs.values()]))
                elif module is head:
                    glue.is_on = False

            return hook

        def after(name):
            def hook(module, args, kwargs, output):
                glue.follow([*args, *kwargs.values()], output)
                if module is embedding and from_embedding:
                    glue.follow(output)
                _, args, kwargs = open_calls.pop()
                found = first_tensor(output)
                if found is None:
                    return
                if name not in calls:
                    calls[name] = Call(args, kwargs, found.detach().clone(), parameter_names(module))
                if isinstance(module, (nn.Linear, Conv1D)) and args:
                    for outer, given, named in open_calls:
                        streams = Call(given, named, found).streams
                        is_entry = (
                            bool(streams) and streams[0].shape == args[0].shape and torch.equal(streams[0], args[0])
                        )
                        if outer not in calls and name.startswith(outer):
                            linears.setdefault(outer, {})[name.removeprefix(outer).lstrip(".")] = is_entry

            return hook

        linears: dict[str, dict[str, bool]] = {}
        for name, module in self.modules.items():
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(name), with_kwargs=True))
        vocabulary = min(embedding.num_embeddings, self.model.config.get_text_config(decoder=True).vocab_size)
        ids = torch.randint(3, vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))

        def loss_function(*args, **kwargs):
            self.calls_loss_function = True
            return ids.new_zeros((), dtype=torch.float32)

        self.model.loss_function = loss_function
        self.calls_loss_function = False
        with torch.no_grad(), aside(), glue:
            self.model(input_ids=ids, labels=ids, use_cache=False)
        self.reads_embedding = glue.reader
        for name, operation in glue.found:
            if name in calls:
                calls[name].glue.append(operation)
        for hook in hooks:
            hook.remove()
        for name, found in linears.items():
            if name in calls:
                calls[name].linears = found
        return calls

    def adds_up(self, name: str, rules: dict[str, str]) -> bool:
        """Whether the ranks' outputs of block `name` under `rules` (by name inside the block; "" is the block) add up to the
        whole one's, in evaluation and in training."""
        call, whole = self.calls[name], self.modules[name]

        def total(training: bool) -> Tensor:
            return sum(self._term(whole, rules, call, rank, training) for rank in range(RANKS))

        return self._gives_the_whole(name, total)

    def is_local(self, name: str) -> bool:
        """Whether the module `name` makes of each part of the sequence alone that part of what it makes of the whole, and leaves
        what it is given as it is: as a norm does."""
        call, whole = self.calls[name], self.modules[name]

        def joined(training: bool) -> Tensor:
            parts = []
            for rank in range(RANKS):
                args, kwargs = copy.deepcopy((call.args, call.kwargs))
                if args:
                    args = (given := chunk_of(args[0], 1, rank, RANKS).clone(), *args[1:])
                else:
                    first = next(iter(kwargs))
                    kwargs[first] = given = chunk_of(kwargs[first], 1, rank, RANKS).clone()
                before = given.clone()
                parts.append(_run(copy.deepcopy(whole), args, kwargs, training))
                if not torch.equal(before, given):
                    raise ValueError("it writes into its input")
            return torch.cat(parts, dim=1)

        return self._gives_the_whole(name, joined)

    def _gives_the_whole(self, name: str, compute: Callable[[bool], Tensor]) -> bool:
        """Whether `compute(training)` gives the output of the module `name`, in evaluation and in training (without dropout)."""
        call, whole = self.calls[name], self.modules[name]
        for training in (False, True):
            try:
                with torch.no_grad(), aside():
                    output = compute(training)
                    expected = call.output
                    if training:
                        args, kwargs = copy.deepcopy((call.args, call.kwargs))
                        expected = _run(copy.deepcopy(whole), args, kwargs, training)
            except Exception:  # a layout that does not fit ends in whatever error its shapes run into
                return False
            if output.shape != expected.shape or not (output - expected).norm() <= LIMIT * expected.norm():
                return False
        return True

    def _term(self, whole: nn.Module, rules: dict[str, str], call: Call, rank: int, training: bool) -> Tensor:
        block = copy.deepcopy(whole)
        config = TPSPConfig(tp_size=RANKS)
        styles = {part: style_for(rule, config) for part, rule in rules.items() if not is_parameter(block, part)}
        for part, rule in rules.items():
            if is_parameter(block, part):
                owner, _, parameter = part.rpartition(".")
                styles[owner].parameter_rules = {**styles[owner].parameter_rules, parameter: rule}
        for part, style in styles.items():
            style.rehearse(block.get_submodule(part), rank, RANKS)
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
        args, kwargs, _ = styles[""].map_streams(args, kwargs, lambda x: x, RANKS, marked=False)
        return _run(block, args, kwargs, training)


def _run(module: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool) -> Tensor:
    """The first tensor of what `module` returns. Whatever it draws at random, it draws again in another run."""
    torch.manual_seed(0)
    return first_tensor(module.train(training)(*args, **kwargs))


def is_parameter(module: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        return last in module.get_submodule(owner)._parameters
    return False
