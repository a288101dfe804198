"""torch's fake tensors and process groups: a rank of a world that does not exist, and what is seen of its step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from ...patching import swapped

# Fake tensors have no values. torch 2.13 keeps both names private, though much is built on them.
__all__ = ["FakeTensor", "FakeTensorMode"]

# A context in which no dispatch mode sees what is computed.
without_modes = _disable_current_modes


def is_fake(x: object) -> bool:
    return isinstance(x, FakeTensor)


def is_simulated() -> bool:
    """Whether operations give fake tensors here, so that generators have no values. torch 2.13 has no public way to
    ask."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@contextmanager
def fake_world(size: int, backend: str) -> Iterator[None]:
    """Be rank 0 of `size` ranks whose collectives send nothing, and whose backend is given as `backend`.

    torch 2.13 keeps the fake group private. DTensor's cache of sharding decisions tells meshes apart by their shape, so
    it would return meshes whose groups are gone. Delete the clearing when torch compares meshes by their groups too.
    """
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        with swapped((dist, "get_backend", lambda original: lambda group=None: backend)):
            yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def _without_modes(original: Callable) -> Callable:
    @functools.wraps(original)
    def run(*args, **kwargs):
        with without_modes():
            return original(*args, **kwargs)

    return run


@contextmanager
def told_apart(inside_fsdp: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """While inside, FSDP2's collectives run in a context of `inside_fsdp()`, and no dispatch mode sees the tensors by
    which DTensor works out the shape of a result when it meets a new operation.

    torch 2.13 (fsdp/_fully_shard/_fsdp_param_group.py, tensor/_sharding_prop.py) has no public place for either. Delete
    when it has, or marks such tensors.
    """

    def labelled(original: Callable) -> Callable:
        @functools.wraps(original)
        def run(*args, **kwargs):
            with inside_fsdp():
                return original(*args, **kwargs)

        return run

    with swapped(
        (fsdp, "foreach_all_gather", labelled),
        (fsdp, "foreach_reduce", labelled),
        (fsdp.FSDPParamGroup, "wait_for_unshard", labelled),
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", _without_modes),
    ):
        yield


@contextmanager
def watched_resizes(track: Callable[..., None]) -> Iterator[None]:
    """While inside, `track(storage, already=bytes)` is called before a storage is resized, and `track(storage)` after.

    FSDP2 resizes storages to gather parameters and to free them again. In torch 2.13 this is no operation, so that no
    dispatch mode sees it. Delete when one does.
    """

    def watch(original: Callable) -> Callable:
        def resize_(storage: torch.UntypedStorage, size: int):
            track(storage, already=storage.nbytes())
            original(storage, size)
            track(storage)

        return resize_

    with swapped((torch.UntypedStorage, "resize_", watch)):
        yield


def address(tensor: Tensor) -> int:
    """A number that identifies the storage of plain `tensor`. A fake one has no `data_ptr()` in torch 2.13."""
    return storage_address(tensor.untyped_storage())


def storage_address(storage: torch.UntypedStorage) -> int:
    return storage._cdata


def sgd(parameters, lr: float, momentum: float = 0) -> torch.optim.SGD:
    """SGD in the only form that fake DTensors can step: torch 2.13 (optim/sgd.py, `_fused_sgd`) runs the fused one on
    real tensors of the global shapes. Delete when it has a meta kernel."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, foreach=False)


def flop_formulas() -> dict:
    """Formulas of FLOPs by operation, with the CPU's fused attention, on which a simulation runs.

    torch 2.13 (utils/flop_counter.py) lacks that one. Delete when it has it.
    """
    aten = torch.ops.aten
    forward, backward = (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_backward,
    )
    return flop_registry | {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[forward],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[backward],
    }


def packet_of(operation: torch._ops.OpOverload) -> torch._ops.OpOverloadPacket:
    """The operation of which `operation` is one overload. torch 2.13 keeps the attribute private."""
    return operation._overloadpacket
