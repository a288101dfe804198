"""All ranks of a TP group must be fed the same batch: they hold parts of one model. Nothing else would say if they are not,
and the model would quietly train on a mixture."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from .collectives import all_gather

CHECKED = ("input_ids", "labels", "shift_labels")


def fingerprint(x: Tensor | None) -> Tensor:
    """One int64 that depends on every element of integer tensor `x`, its place and the shape. No synchronization."""
    if x is None:
        return torch.zeros((), dtype=torch.int64)
    places = torch.arange(1, x.numel() + 1, device=x.device)
    # A multiplicative hash modulo 2**64 (Knuth, TAOCP 3, 6.4): odd, and far from both small and round numbers.
    mixed = (x.reshape(-1).long() + 1) * places * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4417276706812531889
    return mixed.sum() * 31 + x.shape[-1]


def install(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Compare the batch over the TP ranks before each forward that trains or evaluates: one all-gather of 24 bytes.

    The forward raises `ValueError`, on every rank of the group, before anything is computed from the batch.
    """
    inner, calls = model.forward, 0

    @functools.wraps(inner)  # the Trainer reads its signature
    def forward(*args, **kwargs):
        nonlocal calls
        given = {"input_ids": args[0] if args else None, **kwargs}
        if torch.is_grad_enabled() or kwargs.get("labels") is not None:
            calls += 1
            check({name: given.get(name) for name in CHECKED}, tp_mesh, calls)
        return inner(*args, **kwargs)

    model.forward = forward


def check(batch: dict[str, Tensor | None], tp_mesh: DeviceMesh, step: int) -> None:
    """Raise `ValueError` unless all ranks of the TP group hold the same `batch`."""
    device = next((x.device for x in batch.values() if x is not None), None)
    mine = torch.stack([fingerprint(x).to(device) for x in batch.values()])
    everyones = all_gather(mine, tp_mesh).view(tp_mesh.size(), -1).cpu()
    if isinstance(everyones, FakeTensor):  # a simulated world (`hf_tpsp.estimate`): sizes, and no values to compare
        return
    differs = everyones != everyones[0]
    if differs.any():
        names = [name for name, column in zip(batch, differs.T, strict=True) if column.any()]
        ranks = [dist.get_global_rank(tp_mesh.get_group(), i) for i in differs.any(1).nonzero().flatten().tolist()]
        first = dist.get_global_rank(tp_mesh.get_group(), 0)
        raise ValueError(
            f"Forward {step}: rank {', '.join(map(str, ranks))} got other {' and '.join(names)} than rank {first}, in the "
            "same TP group. All ranks of a TP group must get the same batch: let accelerate "
            "deal the batches (prepare the DataLoader), and shuffle with the same seed on every rank."
        )
