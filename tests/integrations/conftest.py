"""What the tests of the Trainer share."""

import models
import pytest
from training import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a tied Qwen2 whose vocabulary divides over the mesh no better than a real one's."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    models.build("qwen2", tied=True, vocab_size=132).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory):
    """The log of one process."""
    return train(tiny, str(tmp_path_factory.mktemp("one")), 1)
