"""Tensors that are not kept for backward, because they are cheap to compute again.

Three tensors in a layer are as large as a matrix product's output, but cost one collective or a few elementwise passes:

* the gathered input of a block. Its sequence shard is kept instead, and gathered once more when the first of the
  projections needs it (q/k/v, or gate/up, share that one gather);
* the output of an activation function, whose input is kept anyway;
* the intermediates of a norm, whose input is the residual stream.

With these, a layer keeps what Megatron's does under TP + SP: `(6 h + 2 kv + 3 f) / tp` elements per token
(`recipes/benchmark.py`). `selective` checkpointing goes further: it keeps the layer's input and the results of matrix
products, attention and reduce-scatters, and runs all else again.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..collectives import all_gather_sequence
from ..upstream.torch import autograd


def overwritten() -> RuntimeError:
    """The error that autograd would have raised, in the same words, if it had kept the tensor."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a module wrote "
        "into a tensor after it, or another, had computed with it."
    )


class _LeftOut:
    """Stands for a tensor in the autograd graph that several operations saved.

    The first of them that needs the tensor in backward has it made, and it is freed after the last one.
    """

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self.saved = self.pending = 0
        self.value: Tensor | None = None
        self.is_overwritten = False

    def get(self) -> Tensor:
        if self.is_overwritten:
            raise overwritten()
        if self.value is None:
            with torch.no_grad():
                self.value, self.pending = self.make(), self.saved
        value, self.pending = self.value, self.pending - 1
        if self.pending == 0:
            self.value = None
        return value


_Packed = tuple[_LeftOut, torch.Size, tuple[int, ...], int | torch.SymInt]
"""What autograd keeps for a view of a tensor that was left out: the `_LeftOut`, and the view's shape, stride and
offset."""


class RecomputeScope(saved_tensors_hooks):
    """A context for a block's forward, in which autograd does not save the tensors given to `leave_out`."""

    def __init__(self) -> None:
        # The keys are storages, which stay alive as long as this scope. The integer is the tensor's version when it was
        # left out; an in-place operation raises the version.
        self._known: dict[int, tuple[_LeftOut, Tensor, int]] = {}
        super().__init__(self._pack, self._unpack)

    def leave_out(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Do not save `tensor` or a view of it; in backward, `make()` must return the same values bitwise.

        After the block has written into `tensor`, it is saved after all.
        """
        self._known[tensor.untyped_storage()._cdata] = (_LeftOut(make), tensor, tensor._version)

    def _pack(self, tensor: Tensor) -> Tensor | _Packed:
        known = None if isinstance(tensor, DTensor) else self._known.get(tensor.untyped_storage()._cdata)
        if known is None or known[1]._version != known[2]:
            return tensor
        known[0].saved += 1
        return known[0], tensor.shape, tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: Tensor | _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        left_out, shape, stride, offset = packed
        return left_out.get().as_strided(shape, stride, offset)

    def __enter__(self) -> RecomputeScope:  # type: ignore[override]  # torch's gives nothing
        super().__enter__()
        self._token = _scope.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _scope.reset(self._token)
        for left_out, tensor, version in self._known.values():
            left_out.is_overwritten = tensor._version != version
        self._known.clear()
        super().__exit__(*exc)


_scope: contextvars.ContextVar[RecomputeScope | None] = contextvars.ContextVar("_scope", default=None)


def current_scope() -> RecomputeScope | None:
    """The scope of the block whose forward is running, if it leaves anything out. A compiled layer has none."""
    return None if torch.compiler.is_compiling() else _scope.get()


def is_active() -> bool:
    """Whether tensors can be left out here: a graph is being recorded, and nothing else decides what it keeps
    (activation checkpointing, offloading, `torch.compile`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not autograd.saved_tensors_are_hooked()


class Recomputed(torch.autograd.Function):
    """Computes `run(x, *parameters)` and keeps only the arguments; backward runs it again with gradients."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
        ctx.save_for_backward(x, *parameters)
        version = x._version
        out = run(x, *parameters)
        if x._version != version:
            raise RuntimeError(
                "a norm wrote into its input, which hf_tpsp keeps to compute the norm again in backward. Set "
                "TPSPConfig(regather_inputs=False)."
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        dtype, device = ctx.autocast or None, grad.device.type
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
            out = ctx.run(*inputs)
        found = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad))
        return None, *(next(found) if need else None for need in needed)


KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,  # a reduce-scatter on gloo
}
"""The operations whose results `selective` checkpointing keeps, except inside `partial_product`."""


_partial_product = contextvars.ContextVar("_partial_product", default=False)


@contextlib.contextmanager
def partial_product() -> Iterator[None]:
    """Inside this context, selective checkpointing does not keep matrix products, because they are partial.

    A partial product is `tp` times as large as the reduce-scattered sum, which is kept instead.
    """
    # Compiled layers are not checkpointed.
    if torch.compiler.is_compiling():
        yield
        return
    token = _partial_product.set(True)
    try:
        yield
    finally:
        _partial_product.reset(token)


def _policy(context: Any, op: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in KEPT and not _partial_product.get()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


selective_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
"""`context_fn` of `torch.utils.checkpoint.checkpoint` for selective checkpointing."""


def regather(x: DTensor, mesh: DeviceMesh) -> Callable[[], Tensor]:
    """Return a function that computes `enter_region(x)` again. It holds only this rank's part of `x`."""
    shard, length = x._local_tensor, x.shape[1]
    version = shard._version

    def make() -> Tensor:
        if shard._version != version:
            raise overwritten()
        return all_gather_sequence(shard, length, mesh)

    return make
