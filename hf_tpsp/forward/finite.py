"""Stops before the optimizer steps on a gradient that is not finite: `TPSPConfig(on_nan=…)`.

One NaN in one rank's part of one gradient is in all weights of all ranks a step later, and nothing else says so: the
Trainer logs such a loss as 0. The norm of all gradients shows it, the same on all ranks. `clip_grad_norm_`, which the
Trainer calls in each step, has it reduced already; this only keeps the number, and reads it when the optimizer is about
to step. Where nobody clips, the norm is taken here. The Trainer waits for the device at the end of each backward (to
look at the loss), so that nothing but the norm is left to wait for.
"""

from __future__ import annotations

import collections
import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.utils import logging

from ..patching import WhileUsed, swap
from ..upstream.torch.dtensor import local_part
from ..upstream.torch.fake import is_fake
from .first_nonfinite import find

logger = logging.get_logger(__name__)

KEPT = 16
"""Micro-batches of a step that are kept to run again. The Trainer holds all of a step's as it is."""


class Guard:
    """Looks at the gradient norm of one model before each step of its optimizer.

    Attributes:
        step: the number of the optimizer's next step; the Trainer's, which goes on after a resume, if one trains.
        skipped: how many steps were left out.
        batches: what the model was given since the last step, as (args, kwargs) of its forward.
    """

    def __init__(self, model: PreTrainedModel, on_nan: str):
        self.model, self.on_nan = weakref.ref(model), on_nan
        self.step, self.skipped = 1, 0
        self.batches: collections.deque[tuple[tuple, dict[str, Any]]] = collections.deque(maxlen=KEPT)

    def note(self, args: tuple, kwargs: dict[str, Any]) -> None:
        kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        if any(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 for x in tree_leaves(kept)):
            # Embeddings or pictures are large, so only the last are kept.
            self.batches.clear()
        self.batches.append(kept)

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise `FloatingPointError` on all ranks, or take the gradients away, if their norm is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or is_fake(local_part(parameters[0].grad)):
            return
        norm = float(_norm_of(parameters))
        batches, step = list(self.batches), self.step
        self.batches.clear()
        self.step += 1
        if math.isfinite(norm):
            return
        model = self.model()
        if self.on_nan == "skip":
            self.skipped += 1
            for p in parameters:
                p.grad = None
            if torch.distributed.get_rank() == 0:
                logger.warning(
                    f"hf_tpsp: step {step} was skipped: its gradient norm is {norm}. Weights and optimizer are as they were "
                    f"({self.skipped} skipped so far)."
                )
            return
        where = find(model, batches) if model is not None else ""
        raise FloatingPointError(
            f"hf_tpsp: the gradient norm of step {step} is {norm}. {where} The optimizer has not stepped, and the weights are "
            "those before this step. HF_TPSP_ON_NAN=skip leaves such steps out, ignore trains on."
        )


_guards: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()
_guarded: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Guard]] = weakref.WeakKeyDictionary()


def install(model: PreTrainedModel, on_nan: str) -> None:
    """Guard the optimizers that will step on `model`, and note what it is given. `on_nan`: as in `TPSPConfig`."""
    if on_nan == "ignore":
        return
    guard = _guards[model] = Guard(model, on_nan)
    inner = model.forward

    # The Trainer reads the signature of the forward.
    @functools.wraps(inner)
    def forward(*args, **kwargs):
        if torch.is_grad_enabled():
            guard.note(args, kwargs)
        return inner(*args, **kwargs)

    model.forward = forward
    GUARDED.keep_for(model)


def guard_of(model: nn.Module) -> Guard | None:
    """The guard of the sharded model inside `model`; None if it has none."""
    return next((_guards[module] for module in model.modules() if module in _guards), None)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if optimizer not in _guarded:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model, guard in list(_guards.items()):
            if any(id(p) in ids for p in model.parameters()):
                _guarded[optimizer] = weakref.ref(guard)
    guard = _guarded[optimizer]() if optimizer in _guarded else None
    if guard is not None:
        guard.before_step(optimizer)


class _Clipped:
    """The norm that was taken of the gradients of `parameters`, for as long as they have these gradients."""

    def __init__(self, parameters: list[nn.Parameter], norm: Tensor):
        self.ids, self.norm = {id(p) for p in parameters}, norm
        self.first = weakref.ref(parameters[0])
        self.grad = weakref.ref(local_part(parameters[0].grad))
        self.version = local_part(parameters[0].grad)._version

    def is_of(self, parameters: list[nn.Parameter]) -> bool:
        first = self.first()
        grad = None if first is None or first.grad is None else local_part(first.grad)
        is_there = grad is not None and grad is self.grad() and grad._version == self.version
        return is_there and all(id(p) in self.ids for p in parameters)


# Of several models, each is clipped before its own optimizer steps.
_clipped: collections.deque[_Clipped] = collections.deque(maxlen=4)


def _norm_of(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients of `parameters`: the one that was taken to clip them, or else a new one."""
    known = [clipped for clipped in _clipped if clipped.is_of(parameters)]
    _clipped.clear()
    return known[-1].norm if known else _total_norm([p.grad for p in parameters])


def _total_norm(grads: Iterable[Tensor], *args: Any) -> Tensor:
    """The norm of `grads` as a plain tensor: one reduction for each mesh."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [get_total_norm(group, *args) for group in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else get_total_norm(norms, *args)


def _patch_clip(original: Callable) -> Callable:
    """`clip_grad_norm_` that keeps the norm, reduced once, and leaves gradients whose norm is not finite as they are,
    so that the one with the NaN can be found. torch multiplies all of them by NaN."""

    @functools.wraps(original)
    def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        given = [p for p in parameters if p.grad is not None]
        meshes = {p.grad.device_mesh if isinstance(p.grad, DTensor) else None for p in given}
        mesh = meshes.pop() if len(meshes) == 1 else None
        if mesh is None or is_fake(local_part(given[0].grad)):
            return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        with torch.no_grad():
            norm = _total_norm([p.grad for p in given], norm_type, error_if_nonfinite, foreach)
            whole, finite = (
                DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
                for x in (norm, norm.nan_to_num(0.0, 0.0, 0.0))
            )
            clip_grads_with_norm_(given, max_norm, finite, foreach)
        _clipped.append(_Clipped(given, norm))
        return whole

    return clip_grad_norm_


def _install() -> Callable[[], None]:
    handle = register_optimizer_step_pre_hook(_before_step)
    restore = swap((torch.nn.utils, "clip_grad_norm_", _patch_clip))

    def undo() -> None:
        restore()
        handle.remove()

    return undo


# The hook of all optimizers, and the function that clips.
GUARDED = WhileUsed(_install)
