"""Where the host waits for the device, and whose line it is.

    with Waits() as waits:
        trainer.train()
    waits.by_owner()  # {"transformers": 4, "hf_tpsp": 1}
    print(waits.table())

Ranks on the CPU wait for nothing. There it counts what would wait on an accelerator: values that are read (`item`,
`tolist`, `cpu`, a tensor as a condition) and results whose size depends on values (`nonzero`, `unique`, an index that is a
mask). On CUDA it counts those whose tensor is on the device, and torch's own report of synchronizations
(`torch.cuda.set_sync_debug_mode`) beside them; that part was never run on a GPU.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..patching import swap

OPERATIONS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
        "unique_consecutive", "repeat_interleave", "bincount",
    )
}  # fmt: skip
# They read a tensor on the CPU without an operation.
METHODS = ("cpu", "tolist")
PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "datasets")
OWN = Path(__file__).parents[1]


@dataclass(frozen=True)
class Wait:
    """One line that waits.

    Attributes:
        owner: the package whose line it is, `"hf_tpsp"`, or `"script"` for all else; torch's own lines count for
            whoever called them.
        operation: such as `aten::_local_scalar_dense`, which `item()`, `float()` and `bool()` end in.
        line: `file:line function`.
    """

    owner: str
    operation: str
    line: str


class Waits(TorchDispatchMode):
    """Counts waits while it is entered, in this thread and in backward.

    Attributes:
        found: wait → how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Wait] = Counter()

    def by_owner(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for wait, count in self.found.items():
            total[wait.owner] += count
        return dict(total)

    def table(self) -> str:
        """Markdown: count, owner, operation and line, the most frequent first."""
        rows = [f"| {n} | {w.owner} | `{w.operation}` | `{w.line}` |" for w, n in self.found.most_common()]
        return "\n".join(["| waits | whose | operation | line |", "| --- | --- | --- | --- |", *rows])

    def note(self, operation: str) -> None:
        self.found[_wait(operation)] += 1

    def __enter__(self) -> Waits:
        def counted(name: str):
            def make(original):
                def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                    if _counts(tensor):
                        self.note(f"Tensor.{name}")
                    return original(tensor, *args, **kwargs)

                return method

            return make

        self._undo = [swap(*((Tensor, name, counted(name)) for name in METHODS))]
        if torch.cuda.is_available():
            self._undo.append(self._hear_torch())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for undo in reversed(self._undo):
            undo()

    def _hear_torch(self):
        """torch's warnings of synchronizations on CUDA, as waits."""
        mode = torch.cuda.get_sync_debug_mode()
        caught = warnings.catch_warnings()
        caught.__enter__()
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def show(message, category, filename, lineno, *args, **kwargs):
            if "synchroniz" in str(message):
                self.note("cuda synchronization")
            else:
                shown(message, category, filename, lineno, *args, **kwargs)

        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")

        def undo() -> None:
            torch.cuda.set_sync_debug_mode(mode)
            caught.__exit__(None, None, None)

        return undo

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            # Its operations on plain tensors come here next.
            return NotImplemented
        name = func.name().partition(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in OPERATIONS or (name in ("aten::index", "aten::index_put_") and _has_mask(args[1])):
            if any(map(_counts, tensors)):
                self.note(name)
        elif name == "aten::_to_copy" and _leaves_the_device(tensors[0], kwargs or {}):
            self.note("copy to the host")
        return func(*args, **(kwargs or {}))


def _counts(x: Tensor) -> bool:
    """Whether reading `x` waits: on a machine with CUDA, only what is there does."""
    return not torch.cuda.is_available() or x.device.type == "cuda"


def _has_mask(indices: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _leaves_the_device(x: Tensor, given: dict[str, Any]) -> bool:
    device = given.get("device")
    to_host = device is not None and torch.device(device).type == "cpu"
    return x.device.type not in ("cpu", "meta") and to_host and not given.get("non_blocking")


def _wait(operation: str) -> Wait:
    """The wait of whoever is the innermost caller outside torch and this file."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = _owner(frame.f_code.co_filename)
        if owner not in ("torch", None):
            path = Path(frame.f_code.co_filename)
            return Wait(owner, operation, f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_qualname}")
        frame = frame.f_back
    return Wait("torch", operation, "")


def _owner(file: str) -> str | None:
    path = Path(file)
    if path == Path(__file__):
        return None
    if path.is_relative_to(OWN):
        return "hf_tpsp"
    parts = path.parts
    if "site-packages" in parts:
        package = parts[parts.index("site-packages") + 1]
        return package if package in PACKAGES else None
    return None if file.startswith("<") or "lib/python" in file else "script"
