"""`enable()`: the whole of hf_tpsp for one process; `TPSPCallback`: its part in the Trainer."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers.trainer
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from . import compat, guard, loading
from .config import TPSPConfig
from .integrations import peft
from .loss import patch_label_smoother
from .options import check_dtypes
from .parallelize import Parallelized, is_parallelized, parallelize, parallelized_model

logger = logging.get_logger(__name__)


class TPSPCallback(TrainerCallback):
    """Parallelizes the Trainer's model when the Trainer is made, unless the loading hook has, and checks the set-up.

    `enable()` adds it to every Trainer. To write it yourself: `Trainer(…, callbacks=[TPSPCallback()])`, launched with
    one of the presets, or with a config given here. Make it before the `TrainingArguments`.

    Args:
        config: defaults to `TPSPConfig.from_accelerate()`.
    """

    def __init__(self, config: TPSPConfig | None = None):
        self.config = config or TPSPConfig.from_accelerate()
        if self.config.world_size > 1 and not _active:
            _install(self.config, hook_loading=False)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.set_up(args, state, model)

    def set_up(self, args, state, model) -> None:
        """Ready a model of the Trainer's, the first one or one that `model_init` has made since."""
        if self.config.world_size == 1 or model is None:
            return
        check_training_arguments(args)
        if library_of(args) == "trl":
            _install_once("trl")
        if not is_parallelized(model):
            parallelize(model, self.config)
        inner = parallelized_model(model)
        done: Parallelized = inner._tpsp
        check_accelerator(done.config)
        if done.config.compile and args.gradient_checkpointing:
            replace(done.config, activation_checkpointing="full")  # says why not
        check_parameters(model)
        set_mixed_precision(model)  # TrainingArguments(bf16=True), else what the preset says
        check_dtypes(inner)
        if state.is_world_process_zero:
            c = done.config
            logger.info(
                f"hf_tpsp: {type(inner).__name__} on dp_replicate {c.dp_replicate_size} x dp_shard {c.dp_shard_size} x "
                f"tp {c.tp_size}, sequence parallel {'on' if c.sequence_parallel else 'off'}, loss {c.loss}"
            )


def parallelize_prepared(args: tuple) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Parallelize the causal LMs that `accelerator.prepare` is given whole, made from a config for one, wrapped or not.

    Returns:
        Each of these models, with the parameters that it had before, by name (tied ones by each of theirs).

    Raises:
        ValueError: the model cannot be sharded, or has parameters outside of the causal LM that it wraps.
    """
    replaced = []
    for model in args:
        if not isinstance(model, nn.Module) or not _active or is_parallelized(model):
            continue
        lm = next(
            (m for m in model.modules() if isinstance(m, PreTrainedModel) and loading.is_causal_lm(type(m))), None
        )
        if lm is None:
            continue
        config = _active[0].config
        check_accelerator(config)
        loading.check_not_quantized(lm.config)
        before = dict(model.named_parameters(remove_duplicate=False))
        inside = {id(p) for p in lm.parameters()}
        if outside := [name for name, p in before.items() if id(p) not in inside]:
            raise ValueError(
                f"{type(model).__name__} has parameters outside of the {type(lm).__name__} that hf_tpsp would shard: "
                f"{', '.join(outside[:3])}. Prepare the causal LM itself, or prepare this model before hf_tpsp.enable()."
            )
        parallelize(model if peft.is_adapted(model) else lm, config)
        check_parameters(model)
        replaced.append((model, before))
    return replaced


def set_mixed_precision(model: nn.Module) -> None:
    """Have a sharded model compute in what accelerate's mixed precision is, and train in fp32."""
    bf16 = AcceleratorState().mixed_precision == "bf16"
    if bf16:
        keep_fp32_masters(model)
    compat.set_mixed_precision(parallelized_model(model), torch.bfloat16 if bf16 else None)


def keep_fp32_masters(model: nn.Module) -> None:
    """Cast what is trained to fp32: accelerate would cast only the outer dtype of a DTensor. Under adapters, the frozen
    base stays as it is."""
    parallelized_model(model)._tpsp.gradients.adapters_to(torch.float32)
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        logger.info(
            "hf_tpsp: bf16 training keeps fp32 master weights; the model is cast to fp32, and saved in fp32 (one process "
            "would save it in the dtype it came in)."
        )
        model.float()


# Optimizers that treat each element alike, whatever the shards; others look at whole rows, blocks or singular values.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
TRL_CONFIGS = ("SFTConfig", "DPOConfig")
# Options of the Trainer and of TRL's that would train something else than one process does: why, and what to do.
REFUSED = {
    "auto_find_batch_size": "would have to unshard the model; set per_device_train_batch_size",
    "torch_compile": "would compile the whole model, hooks and all; leave it out and set HF_TPSP_COMPILE=true, which "
    "compiles each decoder layer",
    "use_liger_kernel": "puts kernels that know nothing of the shards in place of the model's layers and loss; leave it "
    "out (the loss is computed in chunks anyway)",
    "eval_use_gather_object": "gathers every sample once per TP rank; leave it out",
    "activation_offloading": "hooks what autograd keeps, as hf_tpsp does; leave it out and set "
    "HF_TPSP_ACTIVATION_CHECKPOINTING=full",
    "enable_jit_checkpoint": "saves when a timer on each rank says so, and ranks that begin at different steps wait for each "
    "other for ever; leave it out and set save_steps",
    "use_kernels": "puts kernels that know nothing of the shards in place of the model's layers; leave it out",
    "use_weighting": "needs a number of each token that the head on vocabulary shards does not compute; leave it out",
    "precompute_ref_log_probs": "hashes the whole reference model, which is sharded; leave it out",
    "sync_ref_model": "copies whole weights from one sharded model to another; leave it out",
}


def library_of(args) -> str:
    """The library that a trainer's arguments, or the class they derive from, belong to: "trl" or "transformers"."""
    modules = [cls.__module__.partition(".")[0] for cls in type(args).__mro__]
    return "trl" if "trl" in modules else "transformers"


def check_training_arguments(args) -> None:
    """Refuse the `TrainingArguments` that would train something else than one process does. Raises `ValueError`."""
    problems = [f"{name}=True {why}" for name, why in REFUSED.items() if getattr(args, name, False)]
    if library_of(args) == "trl" and not any(cls.__name__ in TRL_CONFIGS for cls in type(args).__mro__):
        problems.append(f"{type(args).__name__}: of TRL's trainers, those of {', '.join(TRL_CONFIGS)} are supported")
    if args.mixed_precision == "fp16":
        problems.append("fp16=True needs loss scaling that knows of the shards; use bf16=True")
    if args.optim not in OPTIMIZERS:
        problems.append(
            f"optim={str(getattr(args.optim, 'value', args.optim))!r} has not been shown to work on shards; of the "
            f"Trainer's, {', '.join(OPTIMIZERS)} have"
        )
    if args.train_sampling_strategy == "batch_rebalance":
        problems.append(
            'train_sampling_strategy="batch_rebalance" deals other batches to each rank of a TP group; use "group_by_length"'
        )
    if args.accelerator_config.dispatch_batches:
        problems.append("dispatch_batches=True does not deal batches by the mesh; leave it out")
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        problems.append(
            "gradient_checkpointing_kwargs={'selective': True} chooses operations by their names in one process; leave it "
            "out, with gradient_checkpointing=False, and set HF_TPSP_ACTIVATION_CHECKPOINTING=selective"
        )
    if (args.activation_checkpointing_kwargs or {}).get("offload"):
        problems.append(
            "activation_checkpointing_kwargs={'offload': True} copies what autograd keeps to the host, which a sharded stream "
            "does not allow; leave offload out (checkpointing keeps 1 / tp of it)"
        )
    if args.fsdp:
        policy = (args.fsdp_config or {}).get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
        if str(policy).upper().rpartition(".")[2] != "NO_WRAP":
            problems.append(f"fsdp_config auto_wrap_policy {policy!r} wraps a model that is sharded; leave `fsdp` out")
    if problems:
        raise ValueError("These TrainingArguments do not work with hf_tpsp: " + "; ".join(problems) + ".")


def check_parameters(model: nn.Module) -> None:
    """Raise `ValueError` naming the parameters that came after the sharding, such as peft's: nobody would reduce their
    gradients."""
    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        named = ", ".join(plain[:3]) + (f" and {len(plain) - 3} more" if len(plain) > 3 else "")
        raise ValueError(
            f"These parameters were added to a model that is already sharded, and would train unsharded and unreduced: "
            f"{named}. Of adapters, peft's LoRA is supported, added before the Trainer is made."
        )


def check_accelerator(config: TPSPConfig) -> None:
    """Raise `ValueError` unless the Trainer's accelerator deals batches and saves state for the mesh of the model."""
    state = AcceleratorState()
    pc = state.parallelism_config
    sizes = None if pc is None else (pc.data_parallel_size, pc.tp_size)
    if not state.is_fsdp2 or sizes != (config.dp_size, config.tp_size):
        raise ValueError(
            f"The model is on a mesh of (data parallel, tensor parallel) = {(config.dp_size, config.tp_size)}, but "
            f"accelerate runs {state.distributed_type.value} with {sizes}. Launch with a preset of these sizes "
            "(`hf-tpsp config`), or call hf_tpsp.enable(config) before the TrainingArguments are made."
        )
    policy = state.fsdp_plugin.auto_wrap_policy
    if policy is not None:
        raise ValueError(
            f"accelerate's FSDP wrap policy is {getattr(policy, '__name__', policy)}, which would wrap a model that is "
            "already sharded. Set `fsdp_auto_wrap_policy: NO_WRAP` in the accelerate config."
        )
    state.fsdp_plugin.activation_checkpointing = False  # TPSPConfig.activation_checkpointing has done it


_active: list[Enabled] = []


class Enabled:
    """The handle of `enable()`: a context manager, or call `disable()`."""

    def __init__(self, config: TPSPConfig, undo: list[Callable[[], None]]):
        self.config = config
        self.integrations: set[str] = set()
        self._undo = undo

    def disable(self) -> None:
        """Leave transformers and accelerate as they were. Models that are sharded stay so."""
        while self._undo:
            self._undo.pop()()
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc) -> None:
        self.disable()


def enable(config: TPSPConfig | None = None) -> Enabled:
    """Train this process's causal LMs on the mesh: one line at the top of a script, before its TrainingArguments.

    From here on `from_pretrained` shards causal LMs while it reads them, and every `Trainer` gets a `TPSPCallback`. In a
    process that was not launched as one of several, nothing changes.

    Args:
        config: defaults to `TPSPConfig.from_accelerate()`, the mesh of the preset `accelerate launch` was given.

    Returns:
        A handle that undoes everything: `with enable(): …`, or `handle.disable()`.

    Raises:
        ValueError: the mesh does not have as many ranks as were started, or it was enabled with another config already.
    """
    use_cpu_if_alone()
    config = config or TPSPConfig.from_accelerate()
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    if _active:
        if _active[0].config != config:
            raise ValueError(f"hf_tpsp is enabled with {_active[0].config}; disable() that first.")
        return _active[0]
    if config.world_size == 1:
        return Enabled(config, [])
    return _install(config, hook_loading=True)


def use_cpu_if_alone() -> None:
    """Have accelerate run the ranks on the CPU if there is nothing else: its FSDP launcher drops `use_cpu`.

    accelerate 1.15 (utils/launch.py, `prepare_multi_gpu_env`) does not export ACCELERATE_USE_CPU, and without it the
    ranks of a machine without accelerators silently become single processes. Delete when it does.
    """
    if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def _install(config: TPSPConfig, hook_loading: bool) -> Enabled:
    undo = [
        _set_environment(config.environment()),
        compat.install(),
        peft.install(),
        compat.replace(
            (LabelSmoother, "__call__", patch_label_smoother),
            (Trainer, "training_step", _knows_batch),
            (Trainer, "prediction_step", _knows_batch),
            (Trainer, "prediction_step", _whole_predictions),
            (Trainer, "call_model_init", _set_up_again),
        ),
    ]
    if int(os.environ.get("RANK", "0")) > 0 and logging.is_progress_bar_enabled():
        logging.disable_progress_bar()  # one bar while loading, not one of each rank
        undo.append(logging.enable_progress_bar)
    handle = Enabled(config, undo)
    _active.append(handle)  # before the callback is made, which would install the glue if nobody had
    if hook_loading:
        undo.append(loading.install(config))
        undo.append(_add_callback(TPSPCallback(config)))
    return handle


def _install_once(integration: str) -> None:
    """Put an integration's patches in place, until `disable()`. Its library is imported by now."""
    handle = _active[0]
    if integration not in handle.integrations:
        handle.integrations.add(integration)
        handle._undo.append(importlib.import_module(f".integrations.{integration}", __package__).install())


def _knows_batch(original: Callable) -> Callable:
    """A Trainer's step, whose forward compares all of the batch: of labels for a smoothed loss, or for one of the script's own,
    the model knows nothing."""

    @functools.wraps(original)
    def step(self, model, inputs, *args, **kwargs):
        with guard.beside(_batch=inputs):
            return original(self, model, inputs, *args, **kwargs)

    return step


def _whole_predictions(original: Callable) -> Callable:
    """`Trainer.prediction_step` whose logits, where `compute_metrics` or `predict` asks for them, are whole."""

    @functools.wraps(original)
    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = original(self, *args, **kwargs)
        return loss, tree_map_only(DTensor, DTensor.full_tensor, logits), labels

    return prediction_step


def _set_up_again(original: Callable) -> Callable:
    """`Trainer.call_model_init`, whose second model (`train()` makes a new one) is readied as the first was."""

    @functools.wraps(original)
    def call_model_init(self, *args, **kwargs):
        model = original(self, *args, **kwargs)
        handler = vars(self).get("callback_handler")  # there is none while the Trainer is made: `on_init_end` will come
        for callback in handler.callbacks if handler is not None else ():
            if isinstance(callback, TPSPCallback):
                callback.set_up(self.args, self.state, model)
        return model

    return call_model_init


def _set_environment(values: dict[str, str]) -> Callable[[], None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return restore


def _add_callback(callback: TPSPCallback) -> Callable[[], None]:
    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(callback)
    return lambda: callbacks.remove(callback)
