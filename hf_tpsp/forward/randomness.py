"""Random numbers on the ranks of a TP group: what they hold alike is drawn alike, what is a rank's own is drawn per rank.

The default generators are the common stream, in the same state on all ranks of a group (`agree`); data-parallel groups
stay apart. A rank's own stream is no second generator but a function of the common one: `own_stream` takes one number of
it, whatever the length of what is drawn, and seeds the generator from that number and the rank for as long as it is open.
So the common streams stay in step on any length, and whoever saves and restores the default generators (activation
checkpointing, the Trainer's resume) reproduces both.

Between the blocks, dropout on the sequence-sharded stream is DTensor's to draw (`Tracker`; on CUDA torch has one). Inside a
split block, numbers for the tokens as all ranks hold them, and for terms of a sum, are common; numbers for this rank's heads or
columns are its own (`Split`).
"""

from __future__ import annotations

import contextlib
import functools
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

from ..fingerprint import fingerprint
from ..patching import WhileUsed
from ..state import style_of
from ..structure import DROPOUTS
from ..upstream.torch import dtensor
from ..upstream.torch.fake import is_simulated

logger = logging.get_logger(__name__)


_DRAWING_NAMES = ("drop", "jitter", "noise")


# Module → where the rates of what is inside it stand: a part, or a part's config, and the attribute's name. Weak on both sides: a
# value that held its key would keep the model for good.
_rates: weakref.WeakKeyDictionary[nn.Module, list[tuple[weakref.ref, str]]] = weakref.WeakKeyDictionary()


def draws(module: nn.Module) -> bool:
    """Whether `module` in training may draw random numbers: a rate of dropout, layerdrop or jitter above zero, of a part of it or
    of the part's config. The rates are read each time, for a script may set them at any time."""
    if module not in _rates:
        _rates[module] = list(_rates_inside(module))
    return any(isinstance(rate := getattr(owner(), name, None), float) and rate > 0 for owner, name in _rates[module])


def look_again() -> None:
    """Have `draws` look for rates again: modules were added, such as adapters."""
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
    """While inside, `device`'s default generator draws numbers of `rank`'s own. The common stream goes on by one number."""
    if torch.compiler.is_compiling() or is_simulated():
        yield
        return
    if device.type == "cpu":
        seed = torch.randint(2**62, (), device="cpu").item()
        generator = torch.default_generator
        state = generator.get_state()
    else:  # counter-based: seed and offset are read without waiting for the device
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


# On the CPU, which torch's own tracker does not know.
_DRAW_BY_SHARD = WhileUsed(lambda: dtensor.draw_by_shard(own_stream))


_DRAWS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.bernoulli, torch.native_dropout, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.multinomial, F.gumbel_softmax, F.scaled_dot_product_attention, Tensor.uniform_, Tensor.normal_,
    Tensor.bernoulli_, Tensor.bernoulli, Tensor.exponential_, Tensor.multinomial, Tensor.random_,
}  # fmt: skip


# Functions that draw nothing at a rate of zero → the place and name of the rate, and its default; likewise of `training`.
_RATED = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout), ((1, "p", 0.5), (2, "training", True))),
    F.alpha_dropout: ((1, "p", 0.5), (2, "training", False)),
    torch.dropout: ((1, "p", 0.5), (2, "train", True)),
    torch.dropout_: ((1, "p", 0.5), (2, "train", True)),
    F.scaled_dot_product_attention: ((4, "dropout_p", 0.0),),
}  # fmt: skip


def _draws_nothing(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether `func` takes no numbers of the generator, as one process does not: else the common stream would go on by one."""
    asked = _RATED.get(func, ())
    return any(not (args[at] if len(args) > at else kwargs.get(name, default)) for at, name, default in asked)


class Split(TorchFunctionMode):
    """Inside a split block: numbers for this rank's heads or columns are drawn from its own stream.

    All else is common: what is drawn for tokens as every rank holds them (jitter, a router's choice), and dropout on terms of a
    sum, which drops the same elements of each, as of the sum itself.

    Args:
        tokens: `(batch, seq)` of the block's stream.
        own_widths: of this block's column-split features, on any rank, that no whole tensor has.
    """

    def __init__(self, rank: int, tokens: tuple[int, int], own_widths: frozenset[int]):
        super().__init__()
        self.rank, self.tokens, self.own_widths = rank, tokens, own_widths

    def is_own(self, x: Tensor) -> bool:
        batch, length = self.tokens
        of_tokens = (x.dim() >= 3 and tuple(x.shape[:2]) == self.tokens) or (
            x.dim() >= 2 and x.shape[0] == batch * length
        )
        if x.dim() >= 4 or not of_tokens:  # heads stand beside the tokens
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
    """What a split block runs in, given the `shape` of its stream, `[batch, seq, …]`. Nothing unless it draws."""
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
                chunk = -(-width // size)
                own |= {chunk, width - chunk * (size - 1)}
        whole |= sizes
    return frozenset(own - whole)


def agree(mesh: DeviceMesh) -> None:
    """Give all ranks of a TP group their first rank's state of the default generators. One broadcast."""
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
    if device.type == "cuda":  # counter-based: seed and offset are read without waiting for the device
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        found = found * 31 + generator.initial_seed() * 31 + generator.get_offset()
    return found


def install(model: nn.Module, mesh: DeviceMesh) -> None:
    """Have the ranks of a TP group draw alike what they hold alike: in training, in `generate`, from the first forward on. A script
    may seed them apart between any two steps: the batch check finds that out (`batch_check.py`)."""
    if mesh.device_type == "cpu":
        _DRAW_BY_SHARD.keep_for(model)
    forward, agreed = model.forward, False

    @functools.wraps(forward)  # the Trainer reads its signature
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
