"""All state that is kept on a sharded model, and how the model is saved and loaded. The sharding itself is in
`sharding.py`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .agreement import agree, decide
from .config import TPSPConfig, launched_ranks
from .hosts import placement, this_host
from .inputs import environment_flag
from .patching import swapped
from .upstream.torch import c10d
from .upstream.versions import REACHED_INTO, version_of

if TYPE_CHECKING:
    from .styles.base import Style, TensorParallel

logger = logging.get_logger(__name__)

# These are accelerate's names. By them it deals one batch to each TP group.
MESH_DIMS = ("dp_replicate", "dp_shard", "tp")


# There is one mesh per process group and shape, because each new mesh makes new process groups.
_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Parallelized:
    """The record of how a model was sharded. It is kept on the model as `model._tpsp`.

    Attributes:
        saved: returns the state dict to save, if that is not the whole model; else None.
    """

    config: TPSPConfig
    mesh: DeviceMesh
    plan: dict[str, str]
    tp: TensorParallel
    saved: Callable[[nn.Module], dict[str, torch.Tensor]] | None = None


def is_parallelized(model: nn.Module) -> bool:
    """Whether `model`, or the model inside a wrapper such as peft's, went through `parallelize`."""
    return any("_tpsp" in vars(module) for module in model.modules())


def parallelized_model(model: nn.Module) -> nn.Module:
    """The sharded model inside `model`, which may be a wrapper such as peft's."""
    return next(module for module in model.modules() if "_tpsp" in vars(module))


def record_of(model: nn.Module) -> Parallelized:
    """The `Parallelized` record of the sharded model inside `model`."""
    return vars(parallelized_model(model))["_tpsp"]


@functools.cache
def _versions() -> dict[str, str]:
    return {f"the version of {name}": str(version_of(name)) for name in (*REACHED_INTO, "hf_tpsp")}


def join(config: TPSPConfig) -> None:
    """Meet the other ranks in the default process group, which is started if it is not there yet.

    Raises:
        ValueError: on all ranks: they run other configs or versions, or the mesh does not have as many ranks as were
            started.
    """
    started = dist.get_world_size() if dist.is_initialized() else launched_ranks()
    if started == 1:
        config.check_world(started)
    PartialState(cpu=environment_flag("ACCELERATE_USE_CPU"))
    # This is a single process, which was not launched as one of several.
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    agree("the mesh", {**_versions(), **{f"TPSPConfig's {name}": repr(value) for name, value in vars(config).items()}})
    config.check_world(started)


def build_mesh(config: TPSPConfig) -> DeviceMesh:
    """The `(dp_replicate, dp_shard, tp)` mesh over all ranks. Starts the process group if it is not initialized yet.
    Its groups have the default group's timeout.

    Raises:
        ValueError: as `join`.
    """
    join(config)
    sizes = (config.dp_replicate_size, config.dp_shard_size, config.tp_size)
    meshes = _meshes_of_world()
    if sizes not in meshes:
        decide("the mesh's hosts", this_host(), lambda hosts: _say_where(hosts, sizes))
        with swapped(*c10d.PATCHES):
            mesh = init_device_mesh(PartialState().device.type, sizes, mesh_dim_names=MESH_DIMS)
            c10d.flatten(mesh["dp_shard", "tp"])
        meshes[sizes] = mesh
    return meshes[sizes]


def _say_where(hosts: list[list[str]], sizes: tuple[int, int, int]) -> None:
    """Rank 0 says once where the ranks are, if there are several hosts."""
    if (sentence := placement(hosts, sizes)) is not None:
        logger.warning_once(f"hf_tpsp: {sentence}")


def _meshes_of_world() -> dict[tuple[int, ...], DeviceMesh]:
    return _meshes.setdefault(cast(dist.ProcessGroup, dist.group.WORLD), {})


def set_timeout(timeout: timedelta) -> None:
    """Have every collective of the default process group and of the meshes end after `timeout`, also those of groups
    that were made before it was known."""
    for mesh in _meshes_of_world().values():
        c10d.set_timeout(mesh, timeout)


def full_state_dict(model: nn.Module, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The whole tensors of a sharded model, on the CPU of rank 0; empty on other ranks. Every rank must call it.

    One parameter is gathered at a time, so only rank 0 ever holds more than one whole parameter.
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
    # Tied weights stay one tensor, so that save_pretrained writes them once.
    return {name: full[tied.get(name, name)] for name in state_dict if tied.get(name, name) in full}


def saved_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict to save, as whole tensors on the CPU of rank 0: the model's, or the one that a wrapping library
    saves."""
    return (record_of(model).saved or full_state_dict)(model)


def cut_whole_tensors(module: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    """A `load_state_dict` pre-hook: cuts whole tensors in `state_dict` in the way that `module`'s parameters are
    cut."""
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
    """Called in `save_pretrained` of a sharded model: gathers the tensors, unless the caller (the Trainer) has done
    so."""
    if any(isinstance(tensor, DTensor) for tensor in state_dict.values()):
        return full_state_dict(self, state_dict)
    return state_dict


def refuse_resize(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "resize_token_embeddings cannot change a model that is already sharded. Resize it once before training, save it "
        "with save_pretrained in one process, and load that folder."
    )


def style_of(module: nn.Module) -> Style | None:
    """The style of `module`, or None if it has none."""
    return vars(module).get("_tpsp_style")
