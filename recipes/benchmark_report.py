"""The tables and pictures of `benchmark.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_tpsp.tools.estimate.floors import RING_PASSES

FOLDER = Path(__file__).parent / "benchmarks"
RIVALS = {
    "native": "transformers' own tensor parallelism: from_pretrained(distributed_config=DistributedConfig(tp_size=N))",
    "fsdp2": "FSDP2 alone: N ranks, each with a row of tokens / N, so that a step has as many tokens as the others'",
}
MIB = 2**20


def mib(size: float) -> str:
    return f"{size / MIB:,.1f}" if size < 100 * MIB else f"{size / MIB:,.0f}"


def header(result: dict) -> list[str]:
    return [
        "tokens", "variant", "step, ms", f"/ {result['base']}", "check, ms", "peak, MiB", "gradients, MiB",
        "saved per layer, MiB (/ floor)", "head + loss peak, MiB (/ logits)", "AG + RS + AR + A2A", "sent, MiB (/ floor)",
    ]  # fmt: skip


def rows(result: dict) -> Iterator[list[str]]:
    """The cells of the table of `result`, in the order of `header`."""
    for run in result["runs"]:
        for variant, found in run["variants"].items():
            cells = [str(run["tokens"]), variant, f"{found['step_seconds'] * 1e3:,.0f}", f"{found['step_ratio']:.2f}"]
            check = found.get("check_seconds")
            cells.append(f"{check * 1e3:.2f} ({check / found['step_seconds']:.2%})" if check is not None else "-")
            if "peak_bytes" in found:
                saved, loss, sent = found["saved_bytes_per_layer"], found["loss_peak_bytes"], found["wire_bytes"]
                floor = found.get("wire_bytes_floor")
                counts = [found["collectives"].get(kind, {}).get("count", 0) for kind in RING_PASSES]
                cells += [
                    mib(found["peak_bytes"]),
                    mib(found["gradient_bytes"]),
                    f"{mib(saved)} ({saved / run['saved_bytes_per_layer_floor']['fused_activation']:.2f})",
                    f"{mib(loss)} ({loss / run['logits_shard_bytes']:.2f})",
                    " + ".join(map(str, counts)),
                    f"{mib(sent)} ({sent / floor:.3f})" if floor else mib(sent),
                ]
            yield cells + ["-"] * (len(header(result)) - len(cells))


def terminal_table(result: dict) -> Table:
    table = Table(*header(result), title=result["name"])
    for cells in rows(result):
        table.add_row(*cells)
    return table


LEGEND = f"""\
- **step**: median of interleaved steps (forward, backward, `zero_grad`), the slowest rank's; the ratio is the median of
  the ratios of steps that follow upon each other.
- **check**: comparing the ranks' batches before a step, and its share of the step.
- **peak**: tensor bytes on rank 0 above parameters, inputs and **gradients**, which have a column of their own. The
  parameters that FSDP2 gathers are in it.
- **saved per layer**: activations of a middle decoder layer that are live from forward to backward; in brackets over
  Megatron's TP + SP figure with a fused activation, `(6 h + 2 kv + 3 f) / N` elements per token (below 1: more is
  recomputed in backward).
- **head + loss peak**: above the hidden states, the head's weight and its gradient; in brackets over one fp32 copy of
  `[tokens, vocab / N]`.
- **AG + RS + AR + A2A**: all-gathers, reduce-scatters, all-reduces, all-to-alls of a step over more than one rank.
- **sent**: by one rank, by the ring algorithm; in brackets over the least that the variant's plan needs.
- `native`: {RIVALS["native"]}.
- `fsdp2`: {RIVALS["fsdp2"]}.
- The others: `hf_tpsp.parallelize` with a `TPSPConfig`, whose defaults are `chunked`."""


def write_readme() -> None:
    """The tables of all JSON files in `FOLDER`."""
    parts = ["# Benchmarks", "Written by `recipes/benchmark.py`, which says how to run it. Do not edit.", LEGEND]
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text())
        machine = result["machine"]
        lines = [header(result), ["---"] * len(header(result)), *rows(result)]
        parts += [
            f"## {result['name']}",
            f"{machine['date']}, {result['ranks']} ranks, one thread each, on {machine['cores']} cores of "
            f"{machine['cpu']} (load {machine['load_before']} before), {machine['ram_gib']} GiB; torch {machine['torch']}, transformers "
            f"{machine['transformers']}. Options: `{result['options'] or 'none'}`.",
            "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
            f"![{result['name']}]({path.stem}.png)",
        ]
    (FOLDER / "README.md").write_text("\n\n".join(parts) + "\n")


def plot(result: dict, path: Path) -> None:
    """Bars of each variant, grouped by the number of tokens: step time, peak memory, memory of head and loss."""
    from matplotlib.figure import Figure

    panels = {
        f"step time / {result['base']}": ("step_ratio", 1),
        "peak tensor memory, MiB": ("peak_bytes", MIB),
        "peak of head + loss, MiB": ("loss_peak_bytes", MIB),
    }
    variants = list(result["runs"][0]["variants"])
    width = 0.8 / len(variants)
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axes, (title, (quantity, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, variant in enumerate(variants):
            values = [run["variants"][variant].get(quantity, 0) / unit for run in result["runs"]]
            places = [group - 0.4 + (i + 0.5) * width for group in range(len(values))]
            bars = axes.bar(places, values, 0.9 * width, label=variant)
            axes.bar_label(
                bars,
                [
                    f"{value:.2f}" if unit == 1 else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
                    for value in values
                ],
                fontsize=7,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(result["runs"])), [f"{run['tokens']:,} tokens" for run in result["runs"]])
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(variants), fontsize=9)
    figure.savefig(path, dpi=130)


def report(result: dict | None, console: Console) -> None:
    """Write `result`, if there is one, and the README."""
    if result:
        path = FOLDER / f"{result['name']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(terminal_table(result))
        try:
            plot(result, path.with_suffix(".png"))
        except ModuleNotFoundError:
            console.print("No plot: matplotlib is missing (pip install 'hf_tpsp[plot]').")
    write_readme()
