"""Counts the bytes that a step holds and sends, by watching every operation of a process.

    with CollectiveBytes() as sent, TensorBytes() as held:
        model(**batch).loss.backward()
    max(held.timeline()), sent.traffic["all-gather"].size

Both are `TorchDispatchMode`s. They see an operation after autograd, and after tensor subclasses (DTensor) have taken
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...upstream.torch import c10d
from ...upstream.torch.fake import FakeTensor, address, flop_formulas, packet_of, storage_address, watched_resizes
from .floors import RING_PASSES, Traffic

FLOPS_OF = flop_formulas()


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_wrappers(types: Collection[type]) -> bool:
    """Whether an operation is on DTensors or other wrappers. Only those on plain tensors, inside it, are counted."""
    plain = Tensor.__torch_dispatch__
    return not all(t.__torch_dispatch__ is plain or issubclass(t, FakeTensor) for t in types)


@dataclass
class _Storage:
    key: int
    size: int  # bytes
    reference: weakref.ref


class TensorBytes(TorchDispatchMode):
    """Bytes of all tensors that come to life while the mode is active, from allocation until they are freed.

    A storage counts once for all its views, from the operation that returns it until its last reference is gone.
    An operation that returns the storage of an argument starts no count. Storages from before the mode (parameters,
    inputs) do not count. If one is resized, as FSDP2 does to gather parameters and free them again, the change counts.
    Scratch memory inside one operation is not seen.

    Time is the number of changes so far: `now` is the current moment, `timeline()[moment]` the bytes live then.

    Attributes:
        label: noted with each storage that comes to life. It is set from outside.
        labels: the label of each storage, by key.
        changes: (key of the storage, bytes) of each change.
    """

    def __init__(self):
        super().__init__()
        self.label: str | None = None
        self.labels: list[str | None] = []
        self.changes: list[tuple[int, int]] = []
        # Address → storage.
        self._storages: dict[int, _Storage] = {}

    @property
    def now(self) -> int:
        return len(self.changes)

    def timeline(self, without: Collection[int] = ()) -> list[int]:
        """Live bytes at each moment from 0 to `now`, not counting the storages with keys in `without`."""
        return list(accumulate((0 if key in without else change for key, change in self.changes), initial=0))

    def key(self, tensor: Tensor) -> int | None:
        """The key of the storage of plain `tensor`, for `timeline(without=…)`; None if the storage is not counted."""
        storage = self._storages.get(address(tensor))
        return storage.key if storage else None

    def __enter__(self):
        self._resizes = watched_resizes(self._track)
        self._resizes.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        self._resizes.__exit__(None, None, None)
        # This drops the references that would call `_freed`, too.
        self._storages.clear()
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
        """Note the size of `storage`. If it was not known before, `already` of its bytes are not counted."""
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

    `by_group` has them by `(ranks of the process group, kind)`, `traffic` by kind. Each collective counts `times`
    times.
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

    Causal attention counts in full, as in that table and in most published figures. Each operation counts `times`
    times.
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
