"""Linear layers inside a block, split over their output or their input features, and convolutions over their
channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..collectives import CopyToRegion, chunk_of, local_slice, own_features, sharded_features
from ..config import TPSPConfig
from ..structure import features, is_transposed
from ..upstream.torch.dtensor import StridedShard
from . import recompute
from .base import Style, TensorParallel


class Colwise(Style):
    """A linear layer split over its output features. Weight and bias split; input full, output local; no collective.

    Attributes:
        width: the output features of the whole layer, where `adjust` has set the module's own number to this rank's.
        rows: the indices of the output features that this rank uses, where these are not the contiguous part that
            DTensor gives it.
    """

    splits_features = True
    width: int | None = None
    rows: Tensor | None = None

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        return Shard(1 if is_transposed(module) and name == "weight" else 0)

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        # The forward of a Conv1D reads the width of its output.
        if is_transposed(module):
            # torch's stubs type the sizes as tensors.
            layer: Any = module
            self.width = layer.nf
            layer.nf = len(rows_of((str(layer.nf),), rank, size))

    def rows_on(self, device: torch.device) -> Tensor:
        # This is called only where `rows` is set.
        rows: Any = self.rows
        if rows.device != device:
            rows = self.rows = rows.to(device)
        return rows

    def gather_features(self, local: Tensor, module: nn.Module, mesh: DeviceMesh, gradient: Placement) -> Tensor:
        """This rank's output features → the output features of all ranks. `gradient` is the placement of the result's
        gradient."""
        out = sharded_features(local, self.width or features(module)[1], mesh)
        return out.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])


class Depthwise(Colwise):
    """A depthwise convolution split over its channels: weight `[channels, 1, kernel]` and bias. Input and output local;
    no collective."""

    is_read_by_owner = True

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        own: Any = len(rows_of((str(module.groups),), rank, size))
        module.in_channels = module.out_channels = module.groups = own


class ColwisePacked(Colwise):
    """Projections of equal width packed in one linear layer (gate and up): each is split over its own output features.

    Written `colwise_packed:n,n` in a plan, with the width of each part. The bias is replicated, and each rank takes its
    own elements of it. No collective.
    """

    def __init__(self, config: TPSPConfig, *parts: str, **given: Any):
        super().__init__(config, **given)
        self.parts = parts

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        if name == "bias":
            return Replicate()
        return StridedShard(cast(Shard, super().placement(module, name, param)).dim, split_factor=len(self.parts))

    def is_partial(self, name: str) -> bool:
        return name == "bias"

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        super().adjust(module, rank, size)
        self.rows = rows_of(self.parts, rank, size)

    def simulate_rank(self, module: nn.Module, rank: int, size: int) -> None:
        super().simulate_rank(module, rank, size)
        if (bias := module._parameters["bias"]) is not None:
            module.bias = nn.Parameter(bias[self.rows])

    def local_value(self, module: nn.Module, name: str, param: DTensor, tp: TensorParallel) -> Tensor:
        value = super().local_value(module, name, param, tp)
        return value.index_select(0, self.rows_on(value.device)) if name == "bias" else value


class ColwiseGathered(Colwise):
    """A linear layer split over its output features, whose output is gathered. Each rank then uses all of it, or a
    part.

    `colwise_gathered`, without arguments, gives each rank the whole output, for a forward that mixes all features, such
    as a norm over all heads. `colwise_gathered:q,k,v` lists the widths of packed projections that no DTensor placement
    can split (query, key and value with fewer kv heads), and gives each rank its features of each projection. A width
    `n@h` is a projection of `h` heads, fewer than there are ranks: each rank takes the head that its query heads use,
    and several ranks share one.
    Forward: all-gather (of the layer's output). Backward: reduce-scatter.
    """

    forward_collective = "all-gather"
    backward_collective = "reduce-scatter"

    def __init__(self, config: TPSPConfig, *parts: str, **given: Any):
        super().__init__(config, **given)
        self.parts = parts

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        super().adjust(module, rank, size)
        if self.parts:
            self.rows = rows_of(self.parts, rank, size)

    def simulate_rank(self, module: nn.Module, rank: int, size: int) -> None:
        if self.parts:
            inner, rows = module.forward, rows_of(self.parts, rank, size)
            module.forward = lambda x: inner(x).index_select(-1, rows)

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        full = self.gather_features(super().run(module, inner, tp, args, kwargs), module, tp.mesh, Partial())
        return full.index_select(-1, self.rows_on(full.device)) if self.parts else full


class ColwiseWhole(Colwise):
    """A linear layer inside a block that every rank computes whole: split over its output features, its output
    gathered.

    Forward: all-gather (of the layer's output). Backward: all-reduce (of its input's gradient).
    """

    forward_collective = "all-gather"
    backward_collective = "all-reduce"
    # The block around it sees the whole output.
    splits_features = False

    def simulate_rank(self, module: nn.Module, rank: int, size: int) -> None:
        """Change nothing, because every rank has the whole output."""

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        (x,) = args
        out = super().run(module, inner, tp, (CopyToRegion.apply(x, tp.mesh),), kwargs)
        return self.gather_features(out, module, tp.mesh, Replicate())


def rows_of(parts: tuple[str, ...], rank: int, size: int) -> Tensor:
    """The indices of `rank`'s output features in a layer that holds the projections `parts` one after the other."""
    start, rows = 0, []
    for part in parts:
        width, _, heads = part.partition("@")
        every = torch.arange(start, start + int(width))
        # There are fewer heads than ranks, so several ranks share one head.
        if heads:
            rows.append(every.chunk(int(heads))[rank * int(heads) // size])
        else:
            rows.append(chunk_of(every, 0, rank, size))
        start += int(width)
    return torch.cat(rows)


class Rowwise(Style):
    """A linear layer split over its input features. Weight split, bias replicated; input local, output partial.

    Each rank adds its share of the bias. The block sums the partial outputs at its exit. No collective.
    """

    splits_features = True

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        return Replicate() if name == "bias" else Shard(0 if is_transposed(module) else 1)

    def is_partial(self, name: str) -> bool:
        return name == "bias"

    def as_partial(self, name: str, value: Tensor, size: int) -> Tensor:
        return value / size if name == "bias" else value

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        with self.local_parameters(module, tp), recompute.partial_product():
            return inner(*args, **kwargs)


class RowwiseSliced(Rowwise):
    """A row-parallel layer whose input is whole on every rank: each rank takes its own features of the input."""

    def simulate_rank(self, module: nn.Module, rank: int, size: int) -> None:
        width = features(module)[0]
        super().simulate_rank(module, rank, size)
        inner = module.forward
        module.forward = lambda x: (
            inner(local_slice(x, Shard(x.dim() - 1), rank, size)) if x.shape[-1] == width else inner(x)
        )

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        (x,) = args
        return super().run(module, inner, tp, (own_features(x, tp.mesh),), kwargs)
