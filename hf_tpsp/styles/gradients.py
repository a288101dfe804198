"""The gradients of replicated parameters and of adapters: added up over the TP ranks, once per backward."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..forward import outside
from ..upstream.torch import autograd, fsdp2


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
        self._set_aside: list[tuple[nn.Parameter, Tensor]] = []
        self.keeps_terms = True  # of the adapters; else they come into `.grad`
        self._terms: dict[int, tuple[DTensor, Tensor]] = {}  # in the running backward
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
        unique = {id(p): p for module, name in owners if (p := fsdp2.sharded_parameter(module, name)) is not None}
        return list(unique.values())

    def computes_model(self) -> bool:
        """Whether the model's forward is running, or a part of it again in backward; else a script calls a module by itself."""
        return self.depth > 0 or autograd.in_backward()

    def summed(self) -> list[nn.Parameter]:
        """The parameters whose gradients are terms of a sum over the TP ranks."""
        return self._parameters(self._sums)

    def local(self, param: DTensor, is_adapter: bool = False) -> Tensor:
        """`param` as a plain tensor whose gradient is one rank's term of the sum."""
        if torch.compiler.is_compiling():  # a compiled layer; the head has armed by then
            return param.to_local(grad_placements=param.placements)
        return _LocalReplica.apply(param, self, is_adapter and self.keeps_terms)

    def add_term(self, param: DTensor, grad: Tensor) -> None:
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
            if hooks := autograd.take_accumulate_hooks(param):
                self._hooks.append((param, hooks))
        # FSDP's own final callback was queued when the loss's gradient arrived, so it runs before this one.
        autograd.at_end_of_backward(callback)

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
        for adapter, term in self._terms.values():
            grad = DTensor(term, adapter._spec, requires_grad=False)
            adapter.grad = grad if adapter.grad is None else adapter.grad.add_(grad)
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
            autograd.give_accumulate_hooks(param, hooks)
        self._set_aside, self._handles, self._hooks, self._terms = [], [], [], {}


def check_hooks(parameters: list[nn.Parameter]) -> None:
    """Raise `ValueError` if a script has registered hooks that would see a rank's term of a gradient, or nothing at all."""
    if any(map(autograd.has_hooks, parameters)):
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
    def forward(ctx: Any, param: DTensor, gradients: ReplicatedGradients, is_adapter: bool) -> Tensor:
        ctx.spec, ctx.gradients, ctx.adapter = param._spec, gradients, param if is_adapter else None
        local = param._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        autograd.check_accumulates(ctx.next_functions[0][0])
        ctx.gradients.arm()
        if ctx.adapter is not None:
            ctx.gradients.add_term(ctx.adapter, grad)
            return None, None, None
        return DTensor(grad, ctx.spec, requires_grad=False), None, None
