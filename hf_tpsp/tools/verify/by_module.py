"""Where a difference from one process begins: each module's output, its gradient, and its parameters' (`--by-module`).

`record` runs one forward and backward of the model in one process, and of the same model on the mesh, and keeps what
every module returned and the gradient that came back to it. Rank 0 then has the parts of all ranks, and joins them. The
weights of both models are left as they were.

What a module returns is whole, or sharded over the sequence, unless the module is inside a split block. There, a rank
has its own features or heads, or a partial output. The shapes of the parts say which, or else the reading that is
nearest to one process is taken. So these modules only help to look further inside a block that is off, and never make
one suspect.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...config import TPSPConfig
from ...loss.logits import LazyLogits
from ...state import style_of
from ...styles.block import Block, WholeBlock, map_tensors
from ...upstream.torch.autograd import in_backward
from .comparison import Errors, backward, data_parallel_rank, larger, largest, relative, shard_batch

Call = tuple[str, int]
"""A module's name, and the number of its call, from 1."""


@dataclass
class ModuleErrors:
    """The relative errors of one call of one module. An error is None if there is nothing, or nothing whole, to
    compare.

    Attributes:
        kind: the module's class.
        call: the number of the call, from 1.
        output: the error of the first floating tensor that the module returned.
        gradient: the error of the gradient of that tensor.
        parameters: the largest error of its own parameters' gradients, and of those of inner modules that are never
            called.
        parameter: the parameter with that error.
        is_inside: whether it is inside a split block, where a rank has a part of what one process has.
        takers: the modules that are given its output, from whose backward its gradient comes.
        backward: its place in the order in which gradients arrive, from 0.
    """

    name: str
    kind: str
    call: int = 1
    output: float | None = None
    gradient: float | None = None
    parameters: float | None = None
    parameter: str = ""
    is_inside: bool = False
    takers: list[str] = field(default_factory=list)
    backward: int | None = None


@dataclass
class Part:
    """What one rank has of a tensor.

    Attributes:
        dim: the dim along which its DTensor is sharded; None if it is no sharded DTensor.
        features: the indices in the last dim that this rank has, if the module's layout says so.
    """

    local: Tensor
    dim: int | None = None
    features: Tensor | None = None


class Recorder:
    """While entered, keeps what each module of `model` returns, and the gradient of that.

    Attributes:
        outputs: call → output, in the order in which the calls end.
        gradients: call → the gradient of the output, in the order in which they arrive.
        takers: call → the outermost modules that are given this very output.
        calls: name → number of calls.
    """

    def __init__(self, model: nn.Module):
        self.names = {module: name for name, module in model.named_modules() if name}
        self.outputs: dict[Call, Part] = {}
        self.gradients: dict[Call, Part] = {}
        self.takers: dict[Call, list[str]] = {}
        self.calls: Counter[str] = Counter()
        # The id of an output → the output and its call. The output is kept, so that no other tensor gets the same id.
        self._made: dict[int, tuple[Tensor, Call]] = {}

    def __enter__(self) -> Recorder:
        self._handles = [
            handle
            for module in self.names
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after),
            )
        ]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._made.clear()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # In backward a checkpointed layer runs again, which is not recorded.
        if in_backward():
            return
        name = self.names[module]

        def note(x: Tensor) -> None:
            _, call = self._made.get(id(x), (None, None))
            if call is not None and not any(is_within(name, taker) for taker in self.takers[call]):
                self.takers[call].append(name)

        map_tensors(note, (args, kwargs))

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        found: list[Tensor] = []
        map_tensors(found.append, dict(output) if isinstance(output, dict) else output)
        output = next((x for x in found if x.is_floating_point()), None)
        if in_backward() or output is None:
            return
        name = self.names[module]
        self.calls[name] += 1
        call = name, self.calls[name]
        features = getattr(style_of(module), "rows", None)
        # The `rows` of an embedding are those of its vocabulary, and no features.
        features = features if isinstance(features, Tensor) else None
        self._made[id(output)], self.takers[call] = (output, call), []
        if isinstance(output, LazyLogits):
            # The logits are computed apart, because a read would leave the whole ones in them. Their gradient is inside
            # the loss.
            with torch.no_grad():
                self.outputs[call] = part_of(output._run(output.hidden))
            return
        self.outputs[call] = part_of(output, features)
        if output.requires_grad:
            output.register_hook(functools.partial(self._arrived, call, features))

    def _arrived(self, call: Call, features: Tensor | None, grad: Tensor) -> None:
        self.gradients[call] = part_of(grad, features)


def part_of(x: Tensor, features: Tensor | None = None) -> Part:
    """This rank's part of `x`, as a copy, because the model may write into `x`."""
    if not isinstance(x, DTensor):
        return Part(x.detach().clone(), None, features)
    (placement,) = x.placements
    return Part(x.to_local().detach().clone(), placement.dim if isinstance(placement, Shard) else None)


def is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def inside_split_blocks(model: nn.Module) -> set[str]:
    """The names of the modules inside split blocks."""
    styles = {name: style_of(module) for name, module in model.named_modules()}
    blocks = [name for name, style in styles.items() if isinstance(style, Block) and not isinstance(style, WholeBlock)]
    return {name for name in styles if any(name != block and is_within(name, block) for block in blocks)}


@dataclass
class Recording:
    """What one step has left on rank 0.

    Attributes:
        expected: what the model in one process has left.
        found: (data-parallel rank, TP rank) → outputs, gradients and calls of the model on the mesh.
        batch: `[rows, seq]`.
        kinds: name → class, of every module.
        inside: the names of the modules inside split blocks.
        zero: the norm up to which a gradient is only rounding.
    """

    expected: Recorder
    found: dict[tuple[int, int], tuple[dict[Call, Part], dict[Call, Part], Counter[str]]]
    config: TPSPConfig
    batch: torch.Size
    kinds: dict[str, str]
    inside: set[str]
    zero: float

    def parts(self, kind: int, call: Call) -> list[list[Part]] | None:
        """The parts of all ranks, `[data-parallel rank][TP rank]`. `kind`: 0 for the output, 1 for its gradient.

        None if a rank has no part, or calls the module more or less often than one process does: an expert that none of
        the rank's tokens chooses is not called, and it cannot be told which of its calls match.
        """
        size = self.config
        ranks = [[self.found[dp, tp] for tp in range(size.tp_size)] for dp in range(size.dp_size)]
        if any(
            rank[2][call[0]] != self.expected.calls[call[0]] or call not in rank[kind] for row in ranks for rank in row
        ):
            return None
        return [[rank[kind][call] for rank in row] for row in ranks]

    def errors(self) -> list[ModuleErrors]:
        """The errors of each call, in the order in which the calls end in one process."""
        order = {call: i for i, call in enumerate(self.expected.gradients)}
        rows = []
        for call, output in self.expected.outputs.items():
            name, number = call
            row = ModuleErrors(name, self.kinds[name], number, is_inside=name in self.inside)
            row.takers, row.backward = self.expected.takers[call], order.get(call)
            if (table := self.parts(0, call)) is not None:
                row.output = error_of(table, output.local, self.batch, is_inside=row.is_inside)
            if call in order and (table := self.parts(1, call)) is not None:
                # The loss was scaled up by the data-parallel size, over which FSDP2 averages parameters' gradients.
                expected = self.expected.gradients[call].local * self.config.dp_size
                row.gradient = error_of(
                    table, expected, self.batch, is_inside=row.is_inside, is_gradient=True, zero=self.zero
                )
            rows.append(row)
        return rows


def record(
    reference: nn.Module, model: nn.Module, batch: dict[str, Tensor], items: Tensor, config: TPSPConfig, mesh: DeviceMesh,
    *, sums: bool,
) -> Recording | None:  # fmt: skip
    """Run one step of both models, without an optimizer. Collective. Rank 0 gets the recording, the others None.

    Args:
        items, sums: as for `train_beside`.
    """
    with Recorder(reference) as expected:
        backward(reference, batch, items)
    with Recorder(model) as found:
        backward(model, shard_batch(batch, mesh), items, config.dp_size if sums else 1)
    for part in (reference, model):
        part.zero_grad()
    place = data_parallel_rank(mesh), mesh["tp"].get_local_rank()
    ranks = [None] * config.world_size if dist.get_rank() == 0 else None
    dist.gather_object((place, found.outputs, found.gradients, found.calls), ranks)
    if ranks is None:
        return None
    norm = config.dp_size * largest(part.local.norm() for part in expected.gradients.values())
    return Recording(
        expected,
        {place: kept for place, *kept in ranks},
        config,
        batch["input_ids"].shape,
        {name: type(module).__name__ for name, module in reference.named_modules()},
        inside_split_blocks(model),
        zero=10 * torch.finfo(next(reference.parameters()).dtype).eps * norm,
    )


def error_of(
    table: list[list[Part]], expected: Tensor, batch: torch.Size, *, is_inside: bool, is_gradient: bool = False,
    zero: float | None = None,
) -> float | None:  # fmt: skip
    """The largest relative error, over the data-parallel ranks, of the tensor that the TP ranks' parts make together;
    None if it cannot be told how they fit together.

    Args:
        table: the parts by data-parallel rank and TP rank.
        batch: `[rows, seq]`. The rows are shared out over the data-parallel ranks.
        zero: the norm up to which `expected` is only rounding.
    """
    table = [joined(parts, expected) for parts in table]
    rows = [parts[0].local.shape[:1].numel() for parts in table]
    owns = [expected] * len(table)
    if expected.dim() and set(rows) == {len(expected) / len(table)} and len(expected) in (batch[0], batch.numel()):
        owns = expected.chunk(len(table))
    elif set(rows) != {expected.shape[:1].numel()}:
        # These are the tokens of an expert, in an order of its own.
        return None
    elif is_gradient:
        # The tensor serves all rows, as positions do, and each data-parallel rank has a partial gradient of it.
        columns = zip(*table, strict=True)
        table, owns = [[replace(parts[0], local=sum(p.local for p in parts)) for parts in columns]], [expected]
    found = 0.0
    for parts, own in zip(table, owns, strict=True):
        ways = readings(parts, own, is_inside, is_gradient)
        errors = [largest(relative(*pair, zero) for pair in pairs) for pairs in ways]
        if not errors:
            return None
        found = larger(found, next((e for e in errors if math.isnan(e)), min(errors)))
    return found


def joined(parts: list[Part], expected: Tensor) -> list[Part]:
    """The TP ranks' parts of a sharded DTensor joined into one; other parts as they are."""
    if (dim := parts[0].dim) is None:
        return parts
    whole = torch.cat([part.local for part in parts], dim)
    # A block may return `[batch * seq, …]`. hf_tpsp gives that its batch dim back.
    if whole.dim() == expected.dim() + 1:
        whole = whole.flatten(0, 1)
    return [Part(whole)]


def readings(
    parts: list[Part], expected: Tensor, is_inside: bool, is_gradient: bool
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The ways to read the TP ranks' parts of a whole tensor. Each way is a list of pairs `(found, expected)`."""
    tensors = [part.local for part in parts]
    shapes = [tensor.shape for tensor in tensors]
    if parts[0].features is not None:
        if is_gradient:
            # Several ranks may have the same feature. Each then has a partial gradient of it.
            whole = torch.zeros_like(expected)
            for part in parts:
                whole.index_add_(-1, part.features, part.local)
            yield [(whole, expected)]
        else:
            yield [(part.local, expected.index_select(-1, part.features)) for part in parts]
    elif all(shape == expected.shape for shape in shapes):
        yield [(tensor, expected) for tensor in tensors]
        if is_inside:
            yield [(sum(tensors), expected)]
    elif is_inside and {len(shape) for shape in shapes} == {expected.dim()}:
        differing = [d for d in range(expected.dim()) if any(shape[d] != expected.shape[d] for shape in shapes)]
        if len(differing) == 1 and sum(shape[differing[0]] for shape in shapes) == expected.shape[differing[0]]:
            yield [(torch.cat(tensors, differing[0]), expected)]


def add_parameters(rows: list[ModuleErrors], errors: Errors) -> None:
    """Enter the error of each parameter's gradient in the row of the module that has it, or of the nearest module
    around it that is called. The row is that of the first call, whose backward is the last to add to the gradient."""
    first = {row.name: row for row in reversed(rows)}
    for parameter, error in errors.of.items():
        name = parameter
        while name and name not in first:
            name = name.rpartition(".")[0]
        if (row := first.get(name)) is None:
            continue
        if row.parameters is None or larger(row.parameters, error) is not row.parameters:
            row.parameters, row.parameter = error, parameter


def is_off(error: float | None, limit: float) -> bool:
    """Whether `error` is above `limit`. NaN is."""
    return error is not None and not error <= limit


def off_from(rows: Iterable[ModuleErrors], limit: float) -> tuple[ModuleErrors | None, ModuleErrors | None]:
    """The first module whose output is off, and in the order of backward the first whose gradient is off, or a
    parameter's."""
    rows = list(rows)
    forward = next((row for row in rows if not row.is_inside and is_off(row.output, limit)), None)
    arrived = sorted((row for row in rows if row.backward is not None), key=lambda row: row.backward)
    # Modules whose output no gradient reaches come last.
    others = [row for row in reversed(rows) if row.backward is None]
    wrong = (
        row
        for row in (*arrived, *others)
        if is_off(row.parameters, limit) or (not row.is_inside and is_off(row.gradient, limit))
    )
    return forward, next(wrong, None)


def verdict(rows: list[ModuleErrors], limit: float) -> list[str]:
    """From which module on forward and backward are off: a sentence each, none if they are not."""
    forward, backward = off_from(rows, limit)
    lines = []
    if forward is not None:
        line = f"the forward is off from {forward.name} ({forward.kind}) on: its output is off by {forward.output:.1e}"
        inner = (row for row in rows if row.name != forward.name and is_within(row.name, forward.name))
        if (first := next((row for row in inner if is_off(row.output, limit)), None)) is not None:
            line += f"; inside it, from {first.name} ({first.kind}) on"
        lines.append(line)
    if backward is not None:
        line = f"the backward is off from {backward.name} ({backward.kind}) on: "
        if not backward.is_inside and is_off(backward.gradient, limit):
            line += f"the gradient of its output is off by {backward.gradient:.1e}"
            line += f"; it comes from {' and '.join(backward.takers)}" if backward.takers else ""
        else:
            line += f"the gradient of {backward.parameter} is off by {backward.parameters:.1e}"
        lines.append(line)
    return lines
