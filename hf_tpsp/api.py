"""The functions that a user calls: `enable` for a whole process, `parallelize` for one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers.trainer
from torch import nn
from transformers import PreTrainedModel

from . import hosts
from .config import TPSPConfig, launched_ranks
from .inputs import instance
from .integrations import loading, registry, resume, session
from .integrations.callback import TPSPCallback, install
from .state import is_parallelized, join


def enable(config: TPSPConfig | None = None) -> session.Enabled:
    """Train this process's causal LMs on the mesh: one line at the top of a script, before its TrainingArguments.

    From then on, `from_pretrained` shards causal LMs while it reads them, and every `Trainer` gets a `TPSPCallback`. If
    the mesh has a single rank, nothing changes, but that a checkpoint of a larger mesh is refused with what exports it.

    Args:
        config: defaults to `TPSPConfig.from_accelerate()`: the mesh of the preset that `accelerate launch` was given.

    Returns:
        A handle that undoes everything: `with enable(): …`, or `handle.disable()`.

    Raises:
        ValueError: the mesh does not have as many ranks as were started, or hf_tpsp is already enabled with another
            config, or a variable of the launcher's has no value of its kind, or other hosts would not find this one.
        TypeError: `config` is no `TPSPConfig`.
    """
    config = TPSPConfig.from_accelerate() if config is None else config
    instance(
        "config", config, TPSPConfig, "Write enable(TPSPConfig(tp_size=…)), or enable() under `accelerate launch`."
    )
    hosts.check_address()
    if config.world_size != launched_ranks():
        # It is said on all ranks, because this one may be the only one that has this config.
        join(config)
    if (running := session.current()) is not None:
        if running.config != config:
            raise ValueError(f"hf_tpsp is enabled with {running.config}; disable() that first.")
        return running
    if config.world_size == 1:
        handle = session.Enabled(config)
        handle.once(resume.install_in_one_process)
        return handle
    handle = install(config)
    handle.once(lambda: loading.install(config))
    handle.once(lambda: _add_callback(TPSPCallback(config)))
    return handle


def _add_callback(callback: TPSPCallback) -> Callable[[], None]:
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(callback)
    return lambda: callbacks.remove(callback)


def parallelize(model: PreTrainedModel, config: TPSPConfig) -> PreTrainedModel:
    """Shard `model` over the mesh of `config`, in place: tensor, sequence and loss parallel, then FSDP2.

    Call it on every rank before the optimizer is made. A model in memory takes rank 0's weights on all ranks. A model
    on meta stays on meta, ready for a loader that fills DTensors (this is what the `from_pretrained` hook does).
    Adapters that peft has put around the model are laid out with it.

    Returns:
        The same model. Its parameters are DTensors on `(dp_shard, tp)`. Its logits are `LazyLogits`, sharded over the
        vocabulary until they are read, and its loss is a plain scalar.

    Raises:
        ValueError: the sizes do not fit the ranks or the model, or a parameter has no layout. The model is untouched.
        TypeError: `model` is no model of transformers or peft, or `config` no `TPSPConfig`.
    """
    instance("config", config, TPSPConfig, "Write parallelize(model, TPSPConfig(tp_size=…)).")
    if not (isinstance(model, nn.Module) and registry.wraps(model)):
        instance("model", model, PreTrainedModel, "Give it a causal LM, or one that peft has put adapters around.")
    if is_parallelized(model):
        raise ValueError("This model is already parallelized.")
    return registry.shard(model, config)
