"""Finds where a NaN or Inf arose, after it has shown in the gradient norm: the step's batches are run once more, watched.

Slow, and only run once, before the error. All ranks run it together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ..fingerprint import fingerprint, leaves
from ..upstream.torch.dtensor import local_part
from ..upstream.torch.modules import without_compiled_code


@dataclass(frozen=True)
class Place:
    """Where a rank first met a value that is not finite. `order` counts the modules' calls, which are the same on all
    ranks."""

    order: int
    what: str


def find(model: nn.Module, batches: list[tuple[tuple, dict[str, Any]]]) -> str:
    """In words: the module or the parameter in which the first value arose that is not finite, the ranks that had it,
    and the batch. Every rank must call it, with the gradients that have it in place.

    Args:
        batches: (args, kwargs) of the model's forward, in the order of the step.
    """
    named = [(i, name, p) for i, (name, p) in enumerate(model.named_parameters())]
    weights = [Place(i, f"{name} itself holds it") for i, name, p in named if not _is_finite(p)]
    # Backward comes to the last parameters first.
    grads = [
        Place(-i, f"the gradient of {name} holds it")
        for i, name, p in named
        if p.grad is not None and not _is_finite(p.grad)
    ]
    if found := _first(weights[0] if weights else None):
        return f"{found}."
    of_gradient = _first(min(grads, key=lambda place: place.order, default=None))
    for p in model.parameters():
        p.grad = None
    try:
        for number, (args, kwargs) in enumerate(batches):
            if found := _run_again(model, args, kwargs):
                which = f"micro-batch {number + 1} of {len(batches)}" if len(batches) > 1 else "the batch"
                return f"First, {found}, of {which}, {_names(args, kwargs)}."
    finally:
        for p in model.parameters():
            p.grad = None
    given = "; ".join(_names(args, kwargs) for args, kwargs in batches)
    if of_gradient is None:
        return f"No single gradient holds it: they are too large to be squared. The batch: {given}."
    return f"{of_gradient[0].upper()}{of_gradient[1:]}; run again, the model did not show it. The batch: {given}."


def _run_again(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Forward and backward of one batch, watched. In words, where it was first met, and on which ranks."""
    met: list[Place] = []
    with torch.enable_grad(), without_compiled_code(model), _watched(model, met):
        output = model(*args, **kwargs)
        if found := _first(met[0] if met else None):
            return found
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
            loss.backward()
        return _first(met[0] if met else None)


@contextlib.contextmanager
def _watched(model: nn.Module, met: list[Place]) -> Iterator[None]:
    """While inside, note in `met` each module whose output, or whose output's gradient, is not finite. A module's parts
    are noted before it."""
    calls = 0
    handles = []

    def watch(name: str):
        def after(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            # Hooks see lazy logits too, and must not have them computed.
            tensors = [x for x in tree_leaves(output) if type(x) in (Tensor, DTensor) and x.is_floating_point()]
            label, order = f"{name} ({type(module).__name__})", calls
            if not all(map(_is_finite, tensors)):
                met.append(Place(order, f"the output of {label} is not finite"))
            for x in tensors:
                if x.requires_grad:
                    x.register_hook(lambda grad: note(grad, label, order))

        return after

    def note(grad: Tensor, label: str, order: int) -> None:
        if not _is_finite(grad):
            # Backward comes to the last calls first.
            met.append(Place(-order, f"the gradient that comes to the output of {label} is not finite"))

    for name, module in model.named_modules():
        if module is not model:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(mine: Place | None) -> str | None:
    """Of the places of all ranks the first one, with the ranks that met it there; None if no rank met any."""
    everyones: list[Place | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    places = [place for place in everyones if place is not None]
    if not places:
        return None
    first = min(places, key=lambda place: place.order)
    ranks = [str(rank) for rank, place in enumerate(everyones) if place == first]
    return f"{first.what} on rank {', '.join(ranks)}"


def _names(args: tuple, kwargs: dict[str, Any]) -> str:
    """The batch by its first tensor of numbers: name, shape and `fingerprint`, as each data-parallel rank has it."""
    given = {name: x for name, x in leaves([*args, kwargs]).items() if isinstance(x, Tensor) and x.dim() > 1}
    name, x = next(iter(given.items()), ("", torch.zeros(0)))
    mine = f"{name.rpartition('.')[2]} {list(x.shape)} with the fingerprint {int(fingerprint(x)) % 2**64:016x}"
    everyones: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    ranks = {text: [str(r) for r, other in enumerate(everyones) if other == text] for text in everyones}
    return " and ".join(f"{text} (rank {', '.join(found)})" for text, found in ranks.items())


def _is_finite(x: Tensor) -> bool:
    return bool(local_part(x).isfinite().all())
