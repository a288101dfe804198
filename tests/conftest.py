import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import pytest
from accelerate.state import AcceleratorState, GradientState

from hf_tpsp.ranks import RankPool


@pytest.fixture(scope="session")
def ranks():
    """The session's rank pool: `ranks.run(world_size, function, …)`."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def nothing_left_of_accelerate():
    """What a one-process reference has set of accelerate's shared state (bf16, accumulation) is not the next test's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
