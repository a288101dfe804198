"""On the residual stream: the embedding that begins it, what enters and meets it, and the norms."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..collectives import OneShare, from_local, own_range, slice_sequence, to_local
from ..config import TPSPConfig
from ..vocabulary import require_inside
from . import recompute
from .base import Style
from .recompute import Recomputed


class Embedding(Style):
    """Vocabulary-sharded lookup into the stream. Weight Shard(0).

    Each rank looks up the ids it owns and leaves zeros for the rest; the sum over ranks is the embedding.
    Forward: reduce-scatter. Backward: all-gather. (Without SP, or `embedding:plain`, for a model that computes between the
    embedding and the first layer: all-reduce, none.)
    """

    def __init__(self, config: TPSPConfig, *variants: str):
        super().__init__(config)
        self.sequence_parallel &= "plain" not in variants
        self.forward_collective = "reduce-scatter" if self.sequence_parallel else "all-reduce"
        self.backward_collective = "all-gather" if self.sequence_parallel else "-"

    def placement(self, module, name, param):
        return Shard(0)

    def install(self, module, gradients):
        if module.max_norm is not None:
            raise ValueError("An embedding with max_norm rescales rows in forward and cannot be vocabulary-sharded.")
        mesh = gradients.mesh
        module._tpsp_rows = own_range(len(module.weight), mesh.get_local_rank(), mesh.size())
        super().install(module, gradients)

    def run(self, module, inner, gradients, args, kwargs):
        (ids,) = args or kwargs.values()
        require_inside("input_ids", ids, module.num_embeddings)
        start, rows = module._tpsp_rows
        ids = ids - start
        foreign = (ids < 0) | (ids >= rows)
        # `padding_idx` keeps its row's gradient at zero; here it must name a row of this shard, or none.
        padding_idx = module.padding_idx
        owned = padding_idx is not None and start <= padding_idx < start + rows
        module.padding_idx = padding_idx - start if owned else None
        try:
            with self.local_parameters(module, gradients):
                out = inner(ids.masked_fill(foreign, 0))
        finally:
            module.padding_idx = padding_idx
        return self.leave_region(out.masked_fill(foreign.unsqueeze(-1), 0), gradients.mesh)


class Stream(Style):
    """Parameters of a decoder layer, or of the model, beside its modules: they meet the stream itself.

    On a sharded stream they are DTensors, as it is. Without SP they are plain meanwhile. A hook, as for `Enter`.
    """

    def __init__(self, config: TPSPConfig):
        super().__init__(config)
        self.inside: list[nn.Module] = []  # modules that are used without being called

    def install(self, module, gradients):
        if self.sequence_parallel:
            return
        open_contexts = []

        def before(module, args):
            open_contexts.append(contextlib.ExitStack())
            open_contexts[-1].enter_context(self.local_parameters(module, gradients))
            for part in self.inside:
                open_contexts[-1].enter_context(part._tpsp_style.local_parameters(part, gradients))

        def after(module, args, output):
            open_contexts.pop().close()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


class Enter(Stream):
    """On a decoder layer: a plain stream (the caller's `inputs_embeds`) is cut into sequence shards, and so is what the layer
    takes along the sequence beside it (`enter:per_layer_input`).

    Forward: none. Backward: all-gather. What is sharded already passes through.
    """

    backward_collective = "all-gather if plain"

    def __init__(self, config: TPSPConfig, *names: str):
        super().__init__(config)
        self.names = names

    def install(self, module, gradients):
        super().install(module, gradients)
        order = list(inspect.signature(type(module).forward).parameters)[1:]

        def cut(x: Any) -> Any:
            if isinstance(x, DTensor) or not isinstance(x, Tensor):
                return x
            return slice_sequence(x, gradients.mesh)

        # A hook, not a wrapped forward: transformers checkpoints a layer only if its class's own forward is called.
        def enter(module, args, kwargs):
            if not gradients.computes_model():  # a layer that the script calls by itself: plain in, plain out
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

    With `regather_inputs` only its input is kept, and it runs once more in backward.
    """

    def is_partial(self, name):
        return self.sequence_parallel

    def run(self, module, inner, gradients, args, kwargs):
        if not args:
            first, *names = kwargs
            args, kwargs = (kwargs[first],), {name: kwargs[name] for name in names}
        x, *rest = args
        local = to_local(x) if isinstance(x, DTensor) else x
        with self.local_parameters(module, gradients):
            if type(self) is Norm and self.sequence_parallel and not isinstance(x, DTensor):
                # The whole sequence on every rank (a script that calls the norm itself, a model all of whose layers were
                # dropped): the ranks' gradients of the parameters, which are added up, are one and the same.
                for name, value in module._parameters.items():
                    if isinstance(value, Tensor) and value.requires_grad:
                        module._parameters[name] = OneShare.apply(value, gradients.mesh.size())
            if self.regather_inputs and not rest and not kwargs and recompute.is_active():
                out = recomputed(module, inner, local)
            else:
                out = inner(local, *rest, **kwargs)
        return from_local(out, x) if isinstance(x, DTensor) else out


def recomputed(module: nn.Module, inner, x: Tensor) -> Tensor:
    """`inner(x)`, the forward of `module`, of which only `x` is kept for backward."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        own = dict(module._parameters)
        module._parameters.update(zip(names, values, strict=True))
        try:
            return inner(x)
        finally:
            module._parameters.update(own)

    return Recomputed.apply(run, x, *(module._parameters[name] for name in names))
