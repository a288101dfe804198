"""Loss, gradients and weights of a parallelized model against the same model in one process. Runs on a rank."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace

import models
import torch
import torch.distributed as dist
import transformers

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.tools.verify.comparison import Errors, KeepFp64, full, largest, relative, shard_batch, train_beside

__all__ = [
    "Errors",
    "KeepFp64",
    "compare",
    "full",
    "largest",
    "relative",
    "shard_batch",
    "shared_folder",
    "train_beside",
]


def shared_folder() -> str:
    """One temporary folder for all ranks."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return names[0]


def compare(
    model_type: str,
    config: TPSPConfig,
    *,
    dtype: torch.dtype = torch.float32,
    length: int = 17,
    tied: bool = False,
    load: bool = True,
    padding: str | None = None,
    packed: bool = False,
    accumulate: int = 1,
    steps: int = 3,
    frozen: tuple[str, ...] = (),
    check: str = "off",
    settings: dict | None = None,
) -> Errors:
    """Largest relative errors: of the loss, over all gradients, over the weights after `steps` of AdamW."""
    config = replace(config, check=check)
    with KeepFp64() if dtype == torch.float64 else contextlib.nullcontext():
        return _compare(
            model_type, config, dtype, length, tied, load, padding, packed, accumulate, steps, frozen, settings or {}
        )


def _compare(model_type, config, dtype, length, tied, load, padding, packed, accumulate, steps, frozen, settings):
    reference = models.build(model_type, tied=tied, dtype=dtype, **settings)
    data = [
        models.batch(4, length, reference.config.vocab_size, seed=10 + i, padding=padding, packed=packed)
        for i in range(accumulate)
    ]
    if load:
        folder = shared_folder()
        if dist.get_rank() == 0:
            reference.save_pretrained(folder)
        dist.barrier()
        # The reference is read too: buffers of a model that was cast are not those of one that was read.
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        with hf_tpsp.enable(config):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    else:
        # Ranks but the first start from other weights: parallelize must take rank 0's.
        model = models.build(model_type, tied=tied, dtype=dtype, seed=dist.get_rank(), **settings)
        hf_tpsp.parallelize(model, config)
    mesh = model._tpsp.mesh
    for part in (reference, model):
        part.train()
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(not name.endswith(frozen) if frozen else True)

    return train_beside(reference, model, [data] * steps, config, mesh, clip=1.0)
