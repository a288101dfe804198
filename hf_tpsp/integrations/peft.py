"""peft 0.21: LoRA on sharded layers.

The two matrices of an adapter follow the layer they adapt, so that an adapter adds no collective to the activations:

    column-parallel layer    A replicated, its gradient a term of a sum    B split as the layer's rows are
    row-parallel layer       A split as the layer's columns are            B replicated, its gradient a term of a sum

On a row-parallel layer, `base(x)` and `B A x` are both terms of a sum over the ranks and are scattered together, once.

Adapters are small: FSDP does not shard them. They are replicated over data parallelism, on the mesh of FSDP's DTensors, and
all their gradients are added up at the end of each backward: one all-reduce over the TP ranks, with those of the norms, and
one over the data-parallel ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ..compat import replace
from ..config import TPSPConfig
from ..parallelize import full_state_dict, is_parallelized, parallelize, parallelized_model
from ..styles import Adapter, Colwise, GatheredColwise, PackedColwise, Rowwise, Style


def install() -> Callable[[], None]:
    """Have `get_peft_model` on a sharded model shard the adapters. Returns the function that undoes it."""
    return replace(
        (LoraLayer, "_get_in_out_features", _patch_features),
        (PeftModel, "__init__", _patch_init),
        (PeftModel, "save_pretrained", _patch_save_pretrained),
    )


def _patch_features(original: Callable) -> Callable:
    """peft 0.21 (tuners/tuners_utils.py, `_get_in_out_features`) takes the local shape of a DTensor, which on a mesh of
    two dims is neither the layer's nor the rank's. Delete when it takes the layer's `in_features`."""

    @functools.wraps(original)
    def features(self, module):
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            return module.in_features, module.out_features
        return original(self, module)

    return features


def _patch_init(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self, model, peft_config, *args, **kwargs):
        ours = is_parallelized(model)
        if ours:
            check_config(peft_config)
        original(self, model, peft_config, *args, **kwargs)
        if ours:
            shard_adapters(self)

    return __init__


def _patch_save_pretrained(original: Callable) -> Callable:
    """peft 0.21 writes the local shards of what is not transformers' own tensor parallelism. Collective here: every rank
    calls it, and the first writes the ordinary adapter folder."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        if not is_parallelized(self):
            return original(self, save_directory, *args, state_dict=state_dict, **kwargs)
        if state_dict is None or any(isinstance(tensor, DTensor) for tensor in state_dict.values()):
            state_dict = adapter_state_dict(self)
        if dist.get_rank() == 0:
            original(self, save_directory, *args, state_dict=state_dict, **kwargs)

    return save_pretrained


def check_config(config: PeftConfig) -> None:
    """Refuse the adapters that hf_tpsp cannot lay out. Raises `ValueError`."""
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{config.peft_type.value} is not supported on a sharded model; use LoRA.")
    for option in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, option, None):
            raise ValueError(
                f"LoraConfig({option}={getattr(config, option)!r}) is not supported on a sharded model: hf_tpsp supports "
                "LoRA and rsLoRA on the linear layers of the decoder layers. Leave it out."
            )


def is_adapted(model: nn.Module) -> bool:
    return isinstance(model, PeftModel)


def adapter_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """The whole tensors of the adapters, on the CPU of rank 0; empty elsewhere. Every rank must call it."""
    return full_state_dict(model, {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name})


def parallelize_adapted(model: PeftModel, config: TPSPConfig) -> PeftModel:
    """`parallelize` for a model in memory that peft has wrapped: the base model first, as if nothing had been added."""
    base = model.get_base_model()
    adapted = [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        base.set_submodule(name, module.get_base_layer())
    try:
        parallelize(base, config)
    finally:
        for name, module in adapted:
            base.set_submodule(name, module)
    shard_adapters(model)
    return model


def shard_adapters(model: PeftModel) -> None:
    """Turn the adapters on a parallelized model into DTensors, with rank 0's values, in place.

    Raises:
        ValueError: an adapter that is not plain LoRA on a linear layer inside the decoder layers.
    """
    base = parallelized_model(model)
    for config in model.peft_config.values():
        check_config(config)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    styles = {name: _styles(name, module) for name, module in adapted.items()}
    owned = {id(p) for module in adapted.values() for p in module.parameters()}
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor) and id(p) not in owned]
    if plain:
        raise ValueError(
            f"peft added {plain[0]}{f' and {len(plain) - 1} more' if plain[1:] else ''}, which hf_tpsp cannot shard: it "
            "supports LoRA on the linear layers of the decoder layers, without modules_to_save or trainable tokens."
        )
    mesh = next(p for p in base.parameters() if isinstance(p, DTensor)).device_mesh
    gradients = base._tpsp.gradients
    gradients.average_over(base._tpsp.mesh)
    for name, module in adapted.items():
        for matrices, style in zip((module.lora_A, module.lora_B), styles[name], strict=True):
            for matrix in matrices.values():
                for parameter_name, parameter in matrix.named_parameters(recurse=False):
                    value = parameter.detach()
                    if not value.is_meta:
                        value = value.to(mesh.device_type)
                        dist.broadcast(value, src=0)
                    placements = [*[Replicate()] * (mesh.ndim - 1), style.placement(matrix, parameter_name, parameter)]
                    value = distribute_tensor(value, mesh, placements, src_data_rank=None)
                    matrix._parameters[parameter_name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    gradients.register_adapter(matrix, parameter_name, style.is_sum)
                style.install(matrix, gradients)
                matrix.register_load_state_dict_pre_hook(_shard_state)


def style_of(module: BaseTunerLayer) -> Style:
    """The layout of the layer that `module` adapts."""
    return vars(module.get_base_layer()).get("_tpsp_style")


def _styles(name: str, module: BaseTunerLayer) -> tuple[Adapter, Adapter]:
    """The layouts of A and B of the adapted layer `name`."""
    base, style = module.get_base_layer(), style_of(module)
    if type(module) is not Linear or not isinstance(style, (Colwise, Rowwise)):
        raise ValueError(
            f"{name} ({type(module).__name__} on a {type(base).__name__}) cannot be adapted on a sharded model: hf_tpsp "
            "supports LoRA on the linear layers of the decoder layers. Leave it out of `target_modules`."
        )
    if variants := [type(v).__name__ for v in module.lora_variant.values() if v is not None]:
        raise ValueError(f"{name}: {variants[0]} is not supported on a sharded model; use LoRA or rsLoRA.")
    if isinstance(style, Rowwise):
        return Adapter(style, Shard(1)), Adapter(style, Replicate(), is_sum=True)
    split: Placement = Shard(0)
    rows = None
    if isinstance(style, PackedColwise):
        split = style.placement(base, "weight", base.weight)
    elif isinstance(style, GatheredColwise):
        split, rows = Replicate(), base._tpsp_rows
    return Adapter(style, Replicate(), is_sum=True), Adapter(style, split, is_sum=rows is not None, rows=rows)


def _shard_state(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Cut whole tensors that are loaded into an adapter as its parameters are."""
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        if value is not None and isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            value = value.to(parameter.device, parameter.dtype)
            state_dict[prefix + name] = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
