"""One simulated step: what it allocates, computes and sends, layer by layer."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...loss.chunked import ChunkedHead
from ...patching import swapped
from ...state import MESH_DIMS, parallelized_model, record_of
from ...structure import decoder_layers
from ...upstream.torch.dtensor import local_part
from ...upstream.torch.fake import address, is_fake, told_apart
from .floors import Traffic
from .recorders import CollectiveBytes, Flops, TensorBytes

CATEGORIES = ("parameters", "optimizer", "gradients", "activations", "loss", "gathered", "temporaries")
"""What the live bytes of a moment are made of.

    parameters   this rank's shards, masters included, and buffers
    optimizer    its state
    gradients    this rank's shards
    activations  made in the forward of a layer (or of the embedding), and still there when it is over
    loss         made between the last layer's forward and its backward; the head's unsharded gradient is one of them
    gathered     FSDP2's: gathered parameters, and the buffers of its all-gathers and reduce-scatters
    temporaries  all others: what is gone with the layer that made it, unsharded gradients, what is computed again
"""


# An int64 array `[len(CATEGORIES)]`.
Bytes = np.ndarray


@dataclass(frozen=True)
class Segment:
    """A stretch of the step, relative to what is live at its start.

    Args:
        name: where in the step it is, in words: "forward of layer 3".
        change: live bytes at its end.
        rise: live bytes at the moment when their sum is largest.
        most: live bytes of each category at the moment when that category is largest.
    """

    name: str
    change: Bytes
    rise: Bytes
    most: Bytes


@dataclass(frozen=True)
class Step:
    """A step of training on one rank: forward, backward, optimizer, `zero_grad`.

    Args:
        start: bytes live before it.
        segments: `[embedding, forward of each layer, head and loss, backward of each layer, rest of backward,
            optimizer]`.
        traffic: collectives by `(mesh dim, kind)`.
        flops: of matrix products and attention on this rank.
        layers: number of decoder layers.
        floor: the least traffic that theory allows; empty where there is no formula.
    """

    start: Bytes
    segments: list[Segment]
    traffic: dict[tuple[str, str], Traffic]
    flops: int
    layers: int
    floor: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def _levels(self) -> Iterator[tuple[Segment, Bytes]]:
        """Each segment, with what is live at its start."""
        return zip(self.segments, accumulate((s.change for s in self.segments[:-1]), initial=self.start), strict=True)

    def peak(self) -> tuple[str, Bytes]:
        """The name of the segment in which most bytes are live, and these bytes."""
        return max(((s.name, level + s.rise) for s, level in self._levels()), key=lambda peak: peak[1].sum())

    def most(self) -> Bytes:
        """The most bytes of each category in the step. They are not all live at the same moment."""
        return np.max([level + s.most for s, level in self._levels()], axis=0)


def _bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {address(local_part(t)): local_part(t).untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def _gathered(memory: TensorBytes) -> Callable[[], AbstractContextManager]:
    """Makes contexts in which `memory` labels what is allocated "gathered"."""

    @contextmanager
    def label() -> Iterator[None]:
        before, memory.label = memory.label, "gathered"
        try:
            yield
        finally:
            memory.label = before

    return label


@contextmanager
def _alike_chunks_once(*counters: CollectiveBytes | Flops) -> Iterator[None]:
    """While inside, a loss on fake tensors runs its first, second and last chunk only. The `counters` count the second
    one for all between."""

    def abridge(original: Callable) -> Callable:
        def chunks(self: ChunkedHead, hidden: Tensor) -> Iterator[slice]:
            every = list(original(self, hidden))
            shown = every if len(every) < 4 or not is_fake(hidden) else [*every[:2], every[-1]]
            for index, chunk in enumerate(shown):
                for counter in counters:
                    counter.times = len(every) - 2 if index == 1 and shown is not every else 1
                yield chunk
            for counter in counters:
                counter.times = 1

        return chunks

    with swapped((ChunkedHead, "chunks", abridge)):
        yield


def record_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], settle: float = 0
) -> Step:
    """One step of `model`, which `parallelize` has sharded and `optimizer` has stepped before.

    Args:
        settle: seconds to wait at each mark, for gloo's threads to let go of what they have sent.
    """
    inner = parallelized_model(model)
    layers = decoder_layers(inner)
    names, marks = ["embedding"], [0]
    start = np.zeros(len(CATEGORIES), np.int64)
    start[CATEGORIES.index("parameters")] = _bytes_of([*model.parameters(), *model.buffers()])
    start[CATEGORIES.index("optimizer")] = _bytes_of(_state_of(optimizer))
    start[CATEGORIES.index("activations")] = _bytes_of(list(batch.values()))

    def mark(name: str) -> None:
        # A checkpointed layer runs again in backward, and is not marked again.
        if name not in names:
            time.sleep(settle)
            names.append(name)
            marks.append(memory.now)

    def enter(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mark(f"forward of layer {index}")
        if index == 0 and (stream := args[0] if args else kwargs["hidden_states"]).requires_grad:
            stream.register_hook(lambda grad: mark("embedding's backward and replicated gradients"))

    def leave(index: int, module: nn.Module, args: tuple, output: object) -> None:
        if index == len(layers) - 1:
            mark("head and loss")
        stream = output[0] if isinstance(output, tuple) else output
        # The first of a checkpointed layer's two forwards may run without gradients.
        if stream.requires_grad:
            stream.register_hook(lambda grad: mark(f"backward of layer {index}"))

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(functools.partial(enter, index), with_kwargs=True))
        handles.append(layer.register_forward_hook(functools.partial(leave, index)))
    try:
        # Collection is off, so that what happens in a step does not depend on how much garbage there was before.
        gc.disable()
        sent, computed, memory = CollectiveBytes(), Flops(), TensorBytes()
        with sent, computed, memory, told_apart(_gathered(memory)), _alike_chunks_once(sent, computed):
            model(**batch).loss.backward()
            time.sleep(settle)
            gradients = {memory.key(local_part(p.grad)) for p in model.parameters() if p.grad is not None}
            mark("optimizer step")
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(settle)
            end = memory.now
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
    # If the embedding is frozen, no gradient arrives there.
    if "embedding's backward and replicated gradients" not in names:
        names.insert(-1, "embedding's backward and replicated gradients")
        marks.insert(-1, marks[-1])
    segments = _segments(memory, names, [*marks, end], gradients, len(layers))
    mesh = record_of(inner).mesh
    # The batch check is over "world", unless one mesh dim has all ranks.
    dims = {frozenset(range(dist.get_world_size())): "world"}
    dims |= {frozenset(dist.get_process_group_ranks(mesh[dim].get_group())): dim for dim in MESH_DIMS}
    traffic = {(dims[group], kind): found for (group, kind), found in sent.by_group.items()}
    return Step(start, segments, traffic, computed.total, len(layers))


def _segments(
    memory: TensorBytes, names: list[str], marks: list[int], gradients: set[int], layers: int
) -> list[Segment]:
    """The changes of `memory` between `marks`, sorted into `CATEGORIES`."""
    # The number of the segment in which each change lies.
    number = np.searchsorted(marks, np.arange(memory.now), side="right") - 1
    born: dict[int, int] = {}
    died: dict[int, int] = {}
    for moment, (key, size) in enumerate(memory.changes):
        born.setdefault(key, number[moment])
        if size < 0:
            died[key] = number[moment]
    loss, optimizer = layers + 1, len(names) - 1

    def category(key: int) -> int:
        if key in gradients:
            name = "gradients"
        elif memory.labels[key] == "gathered":
            name = "gathered"
        elif born[key] == loss:
            name = "loss"
        elif born[key] < loss and died.get(key, optimizer) > born[key]:
            name = "activations"
        else:
            name = "temporaries"
        return CATEGORIES.index(name)

    categories = {key: category(key) for key in born}
    segments = []
    for name, begin, end in zip(names, marks, marks[1:], strict=False):
        levels = np.zeros((end - begin + 1, len(CATEGORIES)), np.int64)
        for moment in range(begin, end):
            key, size = memory.changes[moment]
            levels[moment - begin + 1, categories[key]] = size
        levels = levels.cumsum(0)
        segments.append(Segment(name, levels[-1], levels[levels.sum(1).argmax()], levels.max(0)))
    return segments
