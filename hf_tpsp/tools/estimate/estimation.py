"""`estimate`: will it fit, on which mesh, how long does a step take. Simulated, before a GPU is paid for.

Memory and traffic are recorded from the real package on one simulated rank (`simulate`). The time of a step is a model,
on top of the recorded FLOPs and bytes; `Estimate.assumptions` states it in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import logging

from ...config import TPSPConfig
from ...inputs import choice, flag, instance
from ...launch import SHIPPED
from ...plan.planner import plan_for
from ..source import read
from .depth import layer_kinds
from .hardware import FLOP_RATES, GIB, Hardware, MeshEstimate, judge
from .meshes import legal_meshes
from .simulate import Job, build_on_meta, simulate, simulated_world

# The number of simulations in search of the longest sequence, and of the largest batch.
SEARCH_STEPS = 6


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    Args:
        meshes: those that fit first, the fastest (tokens per second) first; then the others, the smallest peak first.
        skipped: meshes that were not simulated, because with less sharded state they cannot fit either.
        checkpointing: the best mesh under each activation checkpointing.
        longest_seq: tokens of the longest row that fits on the best mesh, with `job.batch` rows; 0 if none does.
        largest_batch: rows that fit there with `job.seq` tokens each; 0 if none does.
        preset: the shipped accelerate config of the best mesh, or the command that makes it.
    """

    model: str
    parameters: int
    gpus: int
    job: Job
    hardware: Hardware
    choices: dict[str, object]
    meshes: tuple[MeshEstimate, ...]
    skipped: tuple[str, ...]
    checkpointing: dict[str, MeshEstimate]
    longest_seq: int | None
    largest_batch: int | None
    preset: str
    assumptions: tuple[str, ...]

    @property
    def best(self) -> MeshEstimate:
        return self.meshes[0]

    def config(self) -> TPSPConfig:
        """The config of the best mesh."""
        return TPSPConfig(
            tp_size=self.best.tp, dp_shard_size=self.best.dp_shard, dp_replicate_size=self.best.dp_replicate,
            **self.choices,
        )  # fmt: skip

    def to_dict(self) -> dict:
        """All of it in plain types, as `--json` prints it."""
        return dataclasses.asdict(self)


def estimate(
    model: str | Path | PreTrainedConfig,
    *,
    gpus: int,
    seq: int,
    batch: int = 1,
    dp: int | None = None,
    tp: int | None = None,
    dp_replicate: int | None = None,
    dtype: str = "bf16",
    optim: str = "adamw",
    lora: int | None = None,
    attention: str = "fused",
    hardware: Hardware | None = None,
    answers: bool = True,
    backend: str = "nccl",
    progress: Callable[[str], None] | None = None,
    **choices,
) -> Estimate:
    """Simulate a step of training `model` on each legal mesh of `gpus` GPUs, and rank the meshes. Needs no GPU.

    Args:
        model: a checkpoint folder, a config.json, the name of a shipped model ("Llama-3-70B"; `hf_tpsp/tools/estimate/models`), a
            model type of transformers (with its default sizes), a hub name, or a config. No code of its own is run.
        gpus: ranks in all.
        seq, batch: tokens of a row, rows of a micro-batch of one TP group.
        dp, tp, dp_replicate: sizes that are fixed; FSDP shards over `dp` ranks. Without any, every legal mesh is tried.
        dtype, optim, lora, attention: as in `simulate.Job`.
        hardware: `Hardware()`, hosts of eight H100, if not given.
        answers: also look for the longest sequence, the largest batch, and the gain of checkpointing on the best mesh.
        backend: of the ranks: "gloo" sends a reduce-scatter as an all-to-all.
        progress: called with a line on each thing that is about to be simulated.
        choices: further fields of `TPSPConfig` (`loss`, `activation_checkpointing`, `sequence_parallel`, …).

    Raises:
        ValueError: an impossible mesh, an unknown model, a model that hf_tpsp does not support, a value that an argument
            cannot have, or a process that is part of a real world already.
        TypeError: `hardware` is no `Hardware`, or a choice is no field of `TPSPConfig`.
    """
    job = Job(seq=seq, batch=batch, dtype=dtype, optim=optim, lora=lora, attention=attention)
    hardware = Hardware() if hardware is None else hardware
    instance("hardware", hardware, Hardware, "Write Hardware(memory=…), in bytes.")
    choice("backend", backend, ("nccl", "gloo"))
    if given := sorted(choices.keys() & {"tp_size", "dp_shard_size", "dp_replicate_size", "mixed_precision"}):
        raise TypeError(
            f"estimate takes the sizes as tp, dp and dp_replicate, and the dtype as dtype, not as {given[0]}."
        )
    source = read(model)
    name, config = source.name, source.config
    if flag("compile", choices.get("compile", False)):
        raise ValueError("compile=True cannot be simulated: what compiled code keeps is the compiler's choice.")
    choices["mixed_precision"] = "bf16" if dtype == "bf16" else "no"
    meshes = legal_meshes(config, gpus, hardware.per_host, dp, tp, dp_replicate, **choices)
    whole = build_on_meta(config, job)
    # The plan raises for what hf_tpsp does not support, before anything is simulated.
    plan_for(whole, meshes[0])
    kinds = layer_kinds(whole)
    parameters = sum(p.numel() for p in whole.parameters())

    def run(mesh: TPSPConfig, job: Job, why: str = "") -> MeshEstimate:
        if progress:
            progress(
                f"{mesh.dp_replicate_size} x {mesh.dp_shard_size} x {mesh.tp_size}, {job.batch} x {job.seq} tokens{why}"
            )
        return judge(simulate(config, mesh, job, kinds), mesh, job, hardware)

    with _quiet(), simulated_world(gpus, backend):
        found: dict[TPSPConfig, MeshEstimate] = {}
        skipped = []
        # Of the meshes with one tp, the most sharded comes first.
        for mesh in meshes:
            if any(_at_least(mesh, m, e) > e.headroom for m, e in found.items() if m.tp_size == mesh.tp_size):
                skipped.append(f"{mesh.dp_replicate_size} x {mesh.dp_shard_size} x {mesh.tp_size}")
            else:
                found[mesh] = run(mesh, job)
        ranked = sorted(
            found, key=lambda m: (not found[m].fits, -found[m].tokens_per_second if found[m].fits else found[m].peak)
        )
        best = ranked[0]
        checkpointing, longest, largest = {}, None, None
        if answers:
            for kind in ("none", "selective", "full"):
                other = dataclasses.replace(best, activation_checkpointing=kind)
                checkpointing[kind] = found[best] if other == best else run(other, job, f", {kind} checkpointing")

            def fits(seq: int = job.seq, batch: int = job.batch) -> int:
                return run(best, dataclasses.replace(job, seq=seq, batch=batch), ", how far it goes").headroom

            granule = max(128, best.tp_size)
            here = found[best].headroom
            longest = _largest(lambda n: fits(seq=n), seq, here, seq * 2 if here > 0 else seq // 2, granule)
            largest = _largest(lambda n: fits(batch=n), batch, here, longest * batch // seq, 1)
    hosts = max(1, gpus // hardware.per_host)
    return Estimate(
        name, parameters, gpus, job, hardware, choices, tuple(found[m] for m in ranked), tuple(skipped), checkpointing,
        longest, largest, _preset(best, hosts), _assumptions(job, hardware, source.note),
    )  # fmt: skip


def _at_least(mesh: TPSPConfig, other: TPSPConfig, estimated: MeshEstimate) -> int:
    """By how many bytes at least the peak on `mesh` is higher than on `other`, which shards the state over more
    ranks."""
    state = estimated.at_peak["parameters"] + estimated.at_peak["optimizer"]
    return state * (other.dp_shard_size - mesh.dp_shard_size) // mesh.dp_shard_size


def _largest(headroom: Callable[[int], int], first: int, at_first: int, guess: int, granule: int) -> int:
    """The largest size that was found to have headroom, to within `granule`; 0 if there is none.

    Args:
        headroom: the headroom of a size, by simulation. It falls about linearly with the size.
        first: the size whose headroom is known to be `at_first`.
        guess: the size to try next.
    """
    known = {first: at_first}
    for _ in range(SEARCH_STEPS):
        fits = max((n for n in known if known[n] >= 0), default=0)
        fails = min((n for n in known if known[n] < 0), default=None)
        if fails is not None and fails - fits <= granule:
            break
        guess = max(guess // granule * granule, fits // granule * granule + granule)
        if fails is not None and guess >= fails:
            guess = (fails - 1) // granule * granule
        known[guess] = headroom(guess)
        # The next guess lies on the line through the two sizes whose headroom is nearest to zero.
        (a, x), (b, y) = sorted(known.items(), key=lambda item: abs(item[1]))[:2]
        guess = int(a + x * (b - a) / (x - y)) if x != y else 2 * guess
    return max((n for n in known if known[n] >= 0), default=0)


def _preset(mesh: TPSPConfig, hosts: int) -> str:
    sizes = (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.tp_size)
    for name, (config, its_hosts, cpu) in SHIPPED.items():
        its = (config.dp_replicate_size, config.dp_shard_size, config.tp_size, config.mixed_precision)
        if (*sizes, mesh.mixed_precision) == its and its_hosts == hosts and not cpu:
            return f"hf_tpsp/presets/{name}.yaml"
    replicas = f" --dp-replicate {sizes[0]}" if sizes[0] > 1 else ""
    precision = "" if mesh.mixed_precision == "bf16" else " --mixed-precision no"
    return f"hf-tpsp config --dp {sizes[1]} --tp {sizes[2]}{replicas} --hosts {hosts}{precision} -o mesh.yaml"


def _assumptions(job: Job, hardware: Hardware, note: str) -> tuple[str, ...]:
    rate = hardware.flops or FLOP_RATES[job.dtype]
    return (
        *([f"Model: {note}."] if note else []),
        f"Memory: all tensors of one rank's step, second step on, by the simulation; {hardware.reserve / GIB:.1f} GiB of "
        f"{hardware.memory / GIB:.1f} GiB are kept for CUDA's context, NCCL, workspaces and fragmentation.",
        f"Attention: {job.attention}" + (", no seq x seq tensor." if job.attention == "fused" else "."),
        f"Compute: {rate / 1e12:.0f} TFLOP/s x {hardware.efficiency:.2f}; matrix products and attention, the recomputed "
        "ones too; causal attention in full; nothing else takes time.",
        f"Links: {hardware.link_inside / 1e9:.0f} GB/s inside a host, {hardware.link_across / 1e9:.0f} GB/s a GPU between "
        f"hosts, {hardware.latency * 1e6:.0f} us a collective; rings.",
        "Overlap: TP's collectives are waited for; FSDP's hide behind compute and TP, and count if they take longer: "
        "step = max(compute + TP, FSDP). The optimizer, the data and stragglers take no time.",
    )


class _quiet:
    """While entered, transformers gives no warnings, which do not concern models without weights."""

    def __enter__(self):
        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *exception):
        logging.set_verbosity(self.verbosity)
