"""A checkpoint's manifest: the size and checksum of each of its files, by which damage is noticed.

What is written through `DigestingFileSystem` (the shards of the model and the optimizer) is hashed as it is written, by
the rank that writes it. Rank 0 hashes the rest, which is small, and writes the manifest last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

NAME = "hf_tpsp_manifest.json"


ALGORITHM = "xxh3_128"


PIECE = 2**20


class File(NamedTuple):
    """What a manifest says of a file: its size in bytes, and the checksum of its contents in hexadecimal."""

    size: int
    checksum: str


class _DigestedStream:
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._hash, self._size = stream, xxhash.xxh3_128(), 0
        # What torch.save makes another error of, if writing failed.
        self.error: OSError | None = None
        self.fileno, self.flush, self.close = stream.fileno, stream.flush, stream.close

    def write(self, data: Any) -> int:
        # A buffered file writes all of it, or raises.
        try:
            written = self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def file(self) -> File:
        return File(self._size, self._hash.hexdigest())


class DigestingFileSystem(FileSystem):
    """The file system of one of torch's `FileSystemWriter`s, which notes in `files` what is written, by its path."""

    def __init__(self, files: dict[Path, File]):
        self.files = files

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        digested = None
        try:
            with super().create_stream(path, mode) as stream:
                digested = _DigestedStream(stream)
                yield digested
        except Exception as error:
            cause = (digested and digested.error) or error
            if not isinstance(cause, OSError):
                raise
            # One that comes of writing has no name of a file.
            raise OSError(cause.errno, cause.strerror, os.fspath(path)) from None
        self.files[Path(path)] = digested.file()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if Path(path) in self.files:
            self.files[Path(new_path)] = self.files.pop(Path(path))


def digest(path: Path) -> File:
    """Read and hash a file."""
    size, buffer = 0, memoryview(bytearray(PIECE))
    found = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while read := stream.readinto(buffer):
            found.update(buffer[:read])
            size += read
    return File(size, found.hexdigest())


def sync(path: Path) -> None:
    """Have what was written of a file be on the disk; or the names in a folder, not only the files that they name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[str]:
    """The paths of all files below `folder`, relative to it, but for a manifest's."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path != NAME)


def write(folder: Path, known: dict[str, File], **facts: Any) -> None:
    """Write the manifest of all files in `folder`, those that are not `known` after hashing them; have all of it be on
    the disk. `facts` are written beside."""
    names = files_in(folder)
    for name in names:
        if name not in known:
            sync(folder / name)
    files = {name: known.get(name) or digest(folder / name) for name in names}
    if gone := known.keys() - files.keys():
        raise FileNotFoundError(f"{folder / min(gone)} was written and is not there")
    content = {**facts, "saved_at": time.time(), "algorithm": ALGORITHM, "files": files}
    with (folder / NAME).open("w") as stream:
        json.dump({**content, "checksum": _checksum(content)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(inner)


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, in which `files` maps paths to `File`s; None if it has none.

    Raises:
        ValueError: the manifest itself is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        files = {name: File(*entry) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: it cannot be read") from None
    if checksum != _checksum(content):
        raise ValueError(f"{path} is damaged: its checksum is another")
    return {**content, "files": files, "checksum": checksum}


def wrong_size(folder: Path, files: dict[str, File]) -> str | None:
    """A sentence about the first file that is missing or has another size than when it was saved; None if none has."""
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected.size:
            return (
                f"{path} is missing"
                if size is None
                else f"{path} has {size} bytes of the {expected.size} that were saved"
            )
    return None


def damage(folder: Path, files: dict[str, File], rank: int = 0, ranks: int = 1) -> str | None:
    """A sentence about the first damaged file among those that it is `rank`'s turn, of `ranks`, to read; None if all are
    as they were saved."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        least = sizes.index(min(sizes))
        shares[least].append(name)
        # A file costs something even if it is empty.
        sizes[least] += files[name].size + PIECE
    for name in shares[rank]:
        try:
            found = digest(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        if found != files[name]:
            return f"{folder / name} is damaged: its checksum is another than when it was saved"
    return None
