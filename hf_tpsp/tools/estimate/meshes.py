"""The model that an estimate is made for, and the meshes that it can run on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ...config import TPSPConfig, divisors

MODELS = Path(__file__).parent / "models"


def model_config(model: str | Path | PreTrainedConfig) -> tuple[str, PreTrainedConfig]:
    """Name and config of a checkpoint folder, a config.json, one of the shipped models, or a config.

    Raises:
        ValueError: it is none of these, or transformers does not know its model type.
    """
    if isinstance(model, PreTrainedConfig):
        return model.model_type, model
    shipped = {path.stem.lower(): path for path in sorted(MODELS.glob("*.json"))}
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = shipped.get(str(model).rpartition("/")[2].lower())
    if path is None or not path.is_file():
        names = [p.stem for p in shipped.values()]
        close = difflib.get_close_matches(str(model), names, n=1)
        raise ValueError(
            f"{str(model)!r} is neither a folder with a config.json, nor such a file, nor one of the shipped models "
            f"({', '.join(names)})." + (f" Did you mean {close[0]}?" if close else "")
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        raise ValueError(
            f"{path}: transformers knows no model type {kind!r}." + (f" Did you mean {close[0]!r}?" if close else "")
        )
    return path.stem if path.parent == MODELS else str(model), AutoConfig.for_model(kind, **values)


def legal_meshes(
    config: PreTrainedConfig,
    gpus: int,
    per_host: int,
    dp: int | None,
    tp: int | None,
    dp_replicate: int | None,
    **choices,
) -> Iterator[TPSPConfig]:
    """The meshes on `gpus` ranks: TP inside a host, and HSDP replicas of whole hosts.

    Raises:
        ValueError: there is none.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}.")
    if gpus > per_host and gpus % per_host:
        raise ValueError(f"{gpus} GPUs do not fill hosts of {per_host}; --per-host can be one of {divisors(gpus)}.")
    per_host = min(per_host, gpus)
    if tp is not None and per_host % tp:
        raise ValueError(
            f"tp={tp} does not divide the {per_host} GPUs of a host, so a TP group would span hosts; it can be one of "
            f"{divisors(per_host)}."
        )
    found, reason = [], None
    for tp_size in [tp] if tp else divisors(per_host):
        for replicas in [dp_replicate] if dp_replicate else divisors(gpus // tp_size):
            shard = dp or gpus // tp_size // replicas
            mesh = TPSPConfig(tp_size=tp_size, dp_shard_size=shard, dp_replicate_size=replicas, **choices)
            whole = not dp_replicate and replicas > 1 and shard * tp_size % per_host
            if mesh.world_size != gpus or whole:
                continue
            try:
                mesh.check_model(config)
            except ValueError as error:
                reason = reason or error
                continue
            found.append(mesh)
    if reason is not None and not found:
        raise reason
    if not found:
        asked = {"dp_replicate": dp_replicate, "dp": dp, "tp": tp}
        sizes = ", ".join(f"{name}={size}" for name, size in asked.items() if size)
        raise ValueError(
            f"No mesh of {gpus} GPUs has {sizes}: dp_replicate x dp x tp must be {gpus}. Leave one out, and it is found."
        )
    return found
