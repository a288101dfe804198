"""Reading a distributed checkpoint without running what is in it."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem, metadata

from ...patching import swapped

ALLOWED = {
    *((metadata.__name__, name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    )),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # The folder that it was saved to, by Python up to 3.12 and from 3.13 on.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}  # fmt: skip
"""Module and name of all that a checkpoint's description is made of. Beside them there are torch's dtypes."""


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f".metadata of this checkpoint asks for {module}.{name}, which no description of tensors needs; it was not "
                "called. The file is damaged, or was made to run code."
            )
        return super().find_class(module, name)


def _load(file: IO[bytes]) -> Any:
    return _Description(file).load()


def _plain_values(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_bytes(self, read_item, value):
        name = read_item.dest_index.fqn
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(
                f"{name} in this checkpoint is neither a tensor nor made of numbers, texts, lists and dicts; it was not loaded, "
                "because that could run code."
            ) from error
        value.seek(0)
        return original(self, read_item, value)

    return load_bytes


@contextlib.contextmanager
def restricted() -> Iterator[None]:
    """While entered, a distributed checkpoint is read without running code that is in it: its description is made of
    the classes that DCP has for it, and its values are what `torch.load(weights_only=True)` takes.

    torch 2.13 unpickles both without a restriction (checkpoint/filesystem.py, `read_metadata`, and default_planner.py,
    `load_bytes`), though it reads tensors with one. Delete when it restricts all three.
    """
    restrained = SimpleNamespace(load=_load, dump=pickle.dump)
    with swapped(
        (filesystem, "pickle", lambda original: restrained), (DefaultLoadPlanner, "load_bytes", _plain_values)
    ):
        yield


def reads_restricted(original: Callable) -> Callable:
    """A function that loads a distributed checkpoint, made to do so under `restricted`."""

    @functools.wraps(original)
    def load(*args, **kwargs):
        with restricted():
            return original(*args, **kwargs)

    return load
