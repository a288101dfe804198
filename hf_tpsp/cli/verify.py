"""`hf-tpsp verify`: compare an architecture with one process."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from .arguments import add_mesh_arguments, add_trust_argument, mesh_config, one_of, output_file, whole

if TYPE_CHECKING:
    from rich.table import Table

    from ..tools.verify.verify import Result


def add(commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare an architecture with one process: loss, every gradient, weights",
        description="Builds a small random copy of an architecture, trains it on ranks that it starts on this machine, and "
        "compares loss, every gradient and the weights after two steps with one process. Exits with 1 if they differ.",
    )
    verify.add_argument(
        "model", nargs="?", metavar="MODEL_TYPE|PATH",
        help="a model type of transformers, checkpoint folder, config.json, shipped model or hub name",
    )  # fmt: skip
    add_mesh_arguments(verify, tp=2)
    add_trust_argument(verify)
    verify.add_argument("--no-sequence-parallel", action="store_true", help="plain tensor parallelism")
    verify.add_argument("--seq", type=whole(2), default=17, metavar="N", help="tokens of a row (default 17)")
    verify.add_argument("--vocab", type=whole(4), default=131, metavar="N", help="vocabulary of the copy (default 131)")
    verify.add_argument("--dtype", **one_of(("fp32", "fp64")), default="fp32", help="default fp32")
    verify.add_argument(
        "--by-module", action="store_true",
        help="compare the output and the gradient of every module too, and say from which on they are off",
    )  # fmt: skip
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.add_argument(
        "--all", action="store_true", help="every causal-LM model type of transformers: prints the table of SUPPORT.md"
    )
    verify.add_argument("--only", nargs="+", metavar="TYPE", help="with --all: these model types")
    verify.add_argument(
        "--jobs", type=whole(), default=1, metavar="N", help="with --all: sets of ranks side by side (default 1)"
    )
    verify.add_argument(
        "--results", type=output_file, metavar="FILE",
        help="with --all: a file to keep what was found in, so that it is not run again",
    )  # fmt: skip
    verify.add_argument(
        "-o", "--output", type=output_file, metavar="FILE", help="with --all: file to write the table to"
    )
    verify.set_defaults(run=run, parser=verify)


OF_ALL = ("only", "jobs", "results", "output")
OF_ONE = (
    "dp",
    "dp_replicate",
    "trust_remote_code",
    "no_sequence_parallel",
    "seq",
    "vocab",
    "dtype",
    "by_module",
    "json",
)


def run(args: argparse.Namespace) -> None:
    from ..tools.verify.verify import verify

    if args.all == (args.model is not None):
        raise ValueError("verify takes a model type or a folder, or --all.")
    for name in OF_ONE if args.all else OF_ALL:
        if getattr(args, name) != args.parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} goes {'without' if args.all else 'with'} --all.")
    if args.all:
        return run_all(args)
    result = verify(
        args.model,
        mesh_config(args, sequence_parallel=not args.no_sequence_parallel),
        length=args.seq,
        vocabulary=args.vocab,
        dtype=f"float{args.dtype.removeprefix('fp')}",
        by_module=args.by_module,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        forward, backward = result.off_from
        found = {
            **asdict(result),
            "is_equal": result.is_equal,
            "forward_off_from": forward,
            "backward_off_from": backward,
        }
        print(json.dumps(found))
    else:
        print_result(result)
    if not result.is_equal:
        sys.exit(1)


def print_result(result: Result) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    if result.error:
        # What the witness raises says that the ranks differ; everything else is an architecture that is refused.
        what = "DIFFERS from one process" if "check of training forward" in result.error else "refused"
        console.print(f"{result.model_type}: [bold]{what}[/]. {escape(result.error)}", highlight=False)
        return
    title = (
        f"{result.model_type}, FSDP {result.dp_size} x TP {result.tp_size}, {result.length} tokens, {result.dtype}: "
    )
    table = Table(
        title=title + ("equal to one process" if result.is_equal else "DIFFERS from one process"), title_justify="left"
    )
    for column in ("", "largest relative error", "limit", "where"):
        table.add_column(column)
    table.add_row("loss", f"{result.loss:.1e}", f"{result.limit:.0e}", "")
    table.add_row("gradients", f"{result.gradient:.1e}", f"{result.limit:.0e}", result.parameter)
    table.add_row("weights after 2 steps", f"{result.weights:.1e}", f"{result.weights_limit:.0e}", "")
    console.print(table)
    layers = ", ".join(f"{count} {kind}" for kind, count in result.collectives.items())
    console.print(f"collectives of a decoder layer, forward and backward: {layers or 'none'}", highlight=False)
    sequence = "on" if result.sequence_parallel else "off"
    console.print(
        f"sequence parallel {sequence}, loss parallel {'on' if result.loss_parallel else 'off'}", highlight=False
    )
    for note in result.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    if result.modules:
        console.print(module_table(result))
    if result.modules or not result.is_equal:
        table = Table(title="the parameters whose gradients are furthest off", title_justify="left")
        table.add_column("parameter", overflow="fold")
        table.add_column("relative error")
        for name, error in result.worst:
            table.add_row(name, figure(error, result.limit))
        console.print(table)
    for line in result.verdict:
        console.print(line, highlight=False, markup=False)
    if result.modules and not result.verdict:
        console.print(f"no module's output or gradient is off by more than {result.limit:.0e}", highlight=False)
    elif not result.modules and not result.is_equal:
        console.print("hf-tpsp verify … --by-module says from which module on", highlight=False)


def module_table(result: Result) -> Table:
    """The errors of every module, in the order of execution, with those above the limit in bold."""
    from rich.table import Table

    table = Table(title="by module, in the order of execution: relative errors", title_justify="left")
    table.add_column("module", overflow="fold")
    for column in ("class", "output", "its gradient", "parameters' gradients", ""):
        table.add_column(column)
    for row in result.modules:
        name = row.name if row.call == 1 else f"{row.name}, call {row.call}"
        figures = (figure(error, result.limit) for error in (row.output, row.gradient, row.parameters))
        table.add_row(name, row.kind, *figures, "inside, split" if row.is_inside else "")
    return table


def figure(error: float | None, limit: float) -> str:
    if error is None:
        return ""
    return f"{error:.1e}" if error <= limit else f"[bold red]{error:.1e}[/]"


def run_all(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..inputs import nearest
    from ..tools.verify import support

    known = support.model_types()
    names = args.only or known
    if unknown := [name for name in names if name not in known]:
        near = nearest(unknown[0], known)
        raise ValueError(f"transformers has no causal LM of type {', '.join(unknown)}.{near}")
    if args.results and args.results.exists():
        # A file that holds something else is refused before anything is run.
        support.load(args.results)
    verdicts = []
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    # The table may be piped into a file.
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("verify", total=len(names))
        for verdict in support.check_all(names, args.tp, args.jobs, args.results):
            verdicts.append(verdict)
            progress.update(task, advance=1, description=verdict.model_type)
            if not verdict.is_equal:
                progress.console.print(f"{verdict.model_type}: {verdict.error or 'DIFFERS'}", highlight=False)
    table = support.markdown(verdicts, args.tp)
    if args.output:
        args.output.write_text(table)
        table = f"{sum(v.is_equal for v in verdicts)} of {len(verdicts)} equal to one process; the table is in {args.output}\n"
    print(table, end="")
    wrong = [v.model_type for v in verdicts if not v.error and not v.is_equal]
    if wrong:
        sys.exit(f"hf-tpsp: not equal, and not refused: {', '.join(wrong)}")
