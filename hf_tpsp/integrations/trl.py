"""TRL 1.16: its fused language-model head, on vocabulary shards.

TRL's trainers do not read logits. They call the model with `fused_lm_head=True` and take per-token log-probabilities,
entropy and top-1 from it, for which TRL gathers the whole head on every rank. Here the same numbers come out of the
chunked loss, and everything else of TRL's is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput

from ..forward.batch_check import beside
from ..loss.cross_entropy import IGNORE_INDEX, vocab_parallel_statistics
from ..loss.logits import unread
from ..state import is_parallelized, parallelized_model
from ..upstream.patching import replace

OUTPUTS = ("log_probs", "entropy", "is_top1", "mean_logits")


def install() -> Callable[[], None]:
    """Put the head in the place of TRL's in SFTTrainer and DPOTrainer. Returns the function that undoes it."""
    return replace(
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
        if (loss := parallelized_model(model)._tpsp.config.loss) != "chunked":
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
    not under hf_tpsp (`compat._patch_gather_for_metrics`)."""

    @functools.wraps(original)
    def compute_loss(self, model, *args, **kwargs):
        if is_parallelized(self.model):
            self._tp_size = 1
        return original(self, model, *args, **kwargs)

    return compute_loss


def fused_forward(forward: Callable, temperature: float = 1.0) -> Callable:
    """`forward` of a parallelized model, with TRL's additional argument `fused_lm_head`."""

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
        with unread(), beside(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch):
            output = forward(*args, **{**kwargs, "use_cache": False})
        if shift_labels is None:  # as TRL does: one position less
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
