"""Options that a script sets on the model itself: those that a sharded model cannot follow are refused by name."""

from __future__ import annotations

import functools
from collections import Counter

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..upstream.torch import fsdp2

REPLACES_LAYERS = "puts kernels that know nothing of the shards in place of the model's layers; leave it out"


OFFLOAD = (
    "activation checkpointing with offload=True copies what autograd keeps to the host, which a sharded stream does not allow; "
    "leave offload out (checkpointing keeps 1 / tp of it)"
)


SELECTIVE = (
    "gradient_checkpointing_kwargs={'selective': True} chooses operations by their names in one process; leave it out, and set "
    "HF_TPSP_ACTIVATION_CHECKPOINTING=selective"
)


def check_options(model: nn.Module) -> None:
    """Raise `ValueError` naming an option of `model`, not sharded yet, that the sharded model could not follow."""
    for module in model.modules():
        if getattr(module, "_use_kernels", False):
            raise ValueError(f"use_kernels=True {REPLACES_LAYERS}.")
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and getattr(module, "gradient_checkpointing", False):
            # transformers wraps `checkpoint` in a function of its own to offload.
            if function.func is not checkpoint:
                raise ValueError(f"{OFFLOAD}.")
            _check_arguments(function.keywords)


def check_dtypes(model: nn.Module) -> None:
    """Raise `ValueError` naming the parameters that are trained in another dtype than most of their FSDP2 group.

    FSDP2 reduces the gradients of a group in one dtype. transformers keeps some parameters in fp32
    (`_keep_in_fp32_modules_strict`).
    """
    prefixes = {module: prefix for prefix, module in model.named_modules()}
    for group in fsdp2.fsdp_groups(model):
        # The parameters are read from the modules, where a loader has put them. FSDP2's first forward looks there too.
        places = map(fsdp2.place_of, group.fsdp_params)
        named = {f"{prefixes[module]}.{name}".lstrip("."): module._parameters[name] for module, name in places}
        trained = {name: p.dtype for name, p in named.items() if p.requires_grad}
        if len(count := Counter(trained.values())) > 1:
            (most, _), *_ = count.most_common()
            others = [f"{name} ({dtype})" for name, dtype in trained.items() if dtype != most]
            named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            raise ValueError(
                f"{model._get_name()}: {named} would be trained beside parameters in {most}, and FSDP2 reduces the "
                "gradients of a layer in one dtype. Train with bf16=True (fp32 master weights), load the model with "
                "dtype=torch.float32, or freeze these parameters."
            )


def install(model: nn.Module) -> None:
    """Have each transformers model inside the sharded `model` refuse such an option when a script sets it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # The instance's methods are replaced, because transformers calls them whichever public name a script uses.
            module._activation_checkpointing_enable = _checked(module._activation_checkpointing_enable)
            module.set_use_kernels = _without_kernels


def _checked(enable):
    @functools.wraps(enable)
    def _activation_checkpointing_enable(activation_checkpointing_kwargs=None, every_n_layers=1, offload=False):
        arguments = dict(activation_checkpointing_kwargs or {})
        # TrainingArguments takes these two in the dictionary; the method would hand them on to torch, which refuses
        # them.
        every_n_layers = arguments.pop("every_n_layers", every_n_layers)
        if arguments.pop("offload", False) or offload:
            raise ValueError(f"{OFFLOAD}.")
        _check_arguments(arguments)
        enable(arguments or None, every_n_layers)

    return _activation_checkpointing_enable


def _check_arguments(arguments: dict) -> None:
    if arguments.get("selective"):
        raise ValueError(f"{SELECTIVE}.")


def _without_kernels(use_kernels: bool, *args, **kwargs) -> None:
    if use_kernels:
        raise ValueError(f"use_kernels=True {REPLACES_LAYERS}.")
