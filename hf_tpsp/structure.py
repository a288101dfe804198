"""What a model is made of: its layers, norms, linear layers and embeddings, and the sizes of its blocks."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .sizes import size_of

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is `[in, out]`, as in transformers' Conv1D."""
    return isinstance(module, Conv1D)


def is_depthwise(module: nn.Module) -> bool:
    """Whether the module is a convolution along the sequence that computes each channel from that channel alone."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels


def features(module: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear layer."""
    # torch's stubs type the sizes as tensors.
    layer: Any = module
    return (layer.nx, layer.nf) if is_transposed(module) else (layer.in_features, layer.out_features)


def own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def layer_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Name → module list of the decoder layers. There is one list, except in models with several stacks of layers.

    Raises:
        ValueError: the model has no list of layers.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(m) for m in decoder.modules()} if isinstance(decoder, nn.Module) else {id(m) for m in model.modules()}
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and id(module) in inside and has_parameters(module) and not nested:
            lists[name] = module
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that hf_tpsp could find. Train it with FSDP alone, or extend "
            "`layer_lists` in hf_tpsp/structure.py."
        )
    ruled = {rule.split(".*", 1)[0] for rule in (model.tp_plan or {}) if ".*" in rule}
    if ruled & lists.keys():
        return {name: layers for name, layers in lists.items() if name in ruled}
    sizes = {name: sum(p.numel() for p in layers.parameters()) for name, layers in lists.items()}
    kinds = {type(layer) for layer in lists[max(sizes, key=sizes.__getitem__)]}
    return {name: layers for name, layers in lists.items() if type(layers[0]) in kinds}


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(itertools.chain.from_iterable(layer_lists(model).values()))


def owners_of_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that contain the layers, so that their forward calls them: `model` and usually `model.model`."""
    parts = [stem.split(".")[:-1] for stem in layer_lists(model)]
    names = sorted({".".join(p[:i]) for p in parts for i in range(len(p) + 1)}, key=len)
    return [model.get_submodule(name) for name in names]


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether the module's lookup is the sum of the ranks' lookups in their parts of the vocabulary."""
    return isinstance(module, nn.Embedding) and own_parameters(module) == ["weight"] and not any(module.children())


def own(block: nn.Module, names: tuple[str, ...]) -> int | None:
    """The value of the first of `names` that is a size of the block, or else of its config; None if none is."""
    owners = [block, getattr(block, "config", None)]
    return next((size for owner in owners if owner is not None for n in names if (size := size_of(owner, n))), None)


def first_tensor(output: Any) -> Tensor | None:
    while isinstance(output, (tuple, list, dict)) and output:
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output if isinstance(output, Tensor) else None
