"""The layouts: one class for each role a module can play.

A decoder layer has two `Block`s, the token mixer and the MLP. Each has one *region*, between a gather and a
reduce-scatter:

    residual stream ──norm──▶ gather ──▶ colwise ──▶ (local heads) ──▶ rowwise ──▶ reduce-scatter ──▶ residual stream
      Shard(1)              all-gather                              partial                             Shard(1)

The residual stream is a DTensor `[batch, seq, hidden]` sharded over the sequence, with its true global shape, so the
Hugging Face code between the layers sees the whole sequence's length (position ids, masks, rotary tables). Inside a
region everything is a plain tensor holding this rank's heads or columns, and the parameters are read as plain local
shards: no DTensor dispatch on the hot path.

With `sequence_parallel=False` the same classes leave the stream a plain replicated tensor, and each pair of gather and
reduce-scatter is one all-reduce instead.

Gradients. A column- or row-sharded weight gets its whole gradient on the rank that owns it. A *replicated* parameter
(norms, q_norm/k_norm, routers, the bias of a row-parallel layer) sees a part of the sequence or of the heads on each
rank, so its local gradient is partial. `ReplicatedGradients` sums the partial gradients over the TP ranks, once per
backward. In a block that every rank computes whole (`WholeBlock`), each rank has the whole gradient, and nothing is
summed.
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
    """The modules inside `module` whose parameters `module` makes plain at its entry. Each must have its style
    already."""
    for child in module.children():
        style = style_of(child)
        if style is None or not style.reads_parts:
            if style is not None and style.is_read_by_owner:
                yield child
            yield from parts_read_by(child)


class TensorParallel:
    """The TP mesh, as a style sees it.

    Attributes:
        mesh: the one-dimensional TP mesh.
        rank: the index of this rank on the mesh.
        size: the number of ranks on the mesh.
        gradients: the reducer that sums the partial gradients of replicated parameters.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self.gradients = ReplicatedGradients(mesh)


class Style:
    """How a module's parameters are laid out over the TP ranks, and what happens around its forward.

    A style belongs to one module, and gets all of its arguments in `__init__`. A subclass overrides some of these
    methods:

        method              runs when                         returns, or does                                      overridden by
        placement           parameters are cut                a DTensor placement on the TP mesh dim                whatever splits weights
        is_partial          parameters are cut                whether the ranks' gradients add up to the whole one  replicated parameters
        as_partial          a parameter is read               the parameter such that the outputs add up            a bias that each rank adds
        adjust              at set-up, and in the proof       sets the module's sizes to this rank's share          blocks, layers that read widths
        run                 in each forward                   the module's output, collectives included             most
        simulate_rank       in the proof (`plan/prove.py`)    makes of a plain module what it is on one rank        where `run` does more than compute

    Training uses `run`, and the proof uses `simulate_rank`: `tests/styles/test_contract.py` checks that the two agree
    for each style. `forward_collective` and `backward_collective` name the collectives on the activations, for the
    table that `hf-tpsp plan` prints. A bias on an input whose features are split over the ranks, for example:

        class ColumnBias(Style):
            def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
                return Shard(0)

    Args:
        config: the sizes of the mesh, and the choices made on it.
        arguments: the part of the plan's rule after the colon (`colwise_packed:64,64`); each subclass names its own.
        parameter_rules: the plan's rules for single parameters of the module, by name: `shard:0`, `shard_packed:1,2`,
            `share`.
    """

    forward_collective = "-"
    backward_collective = "-"
    splits_features = False
    """Whether a linear layer's input or output features are split over the ranks."""
    is_read_by_owner = False
    """Whether the block or layer around the module makes its parameters plain, because they may be read without a call
    of it."""
    reads_parts = False
    """Whether the module makes the parameters of the `is_read_by_owner` modules inside it plain."""

    def __init__(self, config: TPSPConfig, *, parameter_rules: dict[str, str] | None = None):
        self.parameter_rules = parameter_rules or {}
        self.sequence_parallel = config.sequence_parallel
        self.regather_inputs = config.regather_inputs and config.sequence_parallel
        # Adapters and copies are outside FSDP, so all of their gradients are reduced at the end of backward.
        self.outside_fsdp = False
        # If the module is a copy outside FSDP, this is the module that it was copied from.
        self.original: nn.Module | None = None

    def __repr__(self) -> str:
        rules = "".join(f", {name}={rule}" for name, rule in self.parameter_rules.items())
        return f"{type(self).__name__}(forward: {self.forward_collective}, backward: {self.backward_collective}{rules})"

    def of_copy(self, original: nn.Module) -> Style:
        """The style for a copy of `original` that FSDP does not manage (peft's `modules_to_save`). `self` is
        `original`'s style."""
        made = copy.copy(self)
        made.outside_fsdp, made.original = True, original
        return made

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        """The DTensor placement of `module`'s parameter `name` on the TP mesh dim."""
        kind, arguments = Rule.parse(self.parameter_rules.get(name, "share"))
        if kind == "share":
            return Replicate()
        dim, *parts = map(int, arguments)
        dim %= param.dim()
        return Shard(dim) if kind == "shard" else StridedShard(dim, split_factor=parts[0])

    def is_partial(self, name: str) -> bool:
        """Whether the gradient of the replicated parameter `name` is partial: the ranks' gradients must be summed."""
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
        """Wrap `module.forward` in `run`. The modules inside already have their styles, which need not be installed
        yet."""
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
        """Return the output of `module` for `args` and `kwargs`. `inner` is its own forward, which needs plain local
        parameters."""
        with self.local_parameters(module, tp):
            return inner(*args, **kwargs)

    def adjust(self, module: nn.Module, rank: int, size: int) -> None:
        """Set the sizes that `module` keeps as attributes to this rank's share."""

    def simulate_rank(self, module: nn.Module, rank: int, size: int) -> None:
        """Turn a plain `module` into what it is on `rank` of `size` ranks, without collectives (`plan/prove.py`)."""
        for name, param in list(module.named_parameters(recurse=False)):
            local = local_slice(param.detach(), self.placement(module, name, param), rank, size)
            module._parameters[name] = nn.Parameter(self.as_partial(name, local, size))
        self.adjust(module, rank, size)

    def as_partial(self, name: str, value: Tensor, size: int) -> Tensor:
        """The value that this rank computes with for parameter `name`, chosen so that the outputs of `size` ranks add
        up.

        `value` is what the rank holds of the parameter.
        """
        return value / size if self.parameter_rules.get(name) == "share" else value

    @contextlib.contextmanager
    def local_parameters(self, module: nn.Module, tp: TensorParallel) -> Iterator[None]:
        """Inside this context, the module's own parameters are plain local tensors."""
        params: dict[str, Any] = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
        # The annotation allows plain tensors, which stand in this dict while the context is open.
        own: dict[str, Any] = module._parameters
        for name, param in params.items():
            own[name] = self.local_value(module, name, param, tp)
        try:
            yield
        finally:
            module._parameters.update(params)

    def local_value(self, module: nn.Module, name: str, param: DTensor, tp: TensorParallel) -> Tensor:
        is_term = self.outside_fsdp or self.is_partial(name)
        local = tp.gradients.local(param, self.outside_fsdp) if is_term else to_local(param)
        # FSDP has gathered the original's parameter in the dtype to compute in, and a copy outside FSDP must follow it.
        if self.original is not None:
            local = local.to(self.original._parameters[name].dtype)
        return self.as_partial(name, local, tp.size)

    def leave_region(self, partial: Tensor, mesh: DeviceMesh) -> Tensor:
        """Sum the partial outputs `[batch, seq, hidden]` into the stream: reduce-scatter, or all-reduce without SP."""
        if self.sequence_parallel:
            return scatter_sequence(partial, mesh)
        return ReduceFromRegion.apply(partial, mesh)
