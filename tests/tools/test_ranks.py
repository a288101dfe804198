"""The pool of ranks: what one task leaves, and what ends a world."""

import os
import sys
import time
import types
from multiprocessing import spawn
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh

from hf_tpsp import TPSPConfig
from hf_tpsp.state import build_mesh
from hf_tpsp.tools.ranks import RankPool


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def task() -> int:
    """Every mesh of a training: hf_tpsp's, accelerate's, a script's. Returns the threads after them."""
    meshes = (
        build_mesh(TPSPConfig(tp_size=2)),
        ParallelismConfig(tp_size=2).build_device_mesh("cpu"),
        init_device_mesh("cpu", (2,), mesh_dim_names=("mine",)),
    )
    for mesh in meshes:
        one = torch.ones(1)
        dist.all_reduce(one, group=mesh.get_group(mesh.ndim - 1))
        assert one.item() == 2
    return threads()


def test_threads_do_not_grow_with_the_tasks(ranks):
    """Process groups have threads, and no mesh closes its groups."""
    counts = [ranks.run(2, task) for _ in range(8)]
    assert all(count == counts[1] for count in counts[2:]), counts


def listening() -> list[str]:
    """The addresses on which this process listens, in hex."""
    sockets = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    # Column 1 is the local address, 3 the state (0A listens), 9 the socket.
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def test_ranks_meet_on_the_loopback_alone(ranks):
    """The store here, and gloo on the ranks: nothing can be reached from another machine."""
    for addresses in (*ranks.run(2, listening), listening()):
        assert addresses and all(address.startswith("0100007F:") for address in addresses), addresses  # 127.0.0.1


def test_a_script_is_not_run_again(monkeypatch):
    """`verify()` needs no `if __name__ == "__main__":`, without which spawn would start ranks that start ranks."""
    script = types.ModuleType("__main__")
    script.__file__ = "/some/script.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert spawn.get_preparation_data("a rank")["init_main_from_path"] == script.__file__
    prepared = []
    monkeypatch.setattr(
        SpawnProcess, "start", lambda self: prepared.append(spawn.get_preparation_data(self.name)), raising=False
    )
    RankPool()._start_templates()
    assert prepared and not any(key.startswith("init_main") for data in prepared for key in data)
    assert sys.modules["__main__"] is script


def test_a_function_of_the_script_is_refused():
    def mine():
        pass

    mine.__module__ = "__main__"
    with pytest.raises(ValueError, match="mine is defined in the script that is run; move it into a module"):
        RankPool().run(1, mine)


def state() -> tuple:
    found = os.environ.get("LEFT"), torch.initial_seed(), dist.get_rank(), hash("a name")
    os.environ["LEFT"] = "something"
    torch.manual_seed(7)
    return found


def test_a_task_finds_a_clean_process(ranks):
    """Neighbours in a mesh of 2 x 2 have sets of names in different orders, as processes launched on their own have."""
    for _ in range(2):
        found = ranks.run(4, state)
    assert [entry[:3] for entry in found] == [(None, 0, rank) for rank in range(4)]
    order = [entry[3] for entry in found]
    assert order[0] != order[1] and order[0] != order[2] and order[3] != order[1] and order[3] != order[2]


def fails_on_the_first(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    if dist.get_rank() == 0:
        raise ValueError("this rank fails")
    dist.barrier()  # for ever


def test_a_rank_that_fails_ends_its_world(ranks, tmp_path):
    """Those that wait for it too; the next task finds new ranks at once."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 failed:.*ValueError: this rank fails"):
        ranks.run(2, fails_on_the_first, str(tmp_path))
    assert not any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir())
    assert ranks.run(2, dist.get_rank) == [0, 1]


def test_a_task_that_takes_too_long(ranks):
    with pytest.raises(RuntimeError, match="gave no answer"):
        ranks.run(2, time.sleep, 60, timeout=0.1)
    assert ranks.run(2, dist.get_rank) == [0, 1]


def dies() -> None:
    os._exit(1)


def test_a_rank_that_dies(ranks):
    with pytest.raises(RuntimeError, match="the process died"):
        ranks.run(1, dies)
    assert ranks.run(1, dist.get_rank) == [0]
