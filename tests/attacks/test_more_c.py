"""More of the same: seeds and rates that change between steps; what writes into its input; what the witness must see."""

import models
import parity
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate

import hf_tpsp
from attacks.test_random import alike, build
from hf_tpsp import TPSPConfig

# ---- random numbers: ranks that a script seeds apart between two steps --------------------------------------------------


def drifted(model, group) -> list[str]:
    """The parameters that the TP ranks hold alike, and do not any more."""
    return [
        name
        for name, p in model.named_parameters()
        if all(isinstance(x, Replicate) or d != "tp" for x, d in zip(p.placements, p.device_mesh.mesh_dim_names, strict=True))
        and not alike(p._local_tensor.detach(), group)
    ]  # fmt: skip


def noisy(kind: str, config: TPSPConfig) -> list[str]:
    """Three steps of a model that draws in a way that shows only while it runs: NEFTune's noise; dropout from the third step on."""
    model = models.build("llama") if kind == "neftune" else build("gpt2")
    hf_tpsp.parallelize(model, config).train()
    group = model._tpsp.mesh["tp"].get_group()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for part in dropouts:
        part.p = 0.0
    if kind == "neftune":
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out + torch.zeros_like(out).uniform_(-0.2, 0.2)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        if step == 2:
            for part in dropouts:
                part.p = 0.3
        batch = parity.shard_batch(models.batch(4, 17 - step), model._tpsp.mesh)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return drifted(model, group) + ([] if alike(torch.get_rng_state(), group) else ["generator"])


@pytest.mark.parametrize("settings", [{"sequence_parallel": False}, {"dp_shard_size": 2}], ids=str)
def test_seeds_and_rates_that_change_between_steps(ranks, settings):
    config = TPSPConfig(tp_size=2, check="off", **settings)
    for kind in ("neftune", "later"):
        assert ranks.run(config.world_size, noisy, kind, config) == [[]] * config.world_size
