"""The small copy knows a size by each of its names."""

import pytest
from transformers import PreTrainedConfig

from hf_tpsp import sizes
from hf_tpsp.plan.shrink import HEAD_DIM, SIZES, shrunk_config


def shrunk(**values) -> PreTrainedConfig:
    return shrunk_config(PreTrainedConfig(**values))


@pytest.mark.parametrize("name", [*sizes.HEADS, *sizes.OTHER_HEADS])
def test_heads(name):
    assert getattr(shrunk(**{name: 64}), name) == 4


@pytest.mark.parametrize("name", [*sizes.KV_HEADS, *sizes.OTHER_KV_HEADS])
def test_kv_heads_keep_their_ratio(name):
    small = shrunk(num_attention_heads=32, **{name: 8})
    assert small.num_attention_heads == 4 * getattr(small, name) == 8


@pytest.mark.parametrize("name", [*sizes.WIDTHS, *sizes.OTHER_WIDTHS])
def test_widths(name):
    assert getattr(shrunk(num_attention_heads=32, **{name: 4096}), name) == 4 * HEAD_DIM


@pytest.mark.parametrize("name", [name for name in sizes.LAYERS if name != "num_layers_per_stack"])
def test_layers(name):
    assert getattr(shrunk(**{name: 80}), name) < 5


def test_layers_of_each_stack_follow_from_their_sum():
    assert shrunk(num_layers_per_stack=80).num_hidden_layers < 5


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes(name):
    assert getattr(shrunk(**{name: 10**6}), name) == SIZES[name]
