"""Ranks that differ, or are gone, are named on all ranks before anything waits for them; no group waits longer than told."""

import contextlib
import io
import os
import threading
from datetime import timedelta
from pathlib import Path
from unittest import mock

import models
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from training import Rows
from transformers import Trainer, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig, departure, state
from hf_tpsp.agreement import _wait, agree, decide
from hf_tpsp.integrations import alike
from hf_tpsp.upstream.torch import c10d

MESH = TPSPConfig(tp_size=2)


def raised(run, *kinds: type[Exception]) -> str:
    with pytest.raises(kinds or ValueError) as error:
        run()
    return str(error.value)


def mesh_under(config: TPSPConfig) -> None:
    with hf_tpsp.enable(config):
        state.build_mesh(config)


def comparisons() -> dict[str, str]:
    rank, texts = dist.get_rank(), {}
    agree("a stage", {"a": "1"})
    texts["field"] = raised(lambda: agree("a stage", {"a": "1", "lr": str(0.1 * (1 + rank))}))
    texts["missing"] = raised(lambda: agree("a stage", {"a": "1", **({"b": "2"} if rank else {})}))
    texts["stage"] = raised(lambda: agree(f"stage {rank}", {}))
    texts["long"] = raised(lambda: agree("a stage", {"plan": 100 * "x" + str(rank) + 100 * "y"}))
    texts["judge"] = raised(lambda: decide("a stage", rank, lambda values: f"found {values}"))
    texts["config"] = raised(lambda: mesh_under(TPSPConfig(tp_size=2 + 2 * rank)))
    texts["mesh"] = raised(lambda: state.build_mesh([MESH, TPSPConfig(dp_shard_size=2)][rank]))
    texts["both"] = raised(lambda: hf_tpsp.enable(TPSPConfig(tp_size=4)))
    return texts


def test_differences_are_named_on_all_ranks(ranks):
    for texts in ranks.run(2, comparisons):
        assert "lr is 0.2 on rank 1, but 0.1 on rank 0" in texts["field"]
        assert "b is 2 on rank 1, but not given on rank 0" in texts["missing"]
        assert "rank 1 is at stage 1, but rank 0 at stage 0" in texts["stage"]
        assert f"plan is …{20 * 'x'}1{39 * 'y'}… on rank 1" in texts["long"]
        assert texts["judge"] == "found [0, 1]"
        assert "TPSPConfig's tp_size is 4 on rank 1, but 2 on rank 0" in texts["config"]
        assert "TPSPConfig's tp_size is 1 on rank 1, but 2 on rank 0" in texts["mesh"]
        assert "needs 4 ranks, but 2 were started" in texts["both"]


def timeouts(mesh) -> set[timedelta]:
    groups = [*mesh.get_all_groups(), mesh["dp_shard", "tp"]._flatten().get_group(), dist.group.WORLD]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


ARGUMENTS = {
    "learning_rate": (1e-4, 2e-4), "seed": (1, 2), "max_steps": (3, 4), "gradient_accumulation_steps": (1, 2),
    "save_strategy": ("no", "steps"), "eval_strategy": ("no", "epoch"), "max_grad_norm": (1.0, 0.0),
}  # fmt: skip


def trainers(out: str) -> tuple[dict[str, str], list[set[timedelta]]]:
    rank, texts, mine = dist.get_rank(), {}, Path(out, f"rank{dist.get_rank()}")

    def trainer(rows: int = 8, folder: str | Path = out, **options) -> Trainer:
        defaults = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        args = TrainingArguments(str(folder), **{**defaults, "run_name": f"rank {rank}", **options})
        return Trainer(model=model, args=args, train_dataset=Rows(rows, 1), eval_dataset=Rows(4, 1))

    with hf_tpsp.enable(MESH):
        model = hf_tpsp.parallelize(models.build("qwen2", vocab_size=132), MESH)
        for name, values in ARGUMENTS.items():
            texts[name] = raised(lambda name=name, values=values: trainer(**{name: values[rank]}))
        # Below a file there is no folder, not for root either.
        blocked = mine / "file"
        mine.mkdir()
        if rank:
            blocked.touch()
        else:
            blocked.symlink_to(mine.parent)
        os.chdir(mine)
        texts["unwritable"] = raised(lambda: trainer(folder="file/x", save_strategy="steps"))
        with mock.patch.object(alike, "SHOWN", 0.1):
            # Of one name, as on two hosts, each with a disk of its own; and of two.
            texts["a folder for each"] = raised(lambda: trainer(folder="own", save_strategy="steps"))
        (mine / "name").symlink_to(mine.parent)
        trainer(folder=mine / "name", save_strategy="steps")
        assert not list(mine.parent.glob(f"**/{alike.MARK}"))
        texts["rows"] = raised(trainer(rows=8 + rank).train)
        for step in (1, 2):
            (mine / f"checkpoint-{step}").mkdir()
            (mine / f"checkpoint-{step}" / "trainer_state.json").write_text(f"{{{rank}}}")
        texts["folder"] = raised(lambda: trainer().train(resume_from_checkpoint=str(mine / f"checkpoint-{1 + rank}")))
        texts["state"] = raised(lambda: trainer().train(resume_from_checkpoint=str(mine / "checkpoint-1")))
        found = [timeouts(model._tpsp.mesh)]
        trainer(ddp_timeout=77)
        found.append(timeouts(model._tpsp.mesh))
        accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=88))])
        texts["optimizer"] = raised(
            lambda: accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1 + rank))
        )
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        found.append(timeouts(model._tpsp.mesh))
        state.set_timeout(timedelta(seconds=1800))
    return texts, found


def test_trainers_that_differ(ranks, tmp_path):
    for texts, found in ranks.run(2, trainers, str(tmp_path)):
        for name, (first, second) in ARGUMENTS.items():
            assert f"TrainingArguments' {name} is {second!r} on rank 1, but {first!r} on rank 0" in texts[name]
        assert (
            "rank 1 cannot write into output_dir='file/x': NotADirectoryError: Not a directory" in texts["unwritable"]
        )
        assert (
            "rank 1 does not see in output_dir='own' what rank 0 has written into output_dir='own'"
            in texts["a folder for each"]
        )
        assert "the number of rows of train_dataset is 9 on rank 1, but 8 on rank 0" in texts["rows"]
        assert "the checkpoint to resume from is checkpoint-2 on rank 1, but checkpoint-1 on rank 0" in texts["folder"]
        assert "the checkpoint's trainer_state.json is 3 bytes, sha256 " in texts["state"]
        assert "an optimizer's settings is " in texts["optimizer"] and "on rank 1" in texts["optimizer"]
        assert found[1:] == [{timedelta(seconds=77)}, {timedelta(seconds=88)}] and not found[0] & found[1]


def hosts() -> list[str]:
    """What each rank says of a mesh whose two ranks are on two hosts."""
    with (
        mock.patch.object(state, "this_host", lambda: [f"host{dist.get_rank()}", ""]),
        mock.patch.object(state, "_meshes_of_world", dict),
        mock.patch.object(state.logger, "warning_once") as said,
    ):
        state.build_mesh(MESH)
    return [call.args[0] for call in said.call_args_list]


def test_a_mesh_on_two_hosts_says_so_once(ranks):
    first, second = ranks.run(2, hosts)
    assert second == [] and len(first) == 1
    assert "rank 0 on host0; rank 1 on host1. The TP group of ranks 0-1 spans hosts" in first[0]


class Unreachable:
    """A store on a host whose network is gone: it answers nothing, and no connection closes."""

    def __getattr__(self, name):
        return lambda *args: threading.Event().wait()


@mock.patch.object(departure, "ANSWER", 0.1)
@mock.patch.object(c10d, "store", Unreachable)
@mock.patch.object(dist, "get_rank", lambda: 3)
def test_a_store_that_does_not_answer_holds_nobody(capsys):
    departure.end(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms"), lambda: None)
    said = capsys.readouterr().err
    assert said.startswith(
        "hf_tpsp: rank 3 stops, because the job's store did not answer within 0 s: the network between"
    )
    departure.end(ValueError("its own"), lambda: print("its own traceback"))
    assert capsys.readouterr() == ("its own traceback\n", "")
    departure._say_goodbye()
    with pytest.raises(dist.DistNetworkError, match="did not answer"):
        _wait(Unreachable(), ["a"], timedelta(seconds=0.1), "a stage")


@mock.patch.object(departure, "PATIENCE", 0.3)
def departures() -> list[str]:
    """The last rank ends in three ways; the others wait for it in the store, or in a collective."""
    rank, said, broken = dist.get_rank(), [], RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert departure.first() is None and departure.explain(broken) is None
    dist.barrier()

    def hook(error: Exception) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as out, contextlib.redirect_stdout(out):
            departure.end(error, lambda: print("its own traceback"))
        return out.getvalue()

    if rank == 0:
        said.append(raised(lambda: agree("a stage", {}), departure.RankEnded))
        said.append(hook(broken))
        said.append(hook(dist.DistBackendError("NCCL error")))
    else:
        try:
            Rows(4, 1)["no such row"]
        except Exception as error:
            said.append(hook(error))
        # What comes of another's end does not stand for its cause.
        said.append(hook(broken))
    dist.barrier()
    if rank == 0:
        c10d.store().delete_key(departure.KEY)
        dist.group.WORLD.set_timeout(timedelta(seconds=1))
        said.append(raised(lambda: agree("a later stage", {}), TimeoutError))
        dist.group.WORLD.set_timeout(timedelta(seconds=1800))
    dist.barrier()
    if rank:
        # Had it gone on, it would have read the same: comparisons are counted.
        said.append(raised(lambda: agree("a stage", {}), departure.RankEnded))
        said.append(raised(lambda: agree("a later stage", {}), TimeoutError))
    return said


def test_the_others_say_who_ended_first_and_why(ranks):
    first, last = ranks.run(2, departures)
    assert last[0] == "its own traceback\n" and "no rank has said why" in last[1]
    why = "rank 1 ended first: IndexError: "
    assert first[0].startswith(f"hf_tpsp: a stage: {why}") and "training.py:" in first[0]
    assert all(
        text.startswith(f"hf_tpsp: rank 0 stops, because {why}") and "traceback" not in text for text in first[1:3]
    )
    assert last[2:] == [first[0], first[3]]
    assert first[3] == (
        "hf_tpsp: rank 1 did not come to a later stage within 1 s (ddp_timeout), where the others wait for it."
    )
