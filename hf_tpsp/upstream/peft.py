"""peft: workarounds for what it does with a sharded layer, which it takes for a whole one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..state import is_parallelized, saved_state_dict


def _patch_features(original: Callable) -> Callable:
    """peft 0.21 (tuners/tuners_utils.py, `_get_in_out_features`) takes the local shape of a DTensor, which on a mesh of
    two dims is neither the layer's nor the rank's. Delete when it takes the layer's `in_features`."""

    @functools.wraps(original)
    def features(self, module):
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            return module.in_features, module.out_features
        return original(self, module)

    return features


def _patch_save_pretrained(original: Callable) -> Callable:
    """peft 0.21 (peft_model.py, `save_pretrained`) cannot save a DTensor: it asks for the address of its storage, and
    there is none. Collective here: every rank calls it, and the first writes the ordinary adapter folder. Delete when it
    gathers DTensors."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        if not is_parallelized(self):
            return original(self, save_directory, *args, state_dict=state_dict, **kwargs)
        if state_dict is None or any(isinstance(tensor, DTensor) for tensor in state_dict.values()):
            state_dict = saved_state_dict(self)
        if dist.get_rank() == 0:
            original(self, save_directory, *args, state_dict=state_dict, **kwargs)

    return save_pretrained


def _patch_update(original: Callable) -> Callable:
    """peft 0.21 (utils/other.py, `ModulesToSaveWrapper.update`) copies the module with the forward that sharding has
    put on it, which would go on using the original's parameters. Delete when what is put on a module is not bound to
    it."""

    @functools.wraps(original)
    def update(self, *args, **kwargs):
        with _whole(self.original_module):
            original(self, *args, **kwargs)
        self.original_module.requires_grad_(False)

    return update


def _patch_update_layer(original: Callable) -> Callable:
    """peft 0.21 (tuners/lora/dora.py, `DoraLinearLayer.update_layer`) takes the norms of the weight's rows, for which
    it adds plain tensors to the weight. Delete when it gathers a DTensor, as it gathers ZeRO's parameters."""

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


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """While inside, adapted layers in `module` run their base alone. peft 0.21's public switch (`disable_adapter`)
    changes `requires_grad` too. Delete when it does not."""
    adapted = [part for part in module.modules() if vars(part).get("_disable_adapters") is False]
    for part in adapted:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part in adapted:
            part._disable_adapters = False


PATCHES = (
    (LoraLayer, "_get_in_out_features", _patch_features),
    (PeftModel, "save_pretrained", _patch_save_pretrained),
    (ModulesToSaveWrapper, "update", _patch_update),
    (DoraLinearLayer, "update_layer", _patch_update_layer),
)
