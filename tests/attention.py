"""Kernels of attention, packed and padded rows, on a mesh beside one process: loss and every gradient."""

from __future__ import annotations

import standins
import torch
import torch.distributed as dist

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.forward import packing
from hf_tpsp.patching import swapped
from hf_tpsp.tools.verify.comparison import Errors, backward, compare_gradients, relative_number
from hf_tpsp.tools.verify.verify import build

VOCABULARY = 131
LAYOUTS = ("plain", "packed", "told", "padded")
# Families, and what their small copies need to show what is peculiar to them.
FAMILIES: dict[str, dict] = {
    "llama": {}, "qwen2": {}, "mistral": {"sliding_window": 6}, "phi3": {}, "qwen3_moe": {}, "deepseek_v3": {},
    "gemma2": {"sliding_window": 6}, "gemma3_text": {"sliding_window": 6}, "gpt_oss": {"sliding_window": 6},
}  # fmt: skip


def rows(layout: str, number: int, length: int, vocab: int) -> list[dict]:
    """`number` batches of a single row; of two rows each where they are padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(number):
        ids = torch.randint(3, vocab, (2 if layout == "padded" else 1, length), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        cut = length // 3 + 1
        if layout == "padded":
            mask = torch.ones_like(ids)
            mask[1, cut:] = 0
            batch["labels"][mask == 0] = -100
            batch["attention_mask"] = mask
        elif layout != "plain":
            batch["position_ids"] = torch.cat([torch.arange(cut), torch.arange(length - cut)]).unsqueeze(0)
            batch["labels"][:, [0, cut]] = -100
        if layout == "told":
            starts = torch.tensor([0, cut, length], dtype=torch.int32)
            longest = max(cut, length - cut)
            batch |= dict(zip(packing.NAMES, (starts, starts, longest, longest), strict=True))
        found.append(batch)
    return found


def compare(
    family: str,
    attention: str,
    layout: str,
    config: TPSPConfig,
    *,
    dtype: torch.dtype = torch.float32,
    length: int = 17,
) -> tuple[Errors, int, set]:
    """The errors; how often transformers' layers asked on the mesh where the sequences begin; and what its kernels were
    called with there."""
    with standins.kernels_on_cpu():
        settings = {} if config.activation_checkpointing == "none" else {"use_cache": False}
        reference = build(family, dtype, VOCABULARY, {**FAMILIES[family], **settings})
        model = build(family, dtype, VOCABULARY, {**FAMILIES[family], **settings})
        for part in (reference, model):
            part.set_attn_implementation(attention)
            part.train()
        hf_tpsp.parallelize(model, config)
        errors = Errors()
        # A kernel looks for sequences in batches of one row, so that each data-parallel rank gets one.
        batches = rows(layout, config.dp_size, length, VOCABULARY)
        items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
        expected = sum(backward(reference, batch, items) for batch in batches)
        asked = []

        def counting(original):
            def function(position_ids, batch_size):
                if position_ids is not None and batch_size == 1:
                    asked.append(1)
                return original(position_ids, batch_size)

            return function

        standins.calls.clear()
        with swapped((standins.flash, "_is_packed_sequence", counting)):
            own = batches[dist.get_rank() // config.tp_size]
            found = torch.tensor(backward(model, own, items, config.dp_size), dtype=torch.float64)
        dist.all_reduce(found)
        errors.add("loss", relative_number(found.item() / config.tp_size, expected))
        compare_gradients(reference, model, errors, rounding=True)
        return errors, len(asked), set(standins.calls)


def compare_all(cases: list[tuple]) -> list[tuple[Errors, int, set]]:
    return [compare(*case) for case in cases]
