"""torch's autograd: questions that have no public form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def in_backward() -> bool:
    """Whether autograd is running in this thread. torch 2.13 has no public way to ask."""
    return torch._C._current_graph_task_id() != -1


def check_accumulates(node) -> None:
    """Raise `ValueError` if the running backward does not end in the `.grad` of a leaf, whose `AccumulateGrad` is `node`.

    torch 2.13 (`torch.autograd.grad`) hands out what arrives at a parameter: here one rank's term of its gradient. The question
    whether it will accumulate has no public form, and is answered by an exception if not.
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
    """`torch.no_grad` in place of `torch.inference_mode`, if that is on: the gathered parameters, and the tables that models
    keep, outlive the call, and a tensor that was made in inference mode can never be trained with."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield
