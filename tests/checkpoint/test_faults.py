"""The short form of `recipes/faults.py`: a run that is killed in a save goes on as if nothing had happened."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # last: it has a parity.py too
from faults import Faults


def test_a_kill_within_a_save_loses_nothing(ranks, tmp_path):
    """One rank, in an asynchronous save, and all, in one that is not."""
    faults = Faults(ranks, 2, 0, tmp_path)
    assert len(faults.moments) == 4 and min(map(len, faults.moments.values())) >= 8, faults.moments
    for part, everybody in (("optimizer", False), ("manifest, folders, renames", True)):
        outcome = faults.kill(part, everybody, beside=not everybody)
        assert not (outcome.lost or outcome.silent or outcome.hangs), outcome
        assert outcome.seconds < 30
