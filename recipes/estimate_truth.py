"""What `hf-tpsp estimate` predicts against what real ranks hold and send.

    torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 recipes/estimate_truth.py
    torchrun --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0 recipes/estimate_truth.py

Three architectures of 8 layers, two lengths, both losses, all activation checkpointing, on every mesh of 2 and of 4 gloo
ranks without replicas; the prediction runs two shallow models. Rank 0 of each is compared, three ways:

- peak, recorded: tensor bytes by `hf_tpsp.tools.estimate`, as the prediction counts them, on real tensors;
- peak, heap: what glibc says that the process has allocated, read after each operation, above what it had before the step,
  and the bytes of parameters, optimizer and batch. It knows nothing of tensors; the autograd graph and Python are in it;
- collectives: count and bytes of each kind on each mesh dim, and FLOPs. These must be equal.

Writes a table to `--out` if given, and exits 1 if a peak is off by more than 5 % or anything else is not equal.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.cli.arguments import Parser, output_file
from hf_tpsp.sharding import keep_fp32_masters
from hf_tpsp.tools.estimate.simulate import OPTIMIZERS, Job, simulate, simulated_world
from hf_tpsp.tools.estimate.step import Step, record_step

SIZES = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4099, "max_position_embeddings": 1024, "use_cache": False,
}  # fmt: skip
ATTENTION = {"llama": "fused", "qwen2": "fused", "gemma2": "eager"}  # Gemma 2's softcap has no fused kernel on a CPU
LENGTHS = (255, 512)
TOLERANCE = 0.05
M_MMAP_THRESHOLD = -3  # of malloc.h


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


_libc = ctypes.CDLL(None)


def heap_bytes() -> int:
    """Bytes that this process has allocated and not freed, in the main arena and by mmap (Linux with glibc)."""
    _libc.mallinfo2.restype = _Mallinfo
    info = _libc.mallinfo2()
    return info.uordblks + info.hblkhd


class HeapPeak(TorchDispatchMode):
    """The most heap bytes seen after an operation, above those at the start, in `peak`."""

    def __enter__(self):
        _libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # larger blocks by mmap, which mallinfo2 counts for all threads
        self.start, self.peak = heap_bytes(), 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on plain tensors come here next
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, heap_bytes() - self.start)
        return result


def measured(config: PreTrainedConfig, choices: TPSPConfig, job: Job) -> tuple[Step, int]:
    """A real step on this rank, and the peak by its heap."""
    torch.manual_seed(0)
    attention = "sdpa" if job.attention == "fused" else job.attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    # The step that is predicted takes no norm of its gradients.
    hf_tpsp.parallelize(model, replace(choices, on_nan="ignore"))
    if choices.mixed_precision == "bf16":
        keep_fp32_masters(model)
    optimizer = OPTIMIZERS[job.optim](model.parameters(), lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (job.batch, job.seq))
    batch = {"input_ids": ids, "labels": ids.clone()}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    # gloo's threads let go of what they have sent when they get to it, which only ever adds.
    steps = [record_step(model, optimizer, batch, settle=0.01) for _ in range(3)]
    recorded = min(steps, key=lambda step: step.peak()[1].sum())
    peaks = []
    for _ in range(2):  # what is allocated once in a process is not of the step
        gc.collect()
        with HeapPeak() as heap:
            step()
        peaks.append(heap.peak)
    return recorded, int(recorded.start.sum()) + min(peaks)


def compare(predicted: Step, recorded: Step, heap: int) -> dict[str, object]:
    """Ratios of the peaks, and whether all else is equal."""
    (moment, peak), (real_moment, real_peak) = predicted.peak(), recorded.peak()

    def counts(step: Step) -> dict:
        return {key: (traffic.count, traffic.size) for key, traffic in step.traffic.items()}

    return {
        "predicted": int(peak.sum()),
        "/ recorded": float(peak.sum() / real_peak.sum()),
        "/ heap": float(peak.sum() / heap),
        "collectives equal": counts(predicted) == counts(recorded),
        "FLOPs equal": predicted.flops == recorded.flops,
        "moment": moment if moment == real_moment else f"{moment}, really {real_moment}",
    }


def cases(world: int, models: list[str], tp_sizes: list[int]) -> list[tuple]:
    """`(what it is, config, choices, job)`"""
    found = []
    meshes = [(world // tp, tp) for tp in tp_sizes if world // tp <= 2]
    for (dp, tp), kind, seq, loss, kept in itertools.product(
        meshes, models, LENGTHS, ("chunked", "loss_parallel"), ("none", "selective", "full")
    ):
        choices = TPSPConfig(tp_size=tp, dp_shard_size=dp, loss=loss, activation_checkpointing=kept)
        job = Job(seq=seq, dtype="fp32", attention=ATTENTION[kind])
        config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=kind == "gemma2")
        found.append(((f"{dp} x {tp}", kind, seq, loss, kept), config, choices, job))
    return found


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_file, help="file to append the table to, in markdown")
    parser.add_argument("--models", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument("--tp", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="sizes to try")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    todo = cases(world, args.models, args.tp)
    predicted = []
    if rank == 0:
        with simulated_world(world, "gloo"):
            predicted = [simulate(config, choices, job) for _, config, choices, job in todo]
    rows, wrong = [], []
    for index, (what, config, choices, job) in enumerate(todo):
        recorded, heap = measured(config, choices, job)
        if rank == 0:
            found = compare(predicted[index], recorded, heap)
            rows.append([*what, *(f"{v:.4f}" if isinstance(v, float) else v for v in found.values())])
            print(*rows[-1], sep=" | ", flush=True)
            off = max(abs(found["/ recorded"] - 1), abs(found["/ heap"] - 1))
            if off > TOLERANCE or not (found["collectives equal"] and found["FLOPs equal"]):
                wrong.append(what)
    if rank == 0:
        header = ["mesh", "model", "tokens", "loss", "checkpointing", *found]
        print(f"{len(rows)} compared, {len(wrong)} wrong: {wrong}")
        if args.out:
            lines = [header, ["---"] * len(header), *rows]
            with args.out.open("a") as file:
                file.writelines(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
