"""peft 0.21: LoRA, DoRA and `modules_to_save` on sharded layers.

The two matrices of an adapter follow the layer they adapt, so that an adapter adds no collective to the activations:

    layer                            A                                 B
    column-parallel                  replicated, partial               split as the layer's rows are
      with its output gathered       replicated, partial               replicated, partial; each rank its rows
    row-parallel                     split as the layer's columns are  replicated, partial
    whole, in a block that is split  replicated, partial               replicated, partial
    in a block that is whole         replicated                        replicated

Here "partial" says that each rank's gradient is partial. On a row-parallel layer, `base(x)` and `B A x` are both
partial outputs, and are reduced together, once. DoRA's magnitudes, one for each output feature, are laid out as the
rows of B are; the norms that they scale take one all-reduce of `[out]` in the forward of a row-parallel layer.

What `modules_to_save` copies (embedding, head, norms) is laid out over the TP ranks as its original is.

FSDP shards none of this. All of it is replicated over data parallelism, on the mesh of FSDP's DTensors. Its gradients
are reduced at the end of each backward: one all-reduce over the TP ranks, shared with the norms, and one over the
data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ...config import TPSPConfig
from ...forward import randomness
from ...sharding import shard
from ...state import cut_whole_tensors, full_state_dict, parallelized_model, record_of
from ...styles.base import Style, TensorParallel
from .layouts import adapter_layouts, copy_layouts


def check_config(config: PeftConfig, on_shards: bool = False) -> None:
    """Raise `ValueError` if hf_tpsp cannot lay out these adapters, or, with `on_shards`, if they cannot be added to a
    model that is sharded already."""
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{config.peft_type.value} is not supported on a sharded model; use LoRA.")
    if config.target_parameters:
        raise ValueError(
            f"LoraConfig(target_parameters={sorted(config.target_parameters)}) is not supported on a sharded model. On a model with "
            'experts, peft makes these of "all-linear" and of the names of the experts\' layers: leave both out, and name the '
            "layers of the attention and of the shared experts in `target_modules`."
        )
    for option in ("lora_bias", "trainable_token_indices", "ensure_weight_tying"):
        if getattr(config, option, None):
            raise ValueError(
                f"LoraConfig({option}={getattr(config, option)!r}) is not supported on a sharded model: hf_tpsp supports "
                "LoRA, rsLoRA and DoRA on the linear layers of the decoder layers, and modules_to_save. Leave it out."
            )
    start = config.init_lora_weights
    if on_shards and not isinstance(start, bool) and start not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"LoraConfig(init_lora_weights={start!r}) changes the weights of the base model, which are sharded. Add the "
            "adapter to the model in memory and parallelize that, or use True or 'gaussian'."
        )


def is_adapted(model: nn.Module) -> bool:
    return isinstance(model, PeftModel)


def adapter_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The whole tensors of the adapters and of the trained copies, on the CPU of rank 0; empty elsewhere. Every rank
    must call it."""
    ours = {n: t for n, t in model.state_dict().items() if "lora_" in n or ".modules_to_save." in n}
    return full_state_dict(model, ours)


def saved_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What is saved in a folder of `model`: the adapters if peft wraps it, else the whole model."""
    return adapter_state_dict(model) if is_adapted(model) else full_state_dict(model)


def shard_adapted(model: PeftModel, config: TPSPConfig) -> PeftModel:
    """Shard a model in memory that peft has wrapped: first the base without the wrappers, then the adapters."""
    for peft_config in model.peft_config.values():
        check_config(peft_config)
    base = model.get_base_model()
    adapted, saved = _added(base)
    for name, module in adapted.items():
        base.set_submodule(name, module.get_base_layer())
    for name, module in saved.items():
        base.set_submodule(name, module.original_module)
    try:
        shard(base, config)
    finally:
        for name, module in (adapted | saved).items():
            base.set_submodule(name, module)
    shard_adapters(model)
    return model


def _added(model: nn.Module) -> tuple[dict[str, BaseTunerLayer], dict[str, ModulesToSaveWrapper]]:
    """peft's wrappers around modules of `model`, by name: those with adapters, and those with a trained copy."""
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    return adapted, {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}


def shard_adapters(model: PeftModel) -> None:
    """Turn what peft has added to a parallelized model into DTensors, with rank 0's values, in place.

    Raises:
        ValueError: an adapter that is not LoRA or DoRA on a linear layer inside the decoder layers; a copy of anything
            but the embedding, the head or a norm.
    """
    base, record = parallelized_model(model), record_of(model)
    for config in model.peft_config.values():
        check_config(config)
    adapted, saved = _added(model)
    layouts = [layout for name, module in adapted.items() for layout in adapter_layouts(name, module, record.config)]
    layouts += [layout for wrapper in saved.values() for layout in copy_layouts(wrapper)]
    owned = {id(p) for module in (adapted | saved).values() for p in module.parameters()}
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor) and id(p) not in owned]
    if plain:
        raise ValueError(
            f"peft added {plain[0]}{f' and {len(plain) - 1} more' if plain[1:] else ''}, which hf_tpsp cannot shard: it "
            "supports LoRA, rsLoRA and DoRA on the linear layers of the decoder layers, and modules_to_save."
        )
    mesh = next(p for p in base.parameters() if isinstance(p, DTensor)).device_mesh
    tp = record.tp
    tp.gradients.average_over(record.mesh)
    for module, style in layouts:
        _shard(module, style, mesh, tp)
    randomness.look_again()
    base._tpsp = replace(record, saved=saved_state_dict)


def _shard(module: nn.Module, style: Style, mesh: DeviceMesh, tp: TensorParallel) -> None:
    """Lay `module`'s parameters out over TP, the last dim of `mesh`, and replicate them over the other dims."""
    for name, parameter in module.named_parameters(recurse=False):
        value = parameter.detach()
        if not value.is_meta:
            value = value.to(mesh.device_type)
            dist.broadcast(value, src=0)
        placements = [*[Replicate()] * (mesh.ndim - 1), style.placement(module, name, parameter)]
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        tp.gradients.register_adapter(module, name, style.is_partial(name))
    style.install(module, tp)
    module.register_load_state_dict_pre_hook(cut_whole_tensors)
