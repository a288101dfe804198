"""transformers' Trainer: the options it refuses, and what is put around its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from ..config import TPSPConfig
from ..forward import batch_check
from ..loss.cross_entropy import causal_lm_loss
from ..loss.logits import LazyLogits
from ..patching import swap
from . import alike
from .contract import Integration

logger = logging.get_logger(__name__)

# Optimizers that update each element by itself, so that it does not matter how a parameter is sharded. Others look at
# whole rows, blocks or singular values.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


# Refused option → why it does not work with hf_tpsp, and what to do instead.
REFUSED = {
    "auto_find_batch_size": "would have to unshard the model; set per_device_train_batch_size",
    "torch_compile": "would compile the whole model, hooks and all; leave it out and set HF_TPSP_COMPILE=true, which "
    "compiles each decoder layer",
    "use_liger_kernel": "puts kernels that know nothing of the shards in place of the model's layers and loss; leave it "
    "out (the loss is computed in chunks anyway)",
    "eval_use_gather_object": "gathers every sample once per TP rank; leave it out",
    "use_kernels": "puts kernels that know nothing of the shards in place of the model's layers; leave it out",
}


# What a tokenizer puts into texts by itself.
SPECIAL_TOKENS = ("pad_token", "eos_token", "bos_token", "unk_token")


def refuses(args: TrainingArguments) -> list[str]:
    """A sentence for each of the Trainer's arguments that would not train what one process does."""
    problems = [f"{name}=True {why}" for name, why in REFUSED.items() if getattr(args, name, False)]
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
    return problems


def check_parameters(model: nn.Module) -> None:
    """Raise `ValueError` naming the parameters that were added after the sharding, such as peft's. Nothing would reduce
    their gradients."""
    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        named = ", ".join(plain[:3]) + (f" and {len(plain) - 3} more" if len(plain) > 3 else "")
        raise ValueError(
            f"These parameters were added to a model that is already sharded, and would train unsharded and unreduced: "
            f"{named}. Of adapters, peft's LoRA is supported, added before the Trainer is made."
        )


def check_tokenizer(model: PreTrainedModel, processing_class: Any) -> None:
    """Raise `ValueError` if a token that the tokenizer puts into its texts has no row in the embedding: one of its
    special tokens, or of its chat template. Any other that has none is named in a warning: published models have such
    tokens, which no text of theirs holds."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    rows = batch_check.vocabularies(model)["input_ids"]
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or rows is None or len(tokenizer) <= rows:
        return
    outside = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    uses = {getattr(tokenizer, name, None): name for name in SPECIAL_TOKENS}
    uses |= {token: "chat template's" for token in tokenizer.get_added_vocab() if token in str(tokenizer.chat_template)}
    used = [f"its {uses[token]} {token!r} is {index}" for token, index in outside.items() if token in uses]
    sizes = f"The tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows"
    if used:
        raise ValueError(
            f"{sizes}: {used[0]}. Call model.resize_token_embeddings({len(tokenizer)}) in one process, save that model, "
            "and train it; or use tokens that the model has."
        )
    if outside and PartialState().is_main_process:
        logger.warning_once(f"hf_tpsp: {sizes}. A text with one of {', '.join(list(outside)[:3])} would end the run.")


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
    # hf_tpsp has done this itself, by `TPSPConfig.activation_checkpointing`.
    state.fsdp_plugin.activation_checkpointing = False


def _knows_batch(original: Callable) -> Callable:
    """A Trainer's step whose forward compares the whole batch over the ranks. The model itself is not given the labels
    of a smoothed loss, nor those of a loss of the script's own."""

    @functools.wraps(original)
    def step(self, model, inputs, *args, **kwargs):
        with batch_check.beside(_batch=inputs):
            return original(self, model, inputs, *args, **kwargs)

    return step


def _whole_predictions(original: Callable) -> Callable:
    """`Trainer.prediction_step` whose logits, where `compute_metrics` or `predict` asks for them, are whole."""

    @functools.wraps(original)
    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = original(self, *args, **kwargs)
        return loss, tree_map_only(DTensor, DTensor.full_tensor, logits), labels

    return prediction_step


def patch_label_smoother(original):
    """`LabelSmoother.__call__` (of `TrainingArguments(label_smoothing_factor=…)`) on vocabulary shards."""

    @functools.wraps(original)
    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None):
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, (LazyLogits, DTensor)):
            return original(self, model_output, labels, shift_labels, num_items_in_batch)
        return causal_lm_loss(
            logits,
            labels,
            num_items_in_batch=num_items_in_batch,
            ignore_index=self.ignore_index,
            shift_labels=None if shift_labels else labels,
            label_smoothing=self.epsilon,
        )

    return __call__


def _compares_arguments(original: Callable) -> Callable:
    """The first step of a Trainer that needs its arguments, after which it first counts on all ranks."""

    @functools.wraps(original)
    def create_accelerator_and_postprocess(self):
        original(self)
        alike.compare_arguments(self.args)

    return create_accelerator_and_postprocess


def _compares_start(original: Callable) -> Callable:
    @functools.wraps(original)
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        alike.compare_start(self, resume_from_checkpoint)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return train


def install() -> Callable[[], None]:
    """Patch the Trainer's steps and its label smoother. Returns the function that undoes it."""
    return swap(
        (Trainer, "create_accelerator_and_postprocess", _compares_arguments),
        (Trainer, "train", _compares_start),
        (LabelSmoother, "__call__", patch_label_smoother),
        (Trainer, "training_step", _knows_batch),
        (Trainer, "prediction_step", _knows_batch),
        (Trainer, "prediction_step", _whole_predictions),
    )


TRAINER = Integration(install, refuses=refuses)
