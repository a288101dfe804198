"""The functions of flash attention and flex_attention in plain PyTorch, with their signatures, so that what transformers hands to the kernels is
computed on the CPU. The kernels themselves need CUDA."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flex_attention as flex

from hf_tpsp.patching import swapped

calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
"""What the kernels were called with: their name, the shape of the query, and `cu_seqlens_q`."""


def attention(q, k, v, scale, causal, window, softcap, s_aux) -> Tensor:
    """`[tokens, heads, head_dim]` of one sequence; the last query sees the last key. `window`: tokens to the left and to
    the right that are seen, -1 for all."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k)) - torch.arange(len(q)).unsqueeze(1) - (len(k) - len(q))
    left, right = window
    hidden = (distance > 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden | ((distance < -left) if left >= 0 else False) | ((distance > right) if right >= 0 else False)
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(-1, 1, 1).expand(-1, len(q), 1)], dim=-1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :-1], v)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, s_aux=None,
):  # fmt: skip
    calls.append(("flash_attn_func", tuple(q.shape), ()))
    rows = [attention(*row, softmax_scale, causal, window_size, softcap, s_aux) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    s_aux=None,
):  # fmt: skip
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    calls.append(("flash_attn_varlen_func", tuple(q.shape), tuple(starts)))
    assert starts[0] == 0 and starts[-1] == len(q) and key_starts[-1] == len(k)
    assert cu_seqlens_q.dtype == torch.int32 and max(b - a for a, b in itertools.pairwise(starts)) == max_seqlen_q
    lengths, key_lengths = ([b - a for a, b in itertools.pairwise(s)] for s in (starts, key_starts))
    parts = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    return torch.cat([attention(*part, softmax_scale, causal, window_size, softcap, s_aux) for part in parts])


def flex_attention(
    query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, **kwargs
) -> Tensor:
    """torch's own has no backward on the CPU."""
    calls.append(("flex_attention", tuple(query.shape), ()))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    batch, heads, length, keys = scores.shape
    at = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *at)
    if block_mask is not None:
        # What is not sharded is as long as the sequence that attention sees.
        assert block_mask.seq_lengths == (length, keys), (block_mask.seq_lengths, length, keys)
        scores = scores.masked_fill(~create_mask(block_mask.mask_mod, batch, heads, length, keys, "cpu"), -torch.inf)
    # A query that sees nothing (padding) gets zeros.
    sees_nothing = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(sees_nothing, 0).softmax(-1).masked_fill(sees_nothing, 0) @ value


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """While inside, every flash attention and `flex_attention` of transformers is one of the functions above."""
    calls.clear()
    flash._loaded_implementation = None
    functions = flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input
    try:
        with swapped(
            (flash, "_lazy_imports", lambda original: lambda *args, **kwargs: functions),
            (transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda original: lambda *args, **kwargs: True),
            (flex, "compile_friendly_flex_attention", lambda original: flexible),
        ):
            yield
    finally:
        flash._loaded_implementation = None


def flexible(query, key, value, training=False, **kwargs) -> Tensor:
    return flex_attention(query, key, value, **kwargs)
