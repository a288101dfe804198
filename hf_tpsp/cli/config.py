"""`hf-tpsp config`: print an accelerate config for a mesh."""

from __future__ import annotations

import argparse

import yaml

from ..launch import accelerate_config
from .arguments import add_mesh_arguments, mesh_config, one_of, output_file, whole


def add(commands) -> None:
    config = commands.add_parser(
        "config",
        help="print an accelerate config for a mesh",
        description="Prints an accelerate config: hf-tpsp config --dp 2 --tp 4 > mesh.yaml",
    )
    add_mesh_arguments(config)
    config.add_argument("--hosts", type=whole(), default=1, metavar="N", help="number of machines (default 1)")
    config.add_argument("--cpu", action="store_true", help="run the ranks on the CPU")
    config.add_argument("--mixed-precision", **one_of(("bf16", "no")), help="default bf16, on the CPU no")
    config.add_argument("--activation-checkpointing", default="none", **one_of(("none", "full")))
    config.add_argument("-o", "--output", type=output_file, metavar="FILE", help="file to write (default: print)")
    config.set_defaults(run=run, parser=config)


def run(args: argparse.Namespace) -> None:
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
