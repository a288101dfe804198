"""A pool of ranks on this machine: processes that import torch and transformers once and then run functions as gloo
ranks.

`RankPool.run(world_size, function, *args)` runs a picklable function on `world_size` ranks and returns what each rank
returned. Ranks of one world size are started once and keep their process group. If a rank raises, or a call exceeds its
timeout, all of them are ended. The call raises, with that rank's traceback if there is one, and the next call starts
new ranks.

Starting ranks is cheap, because they are forked from two templates: processes that have only imported. There are two
because Python orders a set of strings differently in each process. Ranks that are neighbours in a mesh so see different
orders, as they would in a real launch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing as mp
import multiprocessing.connection
import multiprocessing.reduction
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterable, Iterator

from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
"""The ranks meet here. Nothing of a pool can be reached from another machine."""


def _store() -> TCPStore:
    """A store that listens on a free port of the loopback alone. One that opens its own socket listens everywhere."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        # The store closes the descriptor that it is given.
        return TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are spawned meanwhile do not run the caller's script. By itself, spawn runs it again in each, and a
    script without `if __name__ == "__main__":` would start ranks there too."""
    with _SPAWNING:
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


_SPAWNING = threading.Lock()


def _template(preload: tuple[str, ...], pipe) -> None:
    """Fork a rank for each `(rank, world_size, port)` that comes through `pipe`, followed by the rank's end of a pipe
    of its own. Kill a rank when its process id comes."""
    for name in ("torch", "transformers", "accelerate", *preload):
        importlib.import_module(name)
    gc.collect()
    # A rank's garbage collection then leaves out what was imported, and does not copy the memory pages that hold it.
    gc.freeze()
    while (request := pipe.recv()) is not None:
        if isinstance(request, int):
            os.kill(request, signal.SIGKILL)
            os.waitpid(request, 0)
            pipe.send(None)
            continue
        handle = mp.reduction.recv_handle(pipe)
        if (pid := os.fork()) == 0:
            pipe.close()
            try:
                _rank(*request, mp.connection.Connection(handle))
            except (EOFError, ConnectionError):
                # The pool has gone.
                pass
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.close(handle)
        pipe.send(pid)


def _rank(rank: int, world_size: int, port: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
        # The pool has the store, and the ranks connect to it.
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
    )  # fmt: skip
    import torch
    import transformers
    from accelerate import PartialState
    from torch.distributed import device_mesh

    from ..upstream.accelerate import forget_state

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    # A mesh makes process groups with threads of their own, which nobody closes, so all tasks share one of each shape.
    device_mesh.init_device_mesh = functools.cache(device_mesh.init_device_mesh)
    pristine = dict(os.environ)
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        os.environ.clear()
        os.environ.update(pristine)
        forget_state()
        # accelerate starts the process group, as it does in a script.
        PartialState(cpu=True)
        torch.manual_seed(0)
        try:
            pipe.send(("ok", function(*args, **kwargs)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
            # As a script would: ranks that wait for this one then find out.
            return


class RankPool:
    """Ranks of any world size, started when they are first asked for. Needs a system that forks: Linux.

    Args:
        preload: names of modules that the functions will need, to be imported once and not by each rank.
    """

    def __init__(self, preload: Iterable[str] = ()):
        self._preload = tuple(preload)
        self._templates: list[tuple[mp.Process, mp.connection.Connection]] = []
        self._stores: dict[int, TCPStore] = {}
        # World size → the template, the process id and the pipe of each rank.
        self._worlds: dict[int, list[tuple[mp.connection.Connection, int, mp.connection.Connection]]] = {}

    def _start_templates(self) -> None:
        context = mp.get_context("spawn")
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_template, args=(self._preload, theirs), daemon=True)
            with _without_main():
                process.start()
            theirs.close()
            self._templates.append((process, ours))

    def _start(self, world_size: int) -> list[tuple[mp.connection.Connection, int, mp.connection.Connection]]:
        if not self._templates:
            self._start_templates()
        # The store listens from here on. A port that was only found to be free might be taken before a rank uses it.
        store = self._stores[world_size] = _store()
        ranks = []
        for rank in range(world_size):
            ours, theirs = mp.Pipe()
            # A rank comes from another template than its neighbours in any mesh.
            process, template = self._templates[rank.bit_count() % 2]
            template.send((rank, world_size, store.port))
            mp.reduction.send_handle(template, theirs.fileno(), process.pid)
            theirs.close()
            ranks.append((template, template.recv(), ours))
        return ranks

    def run(self, world_size: int, function, *args, timeout: float = 240, **kwargs) -> list:
        """What `function(*args, **kwargs)` returned on each rank, in rank order.

        Raises:
            RuntimeError: one of them failed.
            ValueError: the function is the script's own: the ranks import modules, and run no script.
        """
        results: dict[int, object] = {}
        for rank, status, value in self._ends(world_size, function, args, kwargs, timeout):
            if status != "ok":
                self.stop_world(world_size)
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def attempt(
        self, world_size: int, function, *args, timeout: float = 240, **kwargs
    ) -> list[tuple[str, object, float]]:
        """How `function(*args, **kwargs)` ended on each rank, in rank order, whatever became of the others: `"ok"` and what
        it returned, `"error"` and its traceback, `"died"`, or `"hangs"` after `timeout` seconds; and the seconds it took."""
        start = time.monotonic()
        ends: dict[int, tuple[str, object, float]] = {}
        for rank, status, value in self._ends(world_size, function, args, kwargs, timeout):
            ends[rank] = status, value, time.monotonic() - start
        if any(status != "ok" for status, *_ in ends.values()):
            self.stop_world(world_size)
        return [ends[rank] for rank in range(world_size)]

    def _ends(
        self, world_size: int, function, args: tuple, kwargs: dict, timeout: float
    ) -> Iterator[tuple[int, str, object]]:
        """Rank, status and value of each rank, in the order in which they end."""
        if getattr(function, "__module__", None) == "__main__":
            raise ValueError(f"{function.__qualname__} is defined in the script that is run; move it into a module.")
        if world_size not in self._worlds:
            self._worlds[world_size] = self._start(world_size)
        waiting = dict(enumerate(pipe for *_, pipe in self._worlds[world_size]))
        for pipe in waiting.values():
            pipe.send((function, args, kwargs))
        while waiting:
            ready = mp.connection.wait(list(waiting.values()), timeout=timeout)
            if not ready:
                yield from ((rank, "hangs", f"gave no answer in {timeout} s") for rank in waiting)
                return
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    status, value = waiting.pop(rank).recv()
                except (EOFError, ConnectionError):
                    status, value = "died", "the process died"
                yield rank, status, value

    def stop_world(self, world_size: int) -> None:
        """End the ranks of this size, if there are any."""
        for template, pid, pipe in self._worlds.pop(world_size, ()):
            template.send(pid)
            template.recv()
            pipe.close()
        self._stores.pop(world_size, None)

    def stop(self) -> None:
        for world_size in list(self._worlds):
            self.stop_world(world_size)
        while self._templates:
            process, pipe = self._templates.pop()
            process.kill()
            process.join()
            pipe.close()
