"""Folders that are whole or not there, wherever a process that writes them is killed."""

import os
import shutil

import pytest

from hf_tpsp.checkpoint import folders, manifest
from hf_tpsp.checkpoint.outcome import CheckpointError


def write(folder, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).write_text(f'"{content}"')
    manifest.write(folder, {})


def save(final, content: str) -> None:
    write(folders.begin(final), content)
    folders.put_in_place(final)


def content_of(folder) -> str:
    assert folders.problem_of(folder) is None
    return (folder / "model.safetensors").read_text().strip('"')


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def killed_at(monkeypatch):
    """`killed_at(n, call)`: call, and be killed before the n-th change to the file system. False if there are fewer."""

    def run(n: int, call) -> bool:
        left = [n]

        def dies(original):
            def change(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return original(*args, **kwargs)

            return change

        with monkeypatch.context() as patches:
            for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
                patches.setattr(os, name, dies(getattr(os, name)))
            # It goes through a list of the system's that cannot be patched.
            patches.setattr(shutil, "rmtree", dies(shutil.rmtree))
            try:
                call()
            except Killed:
                return True
        return False

    return run


@pytest.mark.parametrize("replaces", [False, True])
def test_a_checkpoint_is_whole_or_not_there(tmp_path, killed_at, replaces):
    """Killed before each change: what can be resumed from is the old one or the new one, and somebody else's files stay."""
    for n in range(1, 100):
        out = tmp_path / str(n)
        final = out / "checkpoint-2"
        save(out / "checkpoint-1", "first")
        if replaces:
            save(final, "old")
            (final / "notes.txt").write_text("mine")
        if not killed_at(n, lambda final=final: save(final, "new")):
            break
        for folder in out.glob("checkpoint-*"):
            content_of(folder)
        folders.recover(out)
        found, skipped = folders.newest(out)
        assert content_of(found) in (("old", "new") if replaces else ("first", "new")) and not skipped
        assert not replaces or (final / "notes.txt").read_text() == "mine"
        # Another process may be writing beside it.
        (out / folders.ASIDE / "checkpoint-9").mkdir(parents=True)
        (out / folders.ASIDE / "theirs").mkdir()
        folders.recover(out)
        assert [path.name for path in (out / folders.ASIDE).iterdir()] == ["theirs"]
        (out / folders.ASIDE / "theirs").rmdir()
        save(final, "again")
        assert content_of(final) == "again" and not (out / folders.ASIDE).exists()
    assert n > 8 and content_of(final) == "new"


def test_rotation_keeps_the_last_complete_one(tmp_path, killed_at):
    """What a killed run has left, and what a longer run had before, count for nothing."""
    for step in (2, 3):
        save(tmp_path / f"checkpoint-{step}", str(step))
    (tmp_path / "checkpoint-7").mkdir()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "model.safetensors").unlink()
    save(tmp_path / "checkpoint-4", "4")
    found, skipped = folders.newest(tmp_path)
    assert found.name == "checkpoint-4"
    assert [line.partition(" ")[0] for line in skipped] == ["checkpoint-8", "checkpoint-7"]
    assert (
        "model.safetensors is missing" in skipped[0]
        and "trainer_state.json, which is written last, is missing" in skipped[1]
    )
    folders.rotate(tmp_path, 0, {tmp_path / "checkpoint-4"})
    folders.rotate(tmp_path, None, {tmp_path / "checkpoint-4"})
    folders.rotate(tmp_path, 3, {tmp_path / "checkpoint-4"})
    assert len(folders.checkpoints(tmp_path)) == 5
    folders.rotate(tmp_path, 1, {tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"})
    assert [path.name for path in folders.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 4, 7, 8)]
    # A deletion that is broken off leaves no part of a checkpoint at its name.
    assert killed_at(3, lambda: folders.rotate(tmp_path, 1, {tmp_path / "checkpoint-4"}))
    assert not (tmp_path / "checkpoint-2").exists()
    folders.recover(tmp_path)
    assert not (tmp_path / folders.ASIDE).exists()


def sharded(count: int) -> tuple[str, ...]:
    return *(f"model-0000{i + 1}-of-0000{count}.safetensors" for i in range(count)), "model.safetensors.index.json"


def loaded(folder) -> set[str]:
    """The contents of the weights that transformers would load from `folder`."""
    names = {path.name for path in folder.iterdir()}
    if "model.safetensors" in names:
        return {(folder / "model.safetensors").read_text()}
    if "model.safetensors.index.json" in names:
        of = (folder / "model.safetensors.index.json").read_text()
        return {
            (folder / f"model-0000{i}-of-0000{of[-1]}.safetensors").read_text() for i in range(1, 1 + int(of[-1]))
        } | {of[:-1]}
    return set()


@pytest.mark.parametrize("old", [(), sharded(2), sharded(3), ("model.safetensors",)])
@pytest.mark.parametrize("new", [sharded(2), ("model.safetensors",)])
def test_weights_are_all_there_or_none(tmp_path, killed_at, old, new):
    """Killed before each change, a folder never has weights of two models, and what else is in it stays."""

    def fill(folder, names, content):
        for name in names:
            count = len(names) - 1 if "index" in name else ""
            (folder / name).write_text(f"{content}{count}")

    def save(folder):
        with folders.filled(folder) as within:
            fill(within, new, "new")

    for n in range(1, 100):
        folder = tmp_path / str(n)
        if old:
            folder.mkdir()
            fill(folder, old, "old")
            (folder / "adapter_model.safetensors").write_text("somebody else's")
        if not killed_at(n, lambda folder=folder: save(folder)):
            break
        assert not folder.exists() or loaded(folder) in ({"old"}, {"new"}, set())
    assert n > 5 and loaded(folder) == {"new"}
    assert {path.name for path in folder.iterdir()} == {*new, *(["adapter_model.safetensors"] if old else [])}


def test_weights_that_cannot_be_written_leave_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="No space left"), folders.filled(tmp_path / "new") as within:
        (within / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")
    assert not (tmp_path / "new").exists()
