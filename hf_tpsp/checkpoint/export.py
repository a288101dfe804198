"""A checkpoint of the mesh → the folder that a Trainer in one process would have saved.

Weights are read, converted and written a decoder layer at a time, and the optimizer's state likewise, so that neither is
ever in memory as a whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..upstream.torch.serialization import save_without_data, write_at
from . import manifest
from .one_process import is_of_the_mesh
from .sharded import ShardedState, by_layer

# What the ranks have written, in shards or, under FULL_STATE_DICT, whole; and what only holds of that.
_OF_THE_MESH = re.compile(
    rf"({FSDP_MODEL_NAME}|{OPTIMIZER_NAME})(_\d+|\.bin)|rng_state_\d+\.pth|{re.escape(manifest.NAME)}"
)


def export(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    max_shard_size: float = 5.0,
    optimizer: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint that was saved on the mesh as the folder that one process would have saved.

    `from_pretrained(out)` loads it, and a Trainer without hf_tpsp resumes from it. No ranks are needed. The weights keep
    the dtype that they were saved in, and get the names and layouts that `save_pretrained` gives them. `out` appears when
    it is complete. The most that is in memory is one weight file and one decoder layer.

    Args:
        checkpoint: a `checkpoint-N` folder.
        out: the folder to write. It must not exist, or be empty.
        max_shard_size: size of a weight file, in GB.
        optimizer: write `optimizer.pt`, which takes twice the size of the weights.
        trust_remote_code: run the model's own code, if the checkpoint has some.

    Raises:
        ValueError: the folder is no checkpoint of the mesh, or lacks the model's config; `out` is not empty.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not 0 < max_shard_size < math.inf:
        raise ValueError(f"max_shard_size must be a number of gigabytes above 0, got {max_shard_size!r}.")
    _check(checkpoint, out)
    partial = out.with_name(f"{out.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, partial, ignore=lambda _, names: {*filter(_OF_THE_MESH.fullmatch, names)})
        if not _holds_weights(partial):
            model = _model_on_meta(partial, trust_remote_code)
            weights = _converted(ShardedState(checkpoint / f"{FSDP_MODEL_NAME}_0"), model)
            _write_weights(weights, partial, max_shard_size * 1e9, model.num_parameters())
        sharded, whole = checkpoint / f"{OPTIMIZER_NAME}_0", checkpoint / f"{OPTIMIZER_NAME}.bin"
        if optimizer and sharded.exists():
            _write_optimizer(ShardedState(sharded), partial / f"{OPTIMIZER_NAME}.pt")
        elif optimizer and whole.exists():
            saved = torch.load(whole, weights_only=True, mmap=True)
            torch.save(_numbered(saved["state"], saved["param_groups"]), partial / f"{OPTIMIZER_NAME}.pt")
        _write_random_state(checkpoint / "rng_state_0.pth", partial / "rng_state.pth")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(checkpoint: Path, out: Path) -> None:
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder.")
    if not is_of_the_mesh(checkpoint):
        raise ValueError(
            f"{checkpoint} has no {FSDP_MODEL_NAME}_0 in it, so it is not a checkpoint of the mesh. Export takes a folder "
            "checkpoint-N that a Trainer has saved under hf_tpsp."
        )
    if not _holds_weights(checkpoint) and not (checkpoint / "config.json").exists():
        raise ValueError(
            f"{checkpoint} has neither an adapter nor a config.json. Copy the model's config.json and tokenizer into it, or the "
            f"{ADAPTER_CONFIG_NAME} and {ADAPTER_SAFE_WEIGHTS_NAME} of an adapter."
        )
    known = manifest.read(checkpoint)
    if known is not None and (problem := manifest.damage(checkpoint, known["files"])):
        raise ValueError(f"{problem}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Name another, or delete it.")


def _holds_weights(folder: Path) -> bool:
    """Whether a checkpoint of the mesh holds weights as Hugging Face has them: an adapter, whose folder bears its name if
    it has one, or, under FULL_STATE_DICT, the model."""
    names = (ADAPTER_SAFE_WEIGHTS_NAME, f"*/{ADAPTER_SAFE_WEIGHTS_NAME}", SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return any(any(folder.glob(name)) for name in names)


def _model_on_meta(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model of `folder`'s config, without weights: it knows its parameters' names, and how they are saved."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if cls is None:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return cls._from_config(config)


def _converted(state: ShardedState, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names and in the layouts that `save_pretrained` gives them."""
    saved = {name for (name,) in state}
    known = model.state_dict().keys()
    left_out = {*(model.all_tied_weights_keys or ()), *(model._keys_to_ignore_on_save or ())}
    if wrong := sorted((saved - known) | (known - saved - left_out)):
        raise ValueError(
            f"The checkpoint is not one of a {type(model).__name__} of its config.json: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more parameters' if wrong[3:] else ''} are in one of them only."
        )
    for names in by_layer(name for name in known if name in saved and name not in left_out):
        weights = state.read([(name,) for name in names])
        yield from revert_weight_conversion(model, {name: weights.pop((name,)) for name in names}).items()


def _write_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, limit: float, parameters: int) -> None:
    """Write `model.safetensors`, or, above `limit` bytes, several files and their index, as `save_pretrained` does."""
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def write() -> None:
        nonlocal size
        save_file(pending, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()
        size = 0

    for name, weight in weights:
        if pending and size + weight.nbytes > limit:
            write()
        pending[name] = weight.contiguous()
        size += weight.nbytes
        total += weight.nbytes
    write()
    names = (
        [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        if files[1:]
        else ["model.safetensors"]
    )
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)
    if files[1:]:
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": {weight: name for name, inside in zip(names, files, strict=True) for weight in inside},
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_optimizer(state: ShardedState, path: Path) -> None:
    """Write the optimizer's state as `torch.save(optimizer.state_dict())` in one process does."""
    groups: dict[int, dict[str, Any]] = {}
    for (_, index, key), value in state.read(path for path in state if path[0] == "param_groups").items():
        groups.setdefault(index, {})[key] = value
    entries: dict[str, list[tuple]] = {}
    for entry in state:
        if entry[0] == "state":
            entries.setdefault(entry[1], []).append(entry)
    ordered = [groups[index] for index in sorted(groups)]
    stand_ins = {name: {entry[2]: _stand_in(state, entry) for entry in own} for name, own in entries.items()}
    places = save_without_data(_numbered(stand_ins, ordered), path)["state"]
    numbers = _numbers(ordered)
    with path.open("r+b") as file:
        for layer in by_layer(name for name in numbers if name in entries):
            tensors = [entry for name in layer for entry in entries[name] if state.like(entry) is not None]
            for (_, name, key), value in state.read(tensors).items():
                write_at(file, places[numbers[name]][key], value)


def _numbers(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Parameters' names → their numbers in one process: they are counted in the order of the parameter groups."""
    return {name: number for number, name in enumerate(name for group in groups for name in group["params"])}


def _numbered(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict of an optimizer in one process, of one in which parameters go by their names."""
    numbers = _numbers(groups)
    return {
        "state": {number: state[name] for name, number in numbers.items() if name in state},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def _stand_in(state: ShardedState, entry: tuple) -> Any:
    """A tensor on meta for a tensor; what is none is read at once."""
    like = state.like(entry)
    return state.read([entry])[entry] if like is None else like


def _write_random_state(of_rank: Path, path: Path) -> None:
    """Rank 0's random numbers go on in one process. A rank saves those of all devices, one process those of its own."""
    if of_rank.exists():
        with safe_globals():
            states = torch.load(of_rank, weights_only=True)
        torch.save({k: v[0] if isinstance(v, list) else v for k, v in states.items()}, path)
