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
    """The trained copies that `wrapper` holds, and their layout: the original's."""
    check_copied(wrapper.original_module)
    layouts = []
    for module in wrapper.modules_to_save.values():
        layouts.append((module, style_of(wrapper.original_module).of_copy(wrapper.original_module)))
    return layouts


def check_copied(original: nn.Module) -> None:
    """Raise `ValueError` unless a copy of `original`, a module of a sharded model, can be laid out as it is."""
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
    alone = isinstance(style, WholeBlock) and not style.sequence_parallel  # else it has the stream, or something else
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
    """DoRA's magnitudes `[out]` beside a layer whose rank has rows of the weight, or columns, or all of it.

    Args:
        layer: the layout of the adapted layer.

    Forward: an all-reduce of `[out]` on a row-parallel layer, for the norms. They are constants to autograd.
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
    """This rank's part of `B A`. Only its norm is wanted, which has no gradient."""
    return (to_local(lora_B.weight) @ to_local(lora_A.weight)).detach()


def _norm_of_rows(
    fan_in_fan_out: bool,
    over: DeviceMesh | None,
    weight: Tensor,
    lora_weight: Tensor,
    scaling: float,
    adapter_name=None,
) -> Tensor:
    """Norms of the rows of `W + scaling * B A`. Where each rank has some columns, one all-reduce `over` the ranks."""
    if isinstance(weight, DTensor):  # outside of the forward
        raise ValueError(
            "peft merges DoRA by putting another tensor in the weight's place, which a sharded one does not take. Save the "
            "adapter, and merge it in one process."
        )
    squares = (transpose(weight, fan_in_fan_out) + scaling * lora_weight).square().sum(1)
    return (squares if over is None else all_reduce(squares, over)).sqrt().to(weight.dtype)
