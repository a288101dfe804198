"""The steps of a save, in their order, and who does them: the main thread, or another one beside the training."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ..patching import swapped
from . import folders, manifest
from .outcome import CheckpointError, is_first, settle


class _Background:
    """The save that runs beside the training, and what such saves need of their own."""

    thread: threading.Thread | None = None
    # Why the last one failed, on this rank.
    error: BaseException | None = None
    # Its collectives would mix with the training's in a group that both use.
    group: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None
    # It keeps its buffers from one save to the next.
    stager: DefaultStager | None = None


_background = _Background()


def save(
    final: Path,
    fill: Callable[[Path], None],
    *,
    then: Callable[[], None] = lambda: None,
    beside: bool = False,
    can_fail_alone: bool = True,
    **facts: Any,
) -> None:
    """Write the checkpoint `final` as a whole. Every rank must call it.

    1. `fill` is called with a temporary folder, and writes what is small. What it hands to torch's
       `distributed.checkpoint.save` is kept for later.
    2. The ranks say whether that worked, so that none of them is alone in what follows.
    3. The shards are written, and hashed on the way. The ranks exchange the checksums, and again whether it worked.
    4. Rank 0 hashes the rest, writes the manifest, has everything be on the disk, renames the folder, and calls `then`.
    5. All ranks learn that it is done.

    Args:
        beside: copy what is saved to the host's memory, and do steps 3 to 5 in a thread, beside the training. `wait`
            waits for them, and raises their error. The next save waits, too.
        can_fail_alone: whether a rank for which `fill` raises can tell the others. It cannot if they wait for it in a
            collective of `fill`.
        facts: are written in the manifest.

    Raises:
        CheckpointError: a rank could not write its part, with its reason. Nothing of the checkpoint is left, and the
            one before is as it was.
    """
    wait()
    what, folder = f"{final} could not be written", folders.begin(final)
    writes: list[Callable[..., Any]] = []
    files: dict[Path, manifest.File] = {}
    problem = None
    with _kept(writes, files, staged=beside), swapped((torch, "save", _with_reason)):
        try:
            fill(folder)
        except Exception as error:
            if not can_fail_alone:
                raise
            problem = error

    def finish(group: dist.ProcessGroup | None = None) -> None:
        problem = None
        try:
            for write in writes:
                write(process_group=group)
        # torch's is no Exception.
        except (Exception, dcp.CheckpointException) as error:
            problem = error
        try:
            own = {path.relative_to(folder).as_posix(): file for path, file in files.items()}
            known = {name: file for theirs in settle(what, problem, own, group) for name, file in theirs.items()}
            if is_first():
                try:
                    manifest.write(folder, known, **facts)
                    folders.put_in_place(final)
                    then()
                except Exception as error:
                    problem = error
            settle(what, problem, group=group)
        except CheckpointError:
            if is_first():
                folders.discard(final)
            raise

    try:
        settle(what, problem)
    except CheckpointError:
        if is_first():
            folders.discard(final)
        raise
    if not beside:
        return finish()
    group = _own_group()

    def run() -> None:
        try:
            finish(group)
        except BaseException as error:
            _background.error = error

    # A process that ends for another reason does not wait for it.
    _background.thread = threading.Thread(target=run, name=f"hf_tpsp: {final.name}", daemon=True)
    _background.thread.start()


def wait(seconds: float | None = None) -> None:
    """Wait for the save that runs beside the training, if there is one, but no longer than `seconds`.

    Raises:
        CheckpointError: it failed.
    """
    if _background.thread is None:
        return
    _background.thread.join(seconds)
    if _background.thread.is_alive():
        return
    _background.thread, error, _background.error = None, _background.error, None
    if error is not None:
        if isinstance(error, CheckpointError):
            raise error
        raise CheckpointError(f"A checkpoint that was written beside the training was not finished: {error}") from None


def release() -> None:
    """Give back the memory of the copies, when no save is under way."""
    if _background.thread is None and _background.stager is not None:
        _background.stager.close()
        _background.stager = None


def _own_group() -> dist.ProcessGroup:
    """A gloo group over all ranks, for the thread. All ranks make it at their first save."""
    world = dist.group.WORLD
    if _background.group is None or _background.world is not world:
        _background.group, _background.world = dist.new_group(backend="gloo"), world
    return _background.group


@contextlib.contextmanager
def _kept(writes: list[Callable[..., Any]], files: dict[Path, manifest.File], staged: bool) -> Iterator[None]:
    """While inside, what is handed to torch's `distributed.checkpoint.save` is appended to `writes`, to be called later;
    if `staged`, with a copy in the host's memory. What these calls write is noted in `files`."""

    def keep(original: Callable[..., Any]) -> Callable[..., None]:
        def save(state_dict: dict[str, Any], *, storage_writer: Any = None, **options: Any) -> None:
            if isinstance(storage_writer, dcp.FileSystemWriter):
                storage_writer.fs = manifest.DigestingFileSystem(files)
            state_dict = _stager().stage(state_dict) if staged else state_dict
            writes.append(lambda **how: original(state_dict, storage_writer=storage_writer, **options, **how))

        return save

    with swapped((dcp, "save", keep)):
        yield


def _with_reason(original: Callable[..., None]) -> Callable[..., None]:
    """`torch.save` whose error names the file and the system's reason, which torch's own writer of files leaves out."""

    @functools.wraps(original)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(obj, f, *args, **kwargs)
        except RuntimeError as error:
            if not isinstance(f, (str, os.PathLike)):
                raise
            # What fails for torch fails here too.
            try:
                Path(f).write_bytes(bytes(2**20))
            except OSError as cause:
                raise OSError(cause.errno, cause.strerror, os.fspath(f)) from None
            raise RuntimeError(f"{f}: {error}") from error

    return save


def _stager() -> DefaultStager:
    if _background.stager is None:
        on_accelerator = torch.accelerator.is_available()
        _background.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                # The next optimizer step changes what is copied.
                use_async_staging=False,
                use_non_blocking_copy=on_accelerator,
            )
        )
    return _background.stager
