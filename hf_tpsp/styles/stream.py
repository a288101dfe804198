"""The styles on the residual stream: the embedding, the entry of a layer, parameters used on the stream, and the
norms."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from ..collectives import OneShare, from_local, own_range, slice_sequence, to_local
from ..config import TPSPConfig
from ..state import style_of
from ..vocabulary import require_inside
from . import recompute
from .base import Style, TensorParallel, parts_read_by
from .recompute import Recomputed


class Embedding(Style):
    """Vocabulary-sharded lookup into the stream. Weight Shard(0).

    Each rank looks up the ids it owns and leaves zeros for the rest; the sum over ranks is the embedding.
    Forward: reduce-scatter. Backward: all-gather. (Without SP, or `embedding:plain`, for a model that computes between
    the embedding and the first layer: all-reduce, none.)

    Attributes:
        start: the first id that this rank owns.
        rows: the number of ids that this rank owns.
    """

    start: int
    rows: int

    def __init__(self, config: TPSPConfig, *variants: str, **given: Any):
        super().__init__(config, **given)
        self.sequence_parallel &= "plain" not in variants
        self.forward_collective = "reduce-scatter" if self.sequence_parallel else "all-reduce"
        self.backward_collective = "all-gather" if self.sequence_parallel else "-"

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        return Shard(0)

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        if module.max_norm is not None:
            raise ValueError("An embedding with max_norm rescales rows in forward and cannot be vocabulary-sharded.")
        self.start, self.rows = own_range(len(module.weight), tp.rank, tp.size)
        super().install(module, tp)

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        # torch's stubs type the sizes as tensors.
        embedding: Any = module
        (ids,) = args or kwargs.values()
        require_inside("input_ids", ids, embedding.num_embeddings)
        start, rows = self.start, self.rows
        ids = ids - start
        foreign = (ids < 0) | (ids >= rows)
        # `padding_idx` keeps its row's gradient at zero; here it must name a row of this shard, or none.
        padding_idx = embedding.padding_idx
        owned = padding_idx is not None and start <= padding_idx < start + rows
        embedding.padding_idx = padding_idx - start if owned else None
        try:
            with self.local_parameters(module, tp):
                out = inner(ids.masked_fill(foreign, 0))
        finally:
            embedding.padding_idx = padding_idx
        return self.leave_region(out.masked_fill(foreign.unsqueeze(-1), 0), tp.mesh)


class Stream(Style):
    """Parameters that a decoder layer or the model owns itself, and uses on the stream.

    On a sharded stream they stay DTensors, like the stream. Without SP a pre-forward hook makes them plain, and a
    forward hook puts the DTensors back. These are hooks for the same reason as in `Enter`.
    """

    reads_parts = True

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        if self.sequence_parallel:
            return
        inside = list(parts_read_by(module))
        open_contexts = []

        def before(module: nn.Module, args: tuple) -> None:
            open_contexts.append(contextlib.ExitStack())
            open_contexts[-1].enter_context(self.local_parameters(module, tp))
            for part in inside:
                open_contexts[-1].enter_context(style_of(part).local_parameters(part, tp))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            open_contexts.pop().close()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


class Enter(Stream):
    """The entry of a decoder layer: cuts a plain stream (the caller's `inputs_embeds`) into sequence shards.

    Further arguments along the sequence, which the rule names (`enter:per_layer_input`), are cut too. A DTensor passes
    through unchanged. Forward: none. Backward: all-gather.
    """

    backward_collective = "all-gather if plain"

    def __init__(self, config: TPSPConfig, *names: str, **given: Any):
        super().__init__(config, **given)
        self.names = names

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        super().install(module, tp)
        order = list(inspect.signature(type(module).forward).parameters)[1:]

        def cut(x: Any) -> Any:
            if isinstance(x, DTensor) or not isinstance(x, Tensor):
                return x
            return slice_sequence(x, tp.mesh)

        # This is a hook and no wrapped forward, because transformers checkpoints a layer only if its class's own
        # forward is called.
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            # A layer that the script calls by itself takes plain tensors and returns plain ones.
            if not tp.gradients.computes_model():
                return None
            args = tuple(
                cut(x) if i == 0 or name in self.names else x
                for i, (name, x) in enumerate(zip(order, args, strict=False))
            )
            return args, {name: cut(x) if name in ("hidden_states", *self.names) else x for name, x in kwargs.items()}

        if self.sequence_parallel:
            module.register_forward_pre_hook(enter, with_kwargs=True)


class Norm(Style):
    """A norm on the stream: each rank normalizes its own part of the sequence. Parameters replicated; no collective.

    With `regather_inputs` only the norm's input is kept, and the norm runs once more in backward.
    """

    def is_partial(self, name: str) -> bool:
        return self.sequence_parallel

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        if not args:
            first, *names = kwargs
            args, kwargs = (kwargs[first],), {name: kwargs[name] for name in names}
        x, *rest = args
        local = to_local(x) if isinstance(x, DTensor) else x
        with self.local_parameters(module, tp):
            if type(self) is Norm and self.sequence_parallel and not isinstance(x, DTensor):
                # Every rank has the whole sequence here (a script calls the norm itself, or all layers of the model
                # were dropped). So all ranks have the same gradient of the parameters, and each contributes its share
                # to the sum.
                for name, value in module._parameters.items():
                    if isinstance(value, Tensor) and value.requires_grad:
                        module._parameters[name] = OneShare.apply(value, tp.size)
            if self.regather_inputs and not rest and not kwargs and recompute.is_active():
                out = recomputed(module, inner, local)
            else:
                out = inner(local, *rest, **kwargs)
        return from_local(out, x) if isinstance(x, DTensor) else out


def recomputed(module: nn.Module, inner: Callable, x: Tensor) -> Tensor:
    """Compute `inner(x)`, the forward of `module`, and keep only `x` and the parameters for backward."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        own = dict(module._parameters)
        # The annotation allows plain tensors, which stand in this dict while `inner` runs.
        parameters: dict[str, Any] = module._parameters
        parameters.update(zip(names, values, strict=True))
        try:
            return inner(x)
        finally:
            module._parameters.update(own)

    return Recomputed.apply(run, x, *(module._parameters[name] for name in names))
