"""Bytes at the moments of a real step, recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...upstream.torch.dtensor import local_part
from .recorders import CollectiveBytes, TensorBytes


def step(model: nn.Module, ids: Tensor) -> float:
    """Forward and backward. Returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


@dataclass
class Moments:
    """Moments of a `TensorBytes` in one step.

    Attributes:
        layers: decoder layer → the start of its forward.
        head: the start of the head.
        head_done: the moment when the gradient of the head's input is there.
        head_gradients: the keys of the gradients of the head's weight.
    """

    layers: dict[int, int] = field(default_factory=dict)
    head: int = 0
    head_done: int = 0
    head_gradients: set[int] = field(default_factory=set)


@contextmanager
def moments_of(model: PreTrainedModel, memory: TensorBytes) -> Iterator[Moments]:
    """Note the moments of the step that is made inside."""
    moments = Moments()

    def settled() -> int:
        # gloo's threads let go of what they have sent a moment after it has arrived.
        time.sleep(0.02)
        return memory.now

    def start_layer(index: int) -> None:
        # Checkpointing starts the layer again in backward, which does not count.
        moments.layers.setdefault(index, settled())

    def start_head(head: nn.Linear, args: tuple[Tensor]) -> None:
        moments.head = settled()
        args[0].register_hook(finish_head)
        handles.append(head.weight.register_hook(note_gradient))

    def finish_head(grad: Tensor) -> None:
        moments.head_done = memory.now

    def note_gradient(grad: Tensor) -> None:
        moments.head_gradients.add(memory.key(local_part(grad)))

    handles = [model.lm_head.register_forward_pre_hook(start_head)]
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: start_layer(index)))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def measure_step(model: PreTrainedModel, ids: Tensor) -> dict:
    """Bytes that one step holds and sends, on this rank.

    `peak_bytes`: the most tensor bytes at once, without parameters, buffers, inputs and gradients. They are
    activations, temporaries, and the parameters that FSDP2 has gathered. A gradient is whatever storage ends as a
    parameter's `.grad`; those are `gradient_bytes`.

    `saved_bytes_per_layer`: what is live at the start of the layer after a middle layer, above what was live at the
    middle layer's own start. FSDP2 has freed the one layer by then and gathered the other, which cancels.

    `loss_peak_bytes`: most tensor bytes at once from the start of the head to the gradient of its input, above those
    at its start (hidden states and everything before them) and the gradient of the head's weight, which is recognized
    as the storage that arrives at the weight. The whole model runs, because the step's own order decides what is live
    at the same time; no layer allocates or frees anything in between.
    """
    with CollectiveBytes() as sent, TensorBytes() as held, moments_of(model, held) as moments:
        loss = step(model, ids)
        gradients = [local_part(p.grad) for p in model.parameters()]
        keys = {held.key(grad) for grad in gradients}
        live = held.timeline(without=keys)
        in_loss = held.timeline(without=keys | moments.head_gradients)
    model.zero_grad()
    middle = (len(moments.layers) - 1) // 2
    return {
        "loss": loss,
        "peak_bytes": max(live),
        "gradient_bytes": sum(grad.nbytes for grad in gradients),
        "saved_bytes_per_layer": live[moments.layers[middle + 1]] - live[moments.layers[middle]],
        "loss_peak_bytes": max(in_loss[moments.head : moments.head_done + 1]) - in_loss[moments.head],
        "collectives": sent.traffic,
    }


def saved_by_a_layer(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes that a middle decoder layer keeps for backward, on this rank, from a forward alone; also on fake
    tensors."""
    with TensorBytes() as held, moments_of(model, held) as moments:
        stream = model.model(input_ids=ids).last_hidden_state
        live = held.timeline()
    # The stream has kept the graph alive until here.
    del stream
    middle = (len(moments.layers) - 1) // 2
    return live[moments.layers[middle + 1]] - live[moments.layers[middle]]
