"""The collectives of the residual stream, and its conversions between DTensor and plain tensor, as autograd functions.

They do what `DTensor.redistribute`, `to_local` and `from_local` do for a stream `[batch, seq, hidden]` that is
`Shard(1)`, without DTensor's bookkeeping, which at small sizes is a third of a training step. Under `torch.compile`,
DTensor's own functions are used, because the compiler knows them and does their bookkeeping once. The collectives are
torch's functional ones, because selective checkpointing can keep their results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .upstream.torch import c10d
from .upstream.torch.dtensor import DTensorSpec, StridedShard, spec_of

SEQUENCE = Shard(1)


_ops = c10d.functional


@functools.lru_cache(maxsize=256)
def stream_spec(mesh: DeviceMesh, shape: torch.Size, dtype: torch.dtype) -> DTensorSpec:
    """The DTensor spec of a stream of global `shape` `[batch, seq, hidden]`."""
    return spec_of(mesh, (SEQUENCE,), shape, dtype)


def all_gather_sequence(shard: Tensor, length: int, mesh: DeviceMesh) -> Tensor:
    """Every rank's part `[batch, ceil(length / tp) or less, hidden]` → `[batch, length, hidden]`. One all-gather."""
    size, (batch, held) = mesh.size(), shard.shape[:2]
    width = shard_width(length, size)
    if held < width:
        shard = _pad(shard, width - held)
    parts = all_gather(shard.contiguous(), mesh).unflatten(0, (size, batch))
    if batch == 1:
        return parts.view(1, size * width, *shard.shape[2:])[:, :length]
    return torch.cat([part[:, : max(0, length - i * width)] for i, part in enumerate(parts)], dim=1)


def reduce_scatter_sequence(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    """A partial tensor `[batch, length, hidden]` → this rank's part, along the sequence, of the sum. One
    reduce-scatter."""
    size, (batch, length) = mesh.size(), partial.shape[:2]
    width = shard_width(length, size)
    if length < size * width:
        partial = _pad(partial, size * width - length)
    # For a batch of 1, `contiguous` makes no copy.
    parts = partial.unflatten(1, (size, width)).transpose(0, 1).contiguous()
    summed = c10d.reduce_scatter(parts.flatten(0, 1), mesh.get_group()).view(batch, width, *partial.shape[2:])
    held = min(width, max(0, length - mesh.get_local_rank() * width))
    return summed if held == width else summed[:, :held].contiguous()


def own_range(length: int, rank: int, size: int) -> tuple[int, int]:
    """Start and length of the part that `rank` of `size` holds when DTensor shards `length`. The last ranks' parts may
    be shorter, or empty."""
    width = shard_width(length, size)
    start = min(length, rank * width)
    return start, min(width, length - start)


def chunk_of(full: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """The part of `full` that `rank` of `size` holds when DTensor shards it on `dim`."""
    return full.narrow(dim, *own_range(full.shape[dim], rank, size))


def own_part(full: Tensor, mesh: DeviceMesh) -> Tensor:
    """`[batch, length, …]` → this rank's part of the sequence."""
    return chunk_of(full, 1, mesh.get_local_rank(), mesh.size()).contiguous()


def all_gather(x: Tensor, over: DeviceMesh | dist.ProcessGroup) -> Tensor:
    """`[n, …]` → `[size * n, …]`, in the order of the ranks of a one-dimensional mesh or of a group."""
    group = over.get_group() if isinstance(over, DeviceMesh) else over
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def shard_width(length: int, size: int) -> int:
    """Elements on each of `size` ranks in DTensor's way of sharding unevenly; the last ranks may have fewer."""
    return -(-length // size)


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of `x` over the ranks, in a new tensor, which a model may write into."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", mesh.get_group().group_name))


def _pad(x: Tensor, positions: int) -> Tensor:
    """`x` with zeros after its sequence dimension."""
    return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, positions))


def gather_sequence(x: DTensor) -> Tensor:
    """Stream → plain full tensor, from which each rank computes its own columns, so its gradient is partial.

    Forward: all-gather. Backward: reduce-scatter.
    """
    if torch.compiler.is_compiling():
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return _Gather.apply(x, reduce_scatter_sequence)


def scatter_sequence(partial: Tensor, mesh: DeviceMesh) -> DTensor:
    """A partial tensor → its sum over the ranks, as a stream. Forward: reduce-scatter. Backward: all-gather."""
    if torch.compiler.is_compiling():
        return DTensor.from_local(partial, mesh, [Partial()], run_check=False).redistribute(placements=[SEQUENCE])
    return _Scatter.apply(partial, mesh, reduce_scatter_sequence)


def gather_whole(x: DTensor) -> Tensor:
    """Stream → plain full tensor, from which every rank computes the same, so its gradient is the same on all ranks.

    Forward: all-gather. Backward: none, each rank takes its own part.
    """
    if torch.compiler.is_compiling():
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    return _Gather.apply(x, own_part)


def slice_sequence(full: Tensor, mesh: DeviceMesh) -> DTensor:
    """A full tensor that is the same on every rank → the stream. Forward: none, each rank keeps its own part. Backward:
    all-gather."""
    if torch.compiler.is_compiling():
        return DTensor.from_local(full, mesh, [Replicate()], run_check=False).redistribute(placements=[SEQUENCE])
    return _Scatter.apply(full, mesh, own_part)


def to_local(x: DTensor) -> Tensor:
    """DTensor → local tensor; the local gradient has the DTensor's placements. No collective."""
    if torch.compiler.is_compiling():
        return x.to_local(grad_placements=x.placements)
    return _ToLocal.apply(x)


def from_local(local: Tensor, like: DTensor) -> DTensor:
    """Local tensor → the DTensor with the global shape and layout of `like`. No collective."""
    if torch.compiler.is_compiling():
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    return _FromLocal.apply(local, like._spec)


class _Gather(torch.autograd.Function):
    """Stream → plain full tensor. In backward, `take` turns the full gradient into this rank's part of the stream's."""

    @staticmethod
    def forward(ctx, x: DTensor, take: Callable[[Tensor, DeviceMesh], Tensor]) -> Tensor:
        ctx.spec, ctx.take = x._spec, take
        # For a batch of 1 the gathered tensor is a view, and a block could not write into an output that is a view. So
        # it is detached.
        return all_gather_sequence(x._local_tensor, x.shape[1], x._spec.mesh).detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return DTensor(ctx.take(grad, ctx.spec.mesh), ctx.spec, requires_grad=False), None


class _Scatter(torch.autograd.Function):
    """Plain full tensor → stream. `take` turns the full tensor into this rank's part of the stream."""

    @staticmethod
    def forward(ctx, full: Tensor, mesh: DeviceMesh, take: Callable[[Tensor, DeviceMesh], Tensor]) -> DTensor:
        ctx.spec = stream_spec(mesh, full.shape, full.dtype)
        return DTensor(take(full, mesh), ctx.spec, requires_grad=False)

    @staticmethod
    def backward(ctx, grad: DTensor):
        return all_gather_sequence(_local(grad, ctx.spec), grad.shape[1], ctx.spec.mesh), None, None


class _ToLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: DTensor) -> Tensor:
        ctx.spec = x._spec
        return x._local_tensor.view_as(x._local_tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return DTensor(grad, ctx.spec, requires_grad=False)


class _FromLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor, spec: DTensorSpec) -> DTensor:
        ctx.spec = spec
        return DTensor(local.detach(), spec, requires_grad=False)

    @staticmethod
    def backward(ctx, grad: DTensor):
        return _local(grad, ctx.spec), None


def _local(grad: DTensor, spec: DTensorSpec) -> Tensor:
    """The local part of a gradient, in the layout of `spec`."""
    if grad._spec.placements != spec.placements:
        grad = grad.redistribute(placements=spec.placements)
    return grad._local_tensor


class CopyToRegion(torch.autograd.Function):
    """Identity forward, all-reduce backward: the entry of a region when the stream is replicated (Megatron's f)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        # A block could not write into an output that is a view.
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.mesh.get_group())
        return grad, None


class ReduceFromRegion(torch.autograd.Function):
    """All-reduce forward, identity backward: the exit of a region when the stream is replicated (Megatron's g)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return all_reduce(x, mesh)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class OneShare(torch.autograd.Function):
    """Identity forward. Backward divides a gradient that is the same on all ranks by their number, so that the ranks'
    shares add up to it."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.size, None


class OwnTerm(torch.autograd.Function):
    """A full tensor that is the same on every rank → the stream.

    Backward puts the gradient of this rank's part into zeros of the full shape, which is this rank's partial gradient
    of the full tensor. No collective.
    """

    @staticmethod
    def forward(ctx, full: Tensor, mesh: DeviceMesh) -> DTensor:
        ctx.shape, ctx.mesh = full.shape, mesh
        return slice_sequence(full.detach(), mesh)

    @staticmethod
    def backward(ctx, grad: DTensor):
        if grad.placements != (SEQUENCE,):
            grad = grad.redistribute(placements=[SEQUENCE])
        term = grad._local_tensor.new_zeros(ctx.shape)
        chunk_of(term, 1, ctx.mesh.get_local_rank(), ctx.mesh.size()).copy_(grad._local_tensor)
        return term, None


def local_slice(full: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """The local part of `full` that `distribute_tensor` would give `rank` of a mesh dim of `size`."""
    if isinstance(placement, Replicate):
        return full
    parts = full.chunk(placement.split_factor, placement.dim) if isinstance(placement, StridedShard) else [full]
    return torch.cat([chunk_of(part, placement.dim, rank, size) for part in parts], placement.dim)


def enter_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The stream as the plain full tensor `[batch, seq, hidden]` of a region.

    This rank computes only its own columns from it, so its gradient is partial over the ranks.
    """
    if isinstance(x, DTensor):
        if x.placements == (SEQUENCE,):
            return gather_sequence(x)
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return CopyToRegion.apply(x, mesh) if x.requires_grad else x


def sharded_features(local: Tensor, width: int, mesh: DeviceMesh) -> DTensor:
    """This rank's part of `width` output features → the DTensor of all of them."""
    shape = torch.Size((*local.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(local.dim() - 1)], run_check=False, shape=shape, stride=stride)


def own_features(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`[..., features]` → this rank's part of the features."""
    return local_slice(x, Shard(x.dim() - 1), mesh.get_local_rank(), mesh.size())
