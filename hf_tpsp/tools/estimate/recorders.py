"""What a step holds and what it sends, in bytes: counted, by watching every operation of a process, and at the least.

    with CollectiveBytes() as sent, TensorBytes() as held:
        model(**batch).loss.backward()
    max(held.timeline()), sent.traffic["all-gather"].size

Both are `TorchDispatchMode`s and see an operation after autograd and after tensor subclasses (DTensor) have taken
themselves apart. Neither needs a GPU, and neither sees what compiled code does inside a kernel.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...upstream.torch import c10d
from ...upstream.torch.fake import FakeTensor, address, flop_formulas, packet_of, storage_address, watched_resizes
from .floors import RING_PASSES, Traffic

FLOPS_OF = flop_formulas()


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_wrappers(types: Collection[type]) -> bool:
    """Whether an operation is still one on DTensors or the like. Its parts on plain tensors are what counts."""
    plain = Tensor.__torch_dispatch__
    return not all(t.__torch_dispatch__ is plain or issubclass(t, FakeTensor) for t in types)


@dataclass
class _Storage:
    key: int
    size: int  # bytes
    reference: weakref.ref


class TensorBytes(TorchDispatchMode):
    """Bytes of all tensors that come to life while the mode is active, from allocation until they are freed.

    A storage counts from the operation that returns it, unless that is an argument's, until its last reference is gone,
    and once for all its views. Those from before the mode (parameters, inputs) do not count; if one is resized, as FSDP2
    does to gather parameters and free them again, the change does. Not seen: scratch memory inside one operation.

    Time is the number of changes so far: `now` is the current moment, `timeline()[moment]` the bytes live then. `label`,
    set from outside, is noted with each storage that comes to life.
    """

    def __init__(self):
        super().__init__()
        self.label: str | None = None
        self.labels: list[str | None] = []  # of each storage, by key
        self.changes: list[tuple[int, int]] = []  # (key of the storage, bytes)
        self._storages: dict[int, _Storage] = {}  # by address

    @property
    def now(self) -> int:
        return len(self.changes)

    def timeline(self, without: Collection[int] = ()) -> list[int]:
        """Live bytes at each moment from 0 to `now`, not counting the storages with keys in `without`."""
        return list(accumulate((0 if key in without else change for key, change in self.changes), initial=0))

    def key(self, tensor: Tensor) -> int | None:
        """What stands for the storage of plain `tensor` in `timeline(without=…)`; None if it is not counted."""
        storage = self._storages.get(address(tensor))
        return storage.key if storage else None

    def __enter__(self):
        self._resizes = watched_resizes(self._track)
        self._resizes.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        self._resizes.__exit__(None, None, None)
        self._storages.clear()  # and with them the references that would call `_freed`
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _has_wrappers(types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        storages = [tensor.untyped_storage() for tensor in tensors_in(result) if not tensor.is_meta]
        if any(storage_address(storage) not in self._storages for storage in storages):
            given = {address(tensor) for tensor in tensors_in((args, kwargs))}
            storages = [s for s in storages if (at := storage_address(s)) in self._storages or at not in given]
        for storage in storages:
            self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage, already: int = 0) -> None:
        """Note the size of `storage`. Of one that is new here, `already` bytes are not counted."""
        at = storage_address(storage)
        if at not in self._storages:
            reference = weakref.ref(storage, partial(self._freed, at))
            self._storages[at] = _Storage(len(self.labels), already, reference)
            self.labels.append(self.label)
        known = self._storages[at]
        if known.size != storage.nbytes():
            self.changes.append((known.key, storage.nbytes() - known.size))
            known.size = storage.nbytes()

    def _freed(self, at: int, reference: weakref.ref) -> None:
        storage = self._storages.pop(at)
        self.changes.append((storage.key, -storage.size))


class CollectiveBytes(TorchDispatchMode):
    """Number and bytes of the collectives of each kind. Those of a group of one rank do not count.

    `by_group` has them by `(ranks of the process group, kind)`, `traffic` by kind. Each counts `times` times.
    """

    def __init__(self):
        super().__init__()
        self.times = 1
        self.by_group: defaultdict[tuple[frozenset[int], str], Traffic] = defaultdict(Traffic)

    @property
    def traffic(self) -> dict[str, Traffic]:
        total = defaultdict(Traffic)
        for (_, kind), found in self.by_group.items():
            total[kind] = total[kind] + found
        return dict(total)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _has_wrappers(types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (kind := _kind(func)) is not None and (group := c10d.group_of(func, args, kwargs)).size() > 1:
            size = max(sum(t.nbytes for t in tensors_in(value)) for value in (*args, *kwargs.values(), result))
            ranks = frozenset(dist.get_process_group_ranks(group))
            self.by_group[ranks, kind].add(kind, size * self.times, group.size(), self.times)
        return result


class Flops(TorchDispatchMode):
    """Floating-point operations of matrix products and attention, in `total`, by torch's own table of formulas.

    Causal attention counts in full, as it does there and in most published figures. Each counts `times` times.
    """

    def __init__(self):
        super().__init__()
        self.times = 1
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _has_wrappers(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if (formula := FLOPS_OF.get(packet_of(func))) is not None:
            self.total += self.times * formula(*args, **(kwargs or {}), out_val=result)
        return result


def _kind(func: torch._ops.OpOverload) -> str | None:
    name = c10d.kind_of(func) or ""
    return next((kind for kind in RING_PASSES if name.startswith(kind.replace("-", ""))), None)


def local_part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
