"""The short form of `recipes/faults.py`: a run that is killed in a save goes on as if nothing had happened."""

import importlib
import sys
from pathlib import Path


def test_a_kill_within_a_save_loses_nothing(ranks, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    faults = importlib.import_module("faults").Faults(ranks, 2, 0, tmp_path)
    assert min(faults.moments) > 100
    for _ in range(2):
        outcome = faults.kill()
        assert not (outcome.lost or outcome.silent or outcome.hangs), outcome
        assert outcome.seconds < 30
    sys.modules.pop("faults")
