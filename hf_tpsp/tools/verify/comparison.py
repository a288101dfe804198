"""The one comparison with one process: `verify`, the test suite and the recipes all go by it.

NaN is never equal to anything, and is never lost behind a larger error, as it might be with Python's `max`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from ...config import TPSPConfig
from ...styles.recompute import Recomputed

KINDS = ("loss", "gradient", "norm", "weight")


class KeepFp64(TorchFunctionMode):
    """Leaves out the casts of fp64 tensors to fp32. transformers casts inside norms, softmax and loss, which leaves
    1e-7 of rounding in an fp64 comparison, and more where numbers cancel. Without the casts, what remains is error."""

    def __enter__(self):
        self._backward = backward = Recomputed.backward

        # The autograd engine runs without the modes of its caller.
        def with_mode(ctx, grad):
            TorchFunctionMode.__enter__(self)
            try:
                return backward(ctx, grad)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)

        Recomputed.backward = staticmethod(with_mode)
        return super().__enter__()

    def __exit__(self, *exc):
        Recomputed.backward = staticmethod(self._backward)
        return super().__exit__(*exc)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()}
        return func(*args, **kwargs)


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative(found: Tensor, expected: Tensor, zero: float | None = None) -> float:
    """‖found - expected‖ / ‖expected‖; a zero tensor must stay zero.

    Args:
        zero: the norm up to which `expected` is zero but for rounding. `found` must then be about zero too.
    """
    norm = expected.norm().item()
    if zero is not None and norm <= zero:
        return 0.0 if found.norm() <= 10 * zero else math.inf
    return ((found - expected).norm() / (norm or 1.0)).item()


def relative_number(found: float, expected: float) -> float:
    """`relative` for two numbers."""
    return abs(found - expected) / (abs(expected) or 1.0)


def larger(a: float, b: float) -> float:
    """`max` for which an error that is not a number is the largest of all, whichever of the two it is."""
    return a if a >= b or math.isnan(a) else b


def largest(errors: Iterable[float]) -> float:
    """The largest of `errors`, NaN if one of them is, 0 of none."""
    found = 0.0
    for error in errors:
        found = larger(found, float(error))
    return found


@dataclass
class Errors:
    """The largest relative error of each kind, and the parameter whose gradient is furthest off."""

    loss: float = 0.0
    gradient: float = 0.0
    norm: float = 0.0
    weight: float = 0.0
    parameter: str = ""
    of: dict[str, float] = field(default_factory=dict)
    """Parameter → error of its gradient."""

    def add(self, kind: str, error: float, name: str = "") -> None:
        if kind == "gradient":
            self.of[name] = larger(self.of.get(name, 0.0), error)
            if larger(self.gradient, error) is not self.gradient:
                self.parameter = name
        setattr(self, kind, larger(getattr(self, kind), error))

    def worst(self, count: int = 10) -> list[tuple[str, float]]:
        """The parameters whose gradients are furthest off, and by how much; NaN is furthest."""
        rank = {name: math.inf if math.isnan(error) else error for name, error in self.of.items()}
        return [(name, self.of[name]) for name in sorted(rank, key=rank.get, reverse=True)[:count]]

    def within(self, limit: float, weight: float | None = None) -> bool:
        """Whether all are at most `limit`, the weights' at most `weight`. NaN is not."""
        return all(getattr(self, kind) <= (weight if kind == "weight" and weight else limit) for kind in KINDS)


def data_parallel_rank(mesh: DeviceMesh) -> int:
    return mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size() + mesh["dp_shard"].get_local_rank()


def shard_batch(batch: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """This rank's rows: all ranks of a TP group get the same ones."""
    size = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    return {name: value.chunk(size)[data_parallel_rank(mesh)] for name, value in batch.items()}


def compare_gradients(reference: nn.Module, model: nn.Module, errors: Errors, rounding: bool = False) -> None:
    """Add the error of each gradient of `model`, on the mesh, to `errors`.

    Args:
        rounding: whether a gradient that is zero but for rounding, beside the norm of all, must only stay about zero.
    """
    pairs = list(zip(reference.named_parameters(), model.named_parameters(), strict=True))
    norm = torch.stack([a.grad.norm() for (_, a), _ in pairs if a.grad is not None]).norm().item()
    for (name, expected), (same_name, found) in pairs:
        assert name == same_name and expected.requires_grad == found.requires_grad, (name, same_name)
        if expected.grad is None:
            is_zero = found.grad is None or (found.requires_grad and not full(found.grad).any())
            errors.add("gradient", 0.0 if is_zero else math.inf, name)
        elif found.grad is None:
            errors.add("gradient", float(expected.grad.any()), name)
        else:
            zero = 10 * torch.finfo(expected.dtype).eps * norm if rounding else None
            errors.add("gradient", relative(full(found.grad), expected.grad, zero), name)


def backward(model: nn.Module, batch: dict[str, Tensor], items: Tensor, scale: float = 1) -> float:
    """The loss of `batch`. The gradients of `scale` times this loss are added to the parameters' `.grad`."""
    loss = model(**batch, num_items_in_batch=items).loss
    (loss * scale).backward()
    return loss.item()


def train_beside(
    reference: nn.Module,
    model: nn.Module,
    steps: list[list[dict[str, Tensor]]],
    config: TPSPConfig,
    mesh: DeviceMesh,
    *,
    sums: bool = True,
    clip: float | None = None,
    rounding: bool = False,
    every_gradient: bool = False,
) -> Errors:
    """Train `reference` on whole batches and `model`, on `mesh`, on its shares of them. Runs on every rank.

    Args:
        steps: the micro-batches of each optimizer step, whose gradients accumulate.
        sums: whether the loss is a sum over `num_items_in_batch`, or else a mean.
        clip: the norm to clip gradients to.
        every_gradient: compare the gradients of every step, not of the first alone.
    """
    # Adam would step at random where a gradient is only rounding (a key's bias). eps keeps such weights still.
    optimizers = [
        torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
        for part in (reference, model)
    ]
    errors = Errors()
    for step, batches in enumerate(steps):
        items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
        expected = found = 0.0
        for batch in batches:
            expected += backward(reference, batch, items)
            # FSDP averages over data parallelism.
            found += backward(model, shard_batch(batch, mesh), items, config.dp_size if sums else 1)
        total = torch.tensor(found, dtype=torch.float64)
        dist.all_reduce(total)
        errors.add("loss", relative_number(total.item() / (config.tp_size if sums else config.world_size), expected))
        if step == 0 or every_gradient:
            compare_gradients(reference, model, errors, rounding)
        if clip is not None:
            norms = [
                float(full(torch.nn.utils.clip_grad_norm_(part.parameters(), clip))) for part in (reference, model)
            ]
            errors.add("norm", relative_number(norms[1], norms[0]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for expected_weight, found_weight in zip(reference.parameters(), model.parameters(), strict=True):
        errors.add("weight", relative(full(found_weight.detach()), expected_weight.detach()))
    return errors


def set_training(*models: nn.Module) -> None:
    """Training mode, without dropout."""
    for model in models:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
