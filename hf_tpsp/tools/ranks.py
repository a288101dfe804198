"""A pool of ranks on this machine: processes that import torch and transformers once and then run functions as gloo ranks.

`RankPool.run(world_size, function, *args)` runs a picklable function on `world_size` ranks and returns what each rank
returned. Ranks of one world size are started once and keep their process group. A rank that raises, or a call that
outlives its time, ends them all; the call raises with that rank's traceback, and the next one starts new ranks.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback

from torch.distributed import TCPStore


def _worker(rank: int, world_size: int, port: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",  # the store is the pool's
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
    )  # fmt: skip
    import torch
    import transformers
    from accelerate import PartialState

    from ..upstream.accelerate import forget_state

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    pristine = dict(os.environ)
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        os.environ.clear()
        os.environ.update(pristine)
        forget_state()
        PartialState(cpu=True)  # accelerate starts the process group, as it does in a script
        torch.manual_seed(0)
        try:
            pipe.send(("ok", function(*args, **kwargs)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))


class RankPool:
    def __init__(self):
        self._stores: dict[int, TCPStore] = {}
        self._worlds: dict[int, list[tuple[mp.Process, mp.connection.Connection]]] = {}

    def _start(self, world_size: int) -> list[tuple[mp.Process, mp.connection.Connection]]:
        # Listening from here on: a port that was only found to be free may be somebody's by the time a rank takes it.
        store = self._stores[world_size] = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        context, ranks = mp.get_context("spawn"), []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, world_size, store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        return ranks

    def run(self, world_size: int, function, *args, timeout: float = 240, **kwargs) -> list:
        """What `function(*args, **kwargs)` returned on each rank, in rank order. Raises RuntimeError if one failed."""
        if world_size not in self._worlds:
            self._worlds[world_size] = self._start(world_size)
        pipes = [pipe for _, pipe in self._worlds[world_size]]
        for pipe in pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, object] = {}
        waiting = dict(enumerate(pipes))
        while waiting:
            ready = mp.connection.wait(list(waiting.values()), timeout=timeout)
            if not ready:
                self._stop(world_size)
                raise RuntimeError(f"ranks {sorted(waiting)} gave no answer in {timeout} s")
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    status, value = waiting.pop(rank).recv()
                except (EOFError, ConnectionError):
                    status, value = "error", "the process died"
                if status == "error":
                    self._stop(world_size)
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def _stop(self, world_size: int) -> None:
        for process, pipe in self._worlds.pop(world_size):
            process.kill()
            process.join()
            pipe.close()
        self._stores.pop(world_size, None)

    def stop(self) -> None:
        for world_size in list(self._worlds):
            self._stop(world_size)
