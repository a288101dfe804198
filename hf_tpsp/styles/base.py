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
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ..collectives import ReduceFromRegion, local_slice, scatter_sequence, to_local
from ..config import TPSPConfig
from ..upstream.dtensor import StridedShard
from .gradients import ReplicatedGradients


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
        return Shard(dim) if kind == "split" else StridedShard(dim, split_factor=parts[0])

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
        return ReduceFromRegion.apply(partial, mesh)
