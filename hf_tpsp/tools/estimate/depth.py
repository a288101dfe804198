"""From a model of few layers to one of many: layers of a kind cost alike."""

from __future__ import annotations

import copy
import dataclasses

from transformers import PreTrainedConfig, PreTrainedModel

from ...structure import decoder_layers
from .floors import Traffic
from .step import Segment, Step


def deepen(shallow: Step, deep: Step, layers: int) -> Step:
    """The step of a model with `layers` layers, from the steps of two models that are one pattern of layers apart."""
    pattern = deep.layers - shallow.layers
    times = (layers - deep.layers) // pattern
    assert deep.layers + times * pattern == layers

    def outward(a, b):
        """The value at full depth of what is `a` in the shallow step and `b` in the deep one."""
        return b + (b - a) * times

    def outside(name: str, a: Segment, b: Segment) -> Segment:
        return Segment(name, outward(a.change, b.change), outward(a.rise, b.rise), outward(a.most, b.most))

    # The last layer differs from the others, because its weights stay gathered.
    n, middle = deep.layers, deep.layers - 1
    forward, backward = deep.segments[1 : n + 1], deep.segments[n + 2 : 2 * n + 2][::-1]

    def repeated(segments: list[Segment], name: str) -> list[Segment]:
        """The segments of all layers at full depth, layer 0 first."""
        start = middle - pattern
        order = [*range(middle), *(start + i % pattern for i in range(times * pattern)), *range(middle, n)]
        return [dataclasses.replace(segments[index], name=f"{name} of layer {at}") for at, index in enumerate(order)]

    first, loss, rest, last = (
        outside(b.name, a, b)
        for a, b in (
            (shallow.segments[0], deep.segments[0]),
            (shallow.segments[shallow.layers + 1], deep.segments[n + 1]),
            (shallow.segments[-2], deep.segments[-2]),
            (shallow.segments[-1], deep.segments[-1]),
        )
    )
    segments = [first, *repeated(forward, "forward"), loss, *repeated(backward, "backward")[::-1], rest, last]
    traffic, floor = (
        {key: outward(before.get(key, Traffic()), found) for key, found in after.items()}
        for before, after in ((shallow.traffic, deep.traffic), (shallow.floor, deep.floor))
    )
    return Step(
        outward(shallow.start, deep.start), segments, traffic, outward(shallow.flops, deep.flops), layers, floor
    )


def layer_kinds(model: PreTrainedModel) -> list[tuple]:
    """For each decoder layer what tells it from others: its modules, its parameters' shapes, its entry in the
    config."""
    layers = decoder_layers(model)
    lists = _lists_of(model.config.get_text_config())
    return [
        (
            tuple((name, type(module).__name__) for name, module in layer.named_modules()),
            tuple(tuple(p.shape) for p in layer.parameters()),
            tuple(str(values[index]) for values in lists.values()),
        )
        for index, layer in enumerate(layers)
    ]


def _lists_of(config: PreTrainedConfig) -> dict[str, list]:
    """The config's lists with an entry for each layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
    }


def depths(kinds: list) -> tuple[int, int] | None:
    """Two depths, one pattern apart, from which `deepen` can make the whole; None if it must be run whole.

    Cutting layers off at the end does not change the kinds of those that stay. If whole patterns are cut, the last
    layer is of the same kind as before.
    """
    whole = len(kinds)
    for pattern in range(1, whole):
        # From layer `first` on the pattern repeats.
        first = next(
            i for i in range(whole) if all(a == b for a, b in zip(kinds[i:], kinds[i + pattern :], strict=False))
        )
        # The first two layers and the last differ from others in what FSDP2 has fetched ahead.
        least = first + 3
        shallow = least + (whole - least) % pattern
        if shallow + 2 * pattern <= whole:
            return shallow, shallow + pattern
    return None


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """`config` with its first `layers` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, values in _lists_of(text).items():
        setattr(text, name, list(values[:layers]))
    text.num_hidden_layers = layers
    return config
