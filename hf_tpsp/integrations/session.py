"""What hf_tpsp has put in place in this process, and how it is undone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from .. import upstream
from ..api import _add_callback
from ..config import TPSPConfig
from ..upstream import patching
from . import loading
from .callback import TPSPCallback, _set_up_again
from .peft import patches
from .trainer import _knows_batch, _whole_predictions, patch_label_smoother

_active: list[Enabled] = []


class Enabled:
    """The handle of `enable()`: a context manager, or call `disable()`."""

    def __init__(self, config: TPSPConfig, undo: list[Callable[[], None]]):
        self.config = config
        self.integrations: set[str] = set()
        self._undo = undo

    def disable(self) -> None:
        """Leave transformers and accelerate as they were. Models that are sharded stay so."""
        while self._undo:
            self._undo.pop()()
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc) -> None:
        self.disable()


def _install(config: TPSPConfig, hook_loading: bool) -> Enabled:
    undo = [
        _set_environment(config.environment()),
        upstream.install(),
        patches.install(),
        patching.replace(
            (LabelSmoother, "__call__", patch_label_smoother),
            (Trainer, "training_step", _knows_batch),
            (Trainer, "prediction_step", _knows_batch),
            (Trainer, "prediction_step", _whole_predictions),
            (Trainer, "call_model_init", _set_up_again),
        ),
    ]
    if int(os.environ.get("RANK", "0")) > 0 and logging.is_progress_bar_enabled():
        logging.disable_progress_bar()  # one bar while loading, not one of each rank
        undo.append(logging.enable_progress_bar)
    handle = Enabled(config, undo)
    _active.append(handle)  # before the callback is made, which would install the glue if nobody had
    if hook_loading:
        undo.append(loading.install(config))
        undo.append(_add_callback(TPSPCallback(config)))
    return handle


def _install_once(integration: str) -> None:
    """Put an integration's patches in place, until `disable()`. Its library is imported by now."""
    handle = _active[0]
    if integration not in handle.integrations:
        handle.integrations.add(integration)
        handle._undo.append(importlib.import_module(f".integrations.{integration}", __package__).install())


def _set_environment(values: dict[str, str]) -> Callable[[], None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return restore
