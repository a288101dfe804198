"""The loading hook: under `enable()`, `from_pretrained` shards a causal LM while it reads it.

transformers builds the model on meta, hands it to `maybe_distribute_model`, and then fills whatever DTensors it finds,
each rank reading only its own slices of the safetensors. `parallelize` stands at that point, so no rank ever holds the
whole model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch.distributed.fsdp import FSDPModule
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from .config import TPSPConfig
from .parallelize import build_mesh, is_parallelized, parallelize

logger = logging.get_logger(__name__)


class _Meshes:
    """What transformers asks of its mesh manager. It only passes the mesh on to the loader."""

    def __init__(self, mesh):
        self._mesh = mesh

    def get_mesh(self, dims):
        return self._mesh


def is_causal_lm(cls: type) -> bool:
    return cls in MODEL_FOR_CAUSAL_LM_MAPPING.values() or cls.__name__.endswith("ForCausalLM")


def install(config: TPSPConfig) -> Callable[[], None]:
    """Hook `from_pretrained`. Returns the function that takes the hook out."""
    originals = {
        name: vars(owner)[name]
        for owner, name in (
            (PreTrainedModel, "from_pretrained"),
            (_owner("prepare_distribute_model"), "prepare_distribute_model"),
            (_owner("maybe_distribute_model"), "maybe_distribute_model"),
        )
    }
    load, prepare, distribute = (original.__func__ for original in originals.values())

    @functools.wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        if not is_causal_lm(cls):
            logger.warning_once(f"hf_tpsp: {cls.__name__} is not a causal LM and is loaded whole on every rank.")
            return load(cls, *args, **kwargs)
        for name in ("device_map", "tp_plan", "tp_size", "distributed_config", "quantization_config"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"from_pretrained({name}=…) places the model in another way than hf_tpsp does. Leave {name} out, or "
                    "load this model before hf_tpsp.enable()."
                )
        model = load(cls, *args, **kwargs, distributed_config=_Ours(tp_size=config.tp_size, fsdp_size=config.dp_size))
        loaded = model[0] if isinstance(model, tuple) else model
        finish_loading(loaded)
        return model

    @functools.wraps(prepare)
    def prepare_distribute_model(cls, distributed_config, device_map=None):
        if not isinstance(distributed_config, _Ours):
            return prepare(cls, distributed_config, device_map)
        mesh = build_mesh(config)
        device_map = "cpu" if mesh.device_type == "cpu" else _current_device(mesh.device_type)
        return distributed_config, device_map, _Meshes(mesh)

    @functools.wraps(distribute)
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if not isinstance(distributed_config, _Ours):
            return distribute(cls, model, distributed_config, mesh_manager)
        # accelerate, not transformers, trains, saves and resumes this model; nothing else may see the config.
        del model.config.distributed_config
        return parallelize(model, config)

    hooks = (from_pretrained, prepare_distribute_model, maybe_distribute_model)
    owners = (PreTrainedModel, _owner("prepare_distribute_model"), _owner("maybe_distribute_model"))
    for owner, hook in zip(owners, hooks, strict=True):
        setattr(owner, hook.__name__, classmethod(hook))

    def restore() -> None:
        for owner, (name, original) in zip(owners, originals.items(), strict=True):
            setattr(owner, name, original)

    return restore


class _Ours(DistributedConfig):
    """Marks the loads that the hook started."""


def _owner(name: str) -> type:
    return next(cls for cls in PreTrainedModel.__mro__ if name in vars(cls))


def _current_device(device_type: str):
    from accelerate import PartialState

    return PartialState().device


def finish_loading(model: PreTrainedModel) -> None:
    """After the loader has replaced the parameters: tie again, so that tied stays one parameter for FSDP too."""
    assert is_parallelized(model) and isinstance(model, FSDPModule)
    model.tie_weights()
