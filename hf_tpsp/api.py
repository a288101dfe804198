"""What a user calls: `enable` and `parallelize`."""

from __future__ import annotations

import os
from collections.abc import Callable

import transformers.trainer

from .config import TPSPConfig
from .integrations.callback import TPSPCallback
from .integrations.session import Enabled, _active, _install
from .launch import use_cpu_if_alone


def enable(config: TPSPConfig | None = None) -> Enabled:
    """Train this process's causal LMs on the mesh: one line at the top of a script, before its TrainingArguments.

    From here on `from_pretrained` shards causal LMs while it reads them, and every `Trainer` gets a `TPSPCallback`. In a
    process that was not launched as one of several, nothing changes.

    Args:
        config: defaults to `TPSPConfig.from_accelerate()`, the mesh of the preset `accelerate launch` was given.

    Returns:
        A handle that undoes everything: `with enable(): …`, or `handle.disable()`.

    Raises:
        ValueError: the mesh does not have as many ranks as were started, or it was enabled with another config already.
    """
    use_cpu_if_alone()
    config = config or TPSPConfig.from_accelerate()
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    if _active:
        if _active[0].config != config:
            raise ValueError(f"hf_tpsp is enabled with {_active[0].config}; disable() that first.")
        return _active[0]
    if config.world_size == 1:
        return Enabled(config, [])
    return _install(config, hook_loading=True)


def _add_callback(callback: TPSPCallback) -> Callable[[], None]:
    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(callback)
    return lambda: callbacks.remove(callback)
