import functools
import gc
import os
import re
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import pytest
from accelerate.state import AcceleratorState, GradientState

from hf_tpsp.tools.ranks import RankPool


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes: one has the pool of ranks and all that need it, the other does the rest
    beside it."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if is_whole and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses = 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests that take the fixture `ranks` are one piece of work, and each other test is one."""
    from xdist.scheduler import LoadScopeScheduling

    class RanksTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "ranks" if takes_ranks(*nodeid.partition("[")[0].split("::")) else nodeid

    return RanksTogether(config, log)


@functools.cache
def takes_ranks(path: str, name: str) -> bool:
    """Whether the test `name` in the file `path` takes the fixture `ranks`. pytest-xdist deals tests out by their names."""
    return bool(re.search(rf"^def {name}\([^)]*\branks\b", Path(path).read_text(), re.MULTILINE))


def pytest_collection_modifyitems(items):
    """`-m fast` is what starts no ranks on this machine and simulates none."""
    for item in items:
        starts_ranks = {"ranks", "work"} & set(item.fixturenames)
        simulates = item.module.__name__.rpartition(".")[2] in (
            "test_simulate",
            "test_estimation",
            "test_recompute",
            "test_verify",
        )
        if not starts_ranks and not simulates:
            item.add_marker(pytest.mark.fast)


def pytest_collection_finish():
    """What was imported stays: the collections that accelerate asks for after each training need not walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks():
    """The session's rank pool: `ranks.run(world_size, function, …)`."""
    pool = RankPool(
        preload=[
            "trl.trainer.dpo_trainer",
            "trl.trainer.sft_trainer",
            "transformers.models.qwen2.modeling_qwen2",
        ]
    )
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def nothing_left_of_accelerate():
    """What a one-process reference has set of accelerate's shared state (bf16, accumulation) is not the next test's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
