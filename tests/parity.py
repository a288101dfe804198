"""Loss, gradients and weights of a parallelized model against the same model in one process. Runs on a rank."""

from __future__ import annotations

import contextlib
import tempfile

import models
import torch
import torch.distributed as dist
import transformers

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.verify import KeepFp64, full, larger, relative


def dp_rank(mesh) -> int:
    return mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size() + mesh["dp_shard"].get_local_rank()


def shard_batch(batch: dict, mesh) -> dict:
    """This rank's rows: all ranks of a TP group get the same ones."""
    size = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    return {name: value.chunk(size)[dp_rank(mesh)] for name, value in batch.items()}


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
    settings: dict | None = None,
) -> dict[str, float]:
    """Largest relative errors: of the loss, over all gradients, over the weights after `steps` of AdamW."""
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

    def optimizer(part):
        # Weights whose gradient is rounding alone (a key's bias) get random signs from Adam: eps keeps them still.
        return torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)

    optimizers = optimizer(reference), optimizer(model)
    errors = {"loss": 0.0, "grad": 0.0, "norm": 0.0, "weight": 0.0}
    worst = ""
    for step in range(steps):
        items = sum((b["labels"][:, 1:] != -100).sum() for b in data)
        expected = found = 0.0
        for b in data:
            loss = reference(**b, num_items_in_batch=items).loss
            loss.backward()
            expected += loss.item()
            loss = model(**shard_batch(b, mesh), num_items_in_batch=items).loss
            (loss * config.dp_size).backward()  # FSDP averages over data parallelism
            found += loss.item()
        total = torch.tensor(found, dtype=torch.float64)
        dist.all_reduce(total)
        errors["loss"] = larger(errors["loss"], abs(total.item() / config.tp_size / expected - 1))
        if step == 0:
            expected_grads = {n: p.grad for n, p in reference.named_parameters()}
            assert expected_grads.keys() == {n for n, _ in model.named_parameters()}
            for name, parameter in model.named_parameters():
                if expected_grads[name] is None:
                    assert parameter.grad is None, f"{name} is frozen, but has a gradient"
                    continue
                error = relative(full(parameter.grad), expected_grads[name])
                if larger(errors["grad"], error) is not errors["grad"]:
                    errors["grad"], worst = error, name
        norms = [torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0) for part in (reference, model)]
        errors["norm"] = larger(errors["norm"], abs(full(norms[1]).item() / norms[0].item() - 1))
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    for expected_weight, found_weight in zip(reference.parameters(), model.parameters(), strict=True):
        error = relative(full(found_weight.detach()), expected_weight.detach())
        errors["weight"] = larger(errors["weight"], error)
    return {**errors, "worst": worst}
