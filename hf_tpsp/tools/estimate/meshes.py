"""The meshes that a model can run on."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ...config import TPSPConfig, divisors
from ...inputs import MOST_RANKS, whole_number


def legal_meshes(
    config: PreTrainedConfig,
    gpus: int,
    per_host: int,
    dp: int | None,
    tp: int | None,
    dp_replicate: int | None,
    **choices,
) -> list[TPSPConfig]:
    """The meshes on `gpus` ranks: TP inside a host, and HSDP replicas of whole hosts.

    Raises:
        ValueError: there is none.
    """
    gpus = whole_number("gpus", gpus, most=MOST_RANKS)
    dp, tp, dp_replicate = (
        size if size is None else whole_number(name, size)
        for name, size in (("dp", dp), ("tp", tp), ("dp_replicate", dp_replicate))
    )
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
