"""torch's autograd: what it gives no public way to ask or to do."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

# A context in which a tensor can be written to without autograd noticing.
keep_version = _unsafe_preserve_version_counter


def in_backward() -> bool:
    """Whether autograd is running in this thread. torch 2.13 has no public way to ask."""
    return torch._C._current_graph_task_id() != -1


def check_accumulates(node) -> None:
    """Raise `ValueError` if the running backward does not end in the `.grad` of a leaf, whose `AccumulateGrad` is
    `node`.

    torch 2.13 (`torch.autograd.grad`) returns what arrives at a parameter, which here is a partial gradient. There is
    no public way to ask whether a backward accumulates into `.grad`. The private one may answer no with a
    `RuntimeError`.
    """
    try:
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:
        accumulates = False
    if not accumulates:
        raise ValueError(
            "torch.autograd.grad of a sharded model's parameters would give one rank's term of each gradient. Call "
            "`loss.backward()` and read `.grad`; gradients of activations are whole either way."
        )


def saved_tensors_are_hooked() -> bool:
    """Whether somebody's `torch.autograd.graph.saved_tensors_hooks` are active. torch 2.13 has no public way to ask."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@contextlib.contextmanager
def without_inference_mode() -> Iterator[None]:
    """`torch.no_grad` in place of `torch.inference_mode`, if that is on: the gathered parameters, and the tables that
    models keep, outlive the call, and a tensor that was made in inference mode can never be trained with."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have the running backward call `callback` at its end, after the callbacks that were queued before.

    torch 2.13 has no public way to queue one, though FSDP2 does it. Inside a callback, an operation on DTensors
    crashes, because it would need the engine that is running the callback: work on local tensors there.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def has_hooks(param: nn.Parameter) -> bool:
    """Whether something was registered with `param.register_hook`. torch 2.13 has no public way to ask."""
    return bool(param._backward_hooks)


def take_accumulate_hooks(param: nn.Parameter) -> dict:
    """Take off the hooks that were registered with `register_post_accumulate_grad_hook`, and return them. autograd
    calls them again after `give_accumulate_hooks`. torch 2.13 has no public way to suspend hooks."""
    hooks = param._post_accumulate_grad_hooks or {}
    if hooks:
        # With None in its place, autograd would keep the hooks that it has.
        param._post_accumulate_grad_hooks = OrderedDict()
    return hooks


def give_accumulate_hooks(param: nn.Parameter, hooks: dict) -> None:
    param._post_accumulate_grad_hooks = hooks
