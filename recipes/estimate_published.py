"""What `hf_tpsp.estimate` predicts for the settings whose memory torchtitan has published, and what explains the rest.

    python recipes/estimate_published.py

The figures are torchtitan's (benchmarks/llama3_h100_202412_torchtitan.md: H100 with 96 GB, 8,192 tokens a row, fp32 masters,
bf16 compute; memory is the most that CUDA's caching allocator had reserved). Two of its choices are not hf_tpsp's:

- the loss: all logits, as fp32, through `F.cross_entropy`; at TP by torch's `loss_parallel`, which hf_tpsp has too;
- selective checkpointing keeps every second matrix product; hf_tpsp's keeps all of them but the partial sums.

The last column puts both into the same simulation, in place of hf_tpsp's own.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import hf_tpsp
from hf_tpsp import sharding
from hf_tpsp.loss import cross_entropy
from hf_tpsp.patching import swap
from hf_tpsp.styles import recompute
from hf_tpsp.tools.estimate.hardware import GIB, Hardware

# Model, GPUs, dp, tp, rows of a TP group, checkpointing, published GiB, and what else was different there.
PUBLISHED = [
    ("Llama-3.1-70B", 256, 32, 8, 16, "full", 71.9, "compiled, float8 linear layers"),
    ("Llama-3.1-8B", 8, 8, 1, 2, "selective", 82.4, "-"),
    ("Llama-3.1-8B", 128, 128, 1, 2, "selective", 67.0, "-"),
]


def every_second_product():
    """torchtitan's policy of selective checkpointing, as `context_fn`."""
    seen = {False: 0, True: 0}

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        keep = op in recompute.KEPT
        if op is torch.ops.aten.mm.default:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def whole_logits_loss(logits: DTensor, labels: Tensor, *args, **kwargs) -> Tensor:
    """The cross entropy of whole logits, in fp32."""
    local = logits.to_local(grad_placements=logits.placements).flatten(0, 1)
    return F.cross_entropy(local.float(), F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1))


@contextlib.contextmanager
def as_torchtitan(tp: int) -> Iterator[None]:
    patches = [(sharding, "selective_contexts", lambda original: every_second_product)]
    if tp == 1:
        patches.append((cross_entropy, "causal_lm_loss", lambda original: whole_logits_loss))
    restore = swap(*patches)
    try:
        yield
    finally:
        restore()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = (
        "model",
        "GPUs",
        "FSDP x TP",
        "rows",
        "checkpointing",
        "published, GiB",
        "there",
        "hf_tpsp",
        "as torchtitan",
        "/ published",
    )
    table = Table(*columns)
    for model, gpus, dp, tp, rows, kept, published, there in PUBLISHED:
        settings = {
            "gpus": gpus, "dp": dp, "tp": tp, "seq": 8192, "batch": rows, "activation_checkpointing": kept,
            "hardware": Hardware(memory=96 * 10**9), "answers": False,
        }  # fmt: skip
        ours = hf_tpsp.estimate(model, **settings).best.peak / GIB
        with as_torchtitan(tp):
            theirs = hf_tpsp.estimate(model, **settings, loss="loss_parallel").best.peak / GIB
        table.add_row(
            model, str(gpus), f"{dp} x {tp}", str(rows), kept, f"{published:.1f}", there, f"{ours:.1f}", f"{theirs:.1f}",
            f"{theirs / published:.2f}",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
