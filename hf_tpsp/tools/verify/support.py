"""The support table: every causal-LM model type of the installed transformers, verified one by one (`hf-tpsp verify
--all`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...config import TPSPConfig
from ..ranks import RankPool
from .comparison import larger
from .verify import Result, verify

RUNS = (
    # This run has an odd vocabulary, an odd length, and an MoE's auxiliary loss. Over several batches that loss is not
    # the one of one process.
    {"dp": 1, "length": 17, "vocabulary": 131, "settings": {"output_router_logits": True}},
    {"dp": 2, "length": 16, "vocabulary": 128, "settings": {}},
)


@dataclass
class Verdict:
    """What the runs of one model type say.

    Attributes:
        has_plan: whether transformers has a tensor-parallel plan for it.
        runs: the runs in fp32.
        again: the fp64 runs of those that exceed the limit in fp32.
    """

    model_type: str
    has_plan: bool
    runs: list[Result] = field(default_factory=list)
    again: list[Result] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return bool(self.runs) and all(
            r.is_equal for r in (*self.again, *(r for r in self.runs if not self.again or r.error))
        )

    @property
    def error(self) -> str:
        return next((r.error for r in (*self.runs, *self.again) if r.error), "")


def model_types() -> list[str]:
    """Every causal-LM model type of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check(model_type: str, tp_size: int, pool: RankPool) -> Verdict:
    verdict = Verdict(model_type, bool(getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None)))
    for run in RUNS:
        config = TPSPConfig(tp_size=tp_size, dp_shard_size=run["dp"])
        options = {name: run[name] for name in ("length", "vocabulary", "settings")}
        try:
            result = verify(model_type, config, **options, pool=pool)
        except ValueError as error:
            # Its default config is none that can be read.
            result = Result(
                model_type, config.dp_size, tp_size, run["length"], run["vocabulary"], "float32", error=str(error)
            )
        verdict.runs.append(result)
        if result.error:
            break
        if not result.is_equal:
            verdict.again.append(verify(model_type, config, **options, dtype="float64", pool=pool))
    return verdict


def check_all(names: Iterable[str], tp_size: int, jobs: int, results: Path | None = None) -> Iterator[Verdict]:
    """The verdict on each model type, as it is reached.

    Args:
        jobs: how many sets of ranks run side by side.
        results: a file of verdicts. Those that it holds are not run again; new ones are added.
    """
    known = load(results) if results is not None and results.exists() else {}
    pools: SimpleQueue[RankPool] = SimpleQueue()
    for _ in range(jobs):
        pools.put(RankPool())

    def work(name: str) -> Verdict:
        if name in known:
            return known[name]
        pool = pools.get()
        try:
            return check(name, tp_size, pool)
        finally:
            pools.put(pool)

    try:
        with ThreadPoolExecutor(jobs) as workers:
            for verdict in workers.map(work, names):
                known[verdict.model_type] = verdict
                if results is not None:
                    results.write_text(json.dumps([asdict(v) for v in known.values()], indent=1))
                yield verdict
    finally:
        while not pools.empty():
            pools.get().stop()


def load(results: Path) -> dict[str, Verdict]:
    """The verdicts that `check_all` has written. Raises `ValueError` if the file holds no such verdicts."""
    try:
        rows = json.loads(results.read_text())
        return {
            row["model_type"]: Verdict(
                row["model_type"], row["has_plan"], *([Result(**r) for r in row[key]] for key in ("runs", "again"))
            )
            for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{results} holds no results of `hf-tpsp verify --all`: {error}") from error


def cells(verdict: Verdict) -> list[str]:
    """The cells of the table's row for this verdict."""
    if verdict.error or not verdict.runs:
        return [verdict.model_type, "", "", "refused" if verdict.error else "", "", "", verdict.error]
    first = verdict.runs[0]
    figures = [f"{larger(r.loss, r.gradient):.1e}" for r in verdict.runs]
    again = functools.reduce(larger, (e for r in verdict.again for e in (r.loss, r.gradient)), 0.0)
    on = {True: "yes", False: "no"}
    return [
        verdict.model_type,
        on[first.sequence_parallel],
        on[first.loss_parallel],
        *figures,
        f"{again:.1e}" if verdict.again else "",
        "; ".join(first.notes) if verdict.is_equal else f"WRONG in {first.parameter}; " + "; ".join(first.notes),
    ]


HEADER = ["model type", "SP", "loss parallel", "fp32 1x2", "fp32 2x2", "fp64", "what is not as usual, and why"]


def markdown(verdicts: Iterable[Verdict], tp_size: int) -> str:
    """SUPPORT.md."""
    verdicts = list(verdicts)
    equal = [v for v in verdicts if v.is_equal]
    full = [v for v in equal if all(r.sequence_parallel and r.loss_parallel for r in v.runs)]
    planned = [v for v in verdicts if v.has_plan]
    lines = [
        "# Supported architectures",
        "",
        f"Made by `hf-tpsp verify --all` with transformers {transformers.__version__}: every causal-LM model type, on a small random copy "
        f"(`hf_tpsp/plan/shrink.py`), against one process: loss, the gradient of every parameter, and the weights after 2 steps of AdamW. "
        f"The figures are the largest relative errors of loss and gradients, on FSDP 1 x TP {tp_size} with 131 words, 17 tokens and an "
        f"MoE's auxiliary loss, and on FSDP 2 x TP {tp_size} with 128 words and 16 tokens. The limit is 1e-5 in fp32; where that is exceeded, the "
        "run is made again in fp64, with a limit of 1e-6. No sequence parallel means tensor parallel with the stream on every "
        "rank; a block that is not split is computed whole by every rank.",
        "",
        f"Of {len(verdicts)} model types, {len(equal)} are equal to one process, {len(full)} of them with sequence and loss parallel; "
        f"{sum(bool(v.error) for v in verdicts)} are not supported, and {len(verdicts) - len(equal) - sum(bool(v.error) for v in verdicts)} differ. "
        f"Of the {len(planned)} with a tensor-parallel plan in transformers, "
        f"{sum(v in equal for v in planned)} and {sum(v in full for v in planned)}.",
    ]
    for title, has_plan in (("With a plan in transformers", True), ("With a plan derived from their structure", False)):
        part = [v for v in verdicts if v.has_plan == has_plan and not v.error]
        lines += ["", f"## {title}", "", f"| {' | '.join(HEADER)} |", f"| {' | '.join(['---'] * len(HEADER))} |"]
        lines += [f"| {' | '.join([f'`{name}`', *rest])} |" for name, *rest in map(cells, part)]
    lines += ["", "## Not supported", "", "Each ends in this error, at set-up or in the first forward.", ""]
    lines += ["| model type | why |", "| --- | --- |"]
    lines += [f"| `{v.model_type}` | {v.error.replace('|', '/')} |" for v in verdicts if v.error]
    return "\n".join(lines) + "\n"
