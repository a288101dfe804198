"""Is the sharded model the same model? Loss and every gradient of Qwen2.5-0.5B, on four ranks and in one process.

    accelerate launch --config_file hf_tpsp/presets/cpu_2x2.yaml recipes/parity.py [--layers N]

Four gloo ranks on the CPU, fsdp 2 x tp 2, with sequence parallelism, loss parallelism and activation checkpointing. Four
samples of odd lengths (the first has 423 tokens, which 2 does not divide), one at a time and without padding: sample i
goes to data-parallel rank i % 2, gradients accumulate over two micro-batches. The architecture is that of Qwen2.5-0.5B
at full width and depth, with random weights: 18 GiB and 4 minutes on 2 cores; `--layers 4` takes 10 GiB and 2 minutes.

First rank 0 runs the model plainly: nothing of hf_tpsp is involved, the loss is torch's cross entropy. Then all ranks
load the saved weights under `hf_tpsp.enable()`. Exit status 1 if the loss or any gradient differs by more than rounding.

The samples are random ids: `python recipes/parity.py --make-data recipes/data/parity.jsonl` wrote them.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

import hf_tpsp
from hf_tpsp.cli.arguments import Parser, output_file, whole
from hf_tpsp.tools.verify.comparison import Errors, relative, relative_number

COMMAND = "accelerate launch --config_file hf_tpsp/presets/cpu_2x2.yaml recipes/parity.py"
DATA = Path(__file__).parent / "data" / "parity.jsonl"
VOCAB = 151_936
LENGTHS = (423, 211, 317, 389)
TOLERANCE = 1e-5  # relative, for the loss and for the gradient of each parameter, in fp32


def make_data(path: Path) -> None:
    """Random ids, Zipf-like: the n-th most frequent has weight 1 / n, and which id that is, is drawn too, so that each
    vocabulary shard owns frequent ones. The first third of each sample is a prompt, without loss."""
    generator = torch.Generator().manual_seed(423)
    ids_by_frequency = torch.randperm(VOCAB, generator=generator)
    weights = 1 / torch.arange(1, VOCAB + 1)
    with path.open("w") as file:
        for length in LENGTHS:
            drawn = torch.multinomial(weights, length, replacement=True, generator=generator)
            input_ids = ids_by_frequency[drawn].tolist()
            labels = [-100] * (length // 3) + input_ids[length // 3 :]
            file.write(json.dumps({"input_ids": input_ids, "labels": labels}) + "\n")


def read_data() -> list[dict[str, torch.Tensor]]:
    samples = [json.loads(line) for line in DATA.read_text().splitlines()]
    return [{name: torch.tensor([values]) for name, values in sample.items()} for sample in samples]


def build_model(layers: int) -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B with random weights; norms and biases are moved off 1 and 0, so that no wrong gradient can hide."""
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, initializer_range=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run_plain(samples: list[dict], targets: int, layers: int, folder: str) -> float:
    """One process. Saves the weights and the gradients in `folder` and returns the loss, summed over all targets."""
    model = build_model(layers).train()
    summed = 0.0
    for sample in samples:
        logits = model(sample["input_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1], sample["labels"][0, 1:], reduction="sum")
        (loss / targets).backward()
        summed += loss.item()
        del logits, loss
    model.save_pretrained(folder)
    save_file({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients.safetensors")
    return summed


def run_sharded(samples: list[dict], targets: int, config: hf_tpsp.TPSPConfig, folder: str):
    """All ranks. Returns the sharded model, with its gradients, and the loss, summed over all targets."""
    with hf_tpsp.enable(config):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    summed = 0.0
    dp_rank = dist.get_rank() // config.tp_size  # the ranks of a TP group are neighbours and share their samples
    for sample in samples[dp_rank :: config.dp_size]:
        loss = model(**sample, num_items_in_batch=targets, use_cache=False).loss
        (loss * config.dp_size).backward()  # FSDP averages over the data-parallel ranks
        summed += loss.item() * targets
    total = torch.tensor(summed, dtype=torch.float64)
    dist.all_reduce(total)
    return model, total.item() / config.tp_size


def compare_gradients(model: torch.nn.Module, folder: str) -> Errors:
    """The relative error of each parameter's gradient, on rank 0. One full gradient at a time is gathered."""
    errors = Errors()
    with safe_open(f"{folder}/gradients.safetensors", framework="pt") as saved:
        assert set(saved.keys()) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            found = parameter.grad.full_tensor()
            if dist.get_rank() == 0:
                errors.add("gradient", relative(found, saved.get_tensor(name)), name)
            del found  # before the next one is gathered
    return errors


def main() -> None:
    parser = Parser(description=f"Run it as: {COMMAND}")
    parser.add_argument("--layers", type=whole(), default=24, help="decoder layers (default: all 24)")
    parser.add_argument("--make-data", type=output_file, metavar="PATH", help="write the samples to PATH and stop")
    args = parser.parse_args()
    if args.make_data:
        return make_data(args.make_data)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(f"parity.py compares four ranks with one process. Run it as: {COMMAND}")
    first = os.environ["RANK"] == "0"
    try:
        config = hf_tpsp.TPSPConfig.from_accelerate(activation_checkpointing="full")
        config.check_world(int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        time.sleep(0 if first else 10)  # the launcher ends all ranks with the first: let that be the one that speaks
        sys.exit(str(error))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a failing rank leaves no temporary folder behind
    PartialState(cpu=True)  # starts the gloo process group
    disable_progress_bar()
    console = Console(quiet=not first)
    samples = read_data()
    targets = sum((sample["labels"][:, 1:] != -100).sum().item() for sample in samples)
    with tempfile.TemporaryDirectory() if first else nullcontext() as folder:
        shared = [folder, None]
        start = time.perf_counter()
        if first:
            console.print(f"plain: one process, {args.layers} layers, {targets} target tokens ...")
            shared[1] = run_plain(samples, targets, args.layers, folder)
        dist.broadcast_object_list(shared)  # the other ranks wait here
        folder, expected = shared
        plain_seconds = time.perf_counter() - start
        console.print(f"plain: done in {plain_seconds:.0f} s")
        console.print(f"sharded: {config.world_size} ranks, fsdp {config.dp_size} x tp {config.tp_size} ...")
        start = time.perf_counter()
        model, found = run_sharded(samples, targets, config, folder)
        sharded_seconds = time.perf_counter() - start
        console.print(f"sharded: done in {sharded_seconds:.0f} s; comparing the gradients ...")
        errors = compare_gradients(model, folder)
        dist.barrier()

    memory = [None] * config.world_size
    dist.all_gather_object(memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
    passed = [None]
    if first:
        errors.add("loss", relative_number(found, expected))
        passed = [errors.within(TOLERANCE)]
        table = Table("", "plain", "sharded", title=f"Qwen2.5-0.5B, {args.layers} layers, fp32")
        table.add_row("summed loss", f"{expected:.6f}", f"{found:.6f}")
        table.add_row("relative difference", "", f"{errors.loss:.1e}")
        table.add_row(f"largest difference of {len(errors.of)} gradients", "", f"{errors.gradient:.1e}")
        table.add_row(f"  {errors.parameter}")
        table.add_row("peak maxrss per rank, GiB", "in rank 0's", " ".join(f"{gib:.1f}" for gib in memory))
        table.add_row("seconds", f"{plain_seconds:.0f}", f"{sharded_seconds:.0f}")
        console.print(table)
        console.print(f"{'passed' if passed[0] else 'FAILED'}: the tolerance is {TOLERANCE:g}")
    dist.broadcast_object_list(passed)
    dist.destroy_process_group()
    sys.exit(0 if passed[0] else 1)


if __name__ == "__main__":
    main()
