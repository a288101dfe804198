"""Logits that are computed when somebody reads them.

The chunked loss multiplies by the head a few tokens at a time, so that `[tokens, vocab / tp]` never exists. It needs what
the head was given, but the code between head and loss is the model's own. So the head returns `LazyLogits`, on which
that code's scaling and softcapping is noted down; the loss takes the hidden states and the notes out of it, and for
anybody else the ordinary head runs.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What models do to their logits before the loss: elementwise, with numbers as the only other operands.
POINTWISE = {
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul,
    Tensor.div, Tensor.__truediv__, torch.div,
    Tensor.tanh, torch.tanh, F.tanh,
    Tensor.float, Tensor.to,
}  # fmt: skip
METADATA = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device,
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape", "ndim", "dtype", "device", "layout", "itemsize", "requires_grad", "is_leaf", "_base", "is_cpu",
            "is_cuda", "is_meta", "is_sparse", "is_nested", "is_quantized",
        )
    ),
}  # fmt: skip


_unread = contextvars.ContextVar("_unread", default=False)


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """While inside, a model's lazy logits stay so, also where its caller would otherwise get whole ones."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def stay_unread() -> bool:
    """Whether the caller is inside `unread`."""
    return _unread.get()


class LazyLogits(Tensor):
    """The logits `[batch, seq, vocab]` of a head that has not run.

    Shape, dtype and device are known. An elementwise operation of `POINTWISE` gives another `LazyLogits`; every other
    use runs the head, which is collective: every rank of the TP group must do it. An attribute of DTensor's, such as
    `full_tensor`, is that of the DTensor `Shard(-1)` that comes out, and so are the operations of the model's own code.
    For whoever the model has returned them to, an operation acts on the whole logits, as a plain tensor: any loss can be
    computed from them, and its gradient is exact, at the price of `[batch, seq, vocab]` on every rank.

    Args:
        hidden: what the head was given, as a DTensor `[batch, seq, hidden]`.
        head: the head, whose parameters are DTensors.
        run: `run(hidden)` is the ordinary head.
        parameters: gives its weight and bias (or None) as the plain local tensors to compute with.
    """

    @staticmethod
    def __new__(cls, hidden: DTensor, head: nn.Module, run: Callable[[DTensor], DTensor], parameters: Callable):
        shape, grad = (*hidden.shape[:-1], head.out_features), torch.is_grad_enabled() and hidden.requires_grad
        grad = grad or (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()))
        return cls._make(shape, hidden.dtype, hidden.device, grad, hidden, run, parameters, (), [])

    @classmethod
    def _make(cls, shape, dtype, device, grad, hidden, run, parameters, pointwise, hooks) -> LazyLogits:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=grad)
        self.hidden, self._run, self.parameters, self.pointwise = hidden, run, parameters, pointwise
        self._hooks: list[Callable] = hooks  # of the gradient; one list for all that come from one head
        self._value: DTensor | None = None
        self._whole: Tensor | None = None
        # Replaced once the model's forward is over, when FSDP may have freed the head's weight.
        self.gathered: Callable | None = None
        return self

    def __init__(self, *args, **kwargs):
        pass

    def materialize(self) -> DTensor:
        """The logits, `Shard(-1)`: runs the ordinary head, once."""
        if self._value is None:
            with (self.gathered or contextlib.nullcontext)():
                self._value = self._run(self.hidden)
            for operation in self.pointwise:
                self._value = operation(self._value)
            self.hook(self._value)
        return self._value

    def read(self) -> Tensor:
        """What an operation acts on: the DTensor inside the model's forward, the whole logits after it."""
        value = self.materialize()
        if self.gathered is None:
            return value
        if self._whole is None:
            if value.requires_grad:
                logger.warning_once(
                    "hf_tpsp: the script reads the logits in training, so they are gathered whole on every rank. "
                    "hf_tpsp.vocab_parallel_cross_entropy computes a loss from them as they are."
                )
            self._whole = value.full_tensor()
        return self._whole

    def hook(self, result: Tensor) -> Tensor:
        """`result`, with the hooks of these logits' gradient, which will come through `result` instead.

        FSDP2 starts its backward by a hook on the outputs of the model."""
        if result.requires_grad:
            for hook in self._hooks:
                result.register_hook(hook)
        return result

    def _noted(self, operation: Callable) -> LazyLogits:
        probe = operation(torch.empty(1, dtype=self.dtype, device="meta"))
        grad, pointwise = self.requires_grad, (*self.pointwise, operation)
        noted = self._make(
            self.shape, probe.dtype, self.device, grad, self.hidden, self._run, self.parameters, pointwise, self._hooks
        )
        noted.gathered = self.gathered
        return noted

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.register_hook and args[0]._value is None:
            args[0]._hooks.append(args[1])
            return None
        if func in POINTWISE and isinstance(args[0], LazyLogits):
            rest, device = args[1:], args[0].device
            if func is Tensor.to:  # a move to where the logits are is none
                rest = tuple(x for x in rest if not (isinstance(x, (str, torch.device)) and torch.device(x) == device))
            if not any(isinstance(x, (Tensor, str, torch.device)) for x in (*rest, *kwargs.values())):
                return (
                    args[0]._noted(lambda x: func(x, *rest, **kwargs))
                    if rest or kwargs or func is not Tensor.to
                    else args[0]
                )
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"
