"""All that is kept on a model that was sharded, and how it is saved and loaded. What shards it is in `sharding.py`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from .config import TPSPConfig, environment_flag
from .upstream.torch import c10d

if TYPE_CHECKING:
    from .styles.base import Style, TensorParallel

MESH_DIMS = ("dp_replicate", "dp_shard", "tp")  # accelerate's names, by which it deals one batch to each TP group


# One mesh per process group and shape: each mesh makes groups of its own.
_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Parallelized:
    """What was done to a model. Kept on it as `model._tpsp`."""

    config: TPSPConfig
    mesh: DeviceMesh
    plan: dict[str, str]
    tp: TensorParallel
    saved: Callable[[nn.Module], dict[str, torch.Tensor]] | None = None  # what is saved of it, if not all


def is_parallelized(model: nn.Module) -> bool:
    """Whether `model`, or the model inside a wrapper such as peft's, went through `parallelize`."""
    return any("_tpsp" in vars(module) for module in model.modules())


def parallelized_model(model: nn.Module) -> nn.Module:
    """The model that `parallelize` was given, inside whatever wraps it."""
    return next(module for module in model.modules() if "_tpsp" in vars(module))


def record_of(model: nn.Module) -> Parallelized:
    """What was done to the model inside `model`."""
    return vars(parallelized_model(model))["_tpsp"]


def build_mesh(config: TPSPConfig) -> DeviceMesh:
    """The `(dp_replicate, dp_shard, tp)` mesh over all ranks, starting the process group if nothing has yet.

    Raises:
        ValueError: the number of ranks is not the mesh's.
    """
    config.check_world(dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1")))
    state = PartialState(cpu=environment_flag("ACCELERATE_USE_CPU"))
    if not dist.is_initialized():  # one process, not launched as one of several
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sizes = (config.dp_replicate_size, config.dp_shard_size, config.tp_size)
    meshes = _meshes.setdefault(cast(dist.ProcessGroup, dist.group.WORLD), {})
    if sizes not in meshes:
        mesh = meshes[sizes] = init_device_mesh(state.device.type, sizes, mesh_dim_names=MESH_DIMS)
        c10d.flatten(mesh["dp_shard", "tp"])
    return meshes[sizes]


def full_state_dict(model: nn.Module, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The whole tensors of a sharded model, on the CPU of rank 0; empty elsewhere. Every rank must call it.

    One parameter is gathered at a time, so no rank but the first ever holds more than one of them.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    full = {}
    for name, tensor in state_dict.items():
        if tied.get(name) in state_dict:
            continue
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            full[name] = value.detach().cpu()
    # Tied weights stay one tensor, which is how save_pretrained knows to write them once.
    return {name: full[tied.get(name, name)] for name in state_dict if tied.get(name, name) in full}


def saved_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a folder of `model` holds, as whole tensors on the CPU of rank 0: the model, or what a library that wraps it saves."""
    return (record_of(model).saved or full_state_dict)(model)


def cut_whole_tensors(module: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    """Cut whole tensors that are loaded into `module` as its parameters are. A hook of `load_state_dict`."""
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        if isinstance(parameter, DTensor) and is_whole and value.shape == parameter.shape:
            value = value.to(parameter.device, parameter.dtype)
            state_dict[prefix + name] = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )


def gather_for_save(
    self: PreTrainedModel,
    model_to_save: nn.Module,
    state_dict: dict[str, torch.Tensor],
    distributed_config: Any = None,
    *,
    save_on_this_rank: bool = True,
) -> dict[str, torch.Tensor]:
    """`save_pretrained` of a sharded model: gather, unless the caller (the Trainer) has done so."""
    if any(isinstance(tensor, DTensor) for tensor in state_dict.values()):
        return full_state_dict(self, state_dict)
    return state_dict


def refuse_resize(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "resize_token_embeddings cannot change a model that is already sharded. Resize it once before training, save it "
        "with save_pretrained in one process, and load that folder."
    )


def style_of(module: nn.Module) -> Style | None:
    """The layout of a module that is sharded."""
    return vars(module).get("_tpsp_style")
