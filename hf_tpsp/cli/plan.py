"""`hf-tpsp plan`: which style each module of a model gets, and why."""

from __future__ import annotations

import argparse
import sys

from .mesh import add_mesh_arguments, mesh_config


def add(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="print the plan of a model: module, style, collectives",
        description="Prints which style each module gets and the collectives on its activations. Reads config.json only.",
    )
    plan.add_argument("path", metavar="PATH", help="checkpoint folder, config.json or hub name")
    add_mesh_arguments(plan, tp=2)
    plan.add_argument("--no-sequence-parallel", action="store_true", help="the plan of plain tensor parallelism")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..plan.planner import plan_for
    from ..rules import rule_for, wildcard
    from ..styles.registry import style_for

    config = mesh_config(args, sequence_parallel=not args.no_sequence_parallel)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.path))
    plan = plan_for(model, config)
    table = Table(title=f"{type(model).__name__}, tp {config.tp_size}", title_justify="left")
    for column in ("module", "class", "style", "forward", "backward"):
        table.add_column(column, overflow="fold")
    seen = set()
    for name, module in model.named_modules():
        rule = rule_for(name, plan)
        key = name if name in plan else wildcard(name)
        if rule is not None and key not in seen:
            seen.add(key)
            style = style_for(rule, config)
            table.add_row(key, type(module).__name__, rule, style.forward_collective, style.backward_collective)
    # A pipe gets the whole width; a terminal its own.
    Console(width=None if sys.stdout.isatty() else 180).print(table)
