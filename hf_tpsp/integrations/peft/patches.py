"""Patches of peft, by which adapters that are added to a sharded model are sharded too."""

from __future__ import annotations

import functools
from collections.abc import Callable

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper

from ...patching import swap
from ...state import is_parallelized, style_of
from ...upstream import peft
from .adapters import check_config, shard_adapters
from .layouts import check_copied


def install() -> Callable[[], None]:
    """Have `get_peft_model` on a sharded model shard the adapters. Returns the function that undoes it."""
    return swap(*peft.PATCHES, (PeftModel, "__init__", _patch_init), (ModulesToSaveWrapper, "update", _checked_update))


def _patch_init(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self, model, peft_config, *args, **kwargs):
        ours = is_parallelized(model)
        if ours:
            check_config(peft_config, on_shards=True)
        original(self, model, peft_config, *args, **kwargs)
        if ours:
            shard_adapters(self)

    return __init__


def _checked_update(original: Callable) -> Callable:
    """`ModulesToSaveWrapper.update`, which copies a module. It refuses a sharded one whose copy cannot be laid out."""

    @functools.wraps(original)
    def update(self, *args, **kwargs):
        if any(style_of(module) for module in self.original_module.modules()):
            check_copied(self.original_module)
        original(self, *args, **kwargs)

    return update
