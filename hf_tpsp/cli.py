"""`hf-tpsp`: make an accelerate config, print a model's plan, compare an architecture with one process, estimate a run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .config import ACTIVATION_CHECKPOINTING, LOSSES, TPSPConfig
from .launch import accelerate_config

if TYPE_CHECKING:
    from verify import Result


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

    verify = commands.add_parser(
        "verify",
        help="compare an architecture with one process: loss, every gradient, weights",
        description="Builds a small random copy of an architecture, trains it on ranks that it starts on this machine, and "
        "compares loss, every gradient and the weights after two steps with one process. Exits with 1 if they differ. Runs the "
        "code in a checkpoint folder that has its own.",
    )
    verify.add_argument("model", nargs="?", metavar="MODEL_TYPE|PATH", help="a model type of transformers, or a folder")
    add_mesh_arguments(verify, tp=2)
    verify.add_argument("--seq", type=int, default=17, metavar="N", help="tokens of a row (default 17)")
    verify.add_argument("--vocab", type=int, default=131, metavar="N", help="vocabulary of the copy (default 131)")
    verify.add_argument("--dtype", choices=("fp32", "fp64"), default="fp32", help="default fp32")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.add_argument(
        "--all", action="store_true", help="every causal-LM model type of transformers; writes SUPPORT.md"
    )
    verify.add_argument("--only", nargs="+", metavar="TYPE", help="with --all: these model types")
    verify.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="with --all: sets of ranks side by side (default 1)"
    )
    verify.add_argument(
        "--results", type=Path, default=Path("verify.json"), help="with --all: what was found, and is not run again"
    )
    verify.add_argument(
        "-o", "--output", type=Path, default=Path("SUPPORT.md"), help="with --all: the table (default SUPPORT.md)"
    )
    verify.set_defaults(run=run_verify)

    add_estimate(commands)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"hf-tpsp: {error}\n")


def add_estimate(commands) -> None:
    estimate = commands.add_parser(
        "estimate",
        help="memory, communication and time of a step on each mesh, with no GPU",
        description="Simulates one rank's step on every legal mesh, or on the one given, and ranks the meshes.",
    )
    add = estimate.add_argument
    add("model", metavar="MODEL", help="checkpoint folder, config.json, or a shipped model such as Llama-3-70B")
    add("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    add("--seq", type=int, required=True, metavar="N", help="tokens of a row")
    add("--batch", type=int, default=1, metavar="N", help="rows of a micro-batch of one TP group (default 1)")
    for name, meaning in (("dp", "FSDP shard"), ("tp", "tensor-parallel"), ("dp-replicate", "HSDP replica")):
        add(f"--{name}", type=int, metavar="N", help=f"{meaning} size (default: every one that is legal)")
    add("--dtype", default="bf16", help="bf16 (fp32 masters), fp32 or pure_bf16 (default bf16)")
    add("--optim", default="adamw", help="adamw, sgd or sgd_momentum (default adamw)")
    add("--lora", type=int, metavar="RANK", help="LoRA on every linear layer, of this rank")
    add("--attention", default="fused", help="fused, or eager to keep the scores (default fused)")
    add("--loss", choices=LOSSES)
    add("--activation-checkpointing", choices=ACTIVATION_CHECKPOINTING)
    add("--no-sequence-parallel", dest="sequence_parallel", action="store_false", default=None)
    add("--no-answers", dest="answers", action="store_false", help="the table only: no search for the longest sequence")
    add("--json", action="store_true", help="print everything as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="draw the memory of each mesh (needs matplotlib)")
    add("--write-config", type=Path, metavar="FILE.yaml", help="write the accelerate config of the best mesh")
    hardware = estimate.add_argument_group("hardware", "defaults: hosts of eight H100 SXM, 400 Gbit/s for each GPU")
    add = hardware.add_argument
    add("--per-host", type=int, metavar="N", help="GPUs of a host (8)")
    add("--gpu-memory", dest="memory", metavar="SIZE", help="with its unit, GiB or GB (80GiB)")
    add("--reserve", metavar="SIZE", help="memory that no tensor gets (4GiB)")
    add("--flops", type=float, metavar="F", help="FLOP/s of a GPU (989e12 in bf16)")
    add("--efficiency", type=float, metavar="F", help="the part of them that is reached (0.5)")
    add("--link-inside", metavar="SIZE", help="sent in a second by a GPU inside its host (450GB)")
    add("--link-across", metavar="SIZE", help="sent in a second by a GPU to other hosts (50GB)")
    add("--latency", type=float, metavar="S", help="seconds before a collective's first byte (20e-6)")
    estimate.set_defaults(run=run_estimate)


def add_mesh_arguments(parser: argparse.ArgumentParser, tp: int = 1) -> None:
    parser.add_argument("--tp", type=int, default=tp, metavar="N", help=f"tensor-parallel size (default {tp})")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="FSDP shard size (default 1)")
    parser.add_argument("--dp-replicate", type=int, default=1, metavar="N", help="HSDP replicas (default 1)")


def mesh_config(args: argparse.Namespace, **settings) -> TPSPConfig:
    return TPSPConfig(tp_size=args.tp, dp_shard_size=args.dp, dp_replicate_size=args.dp_replicate, **settings)


def run_config(args: argparse.Namespace) -> None:
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

    from .plan.planner import plan_for
    from .rules import rule_for, wildcard
    from .styles.registry import style_for

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


def run_verify(args: argparse.Namespace) -> None:
    from .tools.verify.verify import verify

    if args.all == bool(args.model):
        raise ValueError("verify takes a model type or a folder, or --all.")
    if args.all:
        return run_verify_all(args)
    result = verify(
        args.model,
        mesh_config(args),
        length=args.seq,
        vocabulary=args.vocab,
        dtype=f"float{args.dtype.removeprefix('fp')}",
    )
    if args.json:
        print(json.dumps({**asdict(result), "is_equal": result.is_equal}))
    else:
        print_result(result)
    if not result.is_equal:
        sys.exit(1)


def print_result(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    if result.error:
        console.print(f"{result.model_type}: [bold]refused[/]. {result.error}", highlight=False)
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
        console.print(f"- {note}", highlight=False)


def run_verify_all(args: argparse.Namespace) -> None:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import support

    names = args.only or support.model_types()
    if unknown := sorted(set(names) - set(support.model_types())):
        raise ValueError(f"transformers has no causal LM of type {', '.join(unknown)}.")
    verdicts = []
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("verify", total=len(names))
        for verdict in support.check_all(names, args.tp, args.jobs, args.results):
            verdicts.append(verdict)
            progress.update(task, advance=1, description=verdict.model_type)
            if not verdict.is_equal:
                progress.console.print(f"{verdict.model_type}: {verdict.error or 'DIFFERS'}", highlight=False)
    args.output.write_text(support.markdown(verdicts, args.tp))
    wrong = [v.model_type for v in verdicts if not v.error and not v.is_equal]
    print(f"{sum(v.is_equal for v in verdicts)} of {len(verdicts)} equal to one process; the table is in {args.output}")
    if wrong:
        sys.exit(f"hf-tpsp: not equal, and not refused: {', '.join(wrong)}")


def run_estimate(args: argparse.Namespace) -> None:
    from rich.console import Console

    from .tools.estimate.estimation import estimate
    from .tools.estimate.hardware import Hardware, parse_bytes

    given = {name: value for name, value in vars(args).items() if value is not None}
    sizes = {
        name: parse_bytes(given.pop(name))
        for name in ("memory", "reserve", "link_inside", "link_across")
        if name in given
    }
    numbers = {name: given.pop(name) for name in ("per_host", "flops", "efficiency", "latency") if name in given}
    for name in ("run", "json", "plot", "write_config"):
        given.pop(name, None)
    if args.plot:
        from .tools.estimate.report import check_plot

        check_plot()  # before minutes have passed
    with Console(stderr=True).status("building the model") as status:
        found = estimate(**given, hardware=Hardware(**sizes, **numbers), progress=status.update)
    if args.write_config:
        hosts = max(1, found.gpus // found.hardware.per_host)
        args.write_config.write_text(yaml.safe_dump(accelerate_config(found.config(), hosts), sort_keys=False))
    if args.plot:
        from .tools.estimate.report import plot

        plot(found, args.plot)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from .tools.estimate.report import report

        # A pipe gets the whole width; a terminal its own.
        Console(width=None if sys.stdout.isatty() else 160).print(report(found))


if __name__ == "__main__":
    main()
