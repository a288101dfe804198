"""What a model's modules show of their parameters between its calls, and how parts of it are called on their own.

FSDP2 gathers parameters for the forward of a module that it was given (the model, each decoder layer), and has the
modules show the gathered ones until it has freed them. After a forward with gradients the model's own (embedding, last
norm, head) and the last layer's are kept for backward. Whoever reads parameters then (an optimizer that is made after a
first look at the loss, `zero_grad`, `get_input_embeddings().weight`) would get tensors that no optimizer should have.
So outside of a running forward the modules show the sharded parameters. The gathered ones stay in memory; this costs
only the setting of attributes.

A part that is called outside the model's forward (the embedding, the decoder, a layer, the head) runs as a forward of
the FSDP2 module that gathers its parameters. It takes and returns whole plain tensors, with exact gradients.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ..collectives import SEQUENCE, gather_whole, slice_sequence
from ..loss.logits import LazyLogits
from ..upstream.torch import autograd, fsdp2
from ..upstream.torch.autograd import without_inference_mode
from .options import check_dtypes


class Calls:
    """The running calls of a sharded model and of its parts. Each model has one, on its `ReplicatedGradients`.

    Args:
        model: the module that FSDP2 has as its root.
        mesh: the one-dimensional TP mesh.
        sequence_parallel: whether layers take a sharded stream.

    Attributes:
        groups: FSDP2's groups of parameters that are gathered together.
        depth: the number of running calls, one inside the other.
        parts: the modules outside the layers, whose parameters are gathered with the model's own.
        mode: the contexts that the running call has entered.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, sequence_parallel: bool):
        self.model, self.mesh, self.sequence_parallel = model, mesh, sequence_parallel
        self.groups = [fsdp2.HiddenGroup(group) for group in fsdp2.fsdp_groups(model)]
        self.depth = 0
        self.parts: set[nn.Module] = set()
        self.mode = contextlib.ExitStack()

    @property
    def is_outside(self) -> bool:
        """Whether no call of the model, nor of a part of it, is running."""
        return self.depth == 0

    def enter(self) -> None:
        if self.depth == 0 and not autograd.in_backward():
            self.mode.enter_context(without_inference_mode())
            if fsdp2.is_before_first_forward(self.model):
                # Without this check torch would fail in an assertion.
                check_dtypes(self.model)
            fsdp2.start_forward(self.model, [hidden.group for hidden in self.groups])
            for group in self.groups:
                # A hidden group had no backward since its last forward, and its parameters may have been written to.
                if group.is_hidden:
                    group.reshard()
        self.depth += 1

    def leave(self) -> None:
        self.depth = max(0, self.depth - 1)
        try:
            self._end()
        finally:
            if self.depth == 0:
                self.mode.close()

    def _end(self) -> None:
        if self.depth == 0 and not autograd.in_backward():
            fsdp2.end_forward(self.model)
            for group in self.groups:
                # Without gradients no backward follows, so nothing else would free the gathered parameters.
                group.hide() if torch.is_grad_enabled() else group.reshard()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """While inside, the model's own parameters (embedding, last norm, head) are gathered, and shown."""
        (own,) = (group for group in self.groups if self.model in group.group.modules)
        # Parameters that are gathered already are kept for a backward, and must stay gathered.
        kept = own.is_unsharded
        with without_inference_mode():
            self.model.unshard()
        try:
            yield
        finally:
            if not kept:
                own.reshard()
            elif self.is_outside and not autograd.in_backward():
                own.hide()

    def run(self, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """Run `inner`, the forward of a part, as a forward of the model, so that FSDP2 gathers its parameters."""
        self.enter()
        try:
            return self.whole(self.model._tpsp_call(inner, *args, **kwargs))
        finally:
            self.leave()

    def run_style(self, style, module: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """Run `inner`, the forward of `module` under `style`, which was called while no other call was running."""
        if (style.original or module) not in self.parts:
            # Backward runs the forward of a checkpointed layer again. An activation function may be one object for all
            # models of the process (openai-gpt's is).
            if autograd.in_backward() or not any(True for _ in module.parameters()):
                return inner(*args, **kwargs)
            raise ValueError(
                f"This {type(module).__name__} is part of a decoder layer of a sharded model, and holds a part of its "
                "parameters. Call the whole layer, or read what you need with a forward hook during the model's own forward."
            )
        return self.run(inner, args, kwargs)

    def whole(self, output: Any) -> Any:
        """The `output` of a part with whole plain tensors in place of sharded ones; with gradients on, logits stay
        lazy. Every rank must call it."""

        def one(x: Tensor) -> Tensor:
            if isinstance(x, LazyLogits):
                if not torch.is_grad_enabled():
                    return x.full_tensor()
                x.with_weights = self.gathered
                return x
            return gather_whole(x) if x.placements == (SEQUENCE,) else x.full_tensor()

        return tree_map_only((DTensor, LazyLogits), one, output)


def install(model: nn.Module, layers: list[nn.Module], calls: Calls, is_compiled: bool) -> None:
    """Have every call of `model`, and of its parts when they are called on their own, go through `calls`."""
    model._tpsp_call = lambda inner, *args, **kwargs: inner(*args, **kwargs)
    register_fsdp_forward_method(model, "_tpsp_call")

    def before(module, args):
        # An interrupted forward may have left its depth behind.
        calls.depth = 0
        calls.enter()

    # The pre-hook runs before FSDP2's own hooks, the forward hook after them.
    model.register_forward_pre_hook(before, prepend=True)
    model.register_forward_hook(lambda module, args, output: calls.leave(), always_call=True)
    for layer in layers:
        _install_on_layer(layer, calls, is_compiled)
    inside = {module for layer in layers for module in layer.modules()}
    calls.parts = {module for module in model.modules() if module not in inside}
    for module in model.modules():
        # A module without parameters may be one object for all models, as activation functions are.
        if any(True for _ in module.parameters()):
            module.__deepcopy__ = _refuse_copy
    for module in calls.parts - {model}:
        if any(m in inside for m in module.modules()) and not isinstance(module, nn.ModuleList):
            _install_on_decoder(module, calls)


def _refuse_copy(memo: dict) -> None:
    raise ValueError(
        "copy.deepcopy cannot copy a sharded model, nor a part of it: what the copy computes would use the parameters of the original. "
        "For an average of the weights keep clones of the parameters ([p.detach().clone() for p in model.parameters()]); for a "
        "second model load it a second time."
    )


def _install_on_decoder(module: nn.Module, calls: Calls) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return calls.run(inner, args, kwargs) if calls.is_outside else inner(*args, **kwargs)

    module.forward = forward


def _install_on_layer(layer: nn.Module, calls: Calls, is_compiled: bool) -> None:
    """Have each call of `layer` go through `calls`, by hooks: a wrapped forward would run inside FSDP2's own hooks."""
    first = next(iter(inspect.signature(layer.forward).parameters))
    # For each running call of the layer, whether it came from outside the model's calls.
    running: list[bool] = []
    is_outside = False

    def cut(x: Any) -> Any:
        is_stream = isinstance(x, Tensor) and not isinstance(x, DTensor) and calls.sequence_parallel
        return slice_sequence(x, calls.mesh) if is_stream else x

    def before(module, args, kwargs):
        nonlocal is_outside
        # In backward the answer from forward still holds, because a script may have checkpointed the layer's call.
        if not autograd.in_backward():
            is_outside = calls.is_outside
        running.append(is_outside and calls.is_outside)
        calls.enter()
        if not running[-1]:
            return None
        return (cut(args[0]), *args[1:]) if args else args, {n: cut(x) if n == first else x for n, x in kwargs.items()}

    def after(module, args, output):
        try:
            return calls.whole(output) if running.pop() and output is not None else None
        finally:
            calls.leave()

    if is_compiled:
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    layer.register_forward_hook(after, always_call=True)
