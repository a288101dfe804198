"""`hf-tpsp estimate`: memory, communication and time of a step, with no GPU."""

from __future__ import annotations

import argparse
import json
import sys

import yaml

from ..config import ACTIVATION_CHECKPOINTING, LOSSES
from ..launch import accelerate_config
from .arguments import one_of, output_file, whole


def add(commands) -> None:
    estimate = commands.add_parser(
        "estimate",
        help="memory, communication and time of a step on each mesh, with no GPU",
        description="Simulates one rank's step on every legal mesh, or on the one given, and ranks the meshes.",
    )
    add = estimate.add_argument
    add(
        "model",
        metavar="MODEL",
        help="checkpoint folder, config.json, model type, hub name, or a shipped model such as Llama-3-70B",
    )
    add("--gpus", type=whole(), required=True, metavar="N", help="GPUs in all")
    add("--seq", type=whole(), required=True, metavar="N", help="tokens of a row")
    add("--batch", type=whole(), default=1, metavar="N", help="rows of a micro-batch of one TP group (default 1)")
    for name, meaning in (("dp", "FSDP shard"), ("tp", "tensor-parallel"), ("dp-replicate", "HSDP replica")):
        add(f"--{name}", type=whole(), metavar="N", help=f"{meaning} size (default: every one that is legal)")
    add("--dtype", default="bf16", help="bf16 (fp32 masters), fp32 or pure_bf16 (default bf16)")
    add("--optim", default="adamw", help="adamw, sgd or sgd_momentum (default adamw)")
    add("--lora", type=whole(), metavar="RANK", help="LoRA on every linear layer, of this rank")
    add("--attention", default="fused", help="fused, or eager to keep the scores (default fused)")
    add("--loss", **one_of(LOSSES))
    add("--activation-checkpointing", **one_of(ACTIVATION_CHECKPOINTING))
    add("--no-sequence-parallel", dest="sequence_parallel", action="store_false", default=None)
    add("--no-answers", dest="answers", action="store_false", help="the table only: no search for the longest sequence")
    add("--json", action="store_true", help="print everything as JSON")
    add("--plot", type=output_file, metavar="FILE.png", help="draw the memory of each mesh (needs matplotlib)")
    add("--write-config", type=output_file, metavar="FILE.yaml", help="write the accelerate config of the best mesh")
    hardware = estimate.add_argument_group("hardware", "defaults: hosts of eight H100 SXM, 400 Gbit/s for each GPU")
    add = hardware.add_argument
    add("--per-host", type=whole(), metavar="N", help="GPUs of a host (8)")
    add("--gpu-memory", dest="memory", metavar="SIZE", help="with its unit, GiB or GB (80GiB)")
    add("--reserve", metavar="SIZE", help="memory that no tensor gets (4GiB)")
    add("--flops", type=float, metavar="F", help="FLOP/s of a GPU (989e12 in bf16)")
    add("--efficiency", type=float, metavar="F", help="the part of them that is reached (0.5)")
    add("--link-inside", metavar="SIZE", help="sent in a second by a GPU inside its host (450GB)")
    add("--link-across", metavar="SIZE", help="sent in a second by a GPU to other hosts (50GB)")
    add("--latency", type=float, metavar="S", help="seconds before a collective's first byte (20e-6)")
    estimate.set_defaults(run=run, parser=estimate)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..tools.estimate.estimation import estimate
    from ..tools.estimate.hardware import Hardware, parse_bytes

    given = {name: value for name, value in vars(args).items() if value is not None}
    sizes = {
        name: parse_bytes(given.pop(name))
        for name in ("memory", "reserve", "link_inside", "link_across")
        if name in given
    }
    numbers = {name: given.pop(name) for name in ("per_host", "flops", "efficiency", "latency") if name in given}
    for name in ("run", "parser", "json", "plot", "write_config"):
        given.pop(name, None)
    if args.plot:
        from ..tools.estimate.report import check_plot

        # What cannot be drawn is reported before the minutes of simulation, not after them.
        check_plot(args.plot)
    with Console(stderr=True).status("building the model") as status:
        found = estimate(**given, hardware=Hardware(**sizes, **numbers), progress=status.update)
    if args.write_config:
        hosts = max(1, found.gpus // found.hardware.per_host)
        args.write_config.write_text(yaml.safe_dump(accelerate_config(found.config(), hosts), sort_keys=False))
    if args.plot:
        from ..tools.estimate.report import plot

        plot(found, args.plot)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from ..tools.estimate.report import report

        # A terminal has a width of its own; a pipe gets a fixed one.
        Console(width=None if sys.stdout.isatty() else 160).print(report(found))
