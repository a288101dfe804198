"""What hf_tpsp has installed in this process, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from ..config import TPSPConfig
from ..departure import LAST_WORDS
from ..inputs import environment_number
from ..launch import environment
from ..patching import set_environment
from ..upstream import accelerate, install, versions

logger = logging.get_logger(__name__)

_current: Enabled | None = None


def current() -> Enabled | None:
    """The handle of what is installed; None if nothing is."""
    return _current


class Enabled:
    """The handle that `enable()` returns. Use it as a context manager, or call `disable()`."""

    def __init__(self, config: TPSPConfig):
        self.config = config
        self._undo: list[Callable[[], None]] = []
        self._installed: set[Callable] = set()

    def once(self, install: Callable[[], Callable[[], None]]) -> None:
        """Call `install` unless it was called before. `disable` calls the function that it returns."""
        if install not in self._installed:
            self._installed.add(install)
            self._undo.append(install())

    def disable(self) -> None:
        """Leave the libraries and the environment as they were. Sharded models stay sharded, and the patches of torch
        that they need stay until the last of them is gone."""
        global _current
        while self._undo:
            self._undo.pop()()
        self._installed.clear()
        if _current is self:
            _current = None

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.disable()


def start(config: TPSPConfig) -> Enabled:
    """Tell accelerate about the mesh, and install the workarounds for the libraries (`upstream/`)."""
    global _current
    is_main = environment_number("RANK", 0) == 0
    if is_main and (sentence := versions.untested()):
        logger.warning_once(sentence)
    handle = Enabled(config)
    handle.once(accelerate.use_cpu_if_alone)
    handle.once(lambda: set_environment(environment(config)))
    handle.once(install.install)
    handle.once(LAST_WORDS.hold)
    if not is_main and logging.is_progress_bar_enabled():
        # Loading shows one progress bar, not one for each rank.
        handle.once(_quiet_progress)
    _current = handle
    return handle


def _quiet_progress() -> Callable[[], None]:
    logging.disable_progress_bar()
    return logging.enable_progress_bar
