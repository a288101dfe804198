"""The hardware that a step is planned for, and the bytes and seconds that a simulated step takes on it."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from dataclasses import dataclass

from ...config import TPSPConfig
from ...inputs import names_its_fields, whole_number
from .floors import Traffic
from .simulate import Job
from .step import CATEGORIES, Step

GIB = 2**30


UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TB": 10**12, "TiB": 2**40}


FLOP_RATES = {"bf16": 989e12, "pure_bf16": 989e12, "fp32": 67e12}
"""Dense matrix products of an H100 SXM in the dtype that is computed in, by its data sheet."""


def parse_bytes(text: str | int) -> int:
    """ "80GiB", "80 GB" → bytes; a whole number is taken as bytes. Raises `ValueError` for a number without its
    unit."""
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


@names_its_fields
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
            name, value = field.name, getattr(self, field.name)
            if value is None and name == "flops":
                continue
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not (value > 0 or (value == 0 and name in ("reserve", "latency"))):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        object.__setattr__(self, "per_host", whole_number("per_host", self.per_host))
        if self.efficiency > 1:
            raise ValueError(f"efficiency is a part of the FLOP rate, at most 1, got {self.efficiency!r}.")
        if self.reserve >= self.memory:
            raise ValueError(f"reserve {self.reserve / GIB:.1f} GiB leaves nothing of {self.memory / GIB:.1f} GiB.")

    def link(self, choices: TPSPConfig, dim: str) -> tuple[bool, float]:
        """Whether the groups of mesh dim `dim` span hosts, and the bytes/s at which one of their ranks sends.

        Rings that leave a host use the links of all the ranks that the group has there.
        """
        if dim == "world":
            # Only the batch check goes over all ranks.
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
        count, size, wire: as in `floors.Traffic`.
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
        fits: whether the peak fits into the memory without the reserve.
        headroom: the bytes that are then left; negative if the peak does not fit.
        moment: where in the step the peak is.
        at_peak: bytes by category (`step.CATEGORIES`) at that moment.
        most: the most bytes of each category in the step.
        tokens: the tokens of a step, all ranks together.
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
        """Tokens per second of one GPU."""
        return self.tokens / self.step_seconds / (self.dp_replicate * self.dp_shard * self.tp)


def judge(step: Step, mesh: TPSPConfig, job: Job, hardware: Hardware) -> MeshEstimate:
    """The estimate of a recorded step on this hardware."""
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
