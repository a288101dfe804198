"""Compares the tensors that ranks must hold alike: each makes a few int64 digests, and one gather shows them to the whole
job."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from ..collectives import all_gather
from ..fingerprint import PIECE, fingerprint
from ..upstream.torch.fsdp2 import sharded_parameter


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sharded parameters, as the optimizer holds them. Inside the model's forward, FSDP2 shows gathered ones in the
    place of some."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name in module._parameters:
            if (parameter := sharded_parameter(module, name)) is not None:
                found.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
    return dict(found.values())


def compare_state(model: PreTrainedModel, mesh) -> None:
    """Raise `RuntimeError` on all ranks if two of them hold different values of the same piece of a parameter, or of a
    buffer."""
    shared = {n: p for n, p in sharded_parameters(model).items() if isinstance(p, DTensor) and is_replicated(p)}
    buffers = dict(model.named_buffers())
    tensors = [p._local_tensor for p in shared.values()] + list(buffers.values())
    if not tensors:
        return
    table = gather_over_world(torch.stack([fingerprint(x).to(mesh.device_type) for x in tensors]))
    groups = [holders(p) for p in shared.values()] + [tp_groups(mesh)] * len(buffers)
    for column, (name, holding) in enumerate(zip([*shared, *buffers], groups, strict=True)):
        if (ranks := odd_ranks(table[:, column], holding)) is not None:
            raise RuntimeError(
                f"hf_tpsp: {name} has other values on rank {ranks[0]} than on rank {ranks[1]}, though both hold the same part of it, "
                "so they would train different models. Load the same folder on every rank, and change weights on all of them "
                "alike."
            )


def gather_over_world(rows: Tensor) -> Tensor:
    """`[n, …]` of each rank → `[world, n, …]`, on the host. Waits for the device."""
    return all_gather(rows, dist.group.WORLD).view(dist.get_world_size(), *rows.shape).cpu()


def outline(local: Tensor | None) -> Tensor:
    """The two numbers by which a gradient is compared, its norm and its product with fixed numbers: `[2]` int64 with
    the bits of fp64. For a missing gradient (None) both are infinite, so that it equals only another missing one."""
    if local is None:
        return torch.full((2,), torch.inf, dtype=torch.float64).view(torch.int64)
    local = local.detach().reshape(-1)
    norm, product = local.new_zeros((), dtype=torch.float64), local.new_zeros((), dtype=torch.float64)
    for start in range(0, local.numel(), PIECE):
        piece = local[start : start + PIECE].double()
        # The fixed numbers are the fractional parts of multiples of the golden ratio (Weyl). They are as good as random
        # ones, and no generator advances.
        places = torch.arange(start, start + piece.numel(), device=local.device, dtype=torch.float64)
        product = product + piece @ ((places * 0.6180339887498949).frac() - 0.5)
        norm = norm + piece.square().sum()
    return torch.stack([norm.sqrt(), product]).view(torch.int64)


def is_replicated(parameter: DTensor) -> bool:
    sizes = parameter.device_mesh.mesh.shape
    return any(isinstance(p, Replicate) and n > 1 for p, n in zip(parameter.placements, sizes, strict=True))


def holders(parameter: DTensor) -> Tensor:
    """`[groups, ranks]`: the ranks of each group hold the same piece of `parameter`."""
    ranks = parameter.device_mesh.mesh
    alike = [i for i, p in enumerate(parameter.placements) if isinstance(p, Replicate)]
    apart = [i for i in range(ranks.dim()) if i not in alike]
    size = int(torch.tensor([ranks.shape[i] for i in alike]).prod()) if alike else 1
    return ranks.permute(*apart, *alike).reshape(-1, size)


def tp_groups(mesh) -> Tensor:
    """`[groups, tp]`: the ranks of each TP group. TP ranks are consecutive (`MESH_DIMS`)."""
    return torch.arange(dist.get_world_size()).view(-1, mesh.size())


def odd_ranks(values: Tensor, groups: Tensor, limit: float | None = None) -> tuple[int, int] | None:
    """A rank whose entry in `values` `[world, …]` differs from the first rank's of its group, and that first rank; None
    if no rank differs.

    Args:
        limit: if given, `values` are `outline`s, and may differ by this fraction of the largest norm in the group.
    """
    found = values[groups]
    differs = found != found[:, :1]
    if limit is not None:
        numbers = found.view(torch.float64)
        off = (numbers - numbers[:, :1]).abs() / numbers[..., :1].amax(1, keepdim=True)
        # A NaN is no small difference. Where all ranks have the same NaN, one process would have it too.
        differs &= ~(off <= limit)
    differs = differs.flatten(2).any(2) if differs.dim() > 2 else differs
    if not differs.any():
        return None
    group, rank = differs.nonzero()[0].tolist()
    return int(groups[group, rank]), int(groups[group, 0])
