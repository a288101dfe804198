"""The Trainer's `resume_from_checkpoint` takes what is in the folder: what one process has saved, or the ranks, in shards or
whole."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from accelerate import FullyShardedDataParallelPlugin
from transformers import Trainer
from transformers import trainer as trainer_module

from ..checkpoint import one_process
from ..patching import swap
from ..state import is_parallelized
from .loading import load_weights


def install() -> Callable[[], None]:
    """Have the Trainer load a checkpoint of one process onto the mesh. Returns the function that undoes it.

    transformers 5.23 (trainer.py) takes every checkpoint for accelerate's FSDP if the run is one: it looks for shards that
    are not there. It loads a folder with an index by itself, without what transformers converts (packed experts).
    """
    return swap(
        (trainer_module, "load_fsdp_model", _load_model),
        (trainer_module, "load_sharded_checkpoint", _load_files),
        (trainer_module, "load_fsdp_optimizer", _load_optimizer),
        (Trainer, "_load_rng_state", _load_random_state),
    )


def install_in_one_process() -> Callable[[], None]:
    """Have a Trainer in one process say what makes a checkpoint of the mesh its own. Returns the function that undoes
    it."""
    return swap((Trainer, "_load_from_checkpoint", _point_to_export))


def _load_model(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_fsdp_model(fsdp_plugin, accelerator, model, input_dir, *args, **kwargs):
        if not is_parallelized(model):
            return original(fsdp_plugin, accelerator, model, input_dir, *args, **kwargs)
        if not one_process.is_of_the_mesh(Path(input_dir)):
            return load_weights(model, input_dir)
        with _as_saved(fsdp_plugin, Path(input_dir)):
            return original(fsdp_plugin, accelerator, model, input_dir, *args, **kwargs)

    return load_fsdp_model


def _load_files(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_sharded_checkpoint(model, folder, *args, **kwargs):
        if not is_parallelized(model):
            return original(model, folder, *args, **kwargs)
        load_weights(model, folder)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    return load_sharded_checkpoint


def _load_optimizer(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_fsdp_optimizer(fsdp_plugin, accelerator, optimizer, model, input_dir, *args, **kwargs):
        if is_parallelized(model) and one_process.has_optimizer(Path(input_dir)):
            return one_process.load_optimizer(optimizer, Path(input_dir))
        with _as_saved(fsdp_plugin, Path(input_dir)) if is_parallelized(model) else contextlib.nullcontext():
            return original(fsdp_plugin, accelerator, optimizer, model, input_dir, *args, **kwargs)

    return load_fsdp_optimizer


@contextlib.contextmanager
def _as_saved(plugin: FullyShardedDataParallelPlugin, folder: Path) -> Iterator[None]:
    """While inside, accelerate's setting is the one that `folder` was saved under, whichever this run saves under."""
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {name: getattr(plugin, name) for name in names}
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT" if one_process.is_whole(folder) else "SHARDED_STATE_DICT")
    try:
        yield
    finally:
        vars(plugin).update(before)


def _load_random_state(original: Callable) -> Callable:
    @functools.wraps(original)
    def _load_rng_state(self, checkpoint):
        if checkpoint is not None and is_parallelized(self.model) and one_process.has_random_state(Path(checkpoint)):
            return one_process.load_random_state(Path(checkpoint))
        return original(self, checkpoint)

    return _load_rng_state


def _point_to_export(original: Callable) -> Callable:
    @functools.wraps(original)
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if one_process.is_of_the_mesh(Path(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} was saved on a mesh. Run `hf-tpsp export {resume_from_checkpoint} OUT`, and resume "
                "from OUT."
            )
        return original(self, resume_from_checkpoint, model)

    return _load_from_checkpoint
