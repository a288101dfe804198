"""Where one row holds several sequences (packing, padding-free batches): said once a forward to flash attention.

For a batch of one row, transformers asks in every layer whether the positions start again somewhere, and where, and the
host waits for the device each time. Here it is asked once before the first layer, and handed to all of them in the
arguments that transformers has for it: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`. They are
those of the whole row, because attention sees the whole sequence of its heads.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from ..upstream.torch.fake import is_fake

NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def install(model: PreTrainedModel) -> None:
    """Give each training or evaluating forward of `model` the arguments of `sequences`, where its attention is a flash
    one."""
    inner = model.forward
    parameters = inspect.signature(inner).parameters
    if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return

    # The Trainer reads the signature of the forward.
    @functools.wraps(inner)
    def forward(*args, **kwargs):
        if _is_flash(model.config.get_text_config()):
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            if torch.is_grad_enabled() or given.get("labels") is not None:
                kwargs = {**kwargs, **sequences(given)}
        return inner(*args, **kwargs)

    model.forward = forward


def _is_flash(config: PreTrainedConfig) -> bool:
    """Whether every layer is a flash attention. A recurrent layer would take the same arguments, and start anew at each
    sequence, which in one process it does only if it is told to."""
    kinds = getattr(config, "layer_types", None) or ()
    return "flash" in (config._attn_implementation or "") and all("attention" in k and "linear" not in k for k in kinds)


def sequences(given: dict[str, Any]) -> dict[str, Tensor | int]:
    """Where the sequences of a single row begin and end, by the rule that transformers' layers go by: int32
    `[sequences + 1]`, and the length of the longest. Empty where a layer would not ask, or has been told.

    Positions that a script gives are read: one wait for the device.
    """
    x = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    is_told = any(given.get(name) is not None for name in (*NAMES, "past_key_values"))
    if not isinstance(x, Tensor) or is_fake(x) or is_told or x.shape[0] != 1 or x.shape[1] < 2:
        return {}
    length, positions = x.shape[1], given.get("position_ids")
    starts = torch.arange(0, length + 1, length, dtype=torch.int32, device=x.device)
    longest = length
    if positions is not None:
        if positions.shape != (1, length):
            return {}
        positions = positions.cpu()
        if (positions - positions.min() != torch.arange(length)).any():
            (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
            starts = starts.to(x.device, non_blocking=True)
    return dict(zip(NAMES, (starts, starts, longest, longest), strict=True))
