"""What all tests of the libraries by themselves need, and what they say when they fail."""

import gc

import pytest

from hf_tpsp.integrations import session

from .worlds import world


@pytest.fixture
def alone():
    """A process group of this process alone, whose collectives do what they say."""
    with world(1, backend="gloo"):
        yield


@pytest.fixture(autouse=True)
def libraries_as_they_come():
    """No patch is in place: what a sharded model of another test keeps is there until it is collected."""
    assert session.current() is None
    gc.collect()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Whoever raises a library's version reads here what to delete."""
    report = (yield).get_result()
    marks = [name for mark in item.iter_markers("still_needed") for name in mark.args]
    if marks and report.when == "call" and report.failed:
        places = ", ".join(
            f"`{name.partition('.')[2]}` in hf_tpsp/upstream/…/{name.partition('.')[0]}.py" for name in marks
        )
        report.longrepr = f"{report.longrepr}\n\nupstream has mended what this test shows, or moved it: delete {places}"
