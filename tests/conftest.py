import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import pytest

from hf_tpsp.ranks import RankPool


@pytest.fixture(scope="session")
def ranks():
    """The session's rank pool: `ranks.run(world_size, function, …)`."""
    pool = RankPool()
    yield pool
    pool.stop()
