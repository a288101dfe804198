"""What `hf-tpsp estimate` prints and draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .estimation import Estimate
from .hardware import GIB, MeshEstimate
from .step import CATEGORIES

# One color for each of CATEGORIES.
COLORS = ("#4c72b0", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd", "#999999")


def gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def report(estimate: Estimate) -> Group:
    """All of `estimate`, for a rich console."""
    job, best = estimate.job, estimate.best
    trained = f"LoRA of rank {job.lora}" if job.lora else "all weights"
    settings = ", ".join(f"{name} {value}" for name, value in estimate.choices.items() if name != "mixed_precision")
    title = (
        f"{estimate.model}: {estimate.parameters / 1e9:,.2f} B parameters, {trained}, {job.dtype}, {job.optim}, "
        f"{job.batch} x {job.seq:,} tokens a TP group, {estimate.gpus} GPUs of {gib(estimate.hardware.memory)} GiB"
    ) + (f", {settings}" if settings else "")
    parts = [Text(title, style="bold"), _ranking(estimate), _memory(best), _traffic(best)]
    parts += [Text(line) for line in _answers(estimate)]
    parts.append(Text("Assumptions", style="bold"))
    parts += [Text(f"- {line}") for line in estimate.assumptions]
    return Group(*parts)


def _ranking(estimate: Estimate) -> Table:
    table = Table(title="Meshes (replicate x FSDP x TP), the fastest that fits first", title_justify="left")
    for column in ("mesh", "fits"):
        table.add_column(column)
    for column in (
        "peak, GiB",
        "headroom",
        "inside, GiB",
        "across, GiB",
        "compute + TP | FSDP, s",
        "step, s",
        "tokens/s/GPU",
    ):
        table.add_column(column, justify="right")
    table.add_column("peak in")
    for mesh in estimate.meshes:
        inside, across = (sum(c.wire for c in mesh.collectives if c.across is far) for far in (False, True))
        table.add_row(
            mesh.name, "yes" if mesh.fits else "no", gib(mesh.peak), gib(mesh.headroom), gib(inside), gib(across),
            f"{mesh.compute_seconds:.2f} + {mesh.tp_seconds:.2f} | {mesh.dp_seconds:.2f}", f"{mesh.step_seconds:.2f}",
            f"{mesh.tokens_per_second:,.0f}", mesh.moment, style=None if mesh.fits else "dim",
        )  # fmt: skip
    if estimate.skipped:
        table.caption = f"Not simulated, they hold more than one above that does not fit: {', '.join(estimate.skipped)}"
    return table


def _memory(mesh: MeshEstimate) -> Table:
    table = Table(title=f"One rank of {mesh.name}, GiB", title_justify="left")
    table.add_column("")
    for category in (*CATEGORIES, "together"):
        table.add_column(category, justify="right")
    table.add_row(f"at the peak ({mesh.moment})", *(gib(mesh.at_peak[c]) for c in CATEGORIES), gib(mesh.peak))
    table.add_row("each at its own most", *(gib(mesh.most[c]) for c in CATEGORIES), "")
    return table


def _traffic(mesh: MeshEstimate) -> Table:
    table = Table(title=f"Collectives of a step on one rank of {mesh.name}", title_justify="left")
    for column in ("mesh dim", "link", "kind"):
        table.add_column(column)
    for column in ("count", "tensors, GiB", "sent, GiB", "/ floor", "s"):
        table.add_column(column, justify="right")
    for c in mesh.collectives:
        table.add_row(
            c.dim, "across hosts" if c.across else "inside a host", c.kind, f"{c.count:,}", f"{c.size / GIB:,.2f}",
            f"{c.wire / GIB:,.2f}", f"{c.wire / c.floor:.3f}" if c.floor else "-", f"{c.seconds:.3f}",
        )  # fmt: skip
    return table


def _answers(estimate: Estimate) -> Iterator[str]:
    job, best = estimate.job, estimate.best
    fits = [m for m in estimate.meshes if m.fits]
    if not fits:
        yield f"Nothing fits. Nearest: {best.name}, which lacks {gib(-best.headroom)} GiB on each GPU."
    if estimate.longest_seq is not None:
        yield f"Longest sequence on {best.name}: {_none(estimate.longest_seq, 'tokens')} at batch {job.batch}."
        yield f"Largest batch on {best.name}: {_none(estimate.largest_batch, 'rows')} of {job.seq:,} tokens."
    for kind, mesh in estimate.checkpointing.items():
        slower = mesh.step_seconds / best.step_seconds
        yield (
            f"Activation checkpointing {kind}: peak {gib(mesh.peak)} GiB"
            f"{'' if mesh.fits else ' (does not fit)'}, {slower:.2f} of the step's time."
        )
    # The meshes come by falling peak, so that the one with the smallest peak of each tp stays.
    by_tp = {m.tp: m for m in sorted(estimate.meshes, key=lambda m: -m.peak)}
    if len(by_tp) > 1:
        yield (
            "Raising tp: "
            + "; ".join(
                f"tp {tp}: {gib(m.peak)} GiB, {m.tokens_per_second:,.0f} tokens/s/GPU"
                for tp, m in sorted(by_tp.items())
            )
            + "."
        )
    yield f"Launch {best.name} with: {estimate.preset}"
    variables = [
        f"HF_TPSP_{name.upper()}={value}" for name, value in estimate.choices.items() if name != "mixed_precision"
    ]
    if variables:
        yield f"and in the environment: {' '.join(variables)}"


def _none(number: int, what: str) -> str:
    return f"{number:,} {what}" if number else "none fits"


def check_plot(path: Path) -> None:
    """Raise `ValueError` if matplotlib is not there, or draws no files of this kind."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'hf_tpsp[plot]'.")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: a file's name must end in one of {', '.join(sorted(kinds))}.")


def plot(estimate: Estimate, path: Path) -> None:
    """Stacked memory of each mesh at its peak against the GPU's limit.

    Raises:
        ValueError: matplotlib is not installed, or it cannot write a file of this kind.
        OSError: the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    meshes, hardware = estimate.meshes[::-1], estimate.hardware
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.42 * len(meshes)), layout="constrained")
    left = [0.0] * len(meshes)
    for category, color in zip(CATEGORIES, COLORS, strict=True):
        sizes = [m.at_peak[category] / GIB for m in meshes]
        axes.barh([m.name for m in meshes], sizes, left=left, color=color, label=category)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    limit, usable = hardware.memory / GIB, (hardware.memory - hardware.reserve) / GIB
    right = max(limit * 1.25, min(max(left), limit * 2.5) * 1.15)
    axes.axvspan(usable, limit, color="red", alpha=0.15, label="reserve")
    axes.axvline(limit, color="red", label="GPU")
    for row, mesh in enumerate(meshes):
        end = mesh.peak / GIB
        text = f"{end:,.0f} GiB" + ("" if mesh.fits else ", does not fit")
        beyond = end > right * 0.85
        axes.text(
            right * 0.995 if beyond else end, row, f" {text} ", va="center", ha="right" if beyond else "left",
            fontsize=8, color="white" if beyond else "black",
        )  # fmt: skip
    axes.set(
        xlim=(0, right), xlabel="GiB of one GPU at the step's peak", ylabel="replicate x FSDP x TP",
        title=f"{estimate.model}, {estimate.job.batch} x {estimate.job.seq:,} tokens, {estimate.gpus} GPUs",
    )  # fmt: skip
    figure.legend(ncols=5, loc="outside lower center", frameon=False)
    try:
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)
