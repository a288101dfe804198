"""The manifest: whatever is changed, cut or taken away of a checkpoint's files is named."""

import random
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from hf_tpsp.checkpoint import folders, manifest, resuming
from hf_tpsp.checkpoint.outcome import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as torch writes one, hashed on the way, with small files beside it."""
    folder = tmp_path / "checkpoint-1"
    writer, files = dcp.FileSystemWriter(folder / "pytorch_model_fsdp_0"), {}
    writer.fs = manifest.DigestingFileSystem(files)
    dcp.save({"a": torch.arange(1000), "b": torch.randn(40, 40)}, storage_writer=writer, no_dist=True)
    for name in ("scheduler.pt", "trainer_state.json", "empty"):
        (folder / name).write_text("" if name == "empty" else name)
    manifest.write(folder, {path.relative_to(folder).as_posix(): file for path, file in files.items()}, step=1)
    assert files.keys() == {*(folder / "pytorch_model_fsdp_0").iterdir()}
    return folder


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        resuming.check(folder)
    return str(error.value)


def test_what_was_hashed_on_the_way_is_what_is_there(checkpoint):
    known = manifest.read(checkpoint)
    assert known["step"] == 1 and len(known["files"]) == 5
    for name, file in known["files"].items():
        assert file == manifest.digest(checkpoint / name) and file.size == (checkpoint / name).stat().st_size
    resuming.check(checkpoint)
    (checkpoint / "notes.txt").write_text("somebody else's")
    resuming.check(checkpoint)


def check_own(folders: list) -> str | None:
    try:
        return resuming.check(folders[dist.get_rank()])
    except CheckpointError as error:
        return str(error)


def test_one_folder_may_have_two_names(ranks, checkpoint, tmp_path):
    """As where two hosts have mounted it in two places."""
    other = tmp_path / "elsewhere" / "checkpoint-1"
    shutil.copytree(checkpoint, other)
    assert ranks.run(2, check_own, [checkpoint, other]) == [None, None]
    (other / "scheduler.pt").write_text("of another run")
    files = manifest.read(checkpoint)["files"]
    manifest.write(other, {name: manifest.digest(other / name) for name in files}, step=1)
    assert all(
        f"rank 0 was given {checkpoint}, and rank 1: {other}" in e for e in ranks.run(2, check_own, [checkpoint, other])
    )


def test_every_flipped_bit_is_noticed(checkpoint):
    """50 of each file's, the manifest's own included."""
    dice = random.Random(0)
    for path in files_of(checkpoint):
        content = path.read_bytes()
        for _ in range(50 if content else 0):
            damaged, at = bytearray(content), dice.randrange(8 * len(content))
            damaged[at // 8] ^= 1 << at % 8
            path.write_bytes(damaged)
            assert str(path) in refusal(checkpoint), at
        path.write_bytes(content)
    resuming.check(checkpoint)


def test_what_is_missing_or_cut_is_named(checkpoint):
    for path in files_of(checkpoint):
        if path.name in (manifest.NAME, "empty"):
            continue
        content = path.read_bytes()
        path.unlink()
        assert f"{path} is missing" in refusal(checkpoint)
        path.write_bytes(content[:-1])
        assert f"{path} has {len(content) - 1} bytes of the {len(content)}" in refusal(checkpoint)
        path.write_bytes(content)
    assert "is not there" in refusal(checkpoint.parent / "checkpoint-9")


def test_the_ranks_read_all_files_once(checkpoint):
    """Each file is one rank's, and no rank has nothing to do as long as there are files."""
    files = manifest.read(checkpoint)["files"]
    for ranks in (1, 2, 3, 7):
        found = []
        for name in files:
            damaged = {**files, name: files[name]._replace(checksum="another")}
            found.append([r for r in range(ranks) if manifest.damage(checkpoint, damaged, r, ranks) is not None])
        assert all(len(owners) == 1 for owners in found)
        assert len({owners[0] for owners in found}) == min(ranks, len(files))


def test_without_a_manifest(tmp_path, caplog):
    """A checkpoint of transformers, or of an older hf_tpsp: taken if nothing is missing, with a line."""
    folder = tmp_path / "checkpoint-1"
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / part).mkdir(parents=True)
        (folder / part / ".metadata").touch()
    for name in ("scheduler.pt", "rng_state_0.pth"):
        (folder / name).touch()
    (folder / "trainer_state.json").write_text("{}")
    assert folders.problem_of(folder) is None
    for name in ("scheduler.pt", "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata", "trainer_state.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert f"{folder / name}" in folders.problem_of(folder)
        (folder / name).write_bytes(content)
    (folder / "optimizer_0").rename(tmp_path / "optimizer_0")
    assert "optimizer_0 is missing" in folders.problem_of(folder)
    # `save_only_model` has written none of the three.
    for name in ("scheduler.pt", "rng_state_0.pth"):
        (folder / name).unlink()
    assert folders.problem_of(folder) is None
    (folder / "pytorch_model_fsdp_0").rename(tmp_path / "model")
    assert "has no weights" in folders.problem_of(folder)
    (folder / "model.safetensors").touch()
    assert folders.problem_of(folder) is None
    # One of accelerate's has another last file, and need not have a scheduler.
    (folder / "trainer_state.json").unlink()
    (folder / "random_states_0.pkl").touch()
    assert folders.problem_of(folder) is None
