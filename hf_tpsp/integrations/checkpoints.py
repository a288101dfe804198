"""Checkpoints of sharded models, by the Trainer and by accelerate: whole or not there, and compared before they are
loaded. How is in `hf_tpsp/checkpoint`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import transformers.trainer
from accelerate import Accelerator
from transformers import Trainer, trainer_jit_checkpoint, trainer_utils
from transformers.utils import logging

from ..checkpoint import folders, resuming, saving
from ..checkpoint.outcome import CheckpointError
from ..patching import swap
from ..state import is_parallelized, record_of
from ..upstream.accelerate import saves_shards, sharded_models
from ..upstream.transformers import checkpoint_folder, checkpoint_in
from .preemption import Preemption

logger = logging.get_logger(__name__)

# How long an error in the training waits for a save that runs beside it: another rank may not be there to finish it.
LAST_SECONDS = 60


def _save_checkpoint(original: Callable) -> Callable:
    """`Trainer._save_checkpoint` that leaves a whole checkpoint, or raises on all ranks and leaves none."""

    @functools.wraps(original)
    def save_checkpoint(self, model, trial):
        if not is_parallelized(self.model):
            return original(self, model, trial)
        final, args = checkpoint_folder(self, trial), self.args
        later: list[Callable[[], None]] = []

        def fill(folder: Path) -> None:
            with checkpoint_in(self, final, folder) as pushes:
                original(self, model, trial)
            later.extend(pushes)

        def rotate() -> None:
            best = self.state.best_model_checkpoint
            folders.rotate(final.parent, args.save_total_limit, {final, *([Path(best)] if best else [])})

        is_sharded, beside = saves_shards(self.accelerator), record_of(self.model).config.async_save
        if beside and (args.push_to_hub or not is_sharded):
            why = "it is pushed to the hub" if args.push_to_hub else "rank 0 gathers it (FULL_STATE_DICT)"
            logger.warning_once(
                f"hf_tpsp: each checkpoint is written in the step, in spite of async_save, because {why}."
            )
            beside = False
        saving.save(
            final,
            fill,
            then=rotate,
            beside=beside,
            can_fail_alone=is_sharded,
            step=self.state.global_step,
            is_model_only=args.save_only_model,
        )
        for push in later:
            push()

    return save_checkpoint


def _train(original: Callable) -> Callable:
    """`Trainer.train` that resumes all ranks from one complete checkpoint, and ends when the last save has."""

    @functools.wraps(original)
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if not is_parallelized(self.model):
            return original(self, resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = str(resuming.newest_of_all(Path(self.args.output_dir)))
            resuming.check(Path(resume_from_checkpoint))
        try:
            return original(self, resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            try:
                saving.wait(LAST_SECONDS)
            except CheckpointError as error:
                logger.error(f"hf_tpsp: {error}")
            raise
        finally:
            saving.release()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Preemption):
                    callback.release()

    return train


def _finalize_training(original: Callable) -> Callable:
    """`Trainer._finalize_training`, which looks for the best checkpoint, and deletes others, once the last one is there."""

    @functools.wraps(original)
    def finalize_training(self, *args, **kwargs):
        if is_parallelized(self.model):
            saving.wait()
        return original(self, *args, **kwargs)

    return finalize_training


def _load_best_model(original: Callable) -> Callable:
    """`Trainer._load_best_model` that notices damage."""

    @functools.wraps(original)
    def load_best_model(self):
        if is_parallelized(self.model):
            resuming.check(Path(self.state.best_model_checkpoint))
        return original(self)

    return load_best_model


def _get_last_checkpoint(original: Callable) -> Callable:
    """transformers' `get_last_checkpoint` that passes over what is not complete."""

    @functools.wraps(original)
    def get_last_checkpoint(folder):
        found = resuming.newest(Path(folder))
        return None if found is None else str(found)

    return get_last_checkpoint


def _save_state(original: Callable) -> Callable:
    """`Accelerator.save_state` of sharded models, as a whole."""

    @functools.wraps(original)
    def save_state(self, output_dir=None, *args, **kwargs):
        if not sharded_models(self):
            return original(self, output_dir, *args, **kwargs)
        project = self.project_configuration
        is_named = project.automatic_checkpoint_naming
        if not is_named and output_dir is None:
            raise ValueError(
                "save_state needs an output_dir, or a ProjectConfiguration(automatic_checkpoint_naming=True)."
            )
        final = (
            Path(self.project_dir, "checkpoints", f"checkpoint_{self.save_iteration}") if is_named else Path(output_dir)
        )
        if is_named and final.exists():
            raise ValueError(f"{final} is there already; set save_iteration to the number to go on with.")

        def fill(folder: Path) -> None:
            project.automatic_checkpoint_naming = False
            try:
                original(self, str(folder), *args, **kwargs)
            finally:
                project.automatic_checkpoint_naming = is_named

        def rotate() -> None:
            if is_named:
                folders.rotate(final.parent, project.total_limit, {final}, "checkpoint_")

        saving.save(final, fill, then=rotate, can_fail_alone=saves_shards(self))
        return str(final)

    return save_state


def _load_state(original: Callable) -> Callable:
    """`Accelerator.load_state` that loads one complete checkpoint on all ranks, and notices damage."""

    @functools.wraps(original)
    def load_state(self, input_dir=None, *args, **kwargs):
        if not sharded_models(self):
            return original(self, input_dir, *args, **kwargs)
        if input_dir is None and self.project_configuration.automatic_checkpoint_naming:
            input_dir = str(resuming.newest_of_all(Path(self.project_dir, "checkpoints"), "checkpoint_"))
        if input_dir is not None:
            resuming.check(Path(input_dir).expanduser())
        return original(self, input_dir, *args, **kwargs)

    return load_state


def install() -> Callable[[], None]:
    """Patch the Trainer and the Accelerator. Returns the function that undoes it."""
    return swap(
        (Trainer, "_save_checkpoint", _save_checkpoint),
        (Trainer, "train", _train),
        (Trainer, "_finalize_training", _finalize_training),
        (Trainer, "_load_best_model", _load_best_model),
        (transformers.trainer, "get_last_checkpoint", _get_last_checkpoint),
        (trainer_utils, "get_last_checkpoint", _get_last_checkpoint),
        (Accelerator, "save_state", _save_state),
        (Accelerator, "load_state", _load_state),
        (trainer_jit_checkpoint, "JITCheckpointCallback", lambda original: Preemption),
    )
