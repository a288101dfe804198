"""A training loop of one's own on accelerate, on the mesh and in one process: every loss, norm and weight."""

import models
import parity
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import hf_tpsp
from hf_tpsp import TPSPConfig

STEPS, HALF = 6, 3
MESHES = {"2x2": TPSPConfig(tp_size=2, dp_shard_size=2), "hsdp": TPSPConfig(tp_size=2, dp_replicate_size=2)}


def rows(number: int) -> list[dict]:
    ids = torch.randint(3, 131, (number, 17), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(17) < i % 7, -100)} for i, row in enumerate(ids)]


def loop(folder: str, out: str, dp_size: int, resume: bool = False) -> dict:
    """An ordinary loop: accumulate two batches of 4 rows, clip, step, schedule; the state is saved half-way."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # accelerate counts a batch of each data-parallel rank as a step of the schedule
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / dp_size))
    # 44 rows: 11 batches in an epoch, so that the second one begins in the middle of an accumulation.
    loader = DataLoader(rows(44), batch_size=4 // dp_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    logged, step = [], 0
    if resume:
        accelerator.load_state(f"{out}/state")
        step = HALF
    first = accelerator.skip_first_batches(loader, 2 * HALF) if resume else loader
    while step < STEPS:
        for batch in first:
            with accelerator.accumulate(model):
                items = accelerator.reduce((batch["labels"][:, 1:] != -100).sum(), "sum")
                items = items / (accelerator.num_processes // dp_size)
                loss = model(**batch, num_items_in_batch=items).loss * dp_size
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5) if accelerator.sync_gradients else None
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            mean = accelerator.reduce(loss.detach().clone(), "mean").item()
            logged.append((mean, None if norm is None else float(parity.full(norm)), scheduler.get_last_lr()[0]))
            step += accelerator.sync_gradients
            if step == HALF and accelerator.sync_gradients and not resume:
                accelerator.save_state(f"{out}/state")
            if step == STEPS:
                break
        first = loader
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        f"{out}/model", state_dict=weights, is_main_process=accelerator.is_main_process
    )
    return {"logged": logged, "weights": weights}


def on_mesh(config: TPSPConfig, *args) -> dict:
    with hf_tpsp.enable(config):
        found = loop(*args)
    kinds = {type(weight) for weight in found["weights"].values()}
    assert kinds <= {torch.Tensor} and (dist.get_rank() == 0) == bool(kinds)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    models.build("qwen2", tied=True).save_pretrained(folder)
    return folder


def assert_equal(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for value, limit, other in zip(mine, (1e-5, 1e-4, 0), theirs, strict=True):
            assert (value is None) == (other is None) and (value is None or abs(value - other) <= limit * other)


@pytest.mark.parametrize("mesh", ["2x2", pytest.param("hsdp", marks=pytest.mark.slow)])
def test_loop(ranks, tiny, tmp_path, mesh):
    """Losses, norms, learning rates and weights of one process; resumed, bitwise those of the run that went on."""
    config = MESHES[mesh]
    expected = loop(tiny, str(tmp_path / "one"), 1)
    whole = ranks.run(config.world_size, on_mesh, config, tiny, str(tmp_path / "mesh"), config.dp_size)
    for found in whole:
        assert_equal(found["logged"], expected["logged"])
    # The head is tied to the embedding; accelerate names it once more in one process or under FSDP2, not in both.
    for name in (expected["weights"].keys() | whole[0]["weights"].keys()) - {"lm_head.weight"}:
        assert parity.relative(whole[0]["weights"][name], expected["weights"][name]) < 1e-4, name

    resumed = ranks.run(config.world_size, on_mesh, config, tiny, str(tmp_path / "mesh"), config.dp_size, True)[0]
    assert resumed["logged"] == whole[0]["logged"][2 * HALF :]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "mesh" / "model", dtype=torch.float32).state_dict()
    for name, weight in whole[0]["weights"].items():
        assert torch.equal(resumed["weights"][name], weight) and torch.equal(saved[name], weight), name
