"""torch's process groups and meshes: a collective that is slow on gloo, timeouts, and what has no public form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group

# The functional collectives, whose results selective checkpointing can keep.
functional = torch.ops._c10d_functional


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[size * n, …]` → the sum over the ranks of this rank's `[n, …]`.

    torch 2.13's gloo (ProcessGroupGloo.cpp, `_reduce_scatter_base`) reduce-scatters by an all-reduce of the whole
    tensor, which sends twice the bytes. Here it is an all-to-all and a local sum. Delete when gloo no longer does so.
    """
    size = group.size()
    if dist.get_backend(group) == "gloo":
        split = [x.shape[0] // size] * size
        received = functional.wait_tensor(functional.all_to_all_single(x, split, split, group.group_name))
        return received.unflatten(0, (size, -1)).sum(0)
    return functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", size, group.group_name))


def flatten(mesh: DeviceMesh) -> None:
    """Give `mesh` a process group over all of its dims, so that DTensor reduces a gradient norm in one collective.

    torch 2.13 (tensor/_redistribute.py) takes one collective for each dim unless such a group exists, and
    `DeviceMesh._flatten` makes it. Delete when DTensor makes it itself, or `flatten` is public.
    """
    mesh._flatten()


def pipeline_products(group: dist.ProcessGroup) -> Callable[[], None]:
    """Have inductor run a matrix product and the collective beside it piece by piece ("async TP"). Returns what undoes
    it.

    torch 2.13 has no public switch for either. Untested on a GPU.
    """
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    before, inductor._micro_pipeline_tp = inductor._micro_pipeline_tp, True

    def undo() -> None:
        inductor._micro_pipeline_tp = before

    return undo


def kind_of(operation: torch._ops.OpOverload) -> str | None:
    """The name, without underscores, of a collective of either of torch's two families; None if `operation` is none."""
    if operation.namespace not in ("c10d", "_c10d_functional"):
        return None
    # Such as allgatherbase, or allgatherintotensor.
    return operation._opname.replace("_", "")


def group_of(operation: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dist.ProcessGroup:
    """The process group among a collective's arguments, which hold it boxed for TorchScript, or by its name."""
    given = {a.name: value for a, value in zip(operation._schema.arguments, args, strict=False)} | kwargs
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    group = given["group_name"]
    return _resolve_process_group(group) if isinstance(group, str) else group


def _default_backend() -> object | None:
    """The default group's backend of its first device; None if there is no group."""
    world = dist.group.WORLD if dist.is_initialized() else None
    return None if world is None else world._get_backend(world._device_types[0])


def default_timeout() -> timedelta | None:
    """The timeout of the default process group's collectives; None if there is no group, or one that sends nothing."""
    backend = _default_backend()
    return None if backend is None or isinstance(backend, FakeProcessGroup) else backend.options._timeout


def store() -> dist.Store | None:
    """The store of the default process group, in which its ranks find each other; None if there is no such group, or
    its other ranks do not exist. torch 2.13 has no public way to it."""
    return _get_default_store() if default_timeout() is not None else None


def set_timeout(mesh: DeviceMesh, timeout: timedelta) -> None:
    """Have the collectives of the default group, and of each group of `mesh`, end after `timeout`."""
    if default_timeout() is None:
        return
    groups = [dist.group.WORLD, *mesh.get_all_groups()]
    groups += [flat.get_group() for flat in mesh._get_root_mesh()._flatten_mapping.values()]
    for group in groups:
        group.set_timeout(timeout)


def _patch_new_timeout(original):
    """torch 2.13 (distributed_c10d.py, `new_group`; device_mesh.py, `init_device_mesh`, which has no argument for it)
    gives a new group the library's own timeout, of 10 or 30 minutes, whatever the default group's is. A rank that waits
    for one that is gone, also while the group is made, waits as long. Delete when a mesh takes the default group's."""

    @functools.wraps(original)
    def _get_default_timeout(backend):
        return default_timeout() or original(backend)

    return _get_default_timeout


PATCHES = ((distributed_c10d, "_get_default_timeout", _patch_new_timeout),)
