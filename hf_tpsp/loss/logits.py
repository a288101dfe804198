"""Logits that are computed when they are read.

The chunked loss multiplies by the head a few tokens at a time, so that `[tokens, vocab / tp]` never exists. It needs
the head's input, but the code between head and loss is the model's own. So the head returns `LazyLogits`. They record
that code's scaling, softcapping and masking of words, in place or not, and the loss takes the hidden states and the
recorded operations from them. For any other use the ordinary head runs, and its logits are gathered: they are whole and
plain, and can be read and written into.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from ..collectives import chunk_of, shard_width
from .operations import (
    EXPOSES,
    INPLACE,
    METADATA,
    NOTABLE,
    POINTWISE,
    elementwise,
    fill,
    is_device,
    is_number,
    of_last_dimension,
)

logger = logging.get_logger(__name__)


_kept_lazy = contextvars.ContextVar("_kept_lazy", default=False)


@contextlib.contextmanager
def keep_lazy() -> Iterator[None]:
    """Inside this context, a model's lazy logits stay lazy, even where its caller would otherwise get whole ones."""
    token = _kept_lazy.set(True)
    try:
        yield
    finally:
        _kept_lazy.reset(token)


def is_kept_lazy() -> bool:
    """Whether the caller is inside `keep_lazy`."""
    return _kept_lazy.get()


class LazyLogits(Tensor):
    """The logits `[batch, seq, vocab]` of a head that has not run.

    Shape, dtype and device are known. An elementwise operation of `POINTWISE` gives another `LazyLogits`; an in-place
    one, or a number written into columns, is recorded on this one. Every other use runs the head and acts on the whole
    logits, a plain tensor. This is collective (every rank of the TP group must do it). Any loss can be computed from
    the whole logits with an exact gradient, but they take `[batch, seq, vocab]` on every rank. Writing into that
    tensor, or into a view of it, changes these logits: a loss that is computed later sees it. An attribute of DTensor,
    such as `placements` or `to_local`, is read from the logits' current value as a DTensor `Shard(-1)`.

    Args:
        hidden: the input of the head, as a DTensor `[batch, seq, hidden]`.
        head: the head, whose parameters are DTensors.
        run: `run(hidden)` runs the ordinary head.
        parameters: returns the head's weight and bias (or None) as plain local tensors to compute with. None if the
            loss is to be computed from the logits of all tokens.

    Attributes:
        pointwise: the recorded operations: functions of logits `[…, columns]` and of the number of their first column.
        origin: the `LazyLogits` that the head returned, if these were derived from them; else None.
        with_weights: once the model's forward is over, a context that the head must run in, because FSDP may have freed
            its weight; None before.
    """

    hidden: DTensor
    parameters: Callable[[], tuple[Tensor, Tensor | None]] | None
    pointwise: tuple[Callable[[Tensor, int], Tensor], ...]
    with_weights: Callable[[], contextlib.AbstractContextManager] | None

    @staticmethod
    def __new__(cls, hidden: DTensor, head: nn.Module, run: Callable[[DTensor], DTensor], parameters: Callable | None):
        shape, grad = (*hidden.shape[:-1], head.out_features), torch.is_grad_enabled() and hidden.requires_grad
        grad = grad or (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()))
        return cls._make(shape, hidden.dtype, hidden.device, grad, hidden, run, parameters, (), [])

    @classmethod
    def _make(cls, shape, dtype, device, grad, hidden, run, parameters, pointwise, hooks) -> LazyLogits:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=grad)
        if grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)
        self.hidden, self._run, self.parameters, self.pointwise = hidden, run, parameters, pointwise
        # Hooks on the gradient, in one list that all `LazyLogits` derived from one head share.
        self._hooks: list[Callable] = hooks
        self._value: DTensor | None = None
        self._whole: Tensor | None = None
        # The version of `_whole` when it was made, or None if it may have been changed without a change of version.
        self._whole_version: int | None = None
        self.origin: LazyLogits | None = None
        self._is_spent = False
        self.with_weights = None
        return self

    def __init__(self, *args, **kwargs):
        pass

    @property
    def is_written(self) -> bool:
        """Whether the whole tensor was (or may have been) written into, so that it holds the logits, and not
        `pointwise`."""
        return self._whole is not None and (self._whole_version is None or self._whole_version != self._whole._version)

    @property
    def is_spent(self) -> bool:
        """Whether a loss was computed from these logits, or others of the same head, without reading the whole
        tensor."""
        return (self if self.origin is None else self.origin)._is_spent

    def spend(self) -> None:
        """Record that a loss with a gradient is computed from these logits."""
        if torch.is_grad_enabled() and not self.is_written:
            (self if self.origin is None else self.origin)._is_spent = True

    @property
    def is_chunked(self) -> bool:
        """Whether the loss is to be computed from `hidden`, `parameters` and `pointwise`."""
        return self.parameters is not None and not self.is_written

    def materialize(self) -> DTensor:
        """The head's output after `pointwise`, as a DTensor `Shard(-1)`. The first call runs the ordinary head."""
        if self._value is None:
            # The value is kept, so it needs its gradient even if it is first read under `torch.no_grad`.
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(self.requires_grad),
                (self.with_weights or contextlib.nullcontext)(),
            ):
                self._value = self.hook(self._shape(self._run(self.hidden)))
        return self._value

    def _shape(self, value: DTensor) -> DTensor:
        """Apply `pointwise` to `value`."""
        if not self.pointwise:
            return value
        local, spec = value.to_local(grad_placements=value.placements), value._spec
        first = shard_width(value.shape[-1], spec.mesh.size()) * spec.mesh.get_local_rank()
        for operation in self.pointwise:
            local = operation(local, first)
        return DTensor.from_local(
            local, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        )

    def read(self) -> Tensor:
        """The logits as a whole plain tensor. Writing into it changes these logits."""
        if self._whole is None:
            value = self.materialize()
            if value.requires_grad:
                logger.warning_once(
                    "hf_tpsp: the logits are read in training, so they are gathered whole on every rank. "
                    "hf_tpsp.vocab_parallel_cross_entropy computes a loss from them as they are."
                )
            with torch.inference_mode(False), torch.set_grad_enabled(self.requires_grad):
                self._whole = _Whole.apply(value)
            self._whole_version = self._whole._version
        # Version counters do not count in inference mode.
        if torch.is_inference_mode_enabled():
            self._whole_version = None
        return self._whole

    full_tensor = read

    def sharded(self) -> DTensor:
        """The current value of the logits, as a DTensor `Shard(-1)`."""
        if not self.is_written:
            return self.materialize()
        whole = DTensor.from_local(self._whole, self.hidden.device_mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(self.dim() - 1)])

    def hook(self, result: Tensor) -> Tensor:
        """Register the hooks on these logits' gradient on `result`, which the gradient comes through instead. Return
        `result`.

        FSDP2 starts its backward by a hook on the outputs of the model.
        """
        if result.requires_grad:
            for hook in self._hooks:
                result.register_hook(hook)
        return result

    def _add_hook(self, hook: Callable) -> None:
        self._hooks.append(hook)
        if self._value is not None and self._value.requires_grad:
            self._value.register_hook(hook)

    def _like(self, dtype: torch.dtype, requires_grad: bool, pointwise: tuple) -> LazyLogits:
        made = self._make(
            self.shape,
            dtype,
            self.device,
            requires_grad,
            self.hidden,
            self._run,
            self.parameters,
            pointwise,
            self._hooks,
        )
        made.with_weights, made.origin = self.with_weights, self if self.origin is None else self.origin
        return made

    def _note(self, func: Callable, rest: tuple, kwargs: dict) -> LazyLogits | None:
        """Record `func(self, *rest, **kwargs)` and return its result; None if it cannot be recorded."""
        if self.requires_grad and not torch.is_grad_enabled():
            # Autograd must not see this operation, but the loss would differentiate a recorded one.
            return None
        if (columns := self._columns(func, rest, kwargs)) is not None:
            operation, is_inplace, dtype = (
                fill(*columns),
                func not in (Tensor.masked_fill, torch.masked_fill),
                self.dtype,
            )
        elif func in POINTWISE or func in INPLACE:
            # A move to the device that the logits are on changes nothing.
            if func is Tensor.to:
                rest = tuple(x for x in rest if not (is_device(x) and torch.device(x) == self.device))
            if not all(isinstance(x, NOTABLE) for x in (*rest, *kwargs.values())):
                return None
            if func is Tensor.to and not rest and not kwargs:
                return self
            operation, is_inplace = elementwise(INPLACE.get(func, func), rest, kwargs), func in INPLACE
            dtype = operation(torch.empty(1, dtype=self.dtype, device="meta"), 0).dtype
            is_copy = any(x is True for x in (*rest, *kwargs.values()))
            if func in (Tensor.to, Tensor.float) and dtype == self.dtype and not is_copy:
                return self
        else:
            return None
        if not is_inplace and not self.is_written:
            return self._like(dtype, self.requires_grad, (*self.pointwise, operation))
        # The result has a whole value already, but a loss can still be computed from it on shards.
        if not is_inplace:
            whole = operation(self._whole, 0)
            made = self._like(dtype, whole.requires_grad, ())
            made._whole = whole
            return made
        if dtype != self.dtype or self._value is not None or self._whole is not None:
            return None
        self.pointwise = (*self.pointwise, operation)
        return self

    def _columns(self, func: Callable, rest: tuple, kwargs: dict) -> tuple[Tensor, Any] | None:
        """The columns `[vocab]` into which `func` writes a number for every token, and that number; None if it does
        something else."""
        if kwargs or len(rest) < 2 or not is_number(rest[-1]):
            return None
        if func is Tensor.__setitem__ and len(rest) == 2:
            selected = of_last_dimension(rest[0], self.dim())
        elif func is Tensor.index_fill_ and rest[0] in (-1, self.dim() - 1):
            selected = rest[1]
        elif func in (Tensor.masked_fill_, Tensor.masked_fill, torch.masked_fill) and isinstance(rest[0], Tensor):
            selected = rest[0] if rest[0].shape == self.shape[-1:] else None
        else:
            return None
        if selected is None:
            return None
        columns = torch.zeros(self.shape[-1], dtype=torch.bool, device=self.device)
        columns[selected] = True
        return columns, rest[-1]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            if func is Tensor.requires_grad.__get__ and args[0].is_written:
                return args[0]._whole.requires_grad
            return super().__torch_function__(func, types, args, kwargs)
        if args and isinstance(args[0], LazyLogits):
            if func is Tensor.register_hook and getattr(args[1], "__module__", "").startswith("torch.distributed"):
                return args[0]._add_hook(args[1])
            if func in (Tensor.register_hook, Tensor.retain_grad) and args[0].is_spent:
                raise RuntimeError(_TOO_LATE)
            if func is Tensor.contiguous and not kwargs:
                return args[0]
            if (noted := args[0]._note(func, args[1:], kwargs)) is not None:
                return noted
        return cls._on_whole(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls._on_whole(func, args, kwargs or {})

    @classmethod
    def _on_whole(cls, func: Callable, args: tuple, kwargs: dict) -> Any:
        read: dict[int, LazyLogits] = {}

        def whole(lazy: LazyLogits) -> Tensor:
            read[id(lazy.read())] = lazy
            if func in EXPOSES:
                lazy._whole_version = None
            return lazy._whole

        args, kwargs = tree_map_only(LazyLogits, whole, (args, kwargs))
        out = func(*args, **kwargs)
        for lazy in read.values():
            if lazy._whole.shape != lazy.shape:
                raise ValueError(
                    f"{getattr(func, '__name__', func)} changed the shape of a parallelized model's logits in place, from "
                    f"{tuple(lazy.shape)} to {tuple(lazy._whole.shape)}. Use its form that returns a new tensor."
                )
        # An in-place operation returns its argument, so the lazy logits stand for it again.
        return read.get(id(out), out) if isinstance(out, Tensor) else out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.sharded(), name)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


class _Whole(torch.autograd.Function):
    """Logits `Shard(-1)` → the whole logits as a plain tensor with its own memory, which may be written into.

    The gradient is the same on all ranks, and each rank takes its own columns of it. Forward: all-gather. Backward:
    none.
    """

    @staticmethod
    def forward(ctx, value: DTensor) -> Tensor:
        ctx.spec = value._spec
        whole = value.full_tensor()
        # Autograd forbids writing into a view that a custom function returned, so the output is none.
        return whole.clone() if ctx.spec.mesh.size() == 1 else whole.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        mesh = ctx.spec.mesh
        own = chunk_of(grad, grad.dim() - 1, mesh.get_local_rank(), mesh.size()).contiguous()
        return DTensor(own, ctx.spec, requires_grad=False)


_TOO_LATE = (
    "A loss was computed from these logits of a parallelized model already, a few tokens at a time, and its gradient does not come "
    "through them: a hook on them, or their `grad`, would know nothing of it. Ask for it before the loss is computed: in a forward "
    "hook on the head, or by calling the model without labels and computing the loss from `logits` afterwards."
)


def _refuse_gradient(grad: Tensor) -> None:
    raise RuntimeError(
        "A gradient came to the logits of a parallelized model from something that does not know them, such as a "
        "torch.autograd.Function, and would be lost. Give it `logits.full_tensor()`: they are whole and plain, and take gradients."
    )
