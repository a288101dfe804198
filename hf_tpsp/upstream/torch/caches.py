"""What DTensor (torch) remembers of each shape that it has met, and never forgets by itself."""

from __future__ import annotations

import threading

from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import (
    _clear_sharding_prop_cache,
    _get_fast_path_sharding_prop_cache_stats,
)

LIMIT = 2048
"""Entries. A step of one shape makes 200 to 400, and each further shape about ten, of 2.5 KiB each."""

SOON = 16
"""Calls: who fills a cache again within so few has steps that need more entries."""


class _Bound(threading.local):
    """How many entries a thread lets gather, and how many calls ago it cleared them."""

    limit, calls = LIMIT, 0


_bound = _Bound()


def bound() -> None:
    """Forget the sharding decisions and redistribution plans of all shapes, if there are more than a limit. To be called
    now and then in each thread that runs operations on DTensors; it takes a microsecond.

    torch 2.13 keeps each for good: operations by the shapes of their arguments (python_variable.cpp, one cache for each
    thread), plans by the spec of their tensor (tensor/_redistribute.py, `_gen_transform_infos` and `_planner_cache`).
    Rows of ever new lengths leave 108 objects and 28 KiB each. Delete when these caches have a size.
    """
    _bound.calls += 1
    _, missed = _get_fast_path_sharding_prop_cache_stats()
    if missed + _redistribute._gen_transform_infos.cache_info().currsize <= _bound.limit:
        return
    if _bound.calls <= SOON:
        # Else a model with very many kinds of operations would begin every step anew.
        _bound.limit *= 2
    _bound.calls = 0
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
