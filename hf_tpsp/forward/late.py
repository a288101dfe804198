"""What a check has found out on an accelerator, read when that keeps nobody waiting: before the optimizer steps.

Reading a value of the device at once would wait for all that it was given before. Here the value is copied to the host
behind that work, and is looked at when the optimizer is about to step: by then it is long there, and nothing that it
speaks against has reached the weights yet, nor a file.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..collectives import all_gather
from ..patching import WhileUsed

LIMIT = 64
"""Outcomes that are kept at most: an optimizer that is none of torch's never asks for them."""

# The copy of the outcome on the host, the event behind that copy (None on the CPU), and who judges it.
_pending: collections.deque[tuple[Tensor, Any, Callable[..., None]]] = collections.deque()


def add(outcome: Tensor, judge: Callable[..., None]) -> None:
    """Have `judge(*outcome)` called by the next `settle`. `outcome`: int64 `[n]`, on the device."""
    if len(_pending) == LIMIT:
        settle()
    event = None
    if outcome.device.type != "cpu":
        # Into pinned memory, which torch takes for such a copy.
        outcome = outcome.to("cpu", non_blocking=True)
        event = torch.get_device_module().Event()
        event.record()
    _pending.append((outcome, event, judge))


def settle() -> None:
    """Judge all outcomes that have not been looked at, in the order of their forwards. All ranks have the same ones."""
    while _pending:
        outcome, event, judge = _pending.popleft()
        if event is not None:
            event.synchronize()
        try:
            judge(*outcome.numpy().tolist())
        except BaseException:
            _pending.clear()
            raise


def hosts_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """A gloo group of the ranks of the one-dimensional `mesh`. Every rank of the job must call it."""
    own = dist.get_process_group_ranks(mesh.get_group())
    if mesh.device_type == "cpu":
        return mesh.get_group()
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, own)
    made = {ranks: dist.new_group(list(ranks), backend="gloo") for ranks in dict.fromkeys(map(tuple, groups))}
    return made[tuple(own)]


def gather(numbers: Sequence[int], hosts: dist.ProcessGroup) -> np.ndarray:
    """Each rank's `numbers`, int64 `[ranks, n]`, in host memory from end to end."""
    return all_gather(torch.tensor(numbers), hosts).numpy().reshape(hosts.size(), -1)


# The hook of all optimizers.
BEFORE_STEPS = WhileUsed(lambda: register_optimizer_step_pre_hook(lambda *_: settle()).remove)
