"""A small copy of a model, run once: what was called with what, and what was done to the stream between the modules."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from ..structure import first_tensor

RANKS = 2


TOKENS = 11


@dataclass
class Call:
    """How a module was called in the copy's forward."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    names: list[str] = field(default_factory=list)  # of its forward's parameters
    linears: dict[str, bool] = field(default_factory=dict)
    """The linear layers that it called, in order, and whether their input was what the module itself was given."""

    @property
    def streams(self) -> list[Tensor]:
        """The arguments that have the first floating tensor's shape."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        return [x for x in tensors if x.shape == tensors[0].shape]

    glue: list[Operation] = field(default_factory=list)
    """What its own forward, and not a module that it calls, ran on tensors along the sequence."""

    @property
    def is_sequence(self) -> bool:
        """Whether it was given `[batch, seq, …]`, and returned that, or `[batch * seq, …]`."""
        shapes = (2, TOKENS), (2 * TOKENS,)
        given, returned = (self.streams or [self.output])[0].shape, self.output.shape
        return given[:2] == shapes[0] and (returned[:2] == shapes[0] or returned[:1] == shapes[1])

    def beyond_pointwise(self, before_layers: bool = False) -> str | None:
        """What its own forward does to the stream, since the layers began or before, that cannot be done to a part of the
        sequence, or puts together with it that is not cut as it is."""
        for operation in self.glue:
            if operation.on_stream and operation.layers_began != before_layers:
                others = [s for s in operation.foreign if s.numel() > 1 and s not in self.along]
                if operation.name not in POINTWISE or others:
                    return str(operation)
        return None

    @property
    def along(self) -> dict[torch.Size, str]:
        """Shape → name, of what it is given along the sequence, beside the stream."""
        named = {**dict(zip(self.names[1:], self.args[1:], strict=False)), **self.kwargs}
        named = {n: x for n, x in named.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3}
        return {x.shape: n for n, x in named.items() if x.shape[:2] == (2, TOKENS)}

    def meets(self) -> list[str]:
        """Names of those that its own forward puts together with the stream."""
        return sorted({self.along[s] for o in self.glue if o.on_stream for s in o.foreign if s in self.along})


@dataclass
class Operation:
    """One operation of a forward on floating tensors of which one is `[batch, seq, …]`.

    Attributes:
        shapes: of its tensors. foreign: of those that the stream is not in. on_stream: whether it is in one. layers_began: whether
            the first layer had been called.
    """

    name: str
    shapes: list[torch.Size]
    foreign: list[torch.Size]
    on_stream: bool
    layers_began: bool

    def __str__(self) -> str:
        return f"{self.name} of {' and '.join(str(list(s)) for s in self.shapes)}"


POINTWISE = {"add", "sub", "rsub", "mul", "div", "true_divide", "neg", "dropout", "to", "type", "type_as", "float", "contiguous",
             "expand_as", "same", "relu", "gelu", "silu", "tanh", "sigmoid"}  # fmt: skip
"""Operations that do to a part of the sequence what they do to the whole. `same`: a view of the same shape."""


SPELLINGS = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul", "itruediv": "div",
             "truediv": "div"}  # fmt: skip


OURS = {"get", "size", "dim", "is_floating_point", "detach", "equal", "clone"}  # questions, and the recording's own


class OwnOperations(TorchFunctionMode):
    """Notes the operations on tensors along the sequence, with the module in whose own forward they are."""

    def __init__(self, open_calls: list, embedding: nn.Module):
        self.open_calls, self.embedding = open_calls, embedding
        self.found: list[tuple[str, Operation]] = []
        self.stream: dict[int, Tensor] = {}  # what it is in, kept alive, so that no other tensor gets its id
        self.layers_began = False
        self.is_on = True  # until the head: logits are not a stream
        self.reader: str | None = None  # of the embedding's weight, beside the embedding

    def follow(self, given: Any, output: Any = None) -> None:
        """The stream is in `given`; or it is in `output` if it is in one of `given`."""
        if output is None:
            self.stream[id(given)] = given
        elif any(id(x) in self.stream for x in given) and (first := first_tensor(output)) is not None:
            self.stream[id(first)] = first

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        name = SPELLINGS.get(name, name)
        if not self.open_calls or not self.is_on or name in OURS:
            return result
        caller = self.open_calls[-1][0]
        if name == "getitem" and args[0] is getattr(self.embedding, "weight", None):
            self.reader = caller
        tensors = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        if name in ("view", "reshape", "expand", "getitem"):
            name = "same" if isinstance(result, Tensor) and tensors and result.shape == tensors[0].shape else "reshape"
        if any(x.shape[:2] == (2, TOKENS) for x in tensors):
            foreign = [x.shape for x in tensors if id(x) not in self.stream]
            on_stream = any(id(x) in self.stream and not isinstance(x, nn.Parameter) for x in tensors)
            shapes = [x.shape for x in tensors]
            self.found.append((caller, Operation(name, shapes, foreign, on_stream, self.layers_began)))
        self.follow(tensors, result)
        return result


def parameter_names(module: nn.Module) -> list[str]:
    """Of its class's forward, without `self`."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def detached(x: Any) -> Any:
    """Tensors copied, for a module may write into what it was given; all else as it is."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, tuple):
        return type(x)(*map(detached, x)) if hasattr(x, "_fields") else tuple(map(detached, x))
    if isinstance(x, list):
        return [detached(v) for v in x]
    if type(x) is dict:
        return {k: detached(v) for k, v in x.items()}
    return x


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """On the CPU, whatever device the model is made on; the caller's random numbers stay; and transformers has things to say
    of a random copy that nobody needs to hear."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        logging.set_verbosity(before)
