"""`hf-tpsp plan`: which style each module of a model gets, and why."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import TYPE_CHECKING

from .arguments import add_mesh_arguments, add_trust_argument, mesh_config

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from ..config import TPSPConfig
    from ..rules import Plan


def add(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="print the plan of a model: module, style, collectives",
        description="Prints which style each module gets, the collectives on its activations, and what is not as usual. Reads "
        "config.json only.",
    )
    plan.add_argument(
        "path",
        metavar="MODEL_TYPE|PATH",
        help="a model type of transformers, checkpoint folder, config.json, shipped model or hub name",
    )
    add_mesh_arguments(plan, tp=2)
    add_trust_argument(plan)
    plan.add_argument("--no-sequence-parallel", action="store_true", help="the plan of plain tensor parallelism")
    plan.add_argument(
        "--why",
        metavar="NAME",
        help="print the layouts that were tried of the block NAME (model.layers.0.self_attn, or with * for the layer), how far "
        "each was off or the error that it ran into, and which was taken",
    )
    plan.set_defaults(run=run, parser=plan)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..plan.planner import NothingToSplit, plan_for
    from ..rules import wildcard
    from ..tools.source import on_meta, read

    config = mesh_config(args, sequence_parallel=not args.no_sequence_parallel)
    source = read(args.path, args.trust_remote_code)
    model = on_meta(source.config, source.cls)
    try:
        plan = plan_for(model, config)
    except NothingToSplit as error:
        if not args.why:
            raise
        plan = error.plan
    notes = plan.notes
    # A terminal has a width of its own; a pipe gets a fixed one. Names and shapes contain brackets, so markup is off.
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False)
    if args.why:
        for table in tables_of_trials(model, plan, args.why, config.tp_size):
            console.print(table)
        notes = [note for note in notes if note.startswith(f"{wildcard(args.why)} ")]
    else:
        console.print(table_of_rules(model, plan, config))
    for note in filter(None, [source.note, *notes]):
        console.print(f"- {note}")


def table_of_rules(model: PreTrainedModel, plan: Plan, config: TPSPConfig) -> Table:
    """A table with a row for each rule, whether a module's or a single parameter's."""
    from rich.table import Table

    from ..rules import rule_for, wildcard
    from ..structure import own_parameters
    from ..styles.registry import style_for

    table = Table(title=f"{type(model).__name__}, tp {config.tp_size}", title_justify="left")
    for column in ("module or parameter", "class", "style", "forward", "backward"):
        table.add_column(column, overflow="fold")
    seen = set()

    def add_row(name: str, kind: str, forward: str, backward: str) -> None:
        key = name if name in plan else wildcard(name)
        if key not in seen:
            seen.add(key)
            table.add_row(key, kind, plan[key], forward, backward)

    for name, module in model.named_modules():
        if (rule := rule_for(name, plan)) is not None:
            style = style_for(rule, config)
            add_row(name, type(module).__name__, style.forward_collective, style.backward_collective)
        for parameter in own_parameters(module):
            if rule_for(full := f"{name}.{parameter}", plan) is not None:
                add_row(full, "Parameter", "-", "-")
    return table


def tables_of_trials(model: PreTrainedModel, plan: Plan, name: str, tp_size: int) -> list[Table]:
    """The layouts that were tried for the block `name`, in one table for each class of module that has this name.

    Raises:
        ValueError: no layout was tried for a block of this name.
    """
    from rich.table import Table

    from ..plan.trial import brief
    from ..rules import rule_for, wildcard

    block = wildcard(name)
    owners = {type(m).__name__: (n, m) for n, m in model.named_modules() if name in (n, wildcard(n))}
    if block not in plan.tried or not owners:
        nearest = difflib.get_close_matches(block, plan.tried, 3, cutoff=0.0)
        raise ValueError(f"{name} names no block that a layout was tried of; the nearest are {', '.join(nearest)}.")
    tables = []
    for owner, (first, module) in owners.items():
        inside = [n for n, _ in (*module.named_modules(), *module.named_parameters()) if n]
        layout = {"": rule_for(first, plan)}
        layout |= {n: rule for n in inside if (rule := rule_for(f"{first}.{n}", plan)) is not None}
        is_split = layout[""] not in ("whole", "replicated")
        table = Table(title=f"{block} ({owner}), tp {tp_size}: {brief(layout)}", title_justify="left", show_lines=True)
        for column in ("", "layout that was tried", "what the ranks computed", "where"):
            table.add_column(column, overflow="fold")
        for number, trial in enumerate((t for t in plan.tried[block] if t.owner == owner), 1):
            taken = ("taken, " if is_split else "not taken, though only ") if trial.adds_up else ""
            table.add_row(str(number), brief(trial.layout), f"{taken}{trial.outcome}", trial.place)
        tables.append(table)
    return tables
