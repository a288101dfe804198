"""Linear layers inside a block, split over their output or their input features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..collectives import CopyToRegion, chunk_of, local_slice, own_features, sharded_features
from ..config import TPSPConfig
from ..structure import features, is_transposed
from ..upstream.dtensor import StridedShard
from . import recompute
from .base import Style


class Colwise(Style):
    """A linear layer split over its output features. Weight and bias split; input full, output local; no collective."""

    def placement(self, module, name, param):
        return Shard(1 if is_transposed(module) and name == "weight" else 0)

    def adjust(self, module, rank, size):
        if is_transposed(module):  # its forward reads the width of its output
            module._tpsp_width = module.nf
            module.nf = len(rows_of((str(module.nf),), rank, size))


class PackedColwise(Colwise):
    """Projections of equal width packed in one linear layer (gate and up): each is split over its own output features.

    Written `packed_colwise:n,n` in a plan, with the width of each part. The bias is replicated, and each rank takes its own
    of it. No collective.
    """

    def __init__(self, config: TPSPConfig, *parts: str):
        super().__init__(config)
        self.parts = parts

    def placement(self, module, name, param):
        if name == "bias":
            return Replicate()
        return StridedShard(super().placement(module, name, param).dim, split_factor=len(self.parts))

    def is_partial(self, name):
        return name == "bias"

    def adjust(self, module, rank, size):
        super().adjust(module, rank, size)
        module._tpsp_rows = rows_of(self.parts, rank, size)

    def rehearse(self, module, rank, size):
        super().rehearse(module, rank, size)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias[module._tpsp_rows])

    def local_value(self, module, name, param, gradients):
        value = super().local_value(module, name, param, gradients)
        return value.index_select(0, own_rows(module, value.device)) if name == "bias" else value


class GatheredColwise(Colwise):
    """A linear layer split over its output features, whose output each rank then has whole, or the part it names.

    Without arguments, the whole (`colwise_gathered`), for a forward that mixes all features, such as a norm over all heads.
    With the widths of packed projections that no placement of DTensor's splits (query, key and value with fewer kv heads),
    this rank's features of each: `colwise_gathered:q,k,v`. `n@h` is a projection of `h` heads, fewer than there are ranks: each
    rank takes the one that its query heads use, and several share it.
    Forward: all-gather (of the layer's output). Backward: reduce-scatter.
    """

    forward_collective = "all-gather"
    backward_collective = "reduce-scatter"

    def __init__(self, config: TPSPConfig, *parts: str):
        super().__init__(config)
        self.parts = parts

    def adjust(self, module, rank, size):
        super().adjust(module, rank, size)
        if self.parts:
            module._tpsp_rows = rows_of(self.parts, rank, size)

    def rehearse(self, module, rank, size):
        if self.parts:
            inner, rows = module.forward, rows_of(self.parts, rank, size)
            module.forward = lambda x: inner(x).index_select(-1, rows)

    def run(self, module, inner, gradients, args, kwargs):
        full = gather_features(super().run(module, inner, gradients, args, kwargs), module, gradients.mesh, Partial())
        return full.index_select(-1, own_rows(module, full.device)) if self.parts else full


class WholeColwise(Colwise):
    """A linear layer inside a block that every rank computes whole: split over its output features, its output gathered.

    Forward: all-gather (of the layer's output). Backward: all-reduce (of its input's gradient).
    """

    forward_collective = "all-gather"
    backward_collective = "all-reduce"

    def rehearse(self, module, rank, size):
        """Every rank has the whole output."""

    def run(self, module, inner, gradients, args, kwargs):
        (x,) = args
        out = super().run(module, inner, gradients, (CopyToRegion.apply(x, gradients.mesh),), kwargs)
        return gather_features(out, module, gradients.mesh, Replicate())


def gather_features(local: Tensor, module: nn.Module, mesh: DeviceMesh, gradient: Placement) -> Tensor:
    """This rank's output features of a column-parallel layer → all of them. `gradient`: of the result, on the ranks."""
    out = sharded_features(local, vars(module).get("_tpsp_width") or features(module)[1], mesh)
    return out.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])


def rows_of(parts: tuple[str, ...], rank: int, size: int) -> Tensor:
    """Indices of the output features of `rank`, of the projections `parts` that lie one after the other in a layer."""
    start, rows = 0, []
    for part in parts:
        width, _, heads = part.partition("@")
        every = torch.arange(start, start + int(width))
        if heads:  # fewer heads than ranks
            rows.append(every.chunk(int(heads))[rank * int(heads) // size])
        else:
            rows.append(chunk_of(every, 0, rank, size))
        start += int(width)
    return torch.cat(rows)


def own_rows(module: nn.Module, device: torch.device) -> Tensor:
    if module._tpsp_rows.device != device:
        module._tpsp_rows = module._tpsp_rows.to(device)
    return module._tpsp_rows


class Rowwise(Style):
    """A linear layer split over its input features. Weight split, bias replicated; input local, output one term of a sum.

    Each rank adds its share of the bias. The block sums the terms at its exit. No collective.
    """

    def placement(self, module, name, param):
        return Replicate() if name == "bias" else Shard(0 if is_transposed(module) else 1)

    def is_partial(self, name):
        return name == "bias"

    def term(self, name, value, size):
        return value / size if name == "bias" else value

    def run(self, module, inner, gradients, args, kwargs):
        with self.local_parameters(module, gradients), recompute.partial_product():
            return inner(*args, **kwargs)


class SplitRowwise(Rowwise):
    """A row-parallel layer whose input every rank has whole: each takes its own features of it."""

    def rehearse(self, module, rank, size):
        width = features(module)[0]
        super().rehearse(module, rank, size)
        inner = module.forward
        module.forward = lambda x: (
            inner(local_slice(x, Shard(x.dim() - 1), rank, size)) if x.shape[-1] == width else inner(x)
        )

    def run(self, module, inner, gradients, args, kwargs):
        (x,) = args
        return super().run(module, inner, gradients, (own_features(x, gradients.mesh),), kwargs)
