"""The layouts: one class for each role a module can play.

A decoder layer is a *region* between a gather and a reduce-scatter, once for the token mixer and once for the MLP, each a `Block`:

    residual stream ──norm──▶ gather ──▶ colwise ──▶ (local heads) ──▶ rowwise ──▶ reduce-scatter ──▶ residual stream
      Shard(1)              all-gather                              a term of a sum                     Shard(1)

The residual stream is a DTensor `[batch, seq, hidden]` sharded over the sequence, with its true global shape, so the
Hugging Face code between the layers sees the whole sequence's length (position ids, masks, rotary tables). Inside a
region everything is a plain tensor holding this rank's heads or columns, and the parameters are read as plain local
shards: no DTensor dispatch on the hot path.

With `sequence_parallel=False` the same classes leave the stream a plain replicated tensor, and each pair of gather and
reduce-scatter is one all-reduce instead.

Gradients. A column- or row-sharded weight gets its whole gradient on the rank that owns it. A *replicated* parameter
(norms, q_norm/k_norm, routers, the bias of a row-parallel layer) sees a part of the sequence or of the heads on each rank, so
its local gradient is one term of a sum over the TP ranks. `ReplicatedGradients` adds the terms, once per backward. In a block
that every rank computes `Whole`, each has the whole gradient, and nothing is added.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers.pytorch_utils import Conv1D

from . import compat, outside, randomness, recompute
from .collectives import (
    SEQUENCE,
    all_gather_sequence,
    all_reduce,
    chunk_of,
    from_local,
    gather_sequence,
    gather_whole,
    scatter_sequence,
    slice_sequence,
    to_local,
)
from .config import TPSPConfig
from .guard import require_inside
from .logits import LazyLogits
from .outputs import LazyWhole, whole_heads
from .recompute import Recomputed, Region


class ReplicatedGradients:
    """Adds up the gradients of the replicated parameters over the TP ranks: one all-reduce per backward.

    The terms are summed at the end of `backward`, after FSDP has reduced over data parallelism (sums commute), in one
    flat buffer for the whole model. Gradients that were there before this backward are set aside meanwhile and added
    back, so that accumulating over several backwards counts each of them once. A backward under FSDP's
    `set_requires_gradient_sync(False)` leaves no `.grad`, and then nothing is reduced until the one that does.

    Adapters, which FSDP does not manage, are also averaged over data parallelism here, in one more all-reduce. Their terms
    are kept beside their `.grad` until then.

    What a script computes from a parameter itself (a penalty on the weights) has its whole gradient on every rank, and does not
    take part in the sum. What a script has registered with `register_post_accumulate_grad_hook` is called when the sum is there.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self._sums: list[tuple[nn.Module, str]] = []  # whose gradients are terms of a sum over the TP ranks
        self._adapters: list[tuple[nn.Module, str]] = []
        self._averages: list[dist.ProcessGroup] = []  # of data parallelism, for the adapters
        self.once_reduced: Callable[[], bool] | None = None  # called after each backward, until it says that it is done
        self.calls: outside.Calls | None = None  # of the model, once FSDP2 has it
        self._armed: weakref.ref | None = None
        # Of those modules, out of the ones that hold the layers, whose forward is running (`outputs.py`).
        self.depth = 0
        self._set_aside: list[tuple[nn.Parameter, DTensor]] = []
        self.keeps_terms = True  # of the adapters; else they come into `.grad`
        self._terms: dict[int, tuple[nn.Parameter, Tensor]] = {}  # in the running backward
        self._handles: list = []
        self._hooks: list[tuple[nn.Parameter, dict]] = []

    def register(self, module: nn.Module, name: str) -> None:
        """Have `module`'s parameter `name` reduced. Called while the plan is applied."""
        self._sums.append((module, name))

    def register_adapter(self, module: nn.Module, name: str, is_sum: bool) -> None:
        """Have a parameter that FSDP does not manage averaged over data parallelism, and, if `is_sum`, reduced."""
        self._adapters.append((module, name))
        if is_sum:
            self.register(module, name)

    def adapters_to(self, dtype: torch.dtype) -> None:
        """Cast the adapters in place: an optimizer may hold them."""
        for module, name in self._adapters:
            if (param := module._parameters[name]).dtype != dtype:
                cast = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
                torch.utils.swap_tensors(param, cast)

    def average_over(self, mesh: DeviceMesh) -> None:
        """Average the adapters' gradients over the data-parallel dims of `mesh`."""
        dims = [dim for dim in ("dp_shard", "dp_replicate") if mesh[dim].size() > 1]
        self._averages = [mesh[dim].get_group() for dim in dims]

    @staticmethod
    def _parameters(owners: list[tuple[nn.Module, str]]) -> list[nn.Parameter]:
        """The parameters as the optimizer knows them, whichever way FSDP holds the modules' own just now."""
        unique = {id(p): p for module, name in owners if (p := compat.sharded_parameter(module, name)) is not None}
        return list(unique.values())

    def computes_model(self) -> bool:
        """Whether the model's forward is running, or a part of it again in backward; else a script calls a module by itself."""
        return self.depth > 0 or compat.in_backward()

    def summed(self) -> list[nn.Parameter]:
        """The parameters whose gradients are terms of a sum over the TP ranks."""
        return self._parameters(self._sums)

    def local(self, param: DTensor, is_adapter: bool = False) -> Tensor:
        """`param` as a plain tensor whose gradient is one rank's term of the sum."""
        if torch.compiler.is_compiling():  # a compiled layer; the head has armed by then
            return param.to_local(grad_placements=param.placements)
        return _LocalReplica.apply(param, self, is_adapter and self.keeps_terms)

    def add_term(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add one rank's term to the gradient of an adapter's `param`."""
        _, before = self._terms.get(id(param), (None, None))
        self._terms[id(param)] = (param, grad.clone() if before is None else before + grad)

    def arm_with(self, hidden: Tensor) -> None:
        """Arm when the gradient arrives at what the head was given."""
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: self.arm())

    def arm(self) -> None:
        """Arrange for the reduction at the end of the running backward. Called when its first term is there.

        That backward may run others inside it (reentrant checkpointing), whose terms are its own. It keeps the callback
        until it ends, whether by an exception or not, so the callback being there says that it is still running.
        """
        if self._armed is not None and self._armed() is not None:
            return
        self._restore()  # a backward that raised never came to its end
        sums, adapters = self.summed(), self._parameters(self._adapters)
        check_hooks([*sums, *adapters, *self._managed()])
        callback = functools.partial(self._reduce)
        self._armed = weakref.ref(callback)
        own = {id(p) for p in adapters}
        for param in {id(p): p for p in [*sums, *adapters]}.values():
            if param.grad is not None and not (self.keeps_terms and id(param) in own):
                self._set_aside.append((param, param.grad))
                param.grad = None
            if id(param) not in own and param.requires_grad:
                # FSDP writes what it has reduced into `.grad`; what autograd brings came from the script's own use of `param`.
                self._handles.append(param.register_hook(lambda grad: grad / self.mesh.size()))
            if hooks := param._post_accumulate_grad_hooks:
                self._hooks.append((param, hooks))
                param._post_accumulate_grad_hooks = None
        # FSDP's own final callback was queued when the loss's gradient arrived, so it runs before this one.
        torch.autograd.Variable._execution_engine.queue_callback(callback)

    def _managed(self) -> list[nn.Parameter]:
        """The parameters that FSDP manages, as the optimizer knows them."""
        groups = self.calls.groups if self.calls is not None else []
        return [record.sharded_param for group in groups for record in group.group.fsdp_params]

    def _reduce(self) -> None:
        adapters = self._parameters(self._adapters)
        kept = {id(p) for p in adapters} if self.keeps_terms else set()

        def terms(parameters: list[nn.Parameter]) -> list[Tensor]:
            found = [self._terms.get(id(p), (p, None))[1] if id(p) in kept else p.grad for p in parameters]
            return [getattr(grad, "_local_tensor", grad) for grad in found if grad is not None]

        _all_reduce(terms(self.summed()), self.mesh.get_group())
        for group in self._averages:
            _all_reduce(terms(adapters), group, average=True)
        for param, term in self._terms.values():
            grad = DTensor(term, param._spec, requires_grad=False)
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        hooks = self._hooks
        self._restore()
        self._armed = None
        if self.once_reduced is not None and self.once_reduced():
            self.once_reduced = None
        for param, registered in hooks:
            for hook in registered.values() if param.grad is not None else ():
                hook(param)

    def _restore(self) -> None:
        for param, earlier in self._set_aside:
            param.grad = earlier if param.grad is None else param.grad.add_(earlier)
        for handle in self._handles:
            handle.remove()
        for param, hooks in self._hooks:
            param._post_accumulate_grad_hooks = hooks
        self._set_aside, self._handles, self._hooks, self._terms = [], [], [], {}


def check_hooks(parameters: list[nn.Parameter]) -> None:
    """Raise `ValueError` if a script has registered hooks that would see a rank's term of a gradient, or nothing at all."""
    if any(p._backward_hooks for p in parameters):
        raise ValueError(
            "A hook was registered on a parameter of a sharded model (register_hook). FSDP reduces gradients outside of autograd, so "
            "it would be given none, or one rank's term. Use register_post_accumulate_grad_hook, which is called once the whole "
            "gradient is in .grad."
        )


def _all_reduce(grads: list[Tensor], group: dist.ProcessGroup, average: bool = False) -> None:
    """Sum or average `grads` over `group`, in place, in one flat buffer."""
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    if average:
        flat /= group.size()
    for grad, reduced in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(reduced.view_as(grad))


class _LocalReplica(torch.autograd.Function):
    """Replicated DTensor → local tensor. Backward claims `Replicate()`, so that nobody reduces before the step's end; the term of
    an adapter it keeps for the sum."""

    @staticmethod
    def forward(ctx, param: DTensor, gradients: ReplicatedGradients, is_adapter: bool) -> Tensor:
        ctx.spec, ctx.gradients, ctx.adapter = param._spec, gradients, param if is_adapter else None
        local = param._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad: Tensor):
        compat.check_accumulates(ctx.next_functions[0][0])
        ctx.gradients.arm()
        if ctx.adapter is not None:
            ctx.gradients.add_term(ctx.adapter, grad)
            return None, None, None
        return DTensor(grad, ctx.spec, requires_grad=False), None, None


class _CopyToRegion(torch.autograd.Function):
    """Identity forward, all-reduce backward: the entry of a region when the stream is replicated (Megatron's f)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.detach()  # and not a view, into which a block could not write

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.mesh.get_group())
        return grad, None


class _ReduceFromRegion(torch.autograd.Function):
    """All-reduce forward, identity backward: the exit of a region when the stream is replicated (Megatron's g)."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return all_reduce(x, mesh)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class OneShare(torch.autograd.Function):
    """Identity forward; backward, one rank's share of a gradient that all ranks have alike, so that they add up to it."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.size, None


class _OwnTerm(torch.autograd.Function):
    """What every rank has whole → its own part of the sequence, as the stream. Backward: the part's gradient, and zeros beside it,
    which is this rank's term of the whole gradient. No collective."""

    @staticmethod
    def forward(ctx, full: Tensor, mesh: DeviceMesh) -> DTensor:
        ctx.shape, ctx.mesh = full.shape, mesh
        return slice_sequence(full.detach(), mesh)

    @staticmethod
    def backward(ctx, grad: DTensor):
        if grad.placements != (SEQUENCE,):
            grad = grad.redistribute(placements=[SEQUENCE])
        term = grad._local_tensor.new_zeros(ctx.shape)
        chunk_of(term, 1, ctx.mesh.get_local_rank(), ctx.mesh.size()).copy_(grad._local_tensor)
        return term, None


class Style:
    """How a module's parameters are laid out over the TP ranks, and what happens around its forward.

    `install` wraps `module.forward`; it calls `run`, which subclasses override. The two strings name the collectives on
    the activations, for the table that `hf-tpsp plan` prints.
    """

    forward_collective = "-"
    backward_collective = "-"

    def __init__(self, config: TPSPConfig):
        self.parameter_rules: dict[str, str] = {}  # the plan's, for single parameters: `split:0`, `packed:1,2`, `mean`
        self.sequence_parallel = config.sequence_parallel
        self.regather_inputs = config.regather_inputs and config.sequence_parallel
        self.outside_fsdp = False  # of adapters, whose gradients are all reduced at the end of backward
        self.original: nn.Module | None = None  # of which the module is a copy outside FSDP

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        """Where parameter `name` of `module` lives on the TP mesh dim."""
        if (rule := self.parameter_rules.get(name)) in (None, "mean"):
            return Replicate()
        kind, _, arguments = rule.partition(":")
        dim, *parts = (int(n) for n in arguments.split(","))
        dim %= param.dim()
        return Shard(dim) if kind == "split" else _StridedShard(dim, split_factor=parts[0])

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
        self.adjust(module, gradients.mesh.get_local_rank(), gradients.mesh.size())
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (calls := gradients.calls) is not None and calls.is_outside:
                return calls.run_style(self, module, run, args, kwargs)
            return self.run(module, inner, gradients, args, kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.run(module, inner, gradients, args, kwargs)

        module.forward = forward

    def run(self, module: nn.Module, inner, gradients: ReplicatedGradients, args: tuple, kwargs: dict) -> Any:
        with self.local_parameters(module, gradients):
            return inner(*args, **kwargs)

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        """Set what `module` knows of its own sizes to this rank's share."""

    def rehearse(self, module: nn.Module, rank: int, size: int) -> None:
        """Make of a plain `module` what it is on `rank` of `size` ranks, without collectives (`prove.py`)."""
        for name, param in list(module.named_parameters(recurse=False)):
            local = local_slice(param.detach(), self.placement(module, name, param), rank, size)
            module._parameters[name] = nn.Parameter(self.term(name, local, size))
        self.adjust(module, rank, size)

    def term(self, name: str, value: Tensor, size: int) -> Tensor:
        """The parameter `name` as a rank uses it, such that the ranks' outputs add up."""
        return value / size if self.parameter_rules.get(name) == "mean" else value

    @contextlib.contextmanager
    def local_parameters(self, module: nn.Module, gradients: ReplicatedGradients):
        """While inside, the module's own parameters are plain local tensors."""
        params = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
        for name, param in params.items():
            module._parameters[name] = self.local_value(module, name, param, gradients)
        try:
            yield
        finally:
            module._parameters.update(params)

    def local_value(self, module: nn.Module, name: str, param: DTensor, gradients: ReplicatedGradients) -> Tensor:
        is_term = self.outside_fsdp or self.is_partial(name)
        local = gradients.local(param, self.outside_fsdp) if is_term else to_local(param)
        if self.original is not None:  # whose parameter FSDP has gathered in the dtype to compute in
            local = local.to(self.original._parameters[name].dtype)
        return self.term(name, local, gradients.mesh.size())

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """Sum the ranks' terms `[batch, seq, hidden]` into the stream: reduce-scatter, or all-reduce without SP."""
        if self.sequence_parallel:
            return scatter_sequence(partial, mesh)
        return _ReduceFromRegion.apply(partial, mesh)


def local_slice(full: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """What `distribute_tensor` would leave of `full` on `rank` of a mesh dim of `size`."""
    if isinstance(placement, Replicate):
        return full
    parts = full.chunk(placement.split_factor, placement.dim) if isinstance(placement, _StridedShard) else [full]
    return torch.cat([chunk_of(part, placement.dim, rank, size) for part in parts], placement.dim)


def map_tensors(function: Callable[[Tensor], Any], x: Any) -> Any:
    """`x` with `function` applied to the tensors that it is, or that are in its lists, tuples and dicts, in order.

    (A function inside another, calling itself, would keep what it has seen alive until Python collects its garbage.)
    """
    if isinstance(x, Tensor):
        return function(x)
    if type(x) in (list, tuple):
        return type(x)([map_tensors(function, value) for value in x])
    if type(x) is dict:
        return {name: map_tensors(function, value) for name, value in x.items()}
    return x


def enter_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The stream as the plain full tensor `[batch, seq, hidden]` of a region.

    What is computed from it covers this rank's columns only, so its gradient is a term of a sum over the ranks.
    """
    if isinstance(x, DTensor):
        if x.placements == (SEQUENCE,):
            return gather_sequence(x)
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return _CopyToRegion.apply(x, mesh) if x.requires_grad else x


def regather(x: DTensor, mesh: DeviceMesh) -> Callable[[], Tensor]:
    """How to make `enter_region(x)` again. Holds this rank's part of it only."""
    shard, length = x._local_tensor, x.shape[1]
    version = shard._version

    def make() -> Tensor:
        if shard._version != version:
            raise recompute.overwritten()
        return all_gather_sequence(shard, length, mesh)

    return make


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
        weight = module.weight
        (rows, _), (start, _) = compute_local_shape_and_global_offset(weight.shape, gradients.mesh, [Shard(0)])
        module._tpsp_rows = (start, rows)
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


class Replica(Norm):
    """Parameters inside a split block that every rank has whole and uses for its term: q_norm, a router, MLA's compression.

    Their gradients are terms of a sum. No collective on activations.
    """

    def is_partial(self, name):
        return self.parameter_rules.get(name) in (None, "mean")

    def run(self, module, inner, gradients, args, kwargs):
        if is_norm(module):  # so that only its input is kept
            return super().run(module, inner, gradients, args, kwargs)
        return inner(*args, **kwargs)  # the block has made the parameters plain


class Copy(Style):
    """Parameters inside a block, or beside the layers, that every rank uses alike: each has their whole gradient."""


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


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


class Activation(Style):
    """An activation function inside a region. Its output is not kept for backward, but computed from its input again."""

    def run(self, module, inner, gradients, args, kwargs):
        if (region := Region.current) is None:
            return inner(*args, **kwargs)
        kept = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        versions = [x._version for x in kept if isinstance(x, Tensor)]

        def is_untouched() -> bool:
            return versions == [x._version for x in kept if isinstance(x, Tensor)]

        def make() -> Tensor:
            if not is_untouched():
                raise recompute.overwritten()
            return inner(*kept, **kwargs)

        out = inner(*args, **kwargs)
        if is_untouched():  # and not an activation function that writes into its input
            region.again(out, make)
        return out


class Block(Style):
    """A token mixer or MLP, from its entry to its exit. Inside are plain tensors of the whole sequence.

    Whatever arguments carry the stream, positional or keyword, are gathered; the first tensor of the output goes back to the
    stream. Parameters inside that belong to no other style are plain tensors meanwhile, for whoever reads them.

    Args:
        variants: `heads` and `widths`: the module (and its config) see this rank's share of them, for a forward that reads
            them; `residual`: a second stream that the module adds to its output is added once, not by each rank.
    """

    HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
    KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
    WIDTHS = ("hidden_size", "embed_dim", "split_size", "d_model", "inner_dim", "all_head_size", "n_embd")

    def __init__(self, config: TPSPConfig, *variants: str):
        super().__init__(config)
        self.variants = variants
        self.inside: list[nn.Module] = []  # the modules whose parameters are made plain at the entry

    def adjust(self, module, rank, size):
        self.heads = next((n for name in self.HEADS if isinstance(n := getattr(self.of(module), name, None), int)), 0)
        if "heads" in self.variants or "widths" in self.variants:
            for part in module.modules():
                self.share(part, size)
        if "groups" in self.variants:  # a kv head serves several ranks
            heads = next(n for n in self.HEADS if hasattr(self.of(module), n))
            module.num_key_value_groups = max(1, getattr(self.of(module), heads) // size)

    def share(self, part: nn.Module, size: int) -> None:
        """Set the heads (and widths) that `part` and its config name to one rank's share."""
        names = self.HEADS + self.KV_HEADS + (self.WIDTHS if "widths" in self.variants else ())
        config = vars(part).get("config")
        if config is not None:
            config = part.config = copy.copy(config)
        for owner in (part, config):
            for name in names:
                if owner is not None and isinstance(whole := vars(owner).get(name), int):
                    setattr(owner, name, max(1, whole // size))

    @staticmethod
    def of(module: nn.Module):
        """Who knows the number of heads."""
        return module if any(hasattr(module, n) for n in Block.HEADS) else getattr(module, "config", None)

    @contextlib.contextmanager
    def local_parameters(self, module, gradients):
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().local_parameters(module, gradients))
            for part in self.inside:
                stack.enter_context(part._tpsp_style.local_parameters(part, gradients))
            yield

    def map_streams(
        self,
        args: tuple,
        kwargs: dict,
        enter: Callable[[Tensor], Tensor],
        size: int,
        other: Callable[[Tensor], Tensor] = lambda x: x,
        marked: bool = True,
    ) -> tuple[tuple, dict, Tensor | None]:
        """`args` and `kwargs` with the streams entered, wherever in them they are, and the first stream.

        `marked`: a stream is a DTensor, if there is one. Otherwise it is the first floating tensor (one that is an argument
        itself goes before one inside a list or dict), and what has its shape.
        """
        inside: list[Tensor] = []
        map_tensors(inside.append, (args, kwargs))
        itself = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        floating = [x for x in (*itself, *inside) if x.is_floating_point()]
        sharded = [x for x in floating if isinstance(x, DTensor) and x.placements == (SEQUENCE,)] if marked else []
        first = next(iter(sharded or floating), None)
        found = 0

        def is_stream(x: Tensor) -> bool:
            if not x.is_floating_point():
                return False
            if not sharded or ("residual" in self.variants and not isinstance(x, DTensor)):
                return x.shape == first.shape
            return isinstance(x, DTensor) and x.placements == (SEQUENCE,)

        def visit(x: Tensor) -> Tensor:
            nonlocal found
            if isinstance(x, LazyLogits):
                return x
            if isinstance(x, LazyWhole) and x.part is not None:  # of heads, from another block: this rank's
                return x.part
            if not is_stream(x):
                return other(x)
            found += 1
            full = enter(x)
            return full / size if found > 1 and "residual" in self.variants else full

        return map_tensors(visit, args), map_tensors(visit, kwargs), first

    def exit(self, output: Any, stream: Tensor | None, mesh: DeviceMesh) -> Any:
        """The first tensor of what the module returned, back in the stream that it was given, `[batch, seq, …]`; plain and
        whole if that was (a script that calls the block itself). A term of a sum never leaves the block as if it were the sum.
        """
        if not isinstance(output, Tensor):
            if isinstance(output, dict):
                first, *rest = output
                beside = {name: self.exit_beside(output[name], mesh) for name in rest}
                return type(output)(**{first: self.exit(output[first], stream, mesh), **beside})
            first, *rest = output
            return type(output)((self.exit(first, stream, mesh), *(self.exit_beside(x, mesh) for x in rest)))
        if stream is not None and output.shape[:2] != stream.shape[:2]:  # [batch * seq, …]
            output = output.view(*stream.shape[:2], *output.shape[1:])
        return self.leave_region(output, mesh) if isinstance(stream, DTensor) else self.leave_whole(output, mesh)

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """What a rank computed, back in the sharded stream."""
        return scatter_sequence(partial, mesh)

    def leave_whole(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """What a rank computed, as the plain whole tensor."""
        return _ReduceFromRegion.apply(partial, mesh)

    def write_back(self, entered: list[tuple[Tensor, Tensor, int]], mesh: DeviceMesh) -> None:
        """If the block wrote into what it was given, have its caller see it, as in one process.

        Args:
            entered: `(stream, what the block was given for it, the version of that)` each.
        """
        if torch.compiler.is_compiling():
            return
        for stream, full, version in entered:
            if full._version == version or full is stream:
                continue
            written = self.written(full, mesh, isinstance(stream, DTensor))
            if not torch.is_grad_enabled() or not stream.requires_grad:
                written = written.detach()
            # A plain stream is the block's own memory: nothing is written now, and what autograd saved of it holds.
            shared = (
                contextlib.nullcontext() if isinstance(stream, DTensor) else _unsafe_preserve_version_counter(stream)
            )
            with shared:
                stream.copy_(written)

    def written(self, full: Tensor, mesh: DeviceMesh, is_sharded: bool) -> Tensor:
        """What the caller sees of the stream `full`, into which every rank has written alike."""
        return _OwnTerm.apply(full, mesh) if is_sharded else OneShare.apply(full, mesh.size())

    def exit_beside(self, x: Any, mesh: DeviceMesh) -> Any:
        """What a module returns beside its output (a router's logits, attention weights)."""
        return x


class Gather(Block):
    """A block that is split: each rank computes one term of the sum that is its output.

    Forward: all-gather, reduce-scatter. Backward: all-gather, reduce-scatter, and with `regather_inputs` the all-gather of
    the input once more, for the weights' gradients. (Without SP: all-reduce, all-reduce.)
    """

    def __init__(self, config: TPSPConfig, *variants: str):
        super().__init__(config, *variants)
        self.forward_collective = "all-gather, reduce-scatter" if config.sequence_parallel else "all-reduce"
        self.backward_collective = self.forward_collective
        if self.regather_inputs:
            self.backward_collective = "2 all-gathers, reduce-scatter"

    def is_partial(self, name):
        return name not in self.parameter_rules

    def run(self, module, inner, gradients, args, kwargs):
        mesh = gradients.mesh

        def other(x: Tensor) -> Tensor:  # each rank's gradient of what all ranks hold is a term of the sum
            return _CopyToRegion.apply(x, mesh) if x.is_floating_point() and x.requires_grad else x

        entered: list[tuple[Tensor, Tensor, int]] = []
        with self.local_parameters(module, gradients), contextlib.ExitStack() as stack:
            region = stack.enter_context(Region()) if self.regather_inputs and recompute.is_active() else None

            def enter(x: Tensor) -> Tensor:
                full = enter_region(x, mesh)
                if not torch.compiler.is_compiling():
                    entered.append((x, full, full._version))
                if region is not None and isinstance(x, DTensor):
                    region.again(full, regather(x, mesh))
                return full

            args, kwargs, stream = self.map_streams(args, kwargs, enter, mesh.size(), other)
            with randomness.inside_block(module, None if stream is None else stream.shape, mesh):
                output = inner(*args, **kwargs)
        self.write_back(entered, mesh)
        return self.exit(output, stream, mesh)

    def exit_beside(self, x, mesh):
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 4 and x.shape[1] * mesh.size() == self.heads:  # attention weights, of this rank's heads
            if (
                torch.compiler.is_compiling()
            ):  # which knows DTensor; whoever is outside the model gets the whole of it too
                return DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
            return whole_heads(x, mesh)
        if not x.requires_grad:
            return x
        x = OneShare.apply(x, mesh.size())
        x._tpsp_shared = True
        return x


class Whole(Block):
    """A block that every rank computes whole: one whose output is no sum over the ranks, as far as hf_tpsp can prove.

    Forward: all-gather. Backward: all-gather. (Without SP: none.) A plain input stays plain.
    """

    def __init__(self, config: TPSPConfig, *variants: str):
        super().__init__(config, *variants)
        self.forward_collective = self.backward_collective = "all-gather" if config.sequence_parallel else "-"

    def run(self, module, inner, gradients, args, kwargs):
        entered: list[tuple[Tensor, Tensor, int]] = []

        def enter(x: Tensor) -> Tensor:
            if not isinstance(x, DTensor):
                return x
            full = gather_whole(x)
            if not torch.compiler.is_compiling():
                entered.append((x, full, full._version))
            return full

        with self.local_parameters(module, gradients):
            args, kwargs, stream = self.map_streams(args, kwargs, enter, gradients.mesh.size())
            output = inner(*args, **kwargs)
        self.write_back(entered, gradients.mesh)
        return self.exit(output, stream, gradients.mesh) if isinstance(stream, DTensor) else output

    def leave_region(self, whole, mesh):
        return slice_sequence(whole, mesh)

    def written(self, full, mesh, is_sharded):
        return slice_sequence(full, mesh)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is `[in, out]`, as in transformers' Conv1D."""
    return isinstance(module, Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear layer."""
    return (module.nx, module.nf) if is_transposed(module) else (module.in_features, module.out_features)


class Colwise(Style):
    """A linear layer split over its output features. Weight and bias split; input full, output local; no collective."""

    def placement(self, module, name, param):
        return Shard(1 if is_transposed(module) and name == "weight" else 0)

    def adjust(self, module, rank, size):
        if is_transposed(module):  # its forward reads the width of its output
            module._tpsp_width = module.nf
            module.nf = len(rows_of((str(module.nf),), rank, size))


class PackedColwise(Colwise):
    """Projections of equal width packed in one linear layer (gate and up): each is split over its own output features.

    Written `packed_colwise:n,n` in a plan, with the width of each part. The bias is replicated, and each rank takes its own
    of it. No collective.
    """

    def __init__(self, config: TPSPConfig, *parts: str):
        super().__init__(config)
        self.parts = parts

    def placement(self, module, name, param):
        if name == "bias":
            return Replicate()
        return _StridedShard(super().placement(module, name, param).dim, split_factor=len(self.parts))

    def is_partial(self, name):
        return name == "bias"

    def adjust(self, module, rank, size):
        super().adjust(module, rank, size)
        module._tpsp_rows = rows_of(self.parts, rank, size)

    def rehearse(self, module, rank, size):
        super().rehearse(module, rank, size)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias[module._tpsp_rows])

    def local_value(self, module, name, param, gradients):
        value = super().local_value(module, name, param, gradients)
        return value.index_select(0, own_rows(module, value.device)) if name == "bias" else value


class GatheredColwise(Colwise):
    """A linear layer split over its output features, whose output each rank then has whole, or the part it names.

    Without arguments, the whole (`colwise_gathered`), for a forward that mixes all features, such as a norm over all heads.
    With the widths of packed projections that no placement of DTensor's splits (query, key and value with fewer kv heads),
    this rank's features of each: `colwise_gathered:q,k,v`. `n@h` is a projection of `h` heads, fewer than there are ranks: each
    rank takes the one that its query heads use, and several share it.
    Forward: all-gather (of the layer's output). Backward: reduce-scatter.
    """

    forward_collective = "all-gather"
    backward_collective = "reduce-scatter"

    def __init__(self, config: TPSPConfig, *parts: str):
        super().__init__(config)
        self.parts = parts

    def adjust(self, module, rank, size):
        super().adjust(module, rank, size)
        if self.parts:
            module._tpsp_rows = rows_of(self.parts, rank, size)

    def rehearse(self, module, rank, size):
        if self.parts:
            inner, rows = module.forward, rows_of(self.parts, rank, size)
            module.forward = lambda x: inner(x).index_select(-1, rows)

    def run(self, module, inner, gradients, args, kwargs):
        full = gather_features(super().run(module, inner, gradients, args, kwargs), module, gradients.mesh, Partial())
        return full.index_select(-1, own_rows(module, full.device)) if self.parts else full


class WholeColwise(Colwise):
    """A linear layer inside a block that every rank computes whole: split over its output features, its output gathered.

    Forward: all-gather (of the layer's output). Backward: all-reduce (of its input's gradient).
    """

    forward_collective = "all-gather"
    backward_collective = "all-reduce"

    def rehearse(self, module, rank, size):
        """Every rank has the whole output."""

    def run(self, module, inner, gradients, args, kwargs):
        (x,) = args
        out = super().run(module, inner, gradients, (_CopyToRegion.apply(x, gradients.mesh),), kwargs)
        return gather_features(out, module, gradients.mesh, Replicate())


def gather_features(local: Tensor, module: nn.Module, mesh: DeviceMesh, gradient: Placement) -> Tensor:
    """This rank's output features of a column-parallel layer → all of them. `gradient`: of the result, on the ranks."""
    out = sharded_features(local, vars(module).get("_tpsp_width") or features(module)[1], mesh)
    return out.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])


def sharded_features(local: Tensor, width: int, mesh: DeviceMesh) -> DTensor:
    """This rank's of `width` output features, as the DTensor of all."""
    shape = torch.Size((*local.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(local.dim() - 1)], run_check=False, shape=shape, stride=stride)


def rows_of(parts: tuple[str, ...], rank: int, size: int) -> Tensor:
    """Indices of the output features of `rank`, of the projections `parts` that lie one after the other in a layer."""
    start, rows = 0, []
    for part in parts:
        width, _, heads = part.partition("@")
        every = torch.arange(start, start + int(width))
        if heads:  # fewer heads than ranks
            rows.append(every.chunk(int(heads))[rank * int(heads) // size])
        else:
            rows.append(chunk_of(every, 0, rank, size))
        start += int(width)
    return torch.cat(rows)


def own_rows(module: nn.Module, device: torch.device) -> Tensor:
    if module._tpsp_rows.device != device:
        module._tpsp_rows = module._tpsp_rows.to(device)
    return module._tpsp_rows


class Rowwise(Style):
    """A linear layer split over its input features. Weight split, bias replicated; input local, output one term of a sum.

    Each rank adds its share of the bias. The block sums the terms at its exit. No collective.
    """

    def placement(self, module, name, param):
        return Replicate() if name == "bias" else Shard(0 if is_transposed(module) else 1)

    def is_partial(self, name):
        return name == "bias"

    def term(self, name, value, size):
        return value / size if name == "bias" else value

    def run(self, module, inner, gradients, args, kwargs):
        with self.local_parameters(module, gradients), recompute.partial_product():
            return inner(*args, **kwargs)


class SplitRowwise(Rowwise):
    """A row-parallel layer whose input every rank has whole: each takes its own features of it."""

    def rehearse(self, module, rank, size):
        width = features(module)[0]
        super().rehearse(module, rank, size)
        inner = module.forward
        module.forward = lambda x: (
            inner(local_slice(x, Shard(x.dim() - 1), rank, size)) if x.shape[-1] == width else inner(x)
        )

    def run(self, module, inner, gradients, args, kwargs):
        (x,) = args
        return super().run(module, inner, gradients, (own_features(x, gradients.mesh),), kwargs)


def own_features(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`[..., features]` → this rank's share of the features."""
    return local_slice(x, Shard(x.dim() - 1), mesh.get_local_rank(), mesh.size())


class Adapter(Style):
    """One matrix of a low-rank adapter, beside the layer it adapts. No collective on activations.

    Args:
        placement: of the weight on the TP ranks.
        is_sum: whether the ranks' gradients are terms of a sum.
        splits_input: whether the input is whole, of which the rank takes its own features.
        rows: of the weight, those that this rank computes; None for all that it has.
    """

    def __init__(
        self,
        config: TPSPConfig,
        placement: Placement,
        is_sum: bool = False,
        splits_input: bool = False,
        rows: Tensor | None = None,
    ):
        super().__init__(config)
        self._placement, self._is_sum, self.splits_input, self.rows = placement, is_sum, splits_input, rows

    def placement(self, module, name, param):
        return self._placement

    def is_partial(self, name):
        return self._is_sum

    def run(self, module, inner, gradients, args, kwargs):
        (x,) = args
        x = own_features(x, gradients.mesh) if self.splits_input else x
        out = super().run(module, inner, gradients, (x,), kwargs)
        return out if self.rows is None else out.index_select(-1, self.rows.to(out.device))


class Head(Style):
    """The language-model head: logits `[batch, seq, vocab]` stay sharded over the vocabulary. Weight and bias Shard(0).

    It runs when its logits are read (`LazyLogits`), by the loss as a rule.
    Forward: all-gather (of the hidden states). Backward: reduce-scatter. (Without SP: none, all-reduce.)
    """

    is_chunked = False

    def __init__(self, config: TPSPConfig):
        super().__init__(config)
        self.forward_collective = "all-gather" if config.sequence_parallel else "-"
        self.backward_collective = "reduce-scatter" if config.sequence_parallel else "all-reduce"

    def placement(self, module, name, param):
        return Shard(0)

    def run(self, module, inner, gradients, args, kwargs):
        (hidden,) = args
        gradients.arm_with(hidden)
        if not isinstance(hidden, DTensor):  # without SP the stream is plain
            hidden = DTensor.from_local(hidden, gradients.mesh, [Replicate()], run_check=False)

        def parameters() -> tuple[Tensor, Tensor | None]:
            own = module._parameters
            return tuple(
                None if own[n] is None else self.local_value(module, n, own[n], gradients) for n in ("weight", "bias")
            )

        def run(hidden: DTensor) -> DTensor:
            local = hidden if self.sequence_parallel else hidden.to_local(grad_placements=hidden.placements)
            with self.local_parameters(module, gradients):
                logits = inner(enter_region(local, gradients.mesh))
            return sharded_features(logits, module.out_features, gradients.mesh)

        return LazyLogits(hidden, module, run, parameters if self.is_chunked else None)


class LazyHead(Head):
    """A head that runs together with the loss, in chunks of tokens."""

    is_chunked = True


STYLES: dict[str, type[Style]] = {
    "embedding": Embedding,
    "enter": Enter,
    "norm": Norm,
    "gather": Gather,
    "whole": Whole,
    "replica": Replica,
    "copy": Copy,
    "stream": Stream,
    "activation": Activation,
    "colwise": Colwise,
    "packed_colwise": PackedColwise,
    "colwise_gathered": GatheredColwise,
    "colwise_whole": WholeColwise,
    "rowwise": Rowwise,
    "rowwise_split": SplitRowwise,
    "head": Head,
    "lazy_head": LazyHead,
}
"""Style names as they stand in a plan."""


def style_for(rule: str, config: TPSPConfig) -> Style:
    """The style that a rule of a plan names; what follows a colon are its arguments (`packed_colwise:64,64`)."""
    name, _, arguments = rule.partition(":")
    if name not in STYLES:
        raise ValueError(f"{rule!r} names no style; the styles are {', '.join(STYLES)}.")
    return STYLES[name](config, *(a for a in arguments.split(",") if a))
