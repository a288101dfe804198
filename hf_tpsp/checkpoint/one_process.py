"""A checkpoint that one process has saved, on the mesh: its optimizer's state and its random numbers.

Its weights are read by `integrations.loading`, as `from_pretrained` reads them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch.distributed.tensor import distribute_tensor
from transformers.trainer_pt_utils import safe_globals

_OPTIMIZER, _RANDOM_STATE = f"{OPTIMIZER_NAME}.pt", "rng_state.pth"


def is_of_the_mesh(folder: Path) -> bool:
    """Whether ranks have saved the checkpoint in `folder`."""
    return any(folder.glob(f"{FSDP_MODEL_NAME}*"))


def is_whole(folder: Path) -> bool:
    """Whether ranks have saved it under `FULL_STATE_DICT`, rank 0 all of it."""
    return any(folder.glob(f"{FSDP_MODEL_NAME}*.bin"))


def has_optimizer(folder: Path) -> bool:
    """Whether one process has saved an optimizer's state in `folder`."""
    return (folder / _OPTIMIZER).exists()


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """Give an optimizer of sharded parameters the state that one process saved, each rank its shards of it.

    Args:
        optimizer: of torch, or accelerate's around one.

    Raises:
        ValueError: the optimizer that was saved has other parameters.
    """
    path = folder / _OPTIMIZER
    # The file is mapped and not read: a rank takes from it what it keeps.
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    counts = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{path} has parameter groups of {counts[0]} parameters, and this run's optimizer has {counts[1]}. Resume with "
            "the model, adapter and weight decay that it was saved with."
        )
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    state = {
        number: {key: _cut(value, parameter, path) for key, value in saved["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in saved["state"]
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _cut(value: Any, parameter: torch.Tensor, path: Path) -> Any:
    """This rank's shard of a tensor that is shaped as its parameter. Anything else, such as the number of steps, is
    whole on every rank."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"{path} has a state of {list(value.shape)} for a parameter of {list(parameter.shape)}: it was saved with another "
            "model or optimizer."
        )
    shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.clone()


def has_random_state(folder: Path) -> bool:
    return (folder / _RANDOM_STATE).exists()


def load_random_state(folder: Path) -> None:
    """Give this rank's generators the state of the one process's, which all ranks so have in common, as at a start."""
    with safe_globals():
        states = torch.load(folder / _RANDOM_STATE, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
