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
from ..upstream.torch import autograd, caches, fsdp2


class ReplicatedGradients:
    """Sums the partial gradients of replicated parameters over the TP ranks: one all-reduce per backward.

    The sum is taken at the end of `backward`, after FSDP has reduced over data parallelism (sums commute), in one flat
    buffer for the whole model. Gradients that existed before this backward are set aside meanwhile and added back, so
    that accumulating over several backwards counts each of them once. A backward under FSDP's
    `set_requires_gradient_sync(False)` leaves no `.grad`, so nothing is reduced until a backward that leaves one.

    Adapters, which FSDP does not manage, are also averaged over data parallelism here, in one more all-reduce for each
    data-parallel dim. Their partial gradients are kept outside `.grad` until then.

    If a script computes something from a parameter itself (a penalty on the weights), every rank has that whole
    gradient, and it is not summed. A hook from `register_post_accumulate_grad_hook` is called once the sum is in
    `.grad`.

    Attributes:
        once_reduced: called after each backward, until it returns True.
        calls: the model's `outside.Calls`, once FSDP2 manages the model.
        depth: how many of the modules that hold the layers are in their forward (`outputs.py`).
        keeps_terms: whether the adapters' partial gradients are kept outside `.grad`; if not, they come into `.grad`.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        # Parameters whose gradients are partial, as (module, parameter name).
        self._sums: list[tuple[nn.Module, str]] = []
        self._adapters: list[tuple[nn.Module, str]] = []
        # The data-parallel groups over which the adapters' gradients are averaged.
        self._averages: list[dist.ProcessGroup] = []
        self.once_reduced: Callable[[], bool] | None = None
        self.calls: outside.Calls | None = None
        self._armed: weakref.ref | None = None
        self.depth = 0
        self._set_aside: list[tuple[nn.Parameter, Tensor]] = []
        self.keeps_terms = True
        # The adapters' partial gradients in the running backward, by the id of the parameter.
        self._terms: dict[int, tuple[DTensor, Tensor]] = {}
        self._handles: list = []
        self._hooks: list[tuple[nn.Parameter, dict]] = []

    def register(self, module: nn.Module, name: str) -> None:
        """Sum the gradients of `module`'s parameter `name` over the TP ranks. Called while the plan is applied."""
        self._sums.append((module, name))

    def register_adapter(self, module: nn.Module, name: str, is_sum: bool) -> None:
        """Average the gradient of a parameter that FSDP does not manage over data parallelism; if `is_sum`, sum it over
        TP too."""
        self._adapters.append((module, name))
        if is_sum:
            self.register(module, name)

    def adapters_to(self, dtype: torch.dtype) -> None:
        """Cast the adapters to `dtype` in place, because an optimizer may hold them."""
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
        """The parameters that the optimizer holds, whether FSDP shows the modules sharded or gathered ones just now."""
        unique = {id(p): p for module, name in owners if (p := fsdp2.sharded_parameter(module, name)) is not None}
        return list(unique.values())

    def computes_model(self) -> bool:
        """Whether the model's forward is running, or is recomputed in backward. If not, a script calls a module by
        itself."""
        return self.depth > 0 or autograd.in_backward()

    def summed(self) -> list[nn.Parameter]:
        """The parameters whose gradients are partial over the TP ranks."""
        return self._parameters(self._sums)

    def local(self, param: DTensor, is_adapter: bool = False) -> Tensor:
        """`param` as a plain tensor whose gradient is partial."""
        # In a compiled layer nothing has to arm: the head has done so by then.
        if torch.compiler.is_compiling():
            return param.to_local(grad_placements=param.placements)
        return _LocalReplica.apply(param, self, is_adapter and self.keeps_terms)

    def add_term(self, param: DTensor, grad: Tensor) -> None:
        """Add `grad`, which is partial, to the kept gradient of the adapter parameter `param`."""
        _, before = self._terms.get(id(param), (None, None))
        self._terms[id(param)] = (param, grad.clone() if before is None else before + grad)

    def arm_with(self, hidden: Tensor) -> None:
        """Call `arm` when the gradient arrives at the head's input `hidden`."""
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: self.arm())

    def arm(self) -> None:
        """Schedule the reduction for the end of the running backward. Called when its first partial gradient arrives.

        A backward may run others inside it (reentrant checkpointing), whose gradients belong to the outer one. Autograd
        holds the callback until the outer backward ends, with or without an exception, so a live callback means that
        the backward is still running.
        """
        if self._armed is not None and self._armed() is not None:
            return
        # On an accelerator this is another thread than the forward's.
        caches.bound()
        # An earlier backward that raised did not restore what it had set aside.
        self._restore()
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
                # FSDP writes its reduced gradient into `.grad` directly. A gradient that autograd brings here comes
                # from the script's own use of `param`, and is whole on every rank: divided, the ranks' shares add up to
                # it.
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
    """Raise `ValueError` if a script has registered hooks that would see a partial gradient, or none at all."""
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
    """Replicated DTensor → local tensor.

    Backward labels the partial gradient `Replicate()`, so that DTensor does not reduce it before the end of backward.
    The partial gradient of an adapter is kept for the sum instead.
    """

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
