"""How fast, how large, how talkative? hf_tpsp beside what one would use instead, in one process group.

    torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 recipes/benchmark.py [options]

Gloo ranks on the CPU, one thread each. A random Qwen2-shaped fp32 model is loaded once for each variant; the variants
then take turns, step by step, so that whatever else the machine does meets them alike. A step is forward, backward and
`zero_grad`. The default takes a quarter of an hour on two cores; `--hidden 64 --vocab 4000 --tokens 256`, seconds.

Writes `recipes/benchmarks/NAME.json` and `NAME.png`, and the tables of all JSON files to `recipes/benchmarks/README.md`.
Bytes are rank 0's, counted by `hf_tpsp.tools.estimate` in a step of its own, beside what they could be at the least where theory
says so: `saved_activation_bytes` and `collective_floor`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from benchmark_report import FOLDER, RIVALS, report
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.cli.arguments import Parser, whole
from hf_tpsp.forward import batch_check
from hf_tpsp.tools.estimate.floors import collective_floor, saved_activation_bytes, wire_bytes
from hf_tpsp.tools.estimate.moments import measure_step, step

COMMAND = "torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 recipes/benchmark.py"
# Name → fields of TPSPConfig.
VARIANTS: dict[str, dict] = {
    "loss_parallel": {"loss": "loss_parallel"},
    "chunked": {},
    "chunked-keep": {"regather_inputs": False},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "compile": {"compile": True},
    "witnessed": {"check": "every"},  # the check that "chunked" has in its first step, in every step
}
DEFAULT = ["native", "fsdp2", "loss_parallel", "chunked", "chunked-keep"]


# ---- variants ----------------------------------------------------------------------------------------------------


def choices_of(variant: str, ranks: int) -> TPSPConfig | None:
    """The config of a variant of hf_tpsp; None for the others."""
    return TPSPConfig(tp_size=ranks, **VARIANTS[variant]) if variant in VARIANTS else None


def build(variant: str, folder: str, ranks: int) -> nn.Module:
    """The model in `folder`, sharded as `variant` says."""
    if variant == "native" and ranks > 1:
        return Qwen2ForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=ranks)).train()
    model = Qwen2ForCausalLM.from_pretrained(folder).train()
    if variant == "native":  # of one rank: the plain model
        return model
    if variant == "fsdp2":
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        return model
    return hf_tpsp.parallelize(model, choices_of(variant, ranks))


def row(variant: str, ids: Tensor) -> Tensor:
    """What this rank is fed of the ids `[1, tokens]`."""
    return ids.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] if variant == "fsdp2" else ids


# ---- measurements ------------------------------------------------------------------------------------------------


@contextmanager
def timed_checks() -> Iterator[list[float]]:
    """While inside, the seconds of each comparison of the ranks' batches (`forward.batch_check`) are appended to the list."""
    seconds, check = [], batch_check.check

    def timed(*args) -> None:
        start = time.perf_counter()
        check(*args)
        seconds.append(time.perf_counter() - start)

    batch_check.check = timed
    try:
        yield seconds
    finally:
        batch_check.check = check


def time_steps(models: dict[str, nn.Module], ids: Tensor, steps: int, warmup: int) -> tuple[dict, dict]:
    """For each variant, the seconds of its steps, and of the checks of the batch in them.

    A step's are the slowest rank's. A check's are the rank's that comes to it last: the others wait for that one, which
    they would do at the next collective. The i-th steps of all variants follow upon each other.
    """
    seconds, checks = ({variant: [] for variant in models} for _ in range(2))
    for _ in range(warmup + steps):
        for variant, model in models.items():
            dist.barrier()
            with timed_checks() as found:
                start = time.perf_counter()
                step(model, row(variant, ids))
                model.zero_grad()
                seconds[variant].append(time.perf_counter() - start)
            checks[variant].append(sum(found))
    agreed = []
    for measured, op in ((seconds, dist.ReduceOp.MAX), (checks, dist.ReduceOp.MIN)):
        values = torch.tensor(list(measured.values()))[:, warmup:]
        dist.all_reduce(values, op=op)
        agreed.append(dict(zip(models, values.tolist(), strict=True)))
    return agreed[0], agreed[1]


def run(models: dict[str, nn.Module], config: Qwen2Config, tokens: int, args: argparse.Namespace) -> dict:
    """Everything about one number of tokens per step."""
    ranks, first = dist.get_world_size(), next(iter(models))
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    seconds, checks = time_steps(models, ids, args.steps, args.warmup)
    result = {
        "tokens": tokens,
        "saved_bytes_per_layer_floor": {
            "unfused_activation": saved_activation_bytes(config, tokens, ranks),
            "fused_activation": saved_activation_bytes(config, tokens, ranks, fused_activation=True),
        },
        "logits_shard_bytes": tokens * config.vocab_size * 4 / ranks,
        "variants": {},
    }
    for variant, model in models.items():
        ratios = [time / base for time, base in zip(seconds[variant], seconds[first], strict=True)]
        found = {"step_seconds": statistics.median(seconds[variant]), "step_ratio": statistics.median(ratios)}
        choices = choices_of(variant, ranks)
        if choices:
            found["check_seconds"] = statistics.median(checks[variant])
        if not VARIANTS.get(variant, {}).get("compile"):  # hf_tpsp.tools.estimate cannot see into compiled code
            found |= measure_step(model, row(variant, ids))
            sent = found["collectives"]
            found["wire_bytes"] = wire_bytes(sent)
            if choices:
                floor = collective_floor(config, tokens, choices)
                found["collectives_floor"] = {kind: asdict(traffic) for kind, traffic in floor.items()}
                found["wire_bytes_floor"] = wire_bytes(floor)
            found["collectives"] = {kind: asdict(traffic) for kind, traffic in sent.items()}
        result["variants"][variant] = found
    check_losses(result["variants"])
    return result


def check_losses(variants: dict[str, dict]) -> None:
    """Raise `RuntimeError` unless all variants that were given the same row found the same loss."""
    losses = {name: found["loss"] for name, found in variants.items() if name != "fsdp2" and "loss" in found}
    if losses and not max(losses.values()) - min(losses.values()) <= 1e-4:
        raise RuntimeError(f"The variants do not compute the same loss: {losses}.")


# ---- command -----------------------------------------------------------------------------------------------------


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
    }


class OneRankParser(Parser):
    def error(self, message: str):
        """One line, from one rank: the launcher ends all ranks with the first, so the others wait for it."""
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 10)
        super().error(message)


def parse() -> tuple[argparse.Namespace, Qwen2Config | None]:
    parser = OneRankParser(description=f"Run it as: {COMMAND}")
    number = {"type": whole(), "metavar": "N"}
    parser.add_argument("--hidden", default=512, **number, help="hidden size; the MLP's is 4 times that (default: 512)")
    parser.add_argument("--layers", default=4, **number, help="decoder layers, at least 2 (default: 4)")
    parser.add_argument("--heads", default=4, **number, help="attention heads (default: 4)")
    parser.add_argument("--kv-heads", default=2, **number, help="key and value heads (default: 2)")
    parser.add_argument("--vocab", default=128_000, **number, help="vocabulary (default: 128000)")
    parser.add_argument(
        "--tokens", default=[2048], nargs="+", **number, help="tokens of a step; several: one after another"
    )
    parser.add_argument("--steps", default=10, **number, help="timed steps of each variant (default: 10)")
    parser.add_argument("--warmup", default=2, **number, help="steps before them (default: 2)")
    names = [*RIVALS, *VARIANTS]
    parser.add_argument(
        "--variants", default=DEFAULT, nargs="+", choices=names, metavar="NAME",
        help=f"of {', '.join(names)}; the first is what the others' times are divided by (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--out", metavar="NAME", help=f"name of the files in {FOLDER} (default: made from the sizes)")
    parser.add_argument("--report", action="store_true", help="only write the README of the files that are there")
    args = parser.parse_args()
    if args.report:
        return args, None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ:
        parser.error(f"needs a launcher. Run it as: {COMMAND}")
    if args.layers < 2:
        parser.error("--layers must be at least 2: what a layer saves is measured from one layer to the next")
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads:
        parser.error("--hidden must be a multiple of twice --heads, and --heads one of --kv-heads")
    if any(tokens % ranks for tokens in args.tokens):
        parser.error(f"--tokens must be multiples of the number of ranks, {ranks}")
    config = Qwen2Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(args.tokens), tie_word_embeddings=False, use_cache=False, dtype="float32",
        attn_implementation="sdpa",
    )  # fmt: skip
    try:
        TPSPConfig(tp_size=ranks).check_model(config)
    except ValueError as error:
        parser.error(str(error))
    args.out = args.out or f"h{args.hidden}_l{args.layers}_v{args.vocab}_t{'_'.join(map(str, args.tokens))}_n{ranks}"
    return args, config


def benchmark(args: argparse.Namespace, config: Qwen2Config, console: Console) -> dict:
    """All ranks. Builds every variant and measures it at every number of tokens."""
    ranks, first, described = dist.get_world_size(), dist.get_rank() == 0, machine()
    with tempfile.TemporaryDirectory() if first else nullcontext() as folder:
        if first:
            torch.manual_seed(0)
            Qwen2ForCausalLM(config).save_pretrained(folder)
        shared = [folder]
        dist.broadcast_object_list(shared)
        models = {variant: build(variant, shared[0], ranks) for variant in args.variants}
        dist.barrier()
    runs = []
    for tokens in args.tokens:
        console.print(f"{tokens} tokens ...")
        runs.append(run(models, config, tokens, args))
    return {
        "name": args.out,
        "options": shlex.join(sys.argv[1:]),
        "ranks": ranks,
        "base": args.variants[0],
        "rivals": RIVALS,
        "choices": {name: asdict(choices) for name in args.variants if (choices := choices_of(name, ranks))},
        "steps": args.steps,
        "machine": described,
        "model": config.to_diff_dict(),
        "runs": runs,
    }


def main() -> None:
    args, config = parse()
    if args.report:
        return report(None, Console())
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a failing rank leaves no temporary folder behind
    PartialState(cpu=True)  # starts the gloo process group
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    first = dist.get_rank() == 0
    console = Console(quiet=not first, width=max(Console().width, 170))
    result = benchmark(args, config, console)
    if first:
        report(result, console)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
