"""The language-model head, whose logits stay sharded over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..collectives import enter_region, sharded_features
from ..config import TPSPConfig
from ..loss.logits import LazyLogits
from .base import Style, TensorParallel


class Head(Style):
    """The language-model head: logits `[batch, seq, vocab]` stay sharded over the vocabulary. Weight and bias Shard(0).

    The head runs when its logits are read (`LazyLogits`), usually by the loss.
    Forward: all-gather (of the hidden states). Backward: reduce-scatter. (Without SP: none, all-reduce.)
    """

    is_chunked = False

    def __init__(self, config: TPSPConfig, **given: Any):
        super().__init__(config, **given)
        self.forward_collective = "all-gather" if config.sequence_parallel else "-"
        self.backward_collective = "reduce-scatter" if config.sequence_parallel else "all-reduce"

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        return Shard(0)

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        (hidden,) = args
        tp.gradients.arm_with(hidden)
        # Without SP the stream is plain.
        if not isinstance(hidden, DTensor):
            hidden = DTensor.from_local(hidden, tp.mesh, [Replicate()], run_check=False)

        def parameters() -> tuple[Tensor, Tensor | None]:
            own: dict[str, Any] = module._parameters
            weight = self.local_value(module, "weight", own["weight"], tp)
            return weight, None if own["bias"] is None else self.local_value(module, "bias", own["bias"], tp)

        # torch's stubs type `out_features` as a tensor.
        vocab_size: Any = module.out_features

        def run(hidden: DTensor) -> DTensor:
            local = hidden if self.sequence_parallel else hidden.to_local(grad_placements=hidden.placements)
            with self.local_parameters(module, tp):
                logits = inner(enter_region(local, tp.mesh))
            return sharded_features(logits, vocab_size, tp.mesh)

        return LazyLogits(hidden, module, run, parameters if self.is_chunked else None)


class LazyHead(Head):
    """A head that runs together with the loss, in chunks of tokens."""

    is_chunked = True
