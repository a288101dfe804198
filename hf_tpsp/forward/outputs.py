"""Makes whole what a model returns to its caller: hidden states, attentions and whatever else, as well as the loss.

Inside the model the stream is sharded over the sequence, and each rank has the attention weights of its own heads. The
caller gets a `LazyWhole` in their place: a plain tensor of the whole shape, which is gathered when somebody computes
with it. Gathering is collective, so every rank of the TP group must do it. A tensor that nobody reads costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map_only

from ..collectives import SEQUENCE, all_gather, all_gather_sequence, own_part


class LazyWhole(Tensor):
    """A whole tensor of which each rank has a part, gathered at the first operation on it. Shape, dtype and device are
    known.

    To autograd it is an ordinary tensor. Its gradient, which all ranks of the TP group compute alike, goes back to each
    rank's own part of it, once.

    Args:
        shape: shape of the whole tensor.
        like: a tensor with the dtype and the device of the whole.
        read: a list of one element: a collective function that gives the whole tensor, or the tensor once it has been
            read.

    Attributes:
        part: this rank's heads, for a block that takes them; None if the tensor is not made of heads.
        source: the model's tensor that this one was made from; None if it needs no gradient, or on a detached copy.
        take: maps the gradient of the whole to the gradient of `source`; None where `source` is.
        give: the reverse of `take`, which is collective; None where `source` is.
    """

    part: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: torch.Size, like: Tensor, read: list) -> LazyWhole:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self._read, self.part = read, None
        self.source = self.take = self.give = None
        return self

    def __init__(self, *args, **kwargs):
        pass

    def whole(self) -> Tensor:
        """The plain tensor, without gradient. Every rank of the TP group must call it."""
        # Detached copies share the list, so the tensor is gathered once for all of them.
        if callable(self._read[0]):
            with torch.no_grad():
                self._read[0] = self._read[0]().contiguous()
        return self._read[0]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0], args[0]._read)
        plain_args, plain_kwargs = tree_map_only(LazyWhole, LazyWhole.whole, (args, kwargs or {}))
        out = func(*plain_args, **plain_kwargs)
        # An in-place operation returns its argument, here the plain tensor. The caller gets this lazy tensor back.
        return args[0] if args and isinstance(args[0], LazyWhole) and out is plain_args[0] else out

    def full_tensor(self) -> Tensor:
        """The whole plain tensor, through which the gradient flows back."""
        return self.clone()

    def register_hook(self, hook: Callable) -> Any:
        """Like `Tensor.register_hook`: `hook` sees, and may change, the whole gradient. That includes what comes back
        through the rest of the model, which was computed from `source` and not from this tensor."""
        # FSDP2's own hooks go on this tensor itself.
        if self.source is None or getattr(hook, "__module__", "").startswith("torch.distributed"):
            return super().register_hook(hook)
        take, give = self.take, self.give

        def on_source(grad: Tensor) -> Tensor | None:
            new = hook(give(grad))
            return None if new is None else take(new)

        return self.source.register_hook(on_source)

    def retain_grad(self) -> None:
        if self.source is None:
            return super().retain_grad()
        return self.source.retain_grad()

    @property
    def grad(self) -> Tensor | None:
        """The whole gradient, after `retain_grad`. Every rank of the TP group must read it."""
        if self.source is None or not self.source.retains_grad:
            return super().grad
        return None if self.source.grad is None else self.give(self.source.grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self.source is None:
            Tensor.grad.__set__(self, value)
        else:
            self.source.grad = value if value is None else self.take(value)

    def _plain(self, what: str) -> Tensor:
        if self.requires_grad:
            raise RuntimeError(f"Can't call {what} on a tensor that requires grad. Use tensor.detach().{what} instead.")
        return self.whole()

    def numpy(self, **kwargs):
        return self._plain("numpy()").numpy(**kwargs)

    def __array__(self, *args):
        return self._plain("numpy()").__array__(*args)

    def tolist(self):
        return self.whole().tolist()

    def item(self):
        return self.whole().item()

    def data_ptr(self):
        return self.whole().data_ptr()

    def untyped_storage(self):
        return self.whole().untyped_storage()

    def __reduce_ex__(self, protocol):
        return self._plain("save()").__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self._plain("deepcopy()").clone()

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LazyWhole(shape={tuple(self.shape)}, dtype={self.dtype})"


class _Hand(torch.autograd.Function):
    """This rank's part of a tensor → the whole, lazily. `take` maps the gradient of the whole to that of the part."""

    @staticmethod
    def forward(ctx, part: Tensor, shape: torch.Size, make: Callable[[], Tensor], take: Callable) -> Tensor:
        ctx.take = take
        return LazyWhole(shape, part, [make])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.take(grad), None, None, None


def _hand(part: Tensor, shape: torch.Size, make: Callable, take: Callable, give: Callable) -> LazyWhole:
    out = _Hand.apply(part, shape, make, take)
    if part.requires_grad:
        out.source, out.take, out.give = part, take, give
    return out


def whole_stream(x: DTensor) -> Tensor:
    """A DTensor → the whole tensor. The stream `[batch, seq, …]`, sharded over the sequence, and replicated tensors are
    made whole lazily; all others are gathered at once."""
    spec, mesh, local = x._spec, x.device_mesh, x._local_tensor.detach()
    if x.placements == (SEQUENCE,):
        return _hand(
            x,
            x.shape,
            lambda: all_gather_sequence(local, spec.shape[1], mesh),
            lambda grad: DTensor(own_part(grad, mesh), spec, requires_grad=False),
            lambda grad: grad.full_tensor(),
        )
    if all(isinstance(p, Replicate) for p in x.placements):
        return _hand(
            x,
            x.shape,
            lambda: local,
            lambda grad: DTensor(grad, spec, requires_grad=False),
            lambda grad: grad.full_tensor(),
        )
    return x.full_tensor()


def whole_heads(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's heads `[batch, heads / tp, …]` → all `[batch, heads, …]`, lazily.

    Backward: the gradient of this rank's heads.
    """
    own, rank, local = x.shape[1], mesh.get_local_rank(), x.detach()

    def give(part: Tensor) -> Tensor:
        return all_gather(part.transpose(0, 1).contiguous(), mesh).transpose(0, 1)

    def take(grad: Tensor) -> Tensor:
        return grad.narrow(1, rank * own, own).contiguous()

    shape = torch.Size((x.shape[0], own * mesh.size(), *x.shape[2:]))
    out = _hand(x, shape, lambda: give(local), take, give)
    out.part = x
    return out


def hand_out_whole(owners: list[nn.Module], gradients: Any) -> None:
    """Have `owners`, the modules that hold the layers, return whole tensors to a caller that is outside all of them.

    Args:
        gradients: the model's `ReplicatedGradients`. Its `depth` counts the owners' forwards that are running.
    """

    def wrapped(inner: Callable) -> Callable:
        # transformers and the Trainer read the signature of the forward.
        @functools.wraps(inner)
        def forward(*args, **kwargs):
            gradients.depth += 1
            try:
                output = inner(*args, **kwargs)
            finally:
                gradients.depth -= 1
            return whole_output(output, {}) if gradients.depth == 0 else output

        return forward

    for module in owners:
        module.forward = wrapped(module.forward)


def whole_output(x: Any, known: dict[int, tuple[DTensor, Tensor]]) -> Any:
    """`x` with every DTensor in it made whole (`whole_stream`), except logits, which stay sharded over the vocabulary.

    Args:
        known: the id of a DTensor → the DTensor and its whole. Keeping the DTensor alive keeps its id from being
            reused.
    """
    if isinstance(x, DTensor):
        if x.placements != (SEQUENCE,) and x.placements == (Shard(x.dim() - 1),):
            return x
        if id(x) not in known:
            known[id(x)] = x, whole_stream(x)
        return known[id(x)][1]
    if isinstance(x, dict):
        for name, value in list(x.items()):
            new = whole_output(value, known)
            if new is not value:
                x[name] = new
        return x
    if type(x) in (list, tuple):
        new = [whole_output(value, known) for value in x]
        return x if all(a is b for a, b in zip(new, x, strict=True)) else type(x)(new)
    return x
