"""The layouts: one class for each role a module can play in a tensor-parallel block.

A decoder layer is a *region* between a gather and a reduce-scatter, once for the token mixer and once for the MLP:

    residual stream ──norm──▶ gather ──▶ colwise ──▶ (local heads) ──▶ rowwise ──▶ residual stream
      Shard(1)              all-gather                              reduce-scatter    Shard(1)

The residual stream is a DTensor `[batch, seq, hidden]` sharded over the sequence, with its true global shape, so the
Hugging Face code between the layers sees the whole sequence's length (position ids, masks, rotary tables). Inside a
region everything is a plain tensor holding this rank's heads or columns, and the parameters are read as plain local
shards: no DTensor dispatch on the hot path.

With `sequence_parallel=False` the same classes leave the stream a plain replicated tensor, and each pair of gather and
reduce-scatter is one all-reduce instead.

Gradients. A column- or row-sharded weight gets its whole gradient on the rank that owns it. A *replicated* parameter
(norms, q_norm/k_norm, the bias of a row-parallel layer) sees a part of the sequence or of the heads on each rank, so
its local gradient is one term of a sum over the TP ranks. `ReplicatedGradients` adds the terms, once per backward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from . import recompute
from .collectives import SEQUENCE, all_gather_sequence, from_local, gather_sequence, scatter_sequence, to_local
from .config import TPSPConfig
from .logits import LazyLogits
from .recompute import Recomputed, Region


class ReplicatedGradients:
    """Adds up the gradients of the replicated parameters over the TP ranks: one all-reduce per backward.

    The terms are summed at the end of `backward`, after FSDP has reduced over data parallelism (sums commute), in one
    flat buffer for the whole model. Gradients that were there before this backward are set aside meanwhile and added
    back, so that accumulating over several backwards counts each of them once. A backward under FSDP's
    `set_requires_gradient_sync(False)` leaves no `.grad`, and then nothing is reduced until the one that does.

    Adapters, which FSDP does not manage, are also averaged over data parallelism here, in one more all-reduce.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self._sums: list[tuple[nn.Module, str]] = []  # whose gradients are terms of a sum over the TP ranks
        self._adapters: list[tuple[nn.Module, str]] = []
        self._averages: list[dist.ProcessGroup] = []  # of data parallelism, for the adapters
        self._graph_task = -1
        self._set_aside: list[tuple[nn.Parameter, DTensor]] = []

    def register(self, module: nn.Module, name: str) -> None:
        """Have `module`'s parameter `name` reduced. Called while the plan is applied."""
        self._sums.append((module, name))

    def register_adapter(self, module: nn.Module, name: str, is_sum: bool) -> None:
        """Have a parameter that FSDP does not manage averaged over data parallelism, and, if `is_sum`, reduced."""
        self._adapters.append((module, name))
        if is_sum:
            self.register(module, name)

    def adapters_to(self, dtype: torch.dtype) -> None:
        """Cast the adapters, before an optimizer is made."""
        for module, name in self._adapters:
            if (param := module._parameters[name]).dtype != dtype:
                module._parameters[name] = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)

    def average_over(self, mesh: DeviceMesh) -> None:
        """Average the adapters' gradients over the data-parallel dims of `mesh`."""
        dims = [dim for dim in ("dp_shard", "dp_replicate") if mesh[dim].size() > 1]
        self._averages = [mesh[dim].get_group() for dim in dims]

    @staticmethod
    def _parameters(owners: list[tuple[nn.Module, str]]) -> list[nn.Parameter]:
        """The parameters as the optimizer knows them, whichever way FSDP holds the modules' own just now."""
        from .compat import sharded_parameter

        unique = {id(p): p for module, name in owners if (p := sharded_parameter(module, name)) is not None}
        return list(unique.values())

    def summed(self) -> list[nn.Parameter]:
        """The parameters whose gradients are terms of a sum over the TP ranks."""
        return self._parameters(self._sums)

    def local(self, param: DTensor) -> Tensor:
        """`param` as a plain tensor whose gradient is one rank's term of the sum."""
        if torch.compiler.is_compiling():  # a compiled layer; the head has armed by then
            return param.to_local(grad_placements=param.placements)
        return _LocalReplica.apply(param, self)

    def arm_with(self, hidden: Tensor) -> None:
        """Arm when the gradient arrives at what the head was given."""
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: self.arm())

    def arm(self) -> None:
        """Arrange for the reduction at the end of the running backward. Called when its first term is there."""
        task = torch._C._current_graph_task_id()
        if task == self._graph_task:
            return
        self._restore()  # a backward that raised never came to its end
        self._graph_task = task
        for param in self._parameters(self._sums + self._adapters):
            if param.grad is not None:
                self._set_aside.append((param, param.grad))
                param.grad = None
        # FSDP's own final callback was queued when the loss's gradient arrived, so it runs before this one.
        torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    def _reduce(self) -> None:
        _all_reduce(self.summed(), self.mesh.get_group())
        for group in self._averages:
            _all_reduce(self._parameters(self._adapters), group, average=True)
        self._restore()
        self._graph_task = -1

    def _restore(self) -> None:
        for param, earlier in self._set_aside:
            param.grad = earlier if param.grad is None else param.grad.add_(earlier)
        self._set_aside = []


def _all_reduce(parameters: list[nn.Parameter], group: dist.ProcessGroup, average: bool = False) -> None:
    """Sum or average the gradients of `parameters` over `group`, in place, in one flat buffer."""
    grads = [p.grad._local_tensor for p in parameters if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    if average:
        flat /= group.size()
    for grad, reduced in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(reduced.view_as(grad))


class _LocalReplica(torch.autograd.Function):
    """Replicated DTensor → local tensor. Backward claims `Replicate()`, so that nobody reduces before the step's end."""

    @staticmethod
    def forward(ctx, param: DTensor, gradients: ReplicatedGradients) -> Tensor:
        ctx.spec, ctx.gradients = param._spec, gradients
        local = param._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.gradients.arm()
        return DTensor(grad, ctx.spec, requires_grad=False), None


class _CopyToRegion(torch.autograd.Function):
    """Identity forward, all-reduce backward: the entry of a region when the stream is replicated (Megatron's f)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.mesh.get_group())
        return grad, None


class _ReduceFromRegion(torch.autograd.Function):
    """All-reduce forward, identity backward: the exit of a region when the stream is replicated (Megatron's g)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=mesh.get_group())
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class Style:
    """How a module's parameters are laid out over the TP ranks, and what happens around its forward.

    `install` wraps `module.forward`; it calls `run`, which subclasses override. The two strings name the collectives on
    the activations, for the table that `hf-tpsp plan` prints.
    """

    forward_collective = "-"
    backward_collective = "-"

    def __init__(self, config: TPSPConfig):
        self.sequence_parallel = config.sequence_parallel
        self.regather_inputs = config.regather_inputs and config.sequence_parallel

    def placement(self, module: nn.Module, name: str, param: nn.Parameter) -> Placement:
        """Where parameter `name` of `module` lives on the TP mesh dim."""
        return Replicate()

    def is_partial(self, name: str) -> bool:
        """Whether the ranks' gradients of the replicated parameter `name` are terms of a sum."""
        return False

    def shard(self, module: nn.Module, gradients: ReplicatedGradients) -> None:
        """Turn the module's own parameters into DTensors on the TP mesh, keeping ties and `requires_grad`."""
        for name, param in list(module.named_parameters(recurse=False)):
            if self.is_partial(name):
                gradients.register(module, name)
            if not isinstance(param, DTensor):
                placement = self.placement(module, name, param)
                # `src_data_rank=None`: every rank cuts its own slice; no communication, and meta tensors work.
                value = distribute_tensor(param.detach(), gradients.mesh, [placement], src_data_rank=None)
                module._parameters[name] = nn.Parameter(value, requires_grad=param.requires_grad)

    def install(self, module: nn.Module, gradients: ReplicatedGradients) -> None:
        module._tpsp_style = self
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run(module, inner, gradients, args, kwargs)

        module.forward = forward

    def run(self, module: nn.Module, inner, gradients: ReplicatedGradients, args: tuple, kwargs: dict) -> Any:
        with self.local_parameters(module, gradients):
            return inner(*args, **kwargs)

    @contextlib.contextmanager
    def local_parameters(self, module: nn.Module, gradients: ReplicatedGradients, without: tuple[str, ...] = ()):
        """While inside, the module's own parameters are plain local tensors; those in `without` are None."""
        params = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
        for name, param in params.items():
            if name in without:
                local = None
            elif self.is_partial(name):
                local = gradients.local(param)
            else:
                local = to_local(param)
            module._parameters[name] = local
        try:
            yield
        finally:
            module._parameters.update(params)

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """Sum the ranks' terms `[batch, seq, hidden]` into the stream: reduce-scatter, or all-reduce without SP."""
        if self.sequence_parallel:
            return scatter_sequence(partial, mesh)
        return _ReduceFromRegion.apply(partial, mesh)


def enter_region(x: Any, mesh: DeviceMesh, sequence_parallel: bool) -> Any:
    """The stream as the plain full tensor `[batch, seq, hidden]` of a region; other values are returned as they are.

    What is computed from it covers this rank's columns only, so its gradient is a term of a sum over the ranks.
    """
    if isinstance(x, DTensor):
        if x.placements == (SEQUENCE,):
            return gather_sequence(x)
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if not sequence_parallel and isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad:
        return _CopyToRegion.apply(x, mesh)
    return x


def regather(x: DTensor, mesh: DeviceMesh) -> Callable[[], Tensor]:
    """How to make `enter_region(x)` again. Holds this rank's part of it only."""
    shard, length = x._local_tensor, x.shape[1]
    return lambda: all_gather_sequence(shard, length, mesh)


class Embedding(Style):
    """Vocabulary-sharded lookup into the stream. Weight Shard(0).

    Each rank looks up the ids it owns and leaves zeros for the rest; the sum over ranks is the embedding.
    Forward: reduce-scatter. Backward: all-gather. (Without SP: all-reduce, none.)
    """

    def __init__(self, config: TPSPConfig):
        super().__init__(config)
        self.forward_collective = "reduce-scatter" if config.sequence_parallel else "all-reduce"
        self.backward_collective = "all-gather" if config.sequence_parallel else "-"

    def placement(self, module, name, param):
        return Shard(0)

    def install(self, module, gradients):
        if module.max_norm is not None:
            raise ValueError("An embedding with max_norm rescales rows in forward and cannot be vocabulary-sharded.")
        weight = module.weight
        (rows, _), (start, _) = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, [Shard(0)])
        module._tpsp_rows = (start, rows)
        super().install(module, gradients)

    def run(self, module, inner, gradients, args, kwargs):
        (ids,) = args or kwargs.values()
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


class Enter(Style):
    """On the first decoder layer: a plain stream (`inputs_embeds` of the caller's) is cut into sequence shards.

    Forward: none. Backward: all-gather. A stream that is sharded already passes through.
    """

    backward_collective = "all-gather if plain"

    def install(self, module, gradients):
        # A hook, not a wrapped forward: transformers checkpoints a layer only if its class's own forward is called.
        def enter(module, args, kwargs):
            x = args[0] if args else kwargs.get("hidden_states")
            if not self.sequence_parallel or not isinstance(x, Tensor) or isinstance(x, DTensor):
                return None
            full = DTensor.from_local(x, gradients.mesh, [Replicate()], run_check=False)
            shard = full.redistribute(placements=[SEQUENCE])
            return ((shard, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": shard})

        module.register_forward_pre_hook(enter, with_kwargs=True)


class Norm(Style):
    """A norm on the stream: each rank normalizes its own part of the sequence. Parameters replicated; no collective.

    With `regather_inputs` only its input is kept, and it runs once more in backward.
    """

    def is_partial(self, name):
        return self.sequence_parallel

    def run(self, module, inner, gradients, args, kwargs):
        x, *rest = args
        local = to_local(x) if isinstance(x, DTensor) else x
        with self.local_parameters(module, gradients):
            if self.regather_inputs and not rest and not kwargs and recompute.is_active():
                out = recomputed(module, inner, local)
            else:
                out = inner(local, *rest, **kwargs)
        return from_local(out, x) if isinstance(x, DTensor) else out


class Replica(Norm):
    """A norm inside a region, on this rank's heads, with the same parameters on every rank (q_norm, k_norm).

    No collective on activations.
    """

    def is_partial(self, name):
        return True


def recomputed(module: nn.Module, inner, x: Tensor) -> Tensor:
    """`inner(x)`, the forward of `module`, of which only `x` is kept for backward."""
    names = list(module._parameters)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        own = dict(module._parameters)
        module._parameters.update(zip(names, values, strict=True))
        try:
            return inner(x)
        finally:
            module._parameters.update(own)

    return Recomputed.apply(run, x, *(module._parameters[name] for name in names))


class Activation(Style):
    """An activation function inside a region. Its output is not kept for backward, but computed from its input again."""

    def run(self, module, inner, gradients, args, kwargs):
        out = inner(*args, **kwargs)
        if (region := Region.current) is not None:
            kept = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
            region.again(out, lambda: inner(*kept, **kwargs))
        return out


class Gather(Style):
    """Entry of a token mixer or MLP: whatever arguments carry the stream, positional or keyword, are gathered.

    Forward: all-gather. Backward: reduce-scatter, and with `regather_inputs` the all-gather once more, for the weights'
    gradients. (Without SP: none, all-reduce.)
    """

    def __init__(self, config: TPSPConfig):
        super().__init__(config)
        self.forward_collective = "all-gather" if config.sequence_parallel else "-"
        self.backward_collective = "reduce-scatter" if config.sequence_parallel else "all-reduce"
        if self.regather_inputs:
            self.backward_collective = "all-gather, reduce-scatter"

    def run(self, module, inner, gradients, args, kwargs):
        if self.regather_inputs and recompute.is_active():
            with Region() as region:

                def enter(x: Any) -> Any:
                    full = enter_region(x, gradients.mesh, True)
                    if full is not x:
                        region.again(full, regather(x, gradients.mesh))
                    return full

                return inner(*map(enter, args), **{name: enter(x) for name, x in kwargs.items()})
        if self.sequence_parallel:
            args = tuple(enter_region(x, gradients.mesh, True) for x in args)
            kwargs = {name: enter_region(x, gradients.mesh, True) for name, x in kwargs.items()}
        else:  # nothing marks a plain stream: it is the first argument, by either calling convention
            if args:
                args = (enter_region(args[0], gradients.mesh, False), *args[1:])
            else:
                first = next(iter(kwargs))
                kwargs = {**kwargs, first: enter_region(kwargs[first], gradients.mesh, False)}
        return inner(*args, **kwargs)


class GatherHeads(Gather):
    """`Gather` for an attention whose forward reads the number of heads (to cut up a packed projection).

    The module sees a config and attributes with this rank's share of the heads.
    """

    HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads")

    def install(self, module, gradients):
        size = gradients.mesh.size()
        module.config = copy.copy(module.config)
        for owner in (module, module.config):
            for name in self.HEADS:
                if isinstance(heads := vars(owner).get(name), int):
                    setattr(owner, name, heads // size)
        super().install(module, gradients)


class Colwise(Style):
    """A linear layer split over its output features. Weight and bias Shard(0); input full, output local; no collective."""

    def placement(self, module, name, param):
        return Shard(0)


class PackedColwise(Colwise):
    """Projections of equal width packed in one linear layer (gate and up): each is split over its own output features.

    Written `packed_colwise:n,n` in a plan, with the width of each part. No collective.
    """

    def __init__(self, config: TPSPConfig, *parts: int):
        super().__init__(config)
        self.parts = parts

    def placement(self, module, name, param):
        return _StridedShard(0, split_factor=len(self.parts))


class PackedUneven(Colwise):
    """Projections of different widths packed in one linear layer: query, key and value with fewer kv heads.

    Written `packed_uneven:q,k,v` in a plan. No placement of DTensor's keeps each head with its group, so the weight is
    split by rows as it lies, the output is gathered, and each rank keeps its own slice of each part.
    Forward: all-gather (of the layer's output). Backward: reduce-scatter.
    """

    forward_collective = "all-gather"
    backward_collective = "reduce-scatter"

    def __init__(self, config: TPSPConfig, *parts: int):
        super().__init__(config)
        self.parts = parts

    def install(self, module, gradients):
        rank, size = gradients.mesh.get_local_rank(), gradients.mesh.size()
        start, rows = 0, []
        for features in self.parts:
            part = features // size
            rows.append(torch.arange(start + rank * part, start + (rank + 1) * part))
            start += features
        module._tpsp_rows = torch.cat(rows)
        super().install(module, gradients)

    def run(self, module, inner, gradients, args, kwargs):
        out = super().run(module, inner, gradients, args, kwargs)
        shape = torch.Size((*out.shape[:-1], module.out_features))
        stride = torch.empty(shape, device="meta").stride()
        out = DTensor.from_local(
            out, gradients.mesh, [Shard(out.dim() - 1)], run_check=False, shape=shape, stride=stride
        )
        full = out.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        module._tpsp_rows = module._tpsp_rows.to(full.device)
        return full.index_select(-1, module._tpsp_rows)


class Rowwise(Style):
    """A linear layer split over its input features, closing a region. Weight Shard(1), bias replicated.

    The ranks' products are terms of a sum. Forward: reduce-scatter. Backward: all-gather. (Without SP: all-reduce,
    none.) The bias is added once, after the sum.
    """

    def __init__(self, config: TPSPConfig):
        super().__init__(config)
        self.forward_collective = "reduce-scatter" if config.sequence_parallel else "all-reduce"
        self.backward_collective = "all-gather" if config.sequence_parallel else "-"

    def placement(self, module, name, param):
        return Replicate() if name == "bias" else Shard(1)

    def is_partial(self, name):
        return name == "bias" and self.sequence_parallel

    def run(self, module, inner, gradients, args, kwargs):
        with self.local_parameters(module, gradients, without=("bias",)), recompute.partial_product():
            partial = inner(*args, **kwargs)
        return partial if vars(module).get("_tpsp_adapted") else self.leave(module, partial, gradients)

    def leave(self, module: nn.Module, partial: Tensor, gradients: ReplicatedGradients) -> Tensor:
        out = self.leave_region(partial, gradients.mesh)
        if (bias := module._parameters.get("bias")) is None:
            return out
        if not self.sequence_parallel:
            return out + to_local(bias)
        return from_local(to_local(out) + gradients.local(bias), out)

    def install_around(self, adapted: nn.Module, module: nn.Module, gradients: ReplicatedGradients) -> None:
        """Have `adapted`, which adds another term to `module`'s output, close the region in `module`'s place."""
        module._tpsp_adapted = True
        inner = adapted.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return self.leave(module, inner(*args, **kwargs), gradients)

        adapted.forward = forward


class Adapter(Style):
    """One matrix of a low-rank adapter, inside the region of the layer it adapts. No collective on activations.

    Args:
        of: the layout of the adapted layer.
        placement: of the weight on the TP ranks.
        is_sum: whether the ranks' gradients are terms of a sum.
        rows: of the weight, those that this rank computes; None for all that it has.
    """

    def __init__(self, of: Style, placement: Placement, is_sum: bool = False, rows: Tensor | None = None):
        self.sequence_parallel, self.regather_inputs = of.sequence_parallel, of.regather_inputs
        self._placement, self.is_sum, self.rows = placement, is_sum, rows

    def placement(self, module, name, param):
        return self._placement

    def is_partial(self, name):
        return True  # FSDP does not reduce it, whatever its layout

    def run(self, module, inner, gradients, args, kwargs):
        out = super().run(module, inner, gradients, args, kwargs)
        return out if self.rows is None else out.index_select(-1, self.rows.to(out.device))


class Head(Style):
    """The language-model head: logits `[batch, seq, vocab]` stay sharded over the vocabulary. Weight and bias Shard(0).

    Forward: all-gather (of the hidden states). Backward: reduce-scatter. (Without SP: none, all-reduce.)
    """

    def __init__(self, config: TPSPConfig):
        super().__init__(config)
        self.forward_collective = "all-gather" if config.sequence_parallel else "-"
        self.backward_collective = "reduce-scatter" if config.sequence_parallel else "all-reduce"

    def placement(self, module, name, param):
        return Shard(0)

    def run(self, module, inner, gradients, args, kwargs):
        gradients.arm_with(args[0])
        hidden = enter_region(args[0], gradients.mesh, self.sequence_parallel)
        with self.local_parameters(module, gradients):
            logits = inner(hidden)
        shape = torch.Size((*logits.shape[:-1], module.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            logits, gradients.mesh, [Shard(logits.dim() - 1)], run_check=False, shape=shape, stride=stride
        )


class LazyHead(Head):
    """A head that runs together with the loss, in chunks of tokens, or when its logits are read (`LazyLogits`)."""

    def run(self, module, inner, gradients, args, kwargs):
        (hidden,) = args
        gradients.arm_with(hidden)
        if not isinstance(hidden, DTensor):  # without SP the stream is plain
            hidden = DTensor.from_local(hidden, gradients.mesh, [Replicate()], run_check=False)
        run_head = super().run

        def run(hidden: DTensor) -> DTensor:
            hidden = hidden if self.sequence_parallel else hidden.to_local(grad_placements=hidden.placements)
            return run_head(module, inner, gradients, (hidden,), {})

        return LazyLogits(hidden, module, run)


STYLES: dict[str, type[Style]] = {
    "embedding": Embedding,
    "enter": Enter,
    "norm": Norm,
    "replica": Replica,
    "activation": Activation,
    "gather": Gather,
    "gather_heads": GatherHeads,
    "colwise": Colwise,
    "packed_colwise": PackedColwise,
    "packed_uneven": PackedUneven,
    "rowwise": Rowwise,
    "head": Head,
    "lazy_head": LazyHead,
}
"""Style names as they stand in a plan."""


def style_for(rule: str, config: TPSPConfig) -> Style:
    """The style that a rule of a plan names; numbers after a colon are its arguments (`packed_colwise:64,64`)."""
    name, _, arguments = rule.partition(":")
    if name not in STYLES:
        raise ValueError(f"{rule!r} names no style; the styles are {', '.join(STYLES)}.")
    return STYLES[name](config, *(int(n) for n in arguments.split(",") if n))
