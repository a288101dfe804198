"""What torch.distributed.checkpoint has written into a folder, read a few tensors at a time, in a single process."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..upstream.torch.unpickling import restricted


class _Reader(dcp.FileSystemReader):
    """A reader that reads the metadata once. They list every rank's part of every tensor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    @functools.cached_property
    def _metadata(self) -> Metadata:
        with restricted():
            return super().read_metadata()


class ShardedState:
    """The nested state dict in `folder`, below its only outermost key ("model", "optimizer").

    An entry goes by its path: `("model.norm.weight",)` of a model, `("state", "model.norm.weight", "exp_avg")` or
    `("param_groups", 0, "lr")` of an optimizer.
    """

    def __init__(self, folder: Path):
        self._reader = _Reader(folder)
        metadata = self._reader.read_metadata()
        self._keys = {path[1:]: key for key, path in metadata.planner_data.items()}
        self._entries = metadata.state_dict_metadata

    def __iter__(self) -> Iterator[tuple]:
        return iter(self._keys)

    def like(self, path: tuple) -> torch.Tensor | None:
        """A tensor on meta with the shape and the dtype of an entry; None if the entry is no tensor."""
        entry = self._entries[self._keys[path]]
        if not isinstance(entry, TensorStorageMetadata):
            return None
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, paths: Iterable[tuple]) -> dict[tuple, Any]:
        """The entries of `paths`, tensors whole on the CPU."""
        keys = {path: self._keys[path] for path in paths}
        found = {}
        for path, key in keys.items():
            like = self.like(path)
            found[key] = None if like is None else torch.empty_like(like, device="cpu")
        with warnings.catch_warnings(), restricted():
            # It says that it assumes a single process, which is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(found, storage_reader=self._reader, no_dist=True)
        return {path: found[key] for path, key in keys.items()}


def by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """Parameters' names, those of a decoder layer together, and outside of the layers those of a module. Whatever
    transformers converts into one weight is in one layer."""
    for _, together in itertools.groupby(names, lambda name: re.match(r".*?\.\d+\.|.*\.|", name).group()):
        yield list(together)
