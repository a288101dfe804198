"""A small copy of a model, run once: the arguments of each module, and the operations on the stream between modules."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..structure import DROPOUTS, first_tensor
from .shrink import shrunk_like

# The batch that the copy is run on. No size of a copy is TOKENS, so a tensor `[BATCH, TOKENS, …]` runs along the
# sequence.
BATCH, TOKENS = 2, 11


LOCAL_OPERATIONS = {"add", "sub", "rsub", "mul", "div", "true_divide", "neg", "dropout", "to", "type", "type_as", "float",
                    "contiguous", "expand_as", "same", "relu", "gelu", "silu", "tanh", "sigmoid"}  # fmt: skip
"""Names of the local operations: they do to a part of the sequence what they do to the whole. `same` is a view of the
same shape."""


SPELLINGS = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul", "itruediv": "div",
             "truediv": "div"}  # fmt: skip


# These only query a tensor, or are called by the recording itself. They compute nothing.
NOT_RECORDED = {"get", "size", "dim", "is_floating_point", "detach", "equal", "clone"}


@dataclass
class Operation:
    """One operation of a forward on floating tensors, at least one of which is `[batch, seq, …]`.

    Attributes:
        name: the function's name without underscores; in-place and reflected forms have the plain form's name.
        shapes: the shapes of its tensor arguments.
        foreign: the shapes of the arguments that do not hold the stream.
        on_stream: whether one of the arguments holds the stream.
        layers_began: whether the first layer had been called before.
    """

    name: str
    shapes: list[torch.Size]
    foreign: list[torch.Size]
    on_stream: bool
    layers_began: bool

    def __str__(self) -> str:
        return f"{self.name} of {' and '.join(str(list(s)) for s in self.shapes)}"


@dataclass
class Call:
    """How a module was called in the copy's forward.

    Attributes:
        args, kwargs: the arguments.
        output: the first tensor that the module returned.
        names: the parameter names of its class's forward, without `self`.
        linears: the linear layers called inside the module, in order: name inside it → whether the layer's input was
            the module's own input.
        own_operations: the operations on tensors along the sequence in its own forward, not in the modules that it
            calls.
    """

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    names: list[str] = field(default_factory=list)
    linears: dict[str, bool] = field(default_factory=dict)
    own_operations: list[Operation] = field(default_factory=list)

    @property
    def streams(self) -> list[Tensor]:
        """The floating tensors among the arguments that have the shape of the first one."""
        tensors = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        return [x for x in tensors if x.shape == tensors[0].shape]

    @property
    def is_sequence(self) -> bool:
        """Whether the module's input was `[batch, seq, …]`, and its output `[batch, seq, …]` or `[batch * seq, …]`."""
        given, returned = (self.streams or [self.output])[0].shape, self.output.shape
        return is_along_sequence(given) and (is_along_sequence(returned) or returned[:1] == (BATCH * TOKENS,))

    def mixes_sequence(self, before_layers: bool = False) -> str | None:
        """The first of its own operations on the stream that would be wrong on a sharded stream; None if there is none.

        Such an operation is not local, or it combines the stream with a tensor that is not cut along the sequence.

        Args:
            before_layers: look at the operations before the first layer was called, instead of those after.
        """
        for operation in self.own_operations:
            if operation.on_stream and operation.layers_began != before_layers:
                others = [s for s in operation.foreign if s.numel() > 1 and s not in self.along]
                if operation.name not in LOCAL_OPERATIONS or others:
                    return str(operation)
        return None

    @property
    def along(self) -> dict[torch.Size, str]:
        """Shape → name of the arguments beside the stream that are `[batch, seq, …]` too."""
        named = {**dict(zip(self.names[1:], self.args[1:], strict=False)), **self.kwargs}
        named = {n: x for n, x in named.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3}
        return {x.shape: n for n, x in named.items() if is_along_sequence(x.shape)}

    def meets(self) -> list[str]:
        """The names of the arguments in `along` that its own forward combines with the stream."""
        return sorted({self.along[s] for o in self.own_operations if o.on_stream for s in o.foreign if s in self.along})


def is_along_sequence(shape: torch.Size) -> bool:
    return shape[:2] == (BATCH, TOKENS)


class SmallCopy:
    """A small random copy of `model` on the CPU, without dropout, and the calls of its modules.

    Args:
        stems: the names of the lists of the model's layers.
        every_layer: keep as many layers as the model has, instead of one of each kind.

    Attributes:
        model: the copy.
        modules: the copy's modules by name.
        calls: module name → its first call, in the order in which the calls ended.
        reads_embedding: the name of the module, if any, that indexes the embedding's weight by itself.
        calls_loss_function: whether the model leaves its loss to `loss_function`, as most do.

    Raises:
        ValueError: no small copy can be built, or run.
    """

    def __init__(self, model: PreTrainedModel, stems: Iterable[str], every_layer: bool = False):
        self.stems = tuple(f"{stem}." for stem in stems)
        with aside():
            self.model = shrunk_like(model, every_layer).eval()
        self.modules = dict(self.model.named_modules())
        # The proof runs in training mode too, and dropout would make two runs differ.
        for module in self.modules.values():
            if isinstance(module, DROPOUTS):
                module.p = 0.0
        try:
            self.record()
        except Exception as error:
            raise ValueError(
                f"hf_tpsp cannot run a small copy of {type(model).__name__} on the CPU, so it cannot prove a plan for it: {error}"
            ) from error

    def record(self, from_embedding: bool = True) -> None:
        """Run the copy once, and record the calls of its modules.

        Args:
            from_embedding: whether the stream starts at the embedding's output; if not, at the first layer's input.
        """
        recorder = Recorder(self, from_embedding)
        recorder.run()
        self.calls = recorder.calls
        self.reads_embedding = recorder.operations.reader
        self.calls_loss_function = recorder.calls_loss_function


class Recorder:
    """The recording of one forward of a small copy: a hook before and after each module, and `OwnOperations` between
    them.

    Attributes:
        calls: module name → its first call.
        open_calls: `(name, args, kwargs)` of the modules whose forward is running, outermost first.
        linears: module name → the `linears` of its call. They are collected here, because a linear layer's forward ends
            before the module that calls it has a `Call`.
        operations: the operations in the modules' own forwards.
        calls_loss_function: whether the model called its `loss_function`.
    """

    def __init__(self, small: SmallCopy, from_embedding: bool):
        self.model, self.modules, self.stems = small.model, small.modules, small.stems
        self.from_embedding = from_embedding
        self.head, self.embedding = small.model.get_output_embeddings(), small.model.get_input_embeddings()
        self.calls: dict[str, Call] = {}
        self.open_calls: list[tuple[str, tuple, dict]] = []
        self.linears: dict[str, dict[str, bool]] = {}
        self.operations = OwnOperations(self.open_calls, self.embedding)
        self.calls_loss_function = False

    def run(self) -> None:
        for parameter in self.stream_parameters():
            self.operations.follow(parameter)
        hooks = []
        for name, module in self.modules.items():
            before, after = functools.partial(self.before, name), functools.partial(self.after, name)
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after, with_kwargs=True))
        self.model.loss_function = self.loss_function
        vocabulary = min(self.embedding.num_embeddings, self.model.config.get_text_config(decoder=True).vocab_size)
        ids = torch.randint(3, vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad(), aside(), self.operations:
                self.model(input_ids=ids, labels=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for name, operation in self.operations.found:
            if name in self.calls:
                self.calls[name].own_operations.append(operation)
        for name, linears in self.linears.items():
            if name in self.calls:
                self.calls[name].linears = linears

    def stream_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the layers, or the modules around the layers, own themselves. They are laid out for the
        stream, so the stream may be combined with them."""
        for stem in self.stems:
            layers = stem[:-1]
            parts = layers.split(".")
            around = [".".join(parts[:depth]) for depth in range(len(parts))]
            for owner in (*around, *(f"{stem}{i}" for i in range(len(self.modules[layers])))):
                yield from self.modules[owner].parameters(recurse=False)

    def before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.open_calls.append((name, *detached((args, kwargs))))
        if f"{name.rpartition('.')[0]}." in self.stems:
            self.operations.layers_began = True
            self.operations.follow(first_tensor([*args, *kwargs.values()]))
        elif module is self.head:
            # Logits are not part of the stream.
            self.operations.is_on = False

    def after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.operations.pass_on([*args, *kwargs.values()], output)
        if module is self.embedding and self.from_embedding:
            self.operations.follow(output)
        # These are copies from before the call, because the module may have written into its arguments.
        _, args, kwargs = self.open_calls.pop()
        if (found := first_tensor(output)) is None:
            return
        if name not in self.calls:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            self.calls[name] = Call(args, kwargs, found.detach().clone(), names)
        if isinstance(module, (nn.Linear, Conv1D)) and args:
            self.note_linear(name, args[0], found)

    def note_linear(self, name: str, given: Tensor, output: Tensor) -> None:
        """Record the linear layer `name` in `linears` of every module around it whose first call is running."""
        for outer, args, kwargs in self.open_calls:
            if outer not in self.calls and name.startswith(outer):
                streams = Call(args, kwargs, output).streams
                is_entry = bool(streams) and streams[0].shape == given.shape and torch.equal(streams[0], given)
                self.linears.setdefault(outer, {})[name.removeprefix(outer).lstrip(".")] = is_entry

    def loss_function(self, *args, **kwargs) -> Tensor:
        self.calls_loss_function = True
        return torch.zeros(())


class OwnOperations(TorchFunctionMode):
    """Records the operations on tensors along the sequence, with the module in whose own forward they run.

    Attributes:
        found: module name and operation, in order.
        stream: id → tensor, for the tensors that hold the stream. They are kept alive, so that no other tensor gets
            their id.
        layers_began: whether the first layer was called.
        is_on: True until the head is called.
        reader: the name of the module, if any, whose own forward indexes the embedding's weight.
    """

    def __init__(self, open_calls: list[tuple[str, tuple, dict]], embedding: nn.Module):
        self.open_calls, self.embedding = open_calls, embedding
        self.found: list[tuple[str, Operation]] = []
        self.stream: dict[int, Tensor] = {}
        self.layers_began, self.is_on = False, True
        self.reader: str | None = None

    def follow(self, tensor: Tensor) -> None:
        """Mark `tensor` as holding the stream from now on."""
        self.stream[id(tensor)] = tensor

    def pass_on(self, given: list, output: Any) -> None:
        """Mark the first tensor of `output` as holding the stream if one of `given` does."""
        if any(id(x) in self.stream for x in given) and (first := first_tensor(output)) is not None:
            self.follow(first)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        name = SPELLINGS.get(name, name)
        if not self.open_calls or not self.is_on or name in NOT_RECORDED:
            return result
        caller = self.open_calls[-1][0]
        if name == "getitem" and args[0] is getattr(self.embedding, "weight", None):
            self.reader = caller
        tensors = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        if name in ("view", "reshape", "expand", "getitem"):
            name = "same" if isinstance(result, Tensor) and tensors and result.shape == tensors[0].shape else "reshape"
        if any(is_along_sequence(x.shape) for x in tensors):
            foreign = [x.shape for x in tensors if id(x) not in self.stream]
            on_stream = any(id(x) in self.stream and not isinstance(x, nn.Parameter) for x in tensors)
            shapes = [x.shape for x in tensors]
            self.found.append((caller, Operation(name, shapes, foreign, on_stream, self.layers_began)))
        self.pass_on(tensors, result)
        return result


def detached(x: Any) -> Any:
    """Copy the tensors in `x`, because a module may write into its arguments. Everything else is kept as it is."""
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
    """Run on the CPU, keep the caller's random state, and silence transformers' warnings about a random copy."""
    before = logging.get_verbosity()
    if before < logging.ERROR:
        logging.set_verbosity_error()
    # A device that is entered looks at every operation, so it is entered only where another one is the default.
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu") if elsewhere else contextlib.nullcontext():
            yield
    finally:
        if before < logging.ERROR:
            logging.set_verbosity(before)
