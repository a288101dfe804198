"""Apply a plan and FSDP2 to a model: on meta before its weights are read, or in memory."""

from __future__ import annotations

import os
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.utils import logging

from . import compat, guard, options, outside, randomness
from .config import TPSPConfig, environment_flag
from .outputs import hand_out_whole
from .plan import decoder_layers, own_parameters, owners_of_layers, plan_for, rule_for
from .recompute import selective_contexts
from .styles import Block, Copy, Gather, OneShare, Replica, ReplicatedGradients, Stream, style_for
from .witness import Witness

logger = logging.get_logger(__name__)

MESH_DIMS = ("dp_replicate", "dp_shard", "tp")  # accelerate's names, by which it deals one batch to each TP group
# One mesh per process group and shape: each mesh makes groups of its own.
_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Parallelized:
    """What was done to a model. Kept on it as `model._tpsp`."""

    config: TPSPConfig
    mesh: DeviceMesh
    plan: dict[str, str]
    gradients: ReplicatedGradients


def is_parallelized(model: nn.Module) -> bool:
    """Whether `model`, or the model inside a wrapper such as peft's, went through `parallelize`."""
    return any("_tpsp" in vars(module) for module in model.modules())


def parallelized_model(model: nn.Module) -> nn.Module:
    """The model that `parallelize` was given, inside whatever wraps it."""
    return next(module for module in model.modules() if "_tpsp" in vars(module))


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
    meshes = _meshes.setdefault(dist.group.WORLD, {})
    if sizes not in meshes:
        mesh = meshes[sizes] = init_device_mesh(state.device.type, sizes, mesh_dim_names=MESH_DIMS)
        mesh["dp_shard", "tp"]._flatten()  # so that DTensor reduces a gradient norm in one collective
    return meshes[sizes]


def parallelize(model: PreTrainedModel, config: TPSPConfig) -> PreTrainedModel:
    """Shard `model` over the mesh of `config`, in place: tensor, sequence and loss parallel, then FSDP2.

    Call it on every rank before the optimizer is made. A model in memory takes rank 0's weights on all ranks; a model on
    meta stays there, ready for a loader that fills DTensors (this is what the `from_pretrained` hook does).

    Returns:
        The same model. Its parameters are DTensors on `(dp_shard, tp)`, its logits `LazyLogits`, sharded
        over the vocabulary until somebody reads them, its loss a plain scalar.

    Raises:
        ValueError: the sizes do not fit the ranks or the model, or a parameter has no layout. The model is untouched.
    """
    if is_parallelized(model):
        raise ValueError("This model is already parallelized.")
    from .integrations.peft import is_adapted, parallelize_adapted

    if is_adapted(model):
        return parallelize_adapted(model, config)
    compat.quiet_redistribute()
    compat.average_whole_parameters()
    mesh = build_mesh(config)
    if config.async_tp and mesh.device_type != "cuda":
        raise ValueError(f"async_tp=True runs on CUDA only; these ranks are on {mesh.device_type}. Leave it out.")
    options.check_options(model)
    plan = plan_for(model, config)
    if PartialState().is_main_process:
        for note in plan.notes:
            logger.warning_once(f"hf_tpsp: {type(model).__name__}: {note}.")
    config = replace(config, sequence_parallel=plan.sequence_parallel)
    on_meta = any(p.is_meta for p in model.parameters())
    if not on_meta:
        _same_on_all_ranks(model, PartialState().device)

    gradients = ReplicatedGradients(mesh["tp"])
    gradients.keeps_terms = not config.compile
    witness = Witness(model, plan, config)
    _apply_plan(model, plan, gradients, config)
    model.tie_weights()
    _check_sharded(model)
    _share_router_logits(model, config.tp_size)
    spared = options.spare_grouped_mm(model, config.tp_size)
    if spared and PartialState().is_main_process:
        logger.warning_once(f"hf_tpsp: {type(model).__name__}: {spared}.")
    name = type(model).__name__
    _apply_fsdp(model, mesh, config)
    gradients.calls = outside.Calls(model, mesh["tp"], config.sequence_parallel)
    outside.install(model, decoder_layers(model), gradients.calls, config.compile)
    compat.keep_name(model, name)
    compat.index_sharded_parameters(model)
    for module in model.modules():
        if module._parameters:
            module.register_load_state_dict_pre_hook(cut_whole_tensors)

    # Placed on the instance, so a model that is not ours is never touched.
    model._tpsp = Parallelized(config, mesh, plan, gradients)
    model._tp_plan = plan
    model.gather_sharded_state_dict_for_save = types.MethodType(_gather_for_save, model)
    model.resize_token_embeddings = _refuse_resize
    options.install(model)
    if config.activation_checkpointing != "none":
        selective = {"context_fn": selective_contexts} if config.activation_checkpointing == "selective" else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **selective})
    if config.compile:
        _compile(model, mesh["tp"], config)

    from .loss import patch_loss

    hand_out_whole(owners_of_layers(model), gradients)
    patch_loss(model, gradients.calls.gathered)
    guard.install(model, mesh)
    randomness.install(model, mesh["tp"])
    witness.install(model, gradients)
    return model


def _same_on_all_ranks(model: nn.Module, device: torch.device) -> None:
    """Move every parameter and buffer to `device` with rank 0's values, as DDP does: slices of one model, not of many."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.to(device)
            dist.broadcast(tensor.data, src=0)


def _apply_plan(
    model: PreTrainedModel, plan: dict[str, str], gradients: ReplicatedGradients, config: TPSPConfig
) -> None:
    for name, module in list(model.named_modules()):
        if (rule := rule_for(name, plan)) is not None:
            style = module._tpsp_style = style_for(rule, config)
            own = {p: rule_for(f"{name}.{p}", plan) for p in own_parameters(module)}
            style.parameter_rules = {p: rule for p, rule in own.items() if rule}
            style.shard(module, gradients)
            style.install(module, gradients)
    _hand_over(model, None)


def _hand_over(module: nn.Module, owner: Block | Stream | None) -> None:
    """Tell each block of the parameters inside it that it makes plain at its entry: those that no style's forward does, for
    their module may be read without being called. Outside the blocks, a layer does."""
    style = vars(module).get("_tpsp_style")
    if isinstance(style, (Block, Stream)):
        owner = style
    elif type(style) in (Replica, Copy) and owner is not None:
        owner.inside.append(module)
    for child in module.children():
        _hand_over(child, owner)


def _share_router_logits(model: PreTrainedModel, tp_size: int) -> None:
    """Have the auxiliary loss of an MoE model reach its routers once, and not from each rank.

    A router inside a split block adds up the ranks' gradients (`Replica`). All ranks compute the auxiliary loss alike, from
    the logits that the decoder hands out.
    """
    routers = [m for m in model.modules() if isinstance(vars(m).get("_tpsp_style"), Gather) and any(_routers(m))]
    if not routers:
        return

    def share(module, args, output):
        if isinstance(output, dict) and output.get("router_logits") is not None:
            logits = output[
                "router_logits"
            ]  # those that a block returned, and did not only compute, are shared already
            output["router_logits"] = tuple(
                x if hasattr(x, "_tpsp_shared") else OneShare.apply(x, tp_size) for x in logits
            )

    model.get_decoder().register_forward_hook(share)


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    """What chooses among the experts inside a block: the replicated parameters beside stacked expert weights."""
    if any(p.dim() == 3 for p in block.parameters()):
        yield from (m for m in block.modules() if type(vars(m).get("_tpsp_style")) is Replica)


def _check_sharded(model: nn.Module) -> None:
    plain = [name for name, param in model.named_parameters() if not isinstance(param, DTensor)]
    assert not plain, f"the plan was checked to be complete, yet these parameters are plain tensors: {plain}"


def _apply_fsdp(model: PreTrainedModel, mesh: DeviceMesh, config: TPSPConfig) -> None:
    """FSDP2 on each decoder layer and on the root, which holds the embedding, the last norm and the head.

    dp_shard_size=1 goes the same way: a mesh dim of size 1 has no traffic, and one path serves all meshes.
    """
    dp_mesh = mesh["dp_replicate", "dp_shard"] if config.dp_replicate_size > 1 else mesh["dp_shard"]

    def placement(param: nn.Parameter) -> Shard | None:
        # A packed weight may be strided over TP on its first dimension; FSDP takes the other one then.
        return Shard(1) if any(isinstance(p, _StridedShard) and p.dim == 0 for p in param.placements) else None

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
        compat.set_mixed_precision(model, torch.bfloat16)


def _compile(model: PreTrainedModel, tp_mesh: DeviceMesh, config: TPSPConfig) -> None:
    """Compile each decoder layer, with FSDP2's hooks around it. Nothing is compiled before the first forward."""
    if config.async_tp:  # untested on a GPU
        import torch._inductor.config as inductor
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(tp_mesh.get_group().group_name)
        inductor._micro_pipeline_tp = True
    for layer in decoder_layers(model):
        layer.compile()


def full_state_dict(model: PreTrainedModel, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
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


def cut_whole_tensors(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Cut whole tensors that are loaded into `module` as its parameters are. A hook of `load_state_dict`."""
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        if isinstance(parameter, DTensor) and is_whole and value.shape == parameter.shape:
            value = value.to(parameter.device, parameter.dtype)
            state_dict[prefix + name] = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )


def _gather_for_save(self, model_to_save, state_dict, distributed_config=None, *, save_on_this_rank=True):
    """`save_pretrained` of a sharded model: gather, unless the caller (the Trainer) has done so."""
    if any(isinstance(tensor, DTensor) for tensor in state_dict.values()):
        return full_state_dict(self, state_dict)
    return state_dict


def _refuse_resize(*args, **kwargs):
    raise ValueError(
        "resize_token_embeddings cannot change a model that is already sharded. Resize it once before training, save it "
        "with save_pretrained in one process, and load that folder."
    )
