"""The model's own forward, which computes its loss on vocabulary shards and hands out lazy logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..loss.cross_entropy import on_shards, with_plain_gradient
from ..loss.logits import LazyLogits, is_kept_lazy


def patch_loss(model: PreTrainedModel, gathered: Callable) -> None:
    """Have `model` compute its own loss from sharded logits, and keep no key-value cache in training.

    The loss is looked up at each forward, because a script may set `model.loss_function` at any time.

    Logits of a call without labels and without gradients come back whole (generation). All others are not computed
    until they are read (`LazyLogits`), on every rank of the TP group.

    Args:
        gathered: makes a context in which the head's parameters are gathered over data parallelism.
    """
    inner = model.forward
    model.loss_function = on_shards(model.loss_function)

    def finish(logits, loss):
        whole = not torch.is_grad_enabled() and loss is None and not is_kept_lazy()
        if whole and isinstance(logits, (LazyLogits, DTensor)):
            return logits.full_tensor()
        if isinstance(logits, LazyLogits):
            logits.with_weights = gathered
        return logits

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        if not hasattr(loss_function := model.loss_function, "_tpsp_on_shards"):
            model.loss_function = on_shards(loss_function)
        # In training transformers would copy every key and value into a cache. With `position_ids` its default stays:
        # transformers takes them for packed rows only if there is no cache, and that choice is the script's.
        if model.training and torch.is_grad_enabled() and kwargs.get("position_ids") is None:
            kwargs.setdefault("use_cache", False)
        output = inner(*args, **kwargs)
        for loss in (output[0],) if isinstance(output, tuple) else (output.get("loss"),):
            # The loss may also be one of the script's own, or have an auxiliary loss in it.
            if type(loss) is Tensor:
                with_plain_gradient(loss)
        if isinstance(output, tuple):
            # The loss, a plain tensor, comes before the logits if there is one.
            at = 0 if isinstance(output[0], (LazyLogits, DTensor)) else 1
            return (*output[:at], finish(output[at], output[0] if at else None), *output[at + 1 :])
        if output.get("logits") is not None:
            output["logits"] = finish(output["logits"], output.get("loss"))
        return output

    model.forward = forward
