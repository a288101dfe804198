"""Random numbers on the ranks of a TP group: common ones for tensors that all ranks hold, own ones for a rank's shard.

The default generators are the common stream: they are in the same state on all ranks of a TP group (`agree`). Each
data-parallel group keeps its own state. A rank's own stream is not a second generator, but is derived from the common
one: `own_stream` takes one number from it, however many are drawn, and seeds the generator from that number and the
rank for as long as it is open. So the common streams stay in step whatever is drawn, and whoever saves and restores the
default generators (activation checkpointing, the Trainer's resume) reproduces both streams.

Between the blocks, DTensor draws the dropout on the sequence-sharded stream (on the CPU by `draw_by_shard`; on CUDA
torch has a tracker). Inside a split block, numbers for tokens that all ranks hold and for partial outputs are common;
numbers for this rank's heads or columns are its own (`Split`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from ..collectives import shard_width
from ..fingerprint import fingerprint
from ..patching import WhileUsed
from ..state import style_of
from ..structure import DROPOUTS
from ..upstream.torch import dtensor
from ..upstream.torch.fake import is_simulated

logger = logging.get_logger(__name__)


_DRAWING_NAMES = ("drop", "jitter", "noise")


# Module → where the rates inside it are kept: the owner (a submodule, or a submodule's config) and the attribute's
# name. Keys and owners are weak references, because a value that held its key would keep the model alive for good.
_rates: weakref.WeakKeyDictionary[nn.Module, list[tuple[weakref.ref, str]]] = weakref.WeakKeyDictionary()


def draws(module: nn.Module) -> bool:
    """Whether `module` may draw random numbers in training: a submodule, or a submodule's config, has a rate of
    dropout, layerdrop or jitter above zero. The rates are read each time, because a script may set them at any time."""
    if module not in _rates:
        _rates[module] = list(_rates_inside(module))
    return any(isinstance(rate := getattr(owner(), name, None), float) and rate > 0 for owner, name in _rates[module])


def look_again() -> None:
    """Have `draws` look for rates again, after modules such as adapters were added."""
    _rates.clear()


def _rates_inside(module: nn.Module) -> Iterator[tuple[weakref.ref, str]]:
    for part in module.modules():
        config = vars(part).get("config")
        for owner in (part, config) if hasattr(config, "__dict__") else (part,):
            yield from ((weakref.ref(owner), name) for name in vars(owner) if any(w in name for w in _DRAWING_NAMES))
        if isinstance(part, DROPOUTS):
            yield weakref.ref(part), "p"


@contextlib.contextmanager
def own_stream(rank: int, device: torch.device) -> Iterator[None]:
    """While inside, `device`'s default generator draws `rank`'s own numbers. The common stream moves one step."""
    if torch.compiler.is_compiling() or is_simulated():
        yield
        return
    if device.type == "cpu":
        generator = torch.default_generator
        seed = host_digest(device) % 2**62
        # The common stream moves on, and a state that is met again gives the same numbers again.
        torch.randint(2**62, (), device="cpu")
        state = generator.get_state()
    else:
        # The generator is counter-based: its seed and offset are read without waiting for the device.
        index = device.index if device.index is not None else torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        seed = (generator.initial_seed() * 0x9E3779B97F4A7C15 + generator.get_offset()) % 2**62
        generator.set_offset(generator.get_offset() + 4)
        state = generator.get_state()
    generator.manual_seed((seed ^ ((rank + 1) * 0xBF58476D1CE4E5B9)) % 2**63)
    try:
        yield
    finally:
        generator.set_state(state)


# DTensor's random operations on the CPU go through this; torch's own tracker works on accelerators only.
_DRAW_BY_SHARD = WhileUsed(lambda: dtensor.draw_by_shard(own_stream))


_DRAWS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.bernoulli, torch.native_dropout, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.multinomial, F.gumbel_softmax, F.scaled_dot_product_attention, Tensor.uniform_, Tensor.normal_,
    Tensor.bernoulli_, Tensor.bernoulli, Tensor.exponential_, Tensor.multinomial, Tensor.random_,
}  # fmt: skip


# Function → position, name and default of its rate and of its `training` flag. If either is zero, it draws nothing.
_RATED = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout), ((1, "p", 0.5), (2, "training", True))),
    F.alpha_dropout: ((1, "p", 0.5), (2, "training", False)),
    torch.dropout: ((1, "p", 0.5), (2, "train", True)),
    torch.dropout_: ((1, "p", 0.5), (2, "train", True)),
    F.scaled_dot_product_attention: ((4, "dropout_p", 0.0),),
}  # fmt: skip


def _draws_nothing(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether `func` draws nothing with these arguments. `own_stream` must not be opened for it: that would advance the
    common stream, which the same call in one process does not do."""
    asked = _RATED.get(func, ())
    return any(not (args[at] if len(args) > at else kwargs.get(name, default)) for at, name, default in asked)


class Split(TorchFunctionMode):
    """Inside a split block, draws the numbers for this rank's heads or columns from its own stream.

    All other numbers are common: those for tokens that every rank holds (jitter, a router's choice), and dropout on
    partial outputs, which must drop the same elements on every rank, as dropout on their sum would.

    Args:
        tokens: `(batch, seq)` of the block's stream.
        own_widths: the widths of this block's column-split features, on any rank, except those that a whole tensor has
            too.
    """

    def __init__(self, rank: int, tokens: tuple[int, int], own_widths: frozenset[int]):
        super().__init__()
        self.rank, self.tokens, self.own_widths = rank, tokens, own_widths

    def is_own(self, x: Tensor) -> bool:
        batch, length = self.tokens
        of_tokens = (x.dim() >= 3 and tuple(x.shape[:2]) == self.tokens) or (
            x.dim() >= 2 and x.shape[0] == batch * length
        )
        # Such a tensor has a dim of heads beside those of the tokens.
        if x.dim() >= 4 or not of_tokens:
            return x.dim() > 1
        return x.shape[-1] in self.own_widths

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn_for = args[0] if func in _DRAWS and args and not _draws_nothing(func, args, kwargs) else None
        if isinstance(drawn_for, Tensor) and not isinstance(drawn_for, DTensor) and self.is_own(drawn_for):
            with own_stream(self.rank, drawn_for.device):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def inside_block(module: nn.Module, shape: torch.Size | None, mesh: DeviceMesh) -> contextlib.AbstractContextManager:
    """The context that a split block runs in, given the `shape` of its stream, `[batch, seq, …]`. It does nothing
    unless the block draws random numbers."""
    if shape is None or not module.training or torch.compiler.is_compiling() or not draws(module):
        return contextlib.nullcontext()
    return Split(mesh.get_local_rank(), tuple(shape[:2]), _own_widths(module, mesh.size()))


def _own_widths(module: nn.Module, size: int) -> frozenset[int]:
    own, whole = set(), set()
    for part in module.modules():
        style = style_of(part)
        sizes = {getattr(part, n) for n in ("in_features", "out_features", "nx", "nf") if hasattr(part, n)}
        if getattr(style, "width", None):
            sizes.add(style.width)
        if style is not None and style.splits_features:
            for width in sizes:
                chunk = shard_width(width, size)
                own |= {chunk, width - chunk * (size - 1)}
        whole |= sizes
    return frozenset(own - whole)


def agree(mesh: DeviceMesh) -> None:
    """Give the default generators of all ranks of a TP group the state of their first rank's. One broadcast."""
    if mesh.size() == 1 or is_simulated():
        return
    group = mesh.get_group()
    states = [torch.get_rng_state()]
    on_cuda = mesh.device_type == "cuda"
    if on_cuda:
        states.append(torch.cuda.get_rng_state())
    mine = torch.cat(states).to(mesh.device_type)
    common = mine.clone()
    dist.broadcast(common, src=dist.get_global_rank(group, 0), group=group)
    if torch.equal(common, mine):
        return
    logger.warning_once(
        "hf_tpsp: the ranks of a TP group had seeds of their own; they take over their first rank's random state, for they "
        "hold parts of one model."
    )
    states = common.cpu().split([len(s) for s in states])
    torch.set_rng_state(states[0].clone())
    if on_cuda:
        torch.cuda.set_rng_state(states[1].clone())


def digest(device: torch.device) -> Tensor:
    """An int64 on `device` that tells states of the default generators apart."""
    if is_simulated():
        return torch.zeros((), dtype=torch.int64, device=device)
    found = fingerprint(torch.get_rng_state()).to(device)
    if device.type == "cuda":
        # The generator is counter-based: its seed and offset are read without waiting for the device.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        found = found * 31 + generator.initial_seed() * 31 + generator.get_offset()
    return found


def host_digest(device: torch.device) -> int:
    """An int64 that tells states of the default generators apart, from what the host knows of them."""
    states = [torch.get_rng_state().numpy().tobytes()]
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        states.append(f"{generator.initial_seed()} {generator.get_offset()}".encode())
    return int.from_bytes(hashlib.blake2b(b"".join(states), digest_size=8).digest(), "little", signed=True)


def install(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give the ranks of a TP group one random state, at the model's first forward and before each `generate`. A script
    may seed the ranks differently between any two steps; the batch check notices that (`batch_check.py`)."""
    if mesh.device_type == "cpu":
        _DRAW_BY_SHARD.keep_for(model)
    forward, agreed = model.forward, False

    # The Trainer reads the signature of the forward.
    @functools.wraps(forward)
    def common_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal agreed
        if not agreed:
            agreed = True
            agree(mesh)
        return forward(*args, **kwargs)

    model.forward = common_forward
    if hasattr(model, "generate"):
        generate = model.generate

        @functools.wraps(generate)
        def common_generate(*args: Any, **kwargs: Any) -> Any:
            agree(mesh)
            return generate(*args, **kwargs)

        model.generate = common_generate
