"""Apply a plan and FSDP2 to a model: on meta before its weights are read, or in memory."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.utils import logging

from .agreement import agree
from .config import TPSPConfig
from .departure import LAST_WORDS
from .forward import batch_check, finite, options, outside, packing, randomness
from .forward.outputs import hand_out_whole
from .forward.own_loss import patch_loss
from .patching import WhileUsed
from .plan.planner import plan_for
from .state import (
    Parallelized,
    build_mesh,
    cut_whole_tensors,
    gather_for_save,
    parallelized_model,
    record_of,
    refuse_resize,
)
from .structure import decoder_layers, owners_of_layers
from .styles.apply import apply_plan, check_sharded, share_router_logits
from .styles.base import TensorParallel
from .styles.recompute import selective_contexts
from .upstream import transformers
from .upstream.torch import c10d, dtensor, fsdp2
from .witness.witness import Witness, setup_of

logger = logging.get_logger(__name__)


def shard(model: PreTrainedModel, config: TPSPConfig) -> PreTrainedModel:
    """Shard a plain `model` over the mesh of `config`, in place. This holds all steps in their order. See
    `api.parallelize`."""
    mesh = build_mesh(config)
    if config.async_tp and mesh.device_type != "cuda":
        raise ValueError(f"async_tp=True runs on CUDA only; these ranks are on {mesh.device_type}. Leave it out.")
    options.check_options(model)
    plan = plan_for(model, config)
    agree("the plan", setup_of(model, plan))
    if PartialState().is_main_process:
        for note in plan.notes:
            logger.warning_once(f"hf_tpsp: {type(model).__name__}: {note}.")
    config = replace(config, sequence_parallel=plan.sequence_parallel)
    on_meta = any(p.is_meta for p in model.parameters())
    if not on_meta:
        _same_on_all_ranks(model, PartialState().device)

    tp = TensorParallel(mesh["tp"])
    gradients = tp.gradients
    gradients.keeps_terms = not config.compile
    witness = Witness(model, plan, config)
    apply_plan(model, plan, tp, config)
    model.tie_weights()
    check_sharded(model)
    share_router_logits(model, config.tp_size)
    spared = transformers.spare_grouped_mm(model, config.tp_size)
    if spared and PartialState().is_main_process:
        logger.warning_once(f"hf_tpsp: {type(model).__name__}: {spared}.")
    name = type(model).__name__
    _apply_fsdp(model, mesh, config)
    gradients.calls = outside.Calls(model, mesh["tp"], config.sequence_parallel)
    outside.install(model, decoder_layers(model), gradients.calls, config.compile)
    transformers.keep_name(model, name)
    fsdp2.index_sharded_parameters(model)
    for module in model.modules():
        if module._parameters:
            module.register_load_state_dict_pre_hook(cut_whole_tensors)

    LAST_WORDS.keep_for(model)
    dtensor.QUIET_REDISTRIBUTE.keep_for(model)
    dtensor.SCALE_LISTS.keep_for(model)
    dtensor.AVERAGE_WHOLE_PARAMETERS.keep_for(model)
    dtensor.average_on(mesh)
    # These are set on the instance, so that models that hf_tpsp did not shard are never changed.
    vars(model)["_tpsp"] = Parallelized(config, mesh, plan, tp)
    model._tp_plan = plan
    model.gather_sharded_state_dict_for_save = types.MethodType(gather_for_save, model)
    model.resize_token_embeddings = refuse_resize
    options.install(model)
    if config.activation_checkpointing != "none":
        selective = {"context_fn": selective_contexts} if config.activation_checkpointing == "selective" else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **selective})
    if config.compile:
        _compile(model, mesh["tp"], config)
    hand_out_whole(owners_of_layers(model), gradients)
    patch_loss(model, gradients.calls.gathered)
    packing.install(model)
    batch_check.install(model, mesh)
    randomness.install(model, mesh["tp"])
    finite.install(model, config.on_nan)
    witness.install(model, gradients)
    return model


def _same_on_all_ranks(model: nn.Module, device: torch.device) -> None:
    """Move all parameters and buffers to `device` with rank 0's values, as DDP does, so that all ranks cut the same
    model."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.to(device)
            dist.broadcast(tensor.data, src=0)


def _apply_fsdp(model: PreTrainedModel, mesh: DeviceMesh, config: TPSPConfig) -> None:
    """FSDP2 on each decoder layer and on the root, which holds the embedding, the last norm and the head.

    A mesh with dp_shard_size=1 is wrapped too: a mesh dim of size 1 has no traffic, and one code path serves all
    meshes.
    """
    dp_mesh = mesh["dp_replicate", "dp_shard"] if config.dp_replicate_size > 1 else mesh["dp_shard"]

    def placement(param: nn.Parameter) -> Shard | None:
        # If a packed weight has strided sharding over TP on its first dimension, FSDP shards the other one.
        placements = cast(DTensor, param).placements
        return Shard(1) if any(isinstance(p, dtensor.StridedShard) and p.dim == 0 for p in placements) else None

    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        fully_shard(
            layer,
            mesh=dp_mesh,
            reshard_after_forward=config.reshard_after_forward and not last,
            shard_placement_fn=placement,
        )
    fully_shard(model, mesh=dp_mesh, reshard_after_forward=False, shard_placement_fn=placement)

    if config.mixed_precision == "bf16":
        fsdp2.set_mixed_precision(model, torch.bfloat16)


def _compile(model: PreTrainedModel, tp_mesh: DeviceMesh, config: TPSPConfig) -> None:
    """Compile each decoder layer, with FSDP2's hooks around it. Nothing is compiled before the first forward."""
    if config.async_tp:
        WhileUsed(lambda: c10d.pipeline_products(tp_mesh.get_group())).keep_for(model)
    for layer in decoder_layers(model):
        layer.compile()


def set_mixed_precision(model: nn.Module) -> None:
    """Make a sharded model compute in the dtype of accelerate's mixed precision, with fp32 master weights."""
    bf16 = AcceleratorState().mixed_precision == "bf16"
    if bf16:
        keep_fp32_masters(model)
    fsdp2.set_mixed_precision(parallelized_model(model), torch.bfloat16 if bf16 else None)


def keep_fp32_masters(model: nn.Module) -> None:
    """Cast trained parameters to fp32, because accelerate would cast only the outer dtype of a DTensor.

    With adapters, the frozen base keeps its dtype.
    """
    record_of(model).tp.gradients.adapters_to(torch.float32)
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        logger.info(
            "hf_tpsp: bf16 training keeps fp32 master weights; the model is cast to fp32, and saved in fp32 (one process "
            "would save it in the dtype it came in)."
        )
        model.float()
