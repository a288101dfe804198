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
that every rank computes `WholeBlock`, each has the whole gradient, and nothing is added.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ..collectives import ReduceFromRegion, local_slice, scatter_sequence, to_local
from ..config import TPSPConfig
from ..rules import Rule
from ..state import style_of
from ..upstream.torch.dtensor import StridedShard
from .gradients import ReplicatedGradients


def parts_read_by(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside `module` whose parameters it makes plain at its entry. They have their styles by now."""
    for child in module.children():
        style = style_of(child)
        if style is None or not style.reads_parts:
            if style is not None and style.is_read_by_owner:
                yield child
            yield from parts_read_by(child)


class TensorParallel:
    """What a style is given of the ranks.

    Attributes:
        mesh: the one-dimensional TP mesh. rank, size: this rank on it, and their number.
        gradients: where the gradients of replicated parameters are added up.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self.gradients = ReplicatedGradients(mesh)


class Style:
    """How a module's parameters are laid out over the TP ranks, and what happens around its forward.

    A style belongs to one module, and is whole once it is made. What a subclass overrides:

        method              runs when                         returns, or does                                      overridden by
        placement           parameters are cut                a DTensor placement on the TP mesh dim                whatever splits weights
        is_partial          parameters are cut                whether the ranks' gradients add up to the whole one  replicated parameters
        as_partial          a parameter is read               the parameter such that the outputs add up            a bias that each rank adds
        adjust              at set-up, and in the proof       sets the module's sizes to this rank's share          blocks, layers that read widths
        run                 in each forward                   the module's output, collectives included             most
        simulate_rank       in the proof (`plan/prove.py`)    makes of a plain module what it is on one rank        where `run` does more than compute

    What trains is `run`, and what was proven is `simulate_rank`: `tests/styles/test_contract.py` holds each style to their being
    one. The two strings name the collectives on the activations, for the table that `hf-tpsp plan` prints. For example:

        class ColumnBias(Style):  # a bias of which each rank has a part of the features, as its input has
            def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
                return Shard(0)

    Args:
        config: what runs on the mesh.
        arguments: of the plan's rule, what follows the colon (`colwise_packed:64,64`); subclasses name theirs.
        parameter_rules: the plan's rules for single parameters of the module, by name: `shard:0`, `shard_packed:1,2`, `share`.
    """

    forward_collective = "-"
    backward_collective = "-"
    splits_features = False
    """Whether the ranks have parts of the features that a linear layer takes or returns."""
    is_read_by_owner = False
    """Whether the block or layer around the module makes its parameters plain, for it may be read without being called."""
    reads_parts = False
    """Whether it makes the parameters of such modules plain."""

    def __init__(self, config: TPSPConfig, *, parameter_rules: dict[str, str] | None = None):
        self.parameter_rules = parameter_rules or {}
        self.sequence_parallel = config.sequence_parallel
        self.regather_inputs = config.regather_inputs and config.sequence_parallel
        self.outside_fsdp = False  # of adapters and copies, whose gradients are all reduced at the end of backward
        self.original: nn.Module | None = None  # of which the module is a copy outside FSDP

    def __repr__(self) -> str:
        rules = "".join(f", {name}={rule}" for name, rule in self.parameter_rules.items())
        return f"{type(self).__name__}(forward: {self.forward_collective}, backward: {self.backward_collective}{rules})"

    def of_copy(self, original: nn.Module) -> Style:
        """The style of a copy of `original`, which this style is on, that FSDP does not manage (peft's `modules_to_save`)."""
        made = copy.copy(self)
        made.outside_fsdp, made.original = True, original
        return made

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        """Where parameter `name` of `module` lives on the TP mesh dim."""
        kind, arguments = Rule.parse(self.parameter_rules.get(name, "share"))
        if kind == "share":
            return Replicate()
        dim, *parts = map(int, arguments)
        dim %= param.dim()
        return Shard(dim) if kind == "shard" else StridedShard(dim, split_factor=parts[0])

    def is_partial(self, name: str) -> bool:
        """Whether the ranks' gradients of the replicated parameter `name` are terms of a sum (DTensor's `Partial`)."""
        return False

    def shard(self, module: nn.Module, tp: TensorParallel) -> None:
        """Turn the module's own parameters into DTensors on the TP mesh, keeping ties and `requires_grad`."""
        for name, param in list(module.named_parameters(recurse=False)):
            if self.is_partial(name):
                tp.gradients.register(module, name)
            if not isinstance(param, DTensor):
                placement = self.placement(module, name, param)
                # `src_data_rank=None`: every rank cuts its own slice; no communication, and meta tensors work.
                value = distribute_tensor(param.detach(), tp.mesh, [placement], src_data_rank=None)
                module._parameters[name] = nn.Parameter(value, requires_grad=param.requires_grad)

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        """Wrap `module.forward` in `run`. The styles of the modules inside it are known by now, and what they do is not in place."""
        self.adjust(module, tp.rank, tp.size)
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (calls := tp.gradients.calls) is not None and calls.is_outside:
                return calls.run_style(self, module, run, args, kwargs)
            return self.run(module, inner, tp, args, kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.run(module, inner, tp, args, kwargs)

        module.forward = forward

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        """What `module` returns for `args` and `kwargs`; `inner` is its own forward, for plain local parameters."""
        with self.local_parameters(module, tp):
            return inner(*args, **kwargs)

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        """Set what `module` knows of its own sizes to this rank's share."""

    def simulate_rank(self, module: nn.Module, rank: int, size: int) -> None:
        """Make of a plain `module` what it is on `rank` of `size` ranks, without collectives (`plan/prove.py`)."""
        for name, param in list(module.named_parameters(recurse=False)):
            local = local_slice(param.detach(), self.placement(module, name, param), rank, size)
            module._parameters[name] = nn.Parameter(self.as_partial(name, local, size))
        self.adjust(module, rank, size)

    def as_partial(self, name: str, value: Tensor, size: int) -> Tensor:
        """The parameter `name`, `value` on this rank, as the rank uses it, such that the outputs of `size` ranks add up."""
        return value / size if self.parameter_rules.get(name) == "share" else value

    @contextlib.contextmanager
    def local_parameters(self, module: nn.Module, tp: TensorParallel) -> Iterator[None]:
        """While inside, the module's own parameters are plain local tensors."""
        params: dict[str, Any] = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
        own: dict[str, Any] = module._parameters  # plain tensors, for a while
        for name, param in params.items():
            own[name] = self.local_value(module, name, param, tp)
        try:
            yield
        finally:
            module._parameters.update(params)

    def local_value(self, module: nn.Module, name: str, param: DTensor, tp: TensorParallel) -> Tensor:
        is_term = self.outside_fsdp or self.is_partial(name)
        local = tp.gradients.local(param, self.outside_fsdp) if is_term else to_local(param)
        if self.original is not None:  # whose parameter FSDP has gathered in the dtype to compute in
            local = local.to(self.original._parameters[name].dtype)
        return self.as_partial(name, local, tp.size)

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """Sum the ranks' terms `[batch, seq, hidden]` into the stream: reduce-scatter, or all-reduce without SP."""
        if self.sequence_parallel:
            return scatter_sequence(partial, mesh)
        return ReduceFromRegion.apply(partial, mesh)
