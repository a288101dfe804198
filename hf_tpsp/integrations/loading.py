"""The loading hook: under `enable()`, `from_pretrained` shards a causal LM while it reads it.

transformers builds the model on meta, hands it to `maybe_distribute_model`, and then fills whatever DTensors it finds,
each rank reading only its own slices of the safetensors. The hook shards the model in `maybe_distribute_model`, so no
rank ever holds the whole model.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from accelerate import PartialState
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.mixin import DistributedMixin
from transformers.utils import logging

from .. import patching
from ..config import TPSPConfig
from ..forward.options import REPLACES_LAYERS
from ..sharding import shard
from ..state import build_mesh, parallelized_model, record_of
from ..upstream import transformers
from ..upstream.torch import fsdp2

logger = logging.get_logger(__name__)


# Arguments of from_pretrained that place or convert the model in another way.
PLACEMENT = ("device_map", "tp_plan", "tp_size", "distributed_config", "quantization_config")


# Arguments that put other code in place of the layers.
KERNELS = ("use_kernels", "kernel_config")


class _Ours(DistributedConfig):
    """Marks the loads that the hook started."""


class _Meshes:
    """Stands for transformers' mesh manager, which is only asked for the mesh that the loader gets."""

    def __init__(self, mesh):
        self._mesh = mesh

    def get_mesh(self, dims):
        return self._mesh


def is_causal_lm(cls: type) -> bool:
    # The class is looked up by its config, because the mapping's `values()` would import every model of transformers.
    config = cls.config_class
    named = config in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[config] is cls
    return named or cls.__name__.endswith("ForCausalLM")


def check_not_quantized(config: PreTrainedConfig | None, name: str = "This checkpoint") -> None:
    """Raise `ValueError` if the config of the checkpoint `name` says that it is quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(
            f"{name} is quantized ({getattr(method, 'value', method)}). hf_tpsp cannot shard quantized weights, so QLoRA is not supported; use LoRA on the "
            "checkpoint in bf16, whose weights are split over all ranks."
        )


def install(config: TPSPConfig) -> Callable[[], None]:
    """Hook `from_pretrained` of every causal LM class, and of the auto class. Returns the function that undoes it."""

    def hook_auto(original):
        def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
            try:
                return original.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)
            except OSError as error:
                if os.path.isdir(pretrained_model_name_or_path):
                    raise
                raise OSError(
                    f"{str(pretrained_model_name_or_path)!r} is neither a checkpoint folder (looked in {os.getcwd()}) nor a model that the "
                    "hub or its local cache has."
                ) from error

        return classmethod(from_pretrained)

    def hook_load(original):
        def from_pretrained(cls, *args, **kwargs):
            if not is_causal_lm(cls):
                logger.warning_once(f"hf_tpsp: {cls.__name__} is not a causal LM and is loaded whole on every rank.")
                return original.__func__(cls, *args, **kwargs)
            if isinstance(kwargs.get("distributed_config"), _Ours):
                # The hook is installed twice.
                return original.__func__(cls, *args, **kwargs)
            for name in PLACEMENT:
                if kwargs.get(name) is not None:
                    raise ValueError(
                        f"from_pretrained({name}=…) places the model in another way than hf_tpsp does. Leave {name} "
                        "out, or load this model before hf_tpsp.enable()."
                    )
            for name in KERNELS:
                if kwargs.get(name):
                    raise ValueError(f"from_pretrained({name}=…) {REPLACES_LAYERS}.")
            # The auto class has read the config, and hands it over.
            check_not_quantized(kwargs.get("config"))
            return original.__func__(cls, *args, **kwargs, distributed_config=_Ours())

        return classmethod(from_pretrained)

    def hook_prepare(original):
        def prepare_distribute_model(cls, distributed_config, device_map=None):
            if not isinstance(distributed_config, _Ours):
                return original.__func__(cls, distributed_config, device_map)
            # The mesh is built first: it may have to start accelerate's state and the process group.
            mesh = build_mesh(config)
            return distributed_config, PartialState().device, _Meshes(mesh)

        return classmethod(prepare_distribute_model)

    def hook_distribute(original):
        def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
            if not isinstance(distributed_config, _Ours):
                return original.__func__(cls, model, distributed_config, mesh_manager)
            check_not_quantized(model.config)
            # accelerate, not transformers, trains, saves and resumes this model, so nothing later may see this config.
            del model.config.distributed_config
            return shard(model, config)

        return classmethod(maybe_distribute_model)

    return patching.swap(
        *transformers.LOADING_PATCHES,
        (AutoModelForCausalLM, "from_pretrained", hook_auto),
        (PreTrainedModel, "from_pretrained", hook_load),
        (DistributedMixin, "prepare_distribute_model", hook_prepare),
        (DistributedMixin, "maybe_distribute_model", hook_distribute),
    )


def load_weights(model: nn.Module, folder: str) -> None:
    """Give a sharded model the weights in a Hugging Face folder, in place. Every rank must call it.

    They are read as `from_pretrained` reads them, each rank its slices, into a second sharded model. That one is gone
    before an optimizer's state, which is larger, is loaded.

    Raises:
        ValueError: the folder has not the weights of this model.
    """
    inner = parallelized_model(model)
    if inner is not model:
        raise ValueError(
            f"{folder} holds a whole model, and this run trains an adapter. Load the model from it instead."
        )
    undo = install(record_of(model).config)
    try:
        loaded, found = fsdp2.plain_class(inner).from_pretrained(
            folder, config=inner.config, dtype=inner.dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        undo()
    reshaped = (name for name, *_ in found["mismatched_keys"])
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"], *reshaped}):
        raise ValueError(
            f"{folder} has not the weights of this {inner._get_name()}: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if wrong[3:] else ''} are missing, unknown or of another shape."
        )
    with torch.no_grad():
        values = loaded.state_dict()
        for name, value in inner.state_dict().items():
            value.copy_(values[name])
    del loaded, values
    # A model refers to itself in circles.
    gc.collect()
