"""`estimate`: will it fit, on which mesh, how long does a step take. Simulated, before a GPU is paid for.

Memory and traffic are recorded from the real package on one simulated rank (`simulate`). The time of a step is a model, on
top of the recorded FLOPs and bytes; `Estimate.assumptions` states it in full.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .config import TPSPConfig, divisors
from .measure import Traffic
from .plan import plan_for
from .presets import SHIPPED
from .simulate import CATEGORIES, Job, Step, build_on_meta, layer_kinds, simulate, simulated_world

MODELS = Path(__file__).parent / "models"
GIB = 2**30
UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TB": 10**12, "TiB": 2**40}
FLOP_RATES = {"bf16": 989e12, "pure_bf16": 989e12, "fp32": 67e12}
"""Dense matrix products of an H100 SXM in the dtype that is computed in, by its data sheet."""
SEARCH_STEPS = 6  # simulations in search of the longest sequence or the largest batch


def parse_bytes(text: str | int) -> int:
    """ "80GiB", "80 GB" → bytes; a whole number is taken as bytes. Raises `ValueError` for a number without its unit."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        number = match[1] if match else "80"
        raise ValueError(
            f"{text!r} is not an amount of memory: write a number and one of {', '.join(UNITS)}, such as {number}GiB "
            f"(2**30 bytes each) or {number}GB (10**9)."
        )
    return int(float(match[1]) * units[match[2].lower()])


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on. The defaults are a host of eight H100 SXM with one 400 Gbit/s link for each GPU.

    Args:
        memory: bytes of one GPU.
        reserve: bytes of it that no tensor gets: CUDA's context, NCCL's buffers, workspaces, fragmentation.
        per_host: GPUs of a host.
        flops: FLOP/s of one GPU; None for an H100's in the dtype of the job (`FLOP_RATES`).
        efficiency: the part of them that matrix products and attention reach.
        link_inside: bytes/s that a GPU sends to others of its host.
        link_across: bytes/s that a GPU sends to other hosts.
        latency: seconds before a collective's first byte.
    """

    memory: int = 80 * GIB
    reserve: int = 4 * GIB
    per_host: int = 8
    flops: float | None = None
    efficiency: float = 0.5
    link_inside: float = 450e9
    link_across: float = 50e9
    latency: float = 20e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 or (value == 0 and field.name in ("reserve", "latency"))):
                raise ValueError(f"{field.name} must be positive, got {value!r}.")
        if self.efficiency > 1:
            raise ValueError(f"efficiency is a part of the FLOP rate, at most 1, got {self.efficiency!r}.")
        if self.reserve >= self.memory:
            raise ValueError(f"reserve {self.reserve / GIB:.1f} GiB leaves nothing of {self.memory / GIB:.1f} GiB.")

    def link(self, choices: TPSPConfig, dim: str) -> tuple[bool, float]:
        """Whether the groups of mesh dim `dim` span hosts, and the bytes/s at which one of their ranks sends.

        Rings that leave a host use the links of all the ranks that the group has there.
        """
        if dim == "world":  # the batch check
            stride, size = 1, choices.world_size
        else:
            stride = {"tp": 1, "dp_shard": choices.tp_size, "dp_replicate": choices.tp_size * choices.dp_shard_size}[
                dim
            ]
            size = getattr(choices, f"{dim}_size")
        if stride * size <= self.per_host:
            return False, self.link_inside
        members = max(1, self.per_host // stride)
        return True, min(self.link_inside, self.link_across * members)


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind over one mesh dim in a step, on one rank.

    Args:
        across: whether the group spans hosts.
        count, size, wire: as in `measure.Traffic`.
        floor: the least `wire` that theory allows; None where there is no formula.
        seconds: by the time model.
    """

    dim: str
    kind: str
    across: bool
    count: int
    size: int
    wire: float
    floor: float | None
    seconds: float


@dataclass(frozen=True)
class MeshEstimate:
    """One mesh. Bytes and FLOPs are those of one rank (the first, whose shards are the largest).

    Args:
        fits: whether the peak fits into the memory less the reserve, and `headroom` by how many bytes (or not).
        moment: where in the step the peak falls.
        at_peak: bytes by category (`simulate.CATEGORIES`) at that moment.
        most: of each category its own most in the step.
        tokens: of a step, all ranks together.
        compute_seconds, tp_seconds, dp_seconds: by the time model; `step_seconds` is what the overlap makes of them.
    """

    dp_replicate: int
    dp_shard: int
    tp: int
    fits: bool
    peak: int
    headroom: int
    moment: str
    at_peak: dict[str, int]
    most: dict[str, int]
    collectives: tuple[Collective, ...]
    flops: int
    tokens: int
    compute_seconds: float
    tp_seconds: float
    dp_seconds: float
    step_seconds: float

    @property
    def name(self) -> str:
        return f"{self.dp_replicate} x {self.dp_shard} x {self.tp}"

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.step_seconds / (self.dp_replicate * self.dp_shard * self.tp)


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
        """That of the best mesh."""
        return TPSPConfig(
            tp_size=self.best.tp, dp_shard_size=self.best.dp_shard, dp_replicate_size=self.best.dp_replicate,
            **self.choices,
        )  # fmt: skip

    def to_dict(self) -> dict:
        """All of it in plain types, as `--json` prints it."""
        return dataclasses.asdict(self)


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
        model: a checkpoint folder, a config.json, the name of a shipped model ("Llama-3-70B"; `hf_tpsp/models`), or a
            config.
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
        ValueError: an impossible mesh, an unknown model, a model that hf_tpsp does not support, or a process that is
            part of a real world already.
    """
    job = Job(seq=seq, batch=batch, dtype=dtype, optim=optim, lora=lora, attention=attention)
    hardware = hardware or Hardware()
    name, config = model_config(model)
    if choices.get("compile"):
        raise ValueError("compile=True cannot be simulated: what compiled code keeps is the compiler's choice.")
    choices["mixed_precision"] = "bf16" if dtype == "bf16" else "no"
    meshes = legal_meshes(config, gpus, hardware.per_host, dp, tp, dp_replicate, **choices)
    whole = build_on_meta(config, job)
    plan_for(whole, meshes[0])  # says what hf_tpsp does not support, before anything is simulated
    kinds = layer_kinds(whole)
    parameters = sum(p.numel() for p in whole.parameters())

    def run(mesh: TPSPConfig, job: Job, why: str = "") -> MeshEstimate:
        if progress:
            progress(
                f"{mesh.dp_replicate_size} x {mesh.dp_shard_size} x {mesh.tp_size}, {job.batch} x {job.seq} tokens{why}"
            )
        return _judge(simulate(config, mesh, job, kinds), mesh, job, hardware)

    with _quiet(), simulated_world(gpus, backend):
        found: dict[TPSPConfig, MeshEstimate] = {}
        skipped = []
        for mesh in meshes:  # of one tp, the most sharded first
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
        longest, largest, _preset(best, hosts), _assumptions(job, hardware),
    )  # fmt: skip


def _at_least(mesh: TPSPConfig, other: TPSPConfig, estimated: MeshEstimate) -> int:
    """By how many bytes at least the peak on `mesh` is higher than on `other`, which shards the state over more ranks."""
    state = estimated.at_peak["parameters"] + estimated.at_peak["optimizer"]
    return state * (other.dp_shard_size - mesh.dp_shard_size) // mesh.dp_shard_size


def _largest(headroom: Callable[[int], int], first: int, at_first: int, guess: int, granule: int) -> int:
    """The largest multiple of `granule` with a headroom, which falls about linearly; 0 if there is none.

    Args:
        headroom: simulates, so every answer but `first` has been simulated.
        first: where the headroom is known to be `at_first`.
        guess: where to look next.
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
        (a, x), (b, y) = sorted(known.items(), key=lambda item: abs(item[1]))[:2]  # the two nearest to none at all
        guess = int(a + x * (b - a) / (x - y)) if x != y else 2 * guess
    return max((n for n in known if known[n] >= 0), default=0)


def _judge(step: Step, mesh: TPSPConfig, job: Job, hardware: Hardware) -> MeshEstimate:
    """The recorded step against the hardware."""
    moment, at_peak = step.peak()
    peak = int(at_peak.sum())
    headroom = hardware.memory - hardware.reserve - peak
    collectives = []
    for (dim, kind), traffic in sorted(step.traffic.items()):
        across, rate = hardware.link(mesh, dim)
        floor: Traffic | None = step.floor.get((dim, kind))
        seconds = traffic.wire / rate + traffic.count * hardware.latency
        collectives.append(
            Collective(
                dim, kind, across, traffic.count, traffic.size, traffic.wire, floor.wire if floor else None, seconds
            )
        )
    compute = step.flops / ((hardware.flops or FLOP_RATES[job.dtype]) * hardware.efficiency)
    tp = sum(c.seconds for c in collectives if c.dim == "tp")
    dp = sum(c.seconds for c in collectives if c.dim != "tp")
    return MeshEstimate(
        mesh.dp_replicate_size, mesh.dp_shard_size, mesh.tp_size, headroom >= 0, peak, headroom, moment,
        dict(zip(CATEGORIES, at_peak.tolist(), strict=True)), dict(zip(CATEGORIES, step.most().tolist(), strict=True)),
        tuple(collectives), step.flops, job.batch * job.seq * mesh.dp_size, compute, tp, dp, max(compute + tp, dp),
    )  # fmt: skip


def _preset(mesh: TPSPConfig, hosts: int) -> str:
    sizes = (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.tp_size)
    for name, (config, its_hosts, cpu) in SHIPPED.items():
        its = (config.dp_replicate_size, config.dp_shard_size, config.tp_size, config.mixed_precision)
        if (*sizes, mesh.mixed_precision) == its and its_hosts == hosts and not cpu:
            return f"hf_tpsp/presets/{name}.yaml"
    replicas = f" --dp-replicate {sizes[0]}" if sizes[0] > 1 else ""
    precision = "" if mesh.mixed_precision == "bf16" else " --mixed-precision no"
    return f"hf-tpsp config --dp {sizes[1]} --tp {sizes[2]}{replicas} --hosts {hosts}{precision} -o mesh.yaml"


def _assumptions(job: Job, hardware: Hardware) -> tuple[str, ...]:
    rate = hardware.flops or FLOP_RATES[job.dtype]
    return (
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
    """transformers' warnings are not for models that have no weights."""

    def __enter__(self):
        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *exception):
        logging.set_verbosity(self.verbosity)
