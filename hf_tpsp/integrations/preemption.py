"""SIGTERM, under `TrainingArguments(enable_jit_checkpoint=True)`: one checkpoint, at a step that all ranks agree on."""

from __future__ import annotations

import signal
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from ..forward.batch_check import message

logger = logging.get_logger(__name__)


class Preemption(TrainerCallback):
    """Takes the place of transformers' `JITCheckpointCallback`, by whose timers each rank saves when its own has run out.

    A rank that gets SIGTERM says so in the batch check of its next training forward, which all ranks hear in the same
    step. At the end of that step they save and stop, and `train()` returns as after its last step.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._is_listening = self._has_stopped = False

    def set_trainer(self, trainer: Any) -> None:
        # As transformers': from here on, and not only in `train`.
        self._listen()

    def _listen(self) -> None:
        if not self._is_listening:
            message.said = message.heard = 0
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._is_listening, self._has_stopped = True, False

    def _note(self, *args: Any) -> None:
        message.said = 1

    def release(self) -> None:
        """Give SIGTERM back to whom it belonged. The Trainer calls it after training, however that ended."""
        if self._is_listening:
            signal.signal(signal.SIGTERM, self._before)
            self._is_listening, message.said, message.heard = False, 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._listen()

    def on_step_end(self, args, state, control, **kwargs):
        if message.heard:
            self._has_stopped = True
            control.should_save = control.should_training_stop = True
            # The time until SIGKILL is for saving.
            control.should_evaluate = False
            if state.is_world_process_zero:
                logger.warning(f"hf_tpsp: SIGTERM; saves a checkpoint at step {state.global_step}, and stops.")

    def on_epoch_end(self, args, state, control, **kwargs):
        # `save_strategy="epoch"` would save the same step again.
        if self._has_stopped:
            control.should_save = control.should_evaluate = False
