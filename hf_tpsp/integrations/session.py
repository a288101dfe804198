"""What hf_tpsp has put in place in this process, and how it is undone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from .. import upstream
from ..config import TPSPConfig
from ..launch import environment

_current: Enabled | None = None


def current() -> Enabled | None:
    """The handle of what is in place, if anything is."""
    return _current


class Enabled:
    """The handle of `enable()`: a context manager, or call `disable()`."""

    def __init__(self, config: TPSPConfig):
        self.config = config
        self._undo: list[Callable[[], None]] = []
        self._installed: set[Callable] = set()

    def once(self, install: Callable[[], Callable[[], None]]) -> None:
        """Call `install`, if it was not yet, and what it returned when everything is undone."""
        if install not in self._installed:
            self._installed.add(install)
            self._undo.append(install())

    def disable(self) -> None:
        """Leave transformers and accelerate as they were. Models that are sharded stay so."""
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
    """Tell accelerate of the mesh, and put the workarounds for the libraries in place."""
    global _current
    handle = Enabled(config)
    handle.once(lambda: _set_environment(environment(config)))
    handle.once(upstream.install)
    if int(os.environ.get("RANK", "0")) > 0 and logging.is_progress_bar_enabled():
        handle.once(_quiet_progress)  # one bar while loading, not one of each rank
    _current = handle
    return handle


def _quiet_progress() -> Callable[[], None]:
    logging.disable_progress_bar()
    return logging.enable_progress_bar


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
