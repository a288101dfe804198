"""`hf-tpsp`: make an accelerate config, print a model's plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from .config import TPSPConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hf-tpsp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    config = commands.add_parser(
        "config",
        help="print an accelerate config for a mesh",
        description="Prints an accelerate config: hf-tpsp config --dp 2 --tp 4 > mesh.yaml",
    )
    add_mesh_arguments(config)
    config.add_argument("--hosts", type=int, default=1, help="number of machines (default 1)")
    config.add_argument("--cpu", action="store_true", help="run the ranks on the CPU")
    config.add_argument("--mixed-precision", choices=("bf16", "no"), help="default bf16, on the CPU no")
    config.add_argument("--activation-checkpointing", choices=("none", "full"), default="none")
    config.add_argument("-o", "--output", type=Path, help="file to write (default: print)")
    config.set_defaults(run=run_config)

    plan = commands.add_parser(
        "plan",
        help="print the plan of a model: module, style, collectives",
        description="Prints which style each module gets and the collectives on its activations. Reads config.json only.",
    )
    plan.add_argument("path", metavar="PATH", help="checkpoint folder, config.json or hub name")
    add_mesh_arguments(plan, tp=2)
    plan.add_argument("--no-sequence-parallel", action="store_true", help="the plan of plain tensor parallelism")
    plan.set_defaults(run=run_plan)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"hf-tpsp: {error}")


def add_mesh_arguments(parser: argparse.ArgumentParser, tp: int = 1) -> None:
    parser.add_argument("--tp", type=int, default=tp, metavar="N", help=f"tensor-parallel size (default {tp})")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="FSDP shard size (default 1)")
    parser.add_argument("--dp-replicate", type=int, default=1, metavar="N", help="HSDP replicas (default 1)")


def mesh_config(args: argparse.Namespace, **settings) -> TPSPConfig:
    return TPSPConfig(tp_size=args.tp, dp_shard_size=args.dp, dp_replicate_size=args.dp_replicate, **settings)


def run_config(args: argparse.Namespace) -> None:
    from .presets import accelerate_config

    config = mesh_config(
        args,
        mixed_precision=args.mixed_precision or ("no" if args.cpu else "bf16"),
        activation_checkpointing=args.activation_checkpointing,
    )
    text = yaml.safe_dump(accelerate_config(config, args.hosts, args.cpu), sort_keys=False)
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")


def run_plan(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig, AutoModelForCausalLM

    from .plan import plan_for, rule_for, wildcard
    from .styles import style_for

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
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
