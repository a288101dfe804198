"""The rank pool: processes that import torch and transformers once and then run functions as gloo ranks.

`RankPool.run(world_size, function, *args)` runs a picklable function on the first `world_size` ranks of a fresh process
group and returns what each rank returned. A rank that raises, or a call that outlives its time, ends the pool's
processes; the call raises with that rank's traceback, and the next one starts new ranks.
"""

from __future__ import annotations

import multiprocessing as mp
import multiprocessing.connection
import os
import socket
import sys
import traceback

MAX_RANKS = 4


def _worker(rank: int, pipe) -> None:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", ACCELERATE_USE_CPU="true")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    import torch
    import torch.distributed as dist
    import transformers
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    pristine = dict(os.environ)
    while (task := pipe.recv()) is not None:
        world_size, port, function, args, kwargs = task
        os.environ.clear()
        os.environ.update(pristine)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )  # fmt: skip
        try:
            torch.manual_seed(0)
            # accelerate starts the process group, as it does in a script.
            PartialState(cpu=True)
            pipe.send(("ok", function(*args, **kwargs)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class RankPool:
    def __init__(self):
        self._ranks: list[tuple[mp.Process, mp.connection.Connection]] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(MAX_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, theirs), daemon=True)
            process.start()
            self._ranks.append((process, ours))

    def run(self, world_size: int, function, *args, timeout: float = 180, **kwargs) -> list:
        """What `function(*args, **kwargs)` returned on each rank, in rank order. Raises RuntimeError if one failed."""
        if not self._ranks:
            self._start()
        pipes = [pipe for _, pipe in self._ranks[:world_size]]
        port = free_port()
        for pipe in pipes:
            pipe.send((world_size, port, function, args, kwargs))
        results: dict[int, object] = {}
        waiting = dict(enumerate(pipes))
        while waiting:
            ready = mp.connection.wait(list(waiting.values()), timeout=timeout)
            if not ready:
                self.stop()
                raise RuntimeError(f"ranks {sorted(waiting)} gave no answer in {timeout} s")
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    status, value = waiting.pop(rank).recv()
                except (EOFError, ConnectionError):
                    status, value = "error", "the process died"
                if status == "error":
                    self.stop()
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def stop(self) -> None:
        for process, _ in self._ranks:
            process.kill()
        for process, pipe in self._ranks:
            process.join()
            pipe.close()
        self._ranks = []


if __name__ == "__main__":
    sys.exit("imported by conftest.py")
