"""peft 0.21: LoRA, DoRA and `modules_to_save` on sharded layers.

The two matrices of an adapter follow the layer they adapt, so that an adapter adds no collective to the activations:

    layer                                        A                                 B
    column-parallel                              replicated, a sum                 split as the layer's rows are
      with its output gathered                   replicated, a sum                 replicated, a sum; each rank its rows
    row-parallel                                 split as the layer's columns are  replicated, a sum
    whole, in a block that is split              replicated, a sum                 replicated, a sum
    in a block that is whole                     replicated                        replicated

"A sum": the gradient of a rank is a term of it. On a row-parallel layer, `base(x)` and `B A x` are both terms of a sum over
the ranks and are scattered together, once. DoRA's magnitudes, one for each output feature, are laid out as the rows of B are;
the norms that they scale take one all-reduce of `[out]` in the forward of a row-parallel layer.

What `modules_to_save` copies (embedding, head, norms) is laid out over the TP ranks as its original is.

FSDP shards none of this. It is replicated over data parallelism, on the mesh of FSDP's DTensors, and all gradients are added up
at the end of each backward: one all-reduce over the TP ranks, with those of the norms, and one over the data-parallel ranks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch.distributed as dist
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, transpose
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from ..collectives import all_reduce, to_local
from ..compat import replace
from ..config import TPSPConfig
from ..parallelize import cut_whole_tensors, full_state_dict, is_parallelized, parallelize, parallelized_model
from ..styles import (
    Adapter,
    Colwise,
    Copy,
    Embedding,
    GatheredColwise,
    Head,
    Norm,
    PackedColwise,
    Replica,
    ReplicatedGradients,
    Rowwise,
    SplitRowwise,
    Style,
    Whole,
    WholeColwise,
    is_norm,
)


def install() -> Callable[[], None]:
    """Have `get_peft_model` on a sharded model shard the adapters. Returns the function that undoes it."""
    return replace(
        (LoraLayer, "_get_in_out_features", _patch_features),
        (PeftModel, "__init__", _patch_init),
        (PeftModel, "save_pretrained", _patch_save_pretrained),
        (ModulesToSaveWrapper, "update", _patch_update),
        (DoraLinearLayer, "update_layer", _patch_update_layer),
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
            check_config(peft_config, on_shards=True)
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


def _patch_update(original: Callable) -> Callable:
    """peft 0.21 (utils/other.py, `ModulesToSaveWrapper.update`) copies the module, and what sharding has put on it would go on
    using the original's parameters. Delete when what is put on a module is not bound to it."""

    @functools.wraps(original)
    def update(self, *args, **kwargs):
        if any(style_of(module) for module in self.original_module.modules()):
            _check_copied(self.original_module)
        with _whole(self.original_module):
            original(self, *args, **kwargs)
        self.original_module.requires_grad_(False)

    return update


def _patch_update_layer(original: Callable) -> Callable:
    """peft 0.21 (tuners/lora/dora.py, `DoraLinearLayer.update_layer`) takes the norms of the weight's rows together with plain
    tensors. Delete when it gathers a DTensor, as it does ZeRO's parameters."""

    @functools.wraps(original)
    def update_layer(self, *, base_layer, **kwargs):
        with _whole(base_layer):
            original(self, base_layer=base_layer, **kwargs)

    return update_layer


@contextlib.contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """While inside, a sharded `module` is plain again, with its whole parameters. Every rank must enter it."""
    parameters = dict(module._parameters)
    ours = {
        n: v
        for n, v in vars(module).items()
        if "_tpsp_style" in vars(module) and (n in ("forward", "__deepcopy__") or "_tpsp" in n)
    }
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            module._parameters[name] = nn.Parameter(parameter.detach().full_tensor(), parameter.requires_grad)
    for name in ours:
        del vars(module)[name]
    try:
        yield
    finally:
        module._parameters.update(parameters)
        vars(module).update(ours)


def check_config(config: PeftConfig, on_shards: bool = False) -> None:
    """Refuse the adapters that hf_tpsp cannot lay out; `on_shards`: that cannot be added to a sharded model. Raises
    `ValueError`."""
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
    """The whole tensors of the adapters and of the trained copies, on the CPU of rank 0; empty elsewhere. Every rank must call
    it."""
    ours = {n: t for n, t in model.state_dict().items() if "lora_" in n or ".modules_to_save." in n}
    return full_state_dict(model, ours)


def parallelize_adapted(model: PeftModel, config: TPSPConfig) -> PeftModel:
    """`parallelize` for a model in memory that peft has wrapped: the base model first, as if nothing had been added."""
    for peft_config in model.peft_config.values():
        check_config(peft_config)
    base = model.get_base_model()
    adapted, saved = _added(base)
    for name, module in adapted.items():
        base.set_submodule(name, module.get_base_layer())
    for name, module in saved.items():
        base.set_submodule(name, module.original_module)
    try:
        parallelize(base, config)
    finally:
        for name, module in (adapted | saved).items():
            base.set_submodule(name, module)
    shard_adapters(model)
    return model


def _added(model: nn.Module) -> tuple[dict[str, BaseTunerLayer], dict[str, ModulesToSaveWrapper]]:
    """What peft has put around modules of `model`, by name: adapters, and copies that are trained whole."""
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    return adapted, {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}


def shard_adapters(model: PeftModel) -> None:
    """Turn what peft has added to a parallelized model into DTensors, with rank 0's values, in place.

    Raises:
        ValueError: an adapter that is not LoRA or DoRA on a linear layer inside the decoder layers; a copy of anything but the
            embedding, the head or a norm.
    """
    base = parallelized_model(model)
    for config in model.peft_config.values():
        check_config(config)
    adapted, saved = _added(model)
    layouts = [layout for name, module in adapted.items() for layout in _layouts(name, module, base._tpsp.config)]
    layouts += [layout for wrapper in saved.values() for layout in _copies(wrapper)]
    owned = {id(p) for module in (adapted | saved).values() for p in module.parameters()}
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor) and id(p) not in owned]
    if plain:
        raise ValueError(
            f"peft added {plain[0]}{f' and {len(plain) - 1} more' if plain[1:] else ''}, which hf_tpsp cannot shard: it "
            "supports LoRA, rsLoRA and DoRA on the linear layers of the decoder layers, and modules_to_save."
        )
    mesh = next(p for p in base.parameters() if isinstance(p, DTensor)).device_mesh
    gradients = base._tpsp.gradients
    gradients.average_over(base._tpsp.mesh)
    for module, style in layouts:
        _shard(module, style, mesh, gradients)


def _shard(module: nn.Module, style: Style, mesh: DeviceMesh, gradients: ReplicatedGradients) -> None:
    """Lay `module`'s parameters out over the TP ranks, the last dim of `mesh`, alike on the others."""
    style.outside_fsdp = True
    for name, parameter in module.named_parameters(recurse=False):
        value = parameter.detach()
        if not value.is_meta:
            value = value.to(mesh.device_type)
            dist.broadcast(value, src=0)
        placements = [*[Replicate()] * (mesh.ndim - 1), style.placement(module, name, parameter)]
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        gradients.register_adapter(module, name, style.is_partial(name))
    style.install(module, gradients)
    module.register_load_state_dict_pre_hook(cut_whole_tensors)


def style_of(module: nn.Module) -> Style | None:
    """The layout of a module that is sharded."""
    return vars(module).get("_tpsp_style")


def _copies(wrapper: ModulesToSaveWrapper) -> list[tuple[nn.Module, Style]]:
    """The trained copies that `wrapper` holds, and their layout: the original's."""
    _check_copied(wrapper.original_module)
    layouts = []
    for module in wrapper.modules_to_save.values():
        style = copy.copy(style_of(wrapper.original_module))
        style.original = wrapper.original_module
        layouts.append((module, style))
    return layouts


def _check_copied(original: nn.Module) -> None:
    """Raise `ValueError` unless a copy of `original`, a module of a sharded model, can be laid out as it is."""
    style = style_of(original)
    if not isinstance(style, (Embedding, Head, Norm)) or (isinstance(style, Replica) and not is_norm(original)):
        raise ValueError(
            f"A {type(original).__name__} cannot be in `modules_to_save` on a sharded model: hf_tpsp supports the embedding, "
            "the head and norms. Adapt its linear layers instead (`target_modules`)."
        )


def _layouts(name: str, module: BaseTunerLayer, config: TPSPConfig) -> list[tuple[nn.Module, Style]]:
    """The modules of the adapters on the layer `name`, and their layouts."""
    base = module.get_base_layer()
    style = style_of(base)
    in_block = isinstance(style, (Colwise, Rowwise, Replica, Copy))
    alone = isinstance(style, Whole) and not style.sequence_parallel  # else it has the stream, or something else
    if type(module) is not Linear or not (in_block or alone):
        raise ValueError(
            f"{name} ({type(module).__name__} on a {type(base).__name__}) cannot be adapted on a sharded model: hf_tpsp "
            "supports LoRA on the linear layers inside token mixers and MLPs. Leave it out of `target_modules`, or name it in "
            "`exclude_modules`."
        )
    for variant in module.lora_variant.values():
        if type(variant) is not DoraLinearVariant:
            raise ValueError(f"{name}: {type(variant).__name__} is not supported on a sharded model; use LoRA or DoRA.")
        if isinstance(style, (GatheredColwise, WholeColwise, SplitRowwise)):
            raise ValueError(
                f"{name}: DoRA is not supported on a layer whose output is gathered or whose input is whole, as it is here. "
                "Leave it out of `target_modules`, or leave use_dora out."
            )
    same = functools.partial(Adapter, config, Replicate())
    rows = Replicate()
    if isinstance(style, Rowwise):
        a, b = Adapter(config, Shard(1), splits_input=isinstance(style, SplitRowwise)), same(is_sum=True)
    elif isinstance(style, GatheredColwise):
        a, b = same(is_sum=True), same(is_sum=True, rows=vars(base).get("_tpsp_rows"))
    elif isinstance(style, Colwise) and not isinstance(style, WholeColwise):
        rows = _StridedShard(0, split_factor=len(style.parts)) if isinstance(style, PackedColwise) else Shard(0)
        a, b = same(is_sum=True), Adapter(config, rows)
    else:
        a = b = same(is_sum=isinstance(style, Replica))
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

    def install(self, module, gradients):
        super().install(module, gradients)
        module.get_lora_weight = _local_product
        over = gradients.mesh if isinstance(self.layer, Rowwise) else None
        module.get_weight_norm = functools.partial(_norm_of_rows, module.fan_in_fan_out, over)

    def run(self, module, inner, gradients, args, kwargs):
        with self.layer.local_parameters(kwargs["base_layer"], gradients):
            return super().run(module, inner, gradients, args, kwargs)


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
