"""Token mixers and MLPs, from their entry to their exit, and what lies inside them beside linear layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..collectives import (
    SEQUENCE,
    CopyToRegion,
    OneShare,
    OwnTerm,
    ReduceFromRegion,
    enter_region,
    gather_whole,
    scatter_sequence,
    slice_sequence,
)
from ..config import TPSPConfig
from ..forward import randomness
from ..forward.outputs import LazyWhole, whole_heads
from ..loss.logits import LazyLogits
from ..sizes import HEADS, KV_HEADS, WIDTHS
from ..state import style_of
from ..structure import is_norm
from ..upstream.torch import autograd
from . import recompute
from .base import Style, TensorParallel, parts_read_by
from .recompute import RecomputeScope, current_scope, regather
from .stream import Norm


def map_tensors(function: Callable[[Tensor], Any], x: Any) -> Any:
    """Apply `function` to `x` if it is a tensor, or to all tensors in its nested lists, tuples and dicts, in order.

    This is a top-level function, because a recursive closure would keep the tensors it has seen alive until Python's
    garbage collector runs.
    """
    if isinstance(x, Tensor):
        return function(x)
    if type(x) in (list, tuple):
        return type(x)([map_tensors(function, value) for value in x])
    if type(x) is dict:
        return {name: map_tensors(function, value) for name, value in x.items()}
    return x


class ReplicatedPartial(Norm):
    """Parameters inside a split block that are replicated, while each rank computes a partial output with them.

    Examples are q_norm, a router and MLA's compression. Their gradients are partial. No collective on activations.
    """

    is_read_by_owner = True

    def is_partial(self, name: str) -> bool:
        return self.parameter_rules.get(name) in (None, "share")

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        # `Norm.run` keeps only the norm's input for backward.
        if is_norm(module):
            return super().run(module, inner, tp, args, kwargs)
        # The block has already made the parameters plain.
        return inner(*args, **kwargs)


class Replicated(Style):
    """Parameters inside a block, or beside the layers, that every rank uses alike, so each rank has the whole
    gradient."""

    is_read_by_owner = True


class Activation(Style):
    """An activation function inside a region. Its output is not kept for backward, but computed from its input
    again."""

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        if (scope := current_scope()) is None:
            return inner(*args, **kwargs)
        kept = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        versions = [x._version for x in kept if isinstance(x, Tensor)]

        def is_untouched() -> bool:
            return versions == [x._version for x in kept if isinstance(x, Tensor)]

        def make() -> Tensor:
            if not is_untouched():
                raise recompute.overwritten()
            return inner(*kept, **kwargs)

        out = inner(*args, **kwargs)
        # An activation function that writes into its input cannot be run again from it.
        if is_untouched():
            scope.leave_out(out, make)
        return out


class Block(Style):
    """A token mixer or MLP, from its entry to its exit. Inside are plain tensors of the whole sequence.

    All arguments that carry the stream, positional or keyword, are gathered; the first tensor of the output goes back
    to the stream. While the block runs, its own parameters and those of the modules in `inside` are plain tensors.

    Args:
        variants: `heads` and `widths`: the module and its config hold this rank's share of these sizes, because its
            forward reads them; `residual`: a second stream that the module adds to its output is added once, not by
            each rank; `groups`: ranks share kv heads, so `num_key_value_groups` is set for one rank.

    Attributes:
        inside: the modules whose parameters are made plain at the entry.
    """

    reads_parts = True

    def __init__(self, config: TPSPConfig, *variants: str, **given: Any):
        super().__init__(config, **given)
        self.variants = variants
        self.inside: list[nn.Module] = []

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        self.inside = list(parts_read_by(module))
        super().install(module, tp)

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        self.heads = next((n for name in HEADS if isinstance(n := getattr(self.of(module), name, None), int)), 0)
        if "heads" in self.variants or "widths" in self.variants:
            for part in module.modules():
                self.share(part, size)
        # Several ranks share one kv head, so the number of query heads per kv head differs on one rank.
        if "groups" in self.variants:
            heads = next(n for n in HEADS if hasattr(self.of(module), n))
            module.num_key_value_groups = max(1, getattr(self.of(module), heads) // size)

    def share(self, part: nn.Module, size: int) -> None:
        """Set the numbers of heads (and the widths) of `part` and its config to one rank's share."""
        names = HEADS + KV_HEADS + (WIDTHS if "widths" in self.variants else ())
        config = vars(part).get("config")
        if config is not None:
            config = part.config = copy.copy(config)
        for owner in (part, config):
            for name in names:
                if owner is not None and isinstance(whole := vars(owner).get(name), int):
                    setattr(owner, name, max(1, whole // size))

    @staticmethod
    def of(module: nn.Module) -> Any:
        """The object that has the number of heads: the module, or else its config."""
        return module if any(hasattr(module, n) for n in HEADS) else getattr(module, "config", None)

    @contextlib.contextmanager
    def local_parameters(self, module: nn.Module, tp: TensorParallel) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().local_parameters(module, tp))
            for part in self.inside:
                stack.enter_context(style_of(part).local_parameters(part, tp))
            yield

    def map_streams(
        self,
        args: tuple,
        kwargs: dict,
        enter: Callable[[Tensor], Tensor],
        size: int,
        other: Callable[[Tensor], Tensor] = lambda x: x,
        marked: bool = True,
    ) -> tuple[tuple, dict, Tensor | None]:
        """Apply `enter` to every stream in `args` and `kwargs`, nested ones too. Return both, and the first stream.

        With `marked`, the streams are the DTensors sharded over the sequence, if there are any. Otherwise the first
        floating tensor is a stream (arguments come before tensors inside a list or dict), and so is every tensor of its
        shape.
        """
        inside: list[Tensor] = []
        map_tensors(inside.append, (args, kwargs))
        itself = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        floating = [x for x in (*itself, *inside) if x.is_floating_point()]
        sharded = [x for x in floating if isinstance(x, DTensor) and x.placements == (SEQUENCE,)] if marked else []
        first = next(iter(sharded or floating), None)
        found = 0

        def is_stream(x: Tensor) -> bool:
            if not x.is_floating_point():
                return False
            if not sharded or ("residual" in self.variants and not isinstance(x, DTensor)):
                return x.shape == first.shape
            return isinstance(x, DTensor) and x.placements == (SEQUENCE,)

        def visit(x: Tensor) -> Tensor:
            nonlocal found
            if isinstance(x, LazyLogits):
                return x
            # Another block made this tensor of heads, and this block needs this rank's part of it.
            if isinstance(x, LazyWhole) and x.part is not None:
                return x.part
            if not is_stream(x):
                return other(x)
            found += 1
            full = enter(x)
            return full / size if found > 1 and "residual" in self.variants else full

        return map_tensors(visit, args), map_tensors(visit, kwargs), first

    def exit(self, output: Any, stream: Tensor | None, mesh: DeviceMesh) -> Any:
        """Return `output` with its first tensor back in the layout of `stream`, `[batch, seq, …]`.

        If `stream` is plain (a script that calls the block itself), that tensor is plain and whole. A partial tensor
        never leaves the block unreduced.
        """
        if not isinstance(output, Tensor):
            if isinstance(output, dict):
                first, *rest = output
                beside = {name: self.exit_beside(output[name], mesh) for name in rest}
                return type(output)(**{first: self.exit(output[first], stream, mesh), **beside})
            first, *rest = output
            return type(output)((self.exit(first, stream, mesh), *(self.exit_beside(x, mesh) for x in rest)))
        # Some modules return `[batch * seq, …]`.
        if stream is not None and output.shape[:2] != stream.shape[:2]:
            output = output.view(*stream.shape[:2], *output.shape[1:])
        return self.leave_region(output, mesh) if isinstance(stream, DTensor) else self.leave_whole(output, mesh)

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """Bring a rank's output back to the sharded stream."""
        return scatter_sequence(partial, mesh)

    def leave_whole(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """Turn a rank's output into the plain whole tensor."""
        return ReduceFromRegion.apply(partial, mesh)

    def write_back(self, entered: list[tuple[Tensor, Tensor, int]], mesh: DeviceMesh) -> None:
        """If the block wrote into an argument, copy the result into the caller's tensor, as would happen in one
        process.

        Args:
            entered: for each stream, `(stream, the tensor that the block was given for it, that tensor's version)`.
        """
        if torch.compiler.is_compiling():
            return
        for stream, full, version in entered:
            if full._version == version or full is stream:
                continue
            written = self.written(full, mesh, isinstance(stream, DTensor))
            if not torch.is_grad_enabled() or not stream.requires_grad:
                written = written.detach()
            # A plain stream shares its memory with what the block wrote into: the values do not change here, so the
            # tensors that autograd saved stay valid.
            shared = contextlib.nullcontext() if isinstance(stream, DTensor) else autograd.keep_version(stream)
            with shared:
                stream.copy_(written)

    def written(self, full: Tensor, mesh: DeviceMesh, is_sharded: bool) -> Tensor:
        """The caller's view of the stream `full`, into which every rank has written the same values."""
        return OwnTerm.apply(full, mesh) if is_sharded else OneShare.apply(full, mesh.size())

    def exit_beside(self, x: Any, mesh: DeviceMesh) -> Any:
        """Handle a value that a module returns beside its first output (a router's logits, attention weights)."""
        return x


class SplitBlock(Block):
    """A block that is split: each rank computes a partial output.

    Forward: all-gather, reduce-scatter. Backward: all-gather, reduce-scatter, and with `regather_inputs` the all-gather
    of the input once more, for the weights' gradients. (Without SP: all-reduce, all-reduce.)
    """

    def __init__(self, config: TPSPConfig, *variants: str, **given: Any):
        super().__init__(config, *variants, **given)
        self.forward_collective = "all-gather, reduce-scatter" if config.sequence_parallel else "all-reduce"
        self.backward_collective = self.forward_collective
        if self.regather_inputs:
            self.backward_collective = "2 all-gathers, reduce-scatter"

    def is_partial(self, name: str) -> bool:
        return name not in self.parameter_rules

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        mesh = tp.mesh

        def other(x: Tensor) -> Tensor:
            # All ranks hold the same `x`, but each rank's gradient of it is partial.
            return CopyToRegion.apply(x, mesh) if x.is_floating_point() and x.requires_grad else x

        entered: list[tuple[Tensor, Tensor, int]] = []
        with self.local_parameters(module, tp), contextlib.ExitStack() as stack:
            scope = stack.enter_context(RecomputeScope()) if self.regather_inputs and recompute.is_active() else None

            def enter(x: Tensor) -> Tensor:
                full = enter_region(x, mesh)
                if not torch.compiler.is_compiling():
                    entered.append((x, full, full._version))
                if scope is not None and isinstance(x, DTensor):
                    scope.leave_out(full, regather(x, mesh))
                return full

            args, kwargs, stream = self.map_streams(args, kwargs, enter, mesh.size(), other)
            with randomness.inside_block(module, None if stream is None else stream.shape, mesh):
                output = inner(*args, **kwargs)
        self.write_back(entered, mesh)
        return self.exit(output, stream, mesh)

    def exit_beside(self, x: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(x, Tensor):
            return x
        # These are attention weights of this rank's heads.
        if x.dim() == 4 and x.shape[1] * mesh.size() == self.heads:
            # `torch.compile` knows DTensor, and a caller outside the model gets the whole tensor either way.
            if torch.compiler.is_compiling():
                return DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
            return whole_heads(x, mesh)
        if not x.requires_grad:
            return x
        x = OneShare.apply(x, mesh.size())
        x._tpsp_shared = True
        return x


class WholeBlock(Block):
    """A block that every rank computes whole, because hf_tpsp could not prove that a split of it adds up.

    Forward: all-gather. Backward: all-gather. (Without SP: none.) A plain input stays plain.
    """

    def __init__(self, config: TPSPConfig, *variants: str, **given: Any):
        super().__init__(config, *variants, **given)
        self.forward_collective = self.backward_collective = "all-gather" if config.sequence_parallel else "-"

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        entered: list[tuple[Tensor, Tensor, int]] = []

        def enter(x: Tensor) -> Tensor:
            if not isinstance(x, DTensor):
                return x
            full = gather_whole(x)
            if not torch.compiler.is_compiling():
                entered.append((x, full, full._version))
            return full

        with self.local_parameters(module, tp):
            args, kwargs, stream = self.map_streams(args, kwargs, enter, tp.size)
            output = inner(*args, **kwargs)
        self.write_back(entered, tp.mesh)
        return self.exit(output, stream, tp.mesh) if isinstance(stream, DTensor) else output

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        return slice_sequence(partial, mesh)

    def written(self, full: Tensor, mesh: DeviceMesh, is_sharded: bool) -> Tensor:
        return slice_sequence(full, mesh)
