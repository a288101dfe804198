"""torch's process groups and meshes: a collective that is slow on gloo, and what has no public form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

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
