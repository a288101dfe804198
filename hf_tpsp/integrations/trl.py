"""TRL 1.16: its fused language-model head, on vocabulary shards.

TRL's trainers do not read logits. They call the model with `fused_lm_head=True` and take per-token log-probabilities,
entropy and top-1 from it, for which TRL gathers the whole head on every rank. Here the same numbers come out of the
chunked loss, and everything else of TRL's is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..forward.batch_check import beside
from ..loss.cross_entropy import IGNORE_INDEX, vocab_parallel_statistics
from ..loss.logits import keep_lazy
from ..patching import swap
from ..state import is_parallelized, record_of
from .contract import Integration

CONFIGS = ("SFTConfig", "DPOConfig")
# Refused option of TRL's → why it does not work with hf_tpsp, and what to do instead.
REFUSED = {
    "activation_offloading": "hooks what autograd keeps, as hf_tpsp does; leave it out and set "
    "HF_TPSP_ACTIVATION_CHECKPOINTING=full",
    "use_weighting": "needs a number of each token that the head on vocabulary shards does not compute; leave it out",
    "precompute_ref_log_probs": "hashes the whole reference model, which is sharded; leave it out",
    "sync_ref_model": "copies whole weights from one sharded model to another; leave it out",
}
OUTPUTS = ("log_probs", "entropy", "is_top1", "mean_logits")


def install() -> Callable[[], None]:
    """Replace TRL's fused head in SFTTrainer and DPOTrainer. Returns the function that undoes it."""
    # Importing TRL takes seconds, so only its own trainers wait for it.
    from trl.trainer import dpo_trainer, sft_trainer

    return swap(
        (sft_trainer, "add_fused_lm_head", _patch_add_fused_lm_head),
        (dpo_trainer, "add_fused_lm_head", _patch_add_fused_lm_head),
        (sft_trainer.SFTTrainer, "compute_loss", _patch_compute_loss),
        (dpo_trainer.DPOTrainer, "compute_loss", _patch_compute_loss),
    )


def _patch_add_fused_lm_head(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
        if not is_parallelized(model):
            return original(model, temperature, cast_lm_head_to_fp32, outputs)
        if (loss := record_of(model).config.loss) != "chunked":
            raise ValueError(f"TRL's trainers need the chunked loss; this model has loss={loss!r}. Leave `loss` out.")
        if cast_lm_head_to_fp32 or not set(outputs) <= set(OUTPUTS):
            raise ValueError(
                f"TRL asks for a fused head with {outputs}{' in fp32' if cast_lm_head_to_fp32 else ''}; on vocabulary "
                f"shards there are {OUTPUTS}. SFTTrainer needs no others, nor does DPOTrainer without use_weighting."
            )
        model.forward = fused_forward(model.forward, temperature)

    return add_fused_lm_head


def _patch_compute_loss(original: Callable) -> Callable:
    """TRL divides its token count by the TP ranks, because accelerate gathers each batch once for each of them. It does
    not under hf_tpsp (`upstream/accelerate.py`)."""

    @functools.wraps(original)
    def compute_loss(self, model, *args, **kwargs):
        if is_parallelized(self.model):
            self._tp_size = 1
        return original(self, model, *args, **kwargs)

    return compute_loss


def fused_forward(forward: Callable, temperature: float = 1.0) -> Callable:
    """`forward` of a parallelized model, with TRL's additional argument `fused_lm_head`."""

    from trl.trainer.utils import FusedCausalLMOutput

    @functools.wraps(forward)
    def fused(
        *args,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ):
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return forward(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})
        with keep_lazy(), beside(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch):
            output = forward(*args, **{**kwargs, "use_cache": False})
        # As in TRL, there is one position less if the labels are not shifted yet.
        if shift_labels is None:
            targets, positions = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), slice(0, -1)
        else:
            targets, positions = shift_labels, slice(None)
        logits = output.logits if temperature == 1.0 else output.logits / temperature
        found = vocab_parallel_statistics(logits, targets)
        log_probs, mask = -found.nll[:, positions], targets[:, positions] != IGNORE_INDEX
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / items,
            log_probs=log_probs,
            entropy=found.entropy[:, positions].masked_fill(~mask, 0.0),
            is_top1=found.is_top1[:, positions],
            mean_logits=found.mean_logit[:, positions].masked_fill(~mask, 0.0),
            label_mask=mask,
        )

    return fused


def is_of_trl(args: Any) -> bool:
    """Whether the class of a trainer's arguments, or one of its base classes, is TRL's."""
    return "trl" in (cls.__module__.partition(".")[0] for cls in type(args).__mro__)


def refuses(args: Any) -> list[str]:
    """A sentence for each of TRL's trainers and options in `args` that is not supported."""
    if not is_of_trl(args):
        return []
    problems = [f"{name}=True {why}" for name, why in REFUSED.items() if getattr(args, name, False)]
    if not any(cls.__name__ in CONFIGS for cls in type(args).__mro__):
        problems.append(f"{type(args).__name__}: of TRL's trainers, those of {', '.join(CONFIGS)} are supported")
    return problems


TRL = Integration(install, applies=is_of_trl, refuses=refuses)
