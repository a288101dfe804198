"""A checkpoint that was made to run code: torch runs it, and hf_tpsp does not."""

import pickle
from pathlib import Path

import accelerate.accelerator
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers.trainer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hf_tpsp.upstream import install
from hf_tpsp.upstream.torch.unpickling import restricted

still_needed = pytest.mark.still_needed


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def checkpoint(tmp_path):
    """What a Trainer saves: tensors of several dtypes, and an optimizer's numbers."""
    model = nn.Linear(3, 3).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path, model, optimizer, state


def load(folder: Path, state: dict) -> dict:
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def in_the_description(folder: Path) -> dict:
    path = folder / ".metadata"
    description = pickle.loads(path.read_bytes())
    description.planner_data = Bomb(folder / "ran")
    path.write_bytes(pickle.dumps(description))
    return {"optimizer": {}}


def in_a_value(folder: Path) -> dict:
    dcp.save({"lr": Bomb(folder / "ran")}, checkpoint_id=folder, no_dist=True)
    return {"lr": 0.0}


@still_needed("unpickling.restricted")
@pytest.mark.parametrize("place", [in_the_description, in_a_value])
def test_a_checkpoint_runs_code(tmp_path, place):
    dcp.save({"optimizer": {"weight": torch.zeros(2)}}, checkpoint_id=tmp_path, no_dist=True)
    state, mark = place(tmp_path), tmp_path / "ran"
    with (
        restricted(),
        pytest.raises(CheckpointException, match=r"it was not called\.|was not loaded, because that could run code"),
    ):
        load(tmp_path, dict(state))
    assert not mark.exists()
    load(tmp_path, state)
    assert mark.exists()


def test_what_is_saved_is_read(checkpoint):
    folder, model, optimizer, saved = checkpoint
    again = get_optimizer_state_dict(model, optimizer)
    again["param_groups"][0]["lr"] = 0.0
    for values in again["state"].values():
        values["exp_avg"].zero_()
    with restricted():
        found = load(folder, {"optimizer": again})["optimizer"]
    assert found["param_groups"] == saved["param_groups"] and found["param_groups"][0]["lr"] == 0.5
    for name, values in saved["state"].items():
        assert torch.equal(found["state"][name]["exp_avg"], values["exp_avg"]) and values["exp_avg"].any()


def test_resuming_is_restricted(tmp_path, monkeypatch):
    """The Trainer's and accelerate's loading, as long as hf_tpsp is enabled."""
    places = [
        (m, f"load_fsdp_{n}") for m in (accelerate.accelerator, transformers.trainer) for n in ("model", "optimizer")
    ]
    dcp.save({"optimizer": {"weight": torch.zeros(2)}}, checkpoint_id=tmp_path, no_dist=True)
    state = in_the_description(tmp_path)
    for module, name in places:
        monkeypatch.setattr(module, name, load)
    undo = install.install()
    try:
        for module, name in places:
            with pytest.raises(
                CheckpointException, match=r"asks for pathlib.Path.touch|asks for \w+.*, which no description"
            ):
                getattr(module, name)(tmp_path, dict(state))
    finally:
        undo()
    assert not (tmp_path / "ran").exists()
