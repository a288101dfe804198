"""Tables of the operations on lazy logits: recorded ones, ones that need no values, and ones that expose the memory."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Operations that models apply to their logits before the loss. They are elementwise, and their other operands are
# numbers.
POINTWISE = {
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul,
    Tensor.div, Tensor.__truediv__, torch.div,
    Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add,
    Tensor.sub, Tensor.__sub__, torch.sub,
    Tensor.tanh, torch.tanh, F.tanh,
    Tensor.clamp, torch.clamp,
    Tensor.clone, torch.clone,
    Tensor.float, Tensor.to,
}  # fmt: skip

# In-place operations → the same operation out of place.
INPLACE = {
    Tensor.mul_: Tensor.mul, Tensor.__imul__: Tensor.mul,
    Tensor.div_: Tensor.div, Tensor.__itruediv__: Tensor.div, Tensor.__idiv__: Tensor.div,
    Tensor.add_: Tensor.add, Tensor.__iadd__: Tensor.add,
    Tensor.sub_: Tensor.sub, Tensor.__isub__: Tensor.sub,
    Tensor.tanh_: Tensor.tanh, torch.tanh_: Tensor.tanh,
    Tensor.clamp_: Tensor.clamp, torch.clamp_: Tensor.clamp,
}  # fmt: skip

NOTABLE = (numbers.Number, torch.dtype, torch.memory_format, type(None))

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

# These hand out the memory of the logits, or concern their gradient, so the version counter does not show later
# changes.
EXPOSES = {
    Tensor.data.__get__, Tensor.detach_, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr,
    Tensor.untyped_storage, Tensor.retain_grad, Tensor.register_hook,
}  # fmt: skip


def elementwise(func: Callable, rest: tuple, kwargs: dict) -> Callable[[Tensor, int], Tensor]:
    return lambda x, first: func(x, *rest, **kwargs)


def fill(columns: Tensor, value: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda x, first: x.masked_fill(columns[first : first + x.shape[-1]], value)


def is_device(x: Any) -> bool:
    return isinstance(x, (str, torch.device))


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def of_last_dimension(key: Any, dims: int) -> Any:
    """The part of the last dimension that `key` selects, if it takes all of the other dimensions; else None."""
    *others, last = key if isinstance(key, tuple) else (key,)
    whole = sum(isinstance(k, slice) and k == slice(None) for k in others)
    ellipses = sum(k is Ellipsis for k in others)
    if whole + ellipses != len(others) or ellipses > 1 or (not ellipses and whole != dims - 1):
        return None
    if isinstance(last, (slice, list, range)) or is_number(last):
        return last
    return last if isinstance(last, Tensor) and last.dim() <= 1 and not last.is_floating_point() else None
