"""`TPSPCallback`: hf_tpsp's part in the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..config import TPSPConfig, launched_ranks
from ..forward import finite
from ..forward.options import check_dtypes
from ..inputs import instance
from ..patching import swap
from ..sharding import set_mixed_precision
from ..state import is_parallelized, join, parallelized_model, record_of, set_timeout
from . import checkpoints, prepare, registry, resume, session
from .trainer import check_accelerator, check_parameters, check_tokenizer

logger = logging.get_logger(__name__)


class TPSPCallback(TrainerCallback):
    """Parallelizes the Trainer's model when the Trainer is made, unless the loading hook has, and checks the set-up.

    `enable()` adds it to every Trainer. To write it yourself: `Trainer(…, callbacks=[TPSPCallback()])`, launched with
    one of the presets, or with a config given here. Make it before the `TrainingArguments`.

    Args:
        config: defaults to `TPSPConfig.from_accelerate()`.
    """

    def __init__(self, config: TPSPConfig | None = None):
        self.config = TPSPConfig.from_accelerate() if config is None else config
        instance("config", self.config, TPSPConfig, "Write TPSPCallback(TPSPConfig(tp_size=…)).")
        if self.config.world_size != launched_ranks():
            join(self.config)
        if self.config.world_size > 1:
            install(self.config)

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        self.set_up(args, state, model, processing_class)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if model is not None and (guard := finite.guard_of(model)) is not None:
            # A training that was resumed does not begin with step 1.
            guard.step = state.global_step + 1

    def set_up(self, args, state, model, processing_class) -> None:
        """Shard and check a model of the Trainer's: the first one, or one that `model_init` has made since."""
        if self.config.world_size == 1 or model is None:
            return
        registry.check_arguments(args)
        registry.install(session.current() or install(self.config), args)
        if not is_parallelized(model):
            registry.shard(model, self.config)
        set_timeout(args.ddp_timeout_delta)
        inner, done = parallelized_model(model), record_of(model)
        check_accelerator(done.config)
        if done.config.compile and args.gradient_checkpointing:
            # The config's own check raises, and says why the two do not go together.
            replace(done.config, activation_checkpointing="full")
        check_parameters(model)
        check_tokenizer(inner, processing_class)
        # The dtype is that of TrainingArguments(bf16=True), or else the preset's.
        set_mixed_precision(model)
        check_dtypes(inner)
        if state.is_world_process_zero:
            c = done.config
            logger.info(
                f"hf_tpsp: {type(inner).__name__} on dp_replicate {c.dp_replicate_size} x dp_shard {c.dp_shard_size} x "
                f"tp {c.tp_size}, sequence parallel {'on' if c.sequence_parallel else 'off'}, loss {c.loss}"
            )


def install(config: TPSPConfig) -> session.Enabled:
    """Install what a Trainer, or a script's own loop with accelerate, needs of hf_tpsp, unless that is done already."""
    if (handle := session.current()) is not None:
        return handle
    handle = session.start(config)
    # The Trainer's room comes later, because ranks are compared before they look at the checkpoint.
    handle.once(checkpoints.install)
    registry.install(handle)
    handle.once(prepare.install)
    handle.once(resume.install)
    handle.once(lambda: swap((Trainer, "call_model_init", _set_up_again)))
    return handle


def _set_up_again(original: Callable) -> Callable:
    """`Trainer.call_model_init` that also sets up the new model that `train()` makes, as the first one was."""

    @functools.wraps(original)
    def call_model_init(self, *args, **kwargs):
        model = original(self, *args, **kwargs)
        # The Trainer has no handler while it is being made. `on_init_end` sets that first model up.
        handler = vars(self).get("callback_handler")
        for callback in handler.callbacks if handler is not None else ():
            if isinstance(callback, TPSPCallback):
                callback.set_up(self.args, self.state, model, self.processing_class)
        return model

    return call_model_init
