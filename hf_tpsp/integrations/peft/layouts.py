"""How the matrices of an adapter are laid out, beside the layer that they adapt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, transpose
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ...collectives import all_reduce, own_features, to_local
from ...config import TPSPConfig
from ...state import style_of
from ...structure import is_norm
from ...styles.base import Style, TensorParallel
from ...styles.block import Replicated, ReplicatedPartial, WholeBlock
from ...styles.head import Head
from ...styles.linear import Colwise, ColwiseGathered, ColwisePacked, ColwiseWhole, Rowwise, RowwiseSliced
from ...styles.stream import Embedding, Norm
from ...upstream.torch.dtensor import StridedShard


class Adapter(Style):
    """One matrix of a low-rank adapter, beside the layer it adapts. No collective on activations.

    Args:
        placement: the placement of the weight on the TP mesh.
        is_sum: whether each rank's gradient is partial.
        splits_input: whether the input is whole, and this rank takes its own features of it.
        rows: the rows of the weight whose output this rank keeps; None for all that it has.
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
        self.outside_fsdp = True

    def placement(self, module: nn.Module, name: str, param: Tensor) -> Placement:
        return self._placement

    def is_partial(self, name: str) -> bool:
        return self._is_sum

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        (x,) = args
        x = own_features(x, tp.mesh) if self.splits_input else x
        out = super().run(module, inner, tp, (x,), kwargs)
        return out if self.rows is None else out.index_select(-1, self.rows.to(out.device))


def copy_layouts(wrapper: ModulesToSaveWrapper) -> list[tuple[nn.Module, Style]]:
    """The trained copies that `wrapper` holds, each with its layout, which is the original's."""
    check_copied(wrapper.original_module)
    layouts = []
    for module in wrapper.modules_to_save.values():
        layouts.append((module, style_of(wrapper.original_module).of_copy(wrapper.original_module)))
    return layouts


def check_copied(original: nn.Module) -> None:
    """Raise `ValueError` unless a copy of `original`, which is in a sharded model, can be laid out like it."""
    style = style_of(original)
    if not isinstance(style, (Embedding, Head, Norm)) or (
        isinstance(style, ReplicatedPartial) and not is_norm(original)
    ):
        raise ValueError(
            f"A {type(original).__name__} cannot be in `modules_to_save` on a sharded model: hf_tpsp supports the embedding, "
            "the head and norms. Adapt its linear layers instead (`target_modules`)."
        )


def adapter_layouts(name: str, module: BaseTunerLayer, config: TPSPConfig) -> list[tuple[nn.Module, Style]]:
    """The modules of the adapters on the layer `name`, and their layouts."""
    base = module.get_base_layer()
    style = style_of(base)
    in_block = isinstance(style, (Colwise, Rowwise, ReplicatedPartial, Replicated))
    # A layer that is a whole block by itself can be adapted, unless its input may be the sharded stream.
    alone = isinstance(style, WholeBlock) and not style.sequence_parallel
    if type(module) is not Linear or not (in_block or alone):
        raise ValueError(
            f"{name} ({type(module).__name__} on a {type(base).__name__}) cannot be adapted on a sharded model: hf_tpsp "
            "supports LoRA on the linear layers inside token mixers and MLPs. Leave it out of `target_modules`, or name it in "
            "`exclude_modules`."
        )
    for variant in module.lora_variant.values():
        if type(variant) is not DoraLinearVariant:
            raise ValueError(f"{name}: {type(variant).__name__} is not supported on a sharded model; use LoRA or DoRA.")
        if isinstance(style, (ColwiseGathered, ColwiseWhole, RowwiseSliced)):
            raise ValueError(
                f"{name}: DoRA is not supported on a layer whose output is gathered or whose input is whole, as it is here. "
                "Leave it out of `target_modules`, or leave use_dora out."
            )
    same = functools.partial(Adapter, config, Replicate())
    rows = Replicate()
    if isinstance(style, Rowwise):
        a, b = Adapter(config, Shard(1), splits_input=isinstance(style, RowwiseSliced)), same(is_sum=True)
    elif isinstance(style, ColwiseGathered):
        a, b = same(is_sum=True), same(is_sum=True, rows=style.rows)
    elif isinstance(style, Colwise) and not isinstance(style, ColwiseWhole):
        rows = StridedShard(0, split_factor=len(style.parts)) if isinstance(style, ColwisePacked) else Shard(0)
        a, b = same(is_sum=True), Adapter(config, rows)
    else:
        a = b = same(is_sum=isinstance(style, ReplicatedPartial))
    magnitude = Magnitude(config, rows, b.is_partial("weight"), style)
    matrices = (module.lora_A, a), (module.lora_B, b), (module.lora_magnitude_vector, magnitude)
    return [(matrix, layout) for group, layout in matrices for matrix in group.values()]


class Magnitude(Adapter):
    """DoRA's magnitudes `[out]`, beside a layer that is split by rows or by columns of its weight, or not at all.

    Args:
        layer: the layout of the adapted layer.

    Forward: on a row-parallel layer, one all-reduce of `[out]` for the norms, which are constants to autograd.
    """

    def __init__(self, config: TPSPConfig, placement, is_sum: bool, layer: Style):
        super().__init__(config, placement, is_sum)
        self.layer = layer

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        super().install(module, tp)
        module.get_lora_weight = _local_product
        over = tp.mesh if isinstance(self.layer, Rowwise) else None
        module.get_weight_norm = functools.partial(_norm_of_rows, module.fan_in_fan_out, over)

    def run(self, module: nn.Module, inner: Callable, tp: TensorParallel, args: tuple, kwargs: dict) -> Any:
        with self.layer.local_parameters(kwargs["base_layer"], tp):
            return super().run(module, inner, tp, args, kwargs)


def _local_product(lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Tensor:
    """This rank's part of `B A`, detached: only its norm is used, and that has no gradient."""
    return (to_local(lora_B.weight) @ to_local(lora_A.weight)).detach()


def _norm_of_rows(
    fan_in_fan_out: bool,
    over: DeviceMesh | None,
    weight: Tensor,
    lora_weight: Tensor,
    scaling: float,
    adapter_name=None,
) -> Tensor:
    """Norms of the rows of `W + scaling * B A`. If each rank has some columns only, one all-reduce `over` TP."""
    # Inside the forward the weight is this rank's local tensor. Outside of it, where peft merges, it is a DTensor.
    if isinstance(weight, DTensor):
        raise ValueError(
            "peft merges DoRA by putting another tensor in the weight's place, which a sharded one does not take. Save the "
            "adapter, and merge it in one process."
        )
    squares = (transpose(weight, fan_in_fan_out) + scaling * lora_weight).square().sum(1)
    return (squares if over is None else all_reduce(squares, over)).sqrt().to(weight.dtype)
