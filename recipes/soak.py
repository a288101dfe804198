"""Does a rank's process grow? 300 steps on a mesh of 2 x 2, each of another length, and what each rank holds on the way.

    python recipes/soak.py [--steps 300] [--unbounded]

Four gloo ranks on the CPU, forked by the package's own pool; a Llama of 2 layers, AdamW, clipped. After step 50 and
after the last one each rank counts its resident memory, open files, threads, live tensors and the objects that the
garbage collector knows, and all ranks compare their replicas bit by bit: whatever several ranks hold alike of weights
and of the optimizer's state. `--unbounded` leaves DTensor's caches without a limit, as torch has them.

Exit status 1 if replicas differ, or files, threads or tensors have grown, or memory by more than a tenth.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.fingerprint import fingerprint
from hf_tpsp.tools.ranks import RankPool
from hf_tpsp.upstream.torch import caches
from hf_tpsp.witness.alike import holders

MESH = TPSPConfig(tp_size=2, dp_shard_size=2)
FIRST, STRIDE = 50, 11


def held() -> dict[str, int]:
    """What this process holds. Memory that was freed is given back to the system first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident KiB": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "live tensors": sum(issubclass(type(x), torch.Tensor) for x in objects),
        "objects": len(objects),
    }


def differing(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """How many tensors several ranks hold pieces of alike, and how many of these differ in a bit."""
    named = [p for p in model.parameters() if isinstance(p, DTensor)]
    tensors = [(p, x) for p in named for x in (p, *optimizer.state[p].values()) if isinstance(x, DTensor)]
    prints = torch.stack([fingerprint(x._local_tensor) for _, x in tensors])
    everyones = [torch.empty_like(prints) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, prints)
    table, compared, differ = torch.stack(everyones), 0, 0
    for column, (parameter, _) in enumerate(tensors):
        groups = table[:, column][holders(parameter)]
        compared += groups.shape[1] > 1
        differ += bool((groups != groups[:, :1]).any())
    return compared, differ


def soak(config: TPSPConfig, steps: int, unbounded: bool) -> tuple[list[dict[str, int]], list[float], tuple[int, int]]:
    """What this rank holds after step `FIRST` and the last one, the seconds of each step, and the replicas."""
    if unbounded:
        caches._bound.limit = sys.maxsize
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, num_hidden_layers=2, use_cache=False))
    model = hf_tpsp.parallelize(model, config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    numbers = torch.Generator().manual_seed(dist.get_rank() // config.tp_size)
    found, seconds = [], []
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        # Each length comes once, short ones among long ones.
        ids = torch.randint(0, 512, (2, 8 + step * STRIDE % (steps + 1)), generator=numbers)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        if step in (FIRST, steps):
            del ids
            found.append(held())
    return found, seconds, differing(model, optimizer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--unbounded", action="store_true", help="leave DTensor's caches without a limit")
    args = parser.parse_args()
    if math.gcd(STRIDE, args.steps + 1) > 1 or args.steps <= FIRST:
        parser.error(f"--steps must be above {FIRST}, and no multiple of {STRIDE} less 1")
    pool = RankPool()
    try:
        results = pool.run(4, soak, MESH, args.steps, args.unbounded, timeout=3600)
    finally:
        pool.stop()
    table = Table(
        title=f"2 x 2, {args.steps} steps of {args.steps} lengths: after step {FIRST} → after step {args.steps}"
    )
    table.add_column("rank")
    for name in results[0][0][0]:
        table.add_column(name, justify="right")
    grown = False
    for rank, ((first, last), _, _) in enumerate(results):
        table.add_row(str(rank), *(f"{first[name]:,} → {last[name]:,}" for name in first))
        grown |= any(last[name] > first[name] for name in ("open files", "threads", "live tensors"))
        grown |= last["resident KiB"] > 1.1 * first["resident KiB"]
    console = Console(width=130)
    console.print(table)
    seconds = sorted(results[0][1][FIRST:])
    compared, differ = results[0][2]
    console.print(f"median step {1e3 * seconds[len(seconds) // 2]:.0f} ms, slowest {1e3 * seconds[-1]:.0f} ms")
    console.print(f"replicas: {compared} tensors are held by several ranks, {differ} differ in a bit")
    return int(grown or differ > 0 or compared == 0)


if __name__ == "__main__":
    sys.exit(main())
