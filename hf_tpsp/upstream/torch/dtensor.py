"""DTensor (torch): its checkpoints, its warnings, its gradients of a whole parameter, its loss, its random numbers."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.distributed.tensor._random as tensor_random
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import loss_parallel as torch_loss_parallel
from torch.distributed.tensor.placement_types import Placement
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from ...patching import WhileUsed, swap


def spec_of(mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size, dtype: torch.dtype) -> DTensorSpec:
    """The spec of a contiguous DTensor, with which one can be made without the checks of `from_local`. torch 2.13 has
    no public form of it."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensorSpec(mesh, placements, TensorMeta(shape, stride, dtype))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, without what autograd would record of `to_local`; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _pieces(tensor: DTensor) -> list[tuple[ChunkStorageMetadata, int, int, int]] | None:
    """The pieces that this rank has of a tensor that is sharded in strides, each with its place in the local tensor
    (dimension, start, length); None if the rank has one piece.

    A packed weight (gate and up in one) is sharded in strides: each TP rank has a piece of every part. torch 2.13
    (tensor/_api.py) takes all that a rank has for one piece. The ranks' pieces then overlap, and
    `torch.distributed.checkpoint` refuses to save them. Delete with the three patches below when it writes each piece
    by itself.
    """
    strided = [(i, p) for i, p in enumerate(tensor.placements) if isinstance(p, StridedShard)]
    if len(strided) != 1:
        return None
    at, placement = strided[0]
    if any(p.is_shard(placement.dim) for i, p in enumerate(tensor.placements) if i != at):
        # FSDP2 strides a dimension that TP shards too. A rank has one piece of it.
        return None
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    rank, size = tensor.device_mesh.get_local_rank(at), tensor.device_mesh.size(at)
    found, start = [], 0
    for part in torch.arange(tensor.shape[placement.dim]).chunk(placement.split_factor):
        own = (part.chunk(size) + (part[:0],) * size)[rank]
        if length := len(own):
            where = [torch.Size((*x[: placement.dim], n, *x[placement.dim + 1 :]))
                     for x, n in ((offsets, int(own[0])), (sizes, length))]  # fmt: skip
            found.append((ChunkStorageMetadata(*where), placement.dim, start, length))
        start += length
    return found


def _patch_write_items(original):
    @functools.wraps(original)
    def __create_write_items__(self, fqn, object):
        if (pieces := _pieces(self)) is None:
            return original(self, fqn, object)
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.size()))
            for chunk, *_ in pieces
        ]  # fmt: skip

    return __create_write_items__


def _patch_chunk_list(original):
    @functools.wraps(original)
    def __create_chunk_list__(self):
        pieces = _pieces(self)
        return original(self) if pieces is None else [chunk for chunk, *_ in pieces]

    return __create_chunk_list__


def _patch_tensor_shard(original):
    @functools.wraps(original)
    def __get_tensor_shard__(self, index):
        for chunk, dim, start, length in _pieces(self) or ():
            if chunk.offsets == index.offset:
                return original(self, index).narrow(dim, start, length)
        return original(self, index)

    return __get_tensor_shard__


class _NotSequential(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "sequential" not in record.getMessage()


def _quiet_redistribute() -> Callable[[], None]:
    """torch 2.13 (tensor/_redistribute.py) warns on every rank that gathering a parameter which TP and FSDP shard on
    one dimension takes two collectives. That is FSDP2's own layout, and it is gathered at saves only. Delete when
    FSDP2's layout does not set the warning off."""
    logger, quiet = logging.getLogger("torch.distributed.tensor._redistribute"), _NotSequential()
    logger.addFilter(quiet)
    return lambda: logger.removeFilter(quiet)


class _WholeParameter(torch.autograd.Function):
    """Sharded parameter → the whole one, on every rank. Backward: the mean of the gradients over data parallelism,
    which FSDP2 takes of all other gradients of this parameter. The ranks of a TP group have one batch, so their
    gradients are alike."""

    @staticmethod
    def forward(ctx, param: DTensor) -> torch.Tensor:
        ctx.spec = param._spec
        return param.detach().full_tensor()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        mesh, grad = ctx.spec.mesh, grad.clone(memory_format=torch.contiguous_format)
        for dim in mesh.mesh_dim_names[:-1]:
            dist.all_reduce(grad, group=mesh.get_group(dim))
            grad /= mesh[dim].size()
        return distribute_tensor(grad, mesh, ctx.spec.placements, src_data_rank=None)


def _patch_full_tensor(original):
    """torch 2.13 (tensor/_api.py, `full_tensor`) assumes that all ranks compute the same from a whole parameter, also
    those of data parallelism, and so each would keep its own shard of its own gradient. Here the gradient is averaged,
    for trained parameters on a mesh that `average_on` was called with, and for no other tensors. Delete when FSDP2's
    parameters do so."""

    @functools.wraps(original)
    def full_tensor(self, *, grad_placements=None):
        is_trained = self.is_leaf and self.requires_grad and torch.is_grad_enabled()
        if is_trained and grad_placements is None and hasattr(self.device_mesh._get_root_mesh(), "_tpsp_averages"):
            return _WholeParameter.apply(self)
        return original(self, grad_placements=grad_placements)

    return full_tensor


def average_on(mesh: DeviceMesh) -> None:
    """Have `full_tensor` average the gradients of the trained parameters on `mesh` and on its submeshes."""
    mesh._tpsp_averages = True


@contextlib.contextmanager
def loss_parallel() -> Iterator[None]:
    """torch's `loss_parallel` that also ends when an exception is raised, and does nothing inside the caller's own.

    torch 2.13 (tensor/parallel/loss.py) does neither. Delete when it does.
    """
    handlers = DTensor._op_dispatcher._custom_op_handlers
    if torch.ops.aten._log_softmax.default in handlers:
        yield
        return
    context = torch_loss_parallel()
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


class _DrawByShard(tensor_random._RNGStateTracker):
    """DTensor's random operations on the CPU: the numbers of a shard are its rank's own, those of a replica are common.

    torch 2.13 (tensor/_random.py) has a tracker for accelerators only. On the CPU each rank draws the same numbers for
    its own shard, and as many as that has. Delete when `is_rng_supported_mesh` holds for a CPU mesh.
    """

    def __init__(self, own_stream: Callable[[int, torch.device], contextlib.AbstractContextManager]):
        self.distribute_region_enabled, self._own_stream = True, own_stream

    @contextlib.contextmanager
    def _distribute_region(self, spec, generator=None):
        sharded = [dim for dim, placement in enumerate(spec.placements) if not placement.is_replicate()]
        if generator is not None or not sharded:
            yield
            return
        rank = 0
        for dim in sharded:
            rank = rank * spec.mesh.size(dim) + spec.mesh.get_local_rank(dim)
        with self._own_stream(rank, torch.device("cpu")):
            yield


def draw_by_shard(own_stream: Callable[[int, torch.device], contextlib.AbstractContextManager]) -> Callable[[], None]:
    """Have random operations on the CPU draw a shard's numbers inside `own_stream(number of the shard, device)`.
    Returns what undoes it."""
    return swap((tensor_random, "_rng_tracker", lambda original: _DrawByShard(own_stream)))


def _scale_lists() -> Callable[[], None]:
    """torch 2.13 (tensor/_sharding_prop.py) looks at all tensors of a list once for each of them, to find how the result
    is sharded. The first clipping of 480 gradients takes each rank 2 s for that. A list that is scaled by one number
    keeps its layout whatever that is, so each rank scales what it has. Delete when the search takes a time that is
    linear in the length of the list."""

    def scale(op_call, args: tuple, kwargs: dict) -> None:
        tensors, factor = args
        if isinstance(factor, DTensor):
            factor = factor.full_tensor()
        if factor.dim():
            for tensor in tensors:
                tensor.mul_(factor)
            return
        op_call([*map(local_part, tensors)], factor)

    handlers, operation = DTensor._op_dispatcher._custom_op_handlers, torch.ops.aten._foreach_mul_.Tensor
    handlers[operation] = scale
    return lambda: handlers.pop(operation)


QUIET_REDISTRIBUTE = WhileUsed(_quiet_redistribute)
SCALE_LISTS = WhileUsed(_scale_lists)
AVERAGE_WHOLE_PARAMETERS = WhileUsed(lambda: swap((DTensor, "full_tensor", _patch_full_tensor)))


PATCHES = (
    (DTensor, "__create_write_items__", _patch_write_items),
    (DTensor, "__create_chunk_list__", _patch_chunk_list),
    (DTensor, "__get_tensor_shard__", _patch_tensor_shard),
)
