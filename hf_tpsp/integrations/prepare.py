"""accelerate: has `Accelerator.prepare` take sharded models and shard whole ones, for a script's own training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..patching import swap
from ..sharding import set_mixed_precision
from ..state import is_parallelized, set_timeout
from ..upstream.accelerate import prepare_beside_sharded
from . import alike, loading, registry, session
from .trainer import check_accelerator, check_parameters


def install() -> Callable[[], None]:
    """Have `prepare` take sharded models, and shard whole ones. Returns the function that undoes it."""
    return swap((Accelerator, "prepare", _patch_prepare))


def _patch_prepare(original):
    """`Accelerator.prepare` that takes models that are sharded already, and shards whole ones."""

    @functools.wraps(original)
    def prepare(self, *args, device_placement=None):
        if any(isinstance(arg, torch.optim.Optimizer) for arg in args):
            alike.compare_prepared(self, args)
        replaced = parallelize_prepared(args)
        sharded = [isinstance(arg, nn.Module) and is_parallelized(arg) for arg in args]
        if not any(sharded):
            _follow_parameters(args, replaced)
            return original(self, *args, device_placement=device_placement)
        if self.init_handler is not None and self.init_handler.timeout is not None:
            set_timeout(self.init_handler.timeout)
        for model in (arg for arg, ours in zip(args, sharded, strict=True) if ours):
            if self.mixed_precision not in ("no", "bf16"):
                raise ValueError(
                    f"Accelerator(mixed_precision={self.mixed_precision!r}) needs scaling that knows of the shards; use 'bf16'."
                )
            # This is for a script's own loop. For a Trainer, the callback has done it.
            if self.mixed_precision == "bf16":
                set_mixed_precision(model)
        _follow_parameters(args, replaced)
        return prepare_beside_sharded(self, args, sharded)

    return prepare


def _follow_parameters(args: tuple, replaced: list[tuple[nn.Module, dict[str, nn.Parameter]]]) -> None:
    """Point the optimizers in `args` at the sharded parameters, as accelerate's own FSDP2 path does.

    Args:
        replaced: each model that has just been sharded, with the parameters that it had before, by name. On each of
            these parameters the one that took its place is noted.

    Raises:
        ValueError: such an optimizer has taken steps, so that its state belongs to whole parameters.
    """
    for model, before in replaced:
        now = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in before.items():
            parameter._tpsp_replaced_by = now[name]
    for optimizer in args:
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        old = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "_tpsp_replaced_by")]
        if any(optimizer.state.get(p) for p in old):
            raise ValueError(
                "This optimizer has taken steps on the whole model that accelerator.prepare has sharded since. Make it, or "
                "load its state, after accelerator.prepare(model)."
            )
        for p in old:
            optimizer.state.pop(p, None)
        for group in optimizer.param_groups:
            group["params"] = [getattr(p, "_tpsp_replaced_by", p) for p in group["params"]]


def parallelize_prepared(args: tuple) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Shard the causal LMs that `accelerator.prepare` is given whole (made from a config, for example), inside another
    module or not.

    Returns:
        Each of these models, with the parameters that it had before, by name (a tied one under each of its names).

    Raises:
        ValueError: the model cannot be sharded, or has parameters outside of the causal LM that it wraps.
    """
    replaced = []
    for model in args:
        if not isinstance(model, nn.Module) or session.current() is None or is_parallelized(model):
            continue
        lm = next(
            (m for m in model.modules() if isinstance(m, PreTrainedModel) and loading.is_causal_lm(type(m))), None
        )
        if lm is None:
            continue
        config = session.current().config
        check_accelerator(config)
        loading.check_not_quantized(lm.config)
        before = dict(model.named_parameters(remove_duplicate=False))
        inside = {id(p) for p in lm.parameters()}
        if outside := [name for name, p in before.items() if id(p) not in inside]:
            raise ValueError(
                f"{type(model).__name__} has parameters outside of the {type(lm).__name__} that hf_tpsp would shard: "
                f"{', '.join(outside[:3])}. Prepare the causal LM itself, or prepare this model before hf_tpsp.enable()."
            )
        registry.shard(model if registry.wraps(model) else lm, config)
        check_parameters(model)
        replaced.append((model, before))
    return replaced
