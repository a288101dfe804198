"""Checks that all ranks of a TP group are fed the same batch, and that its tokens and labels are in the vocabulary.

The ranks of a TP group hold parts of one model. If they were fed different batches, nothing else would notice, and the
model would quietly train on a mixture. Nothing else would notice a token or a label that no rank has a row for either,
because each rank would take it for another rank's.

Before each forward that trains or evaluates, the ranks exchange a few numbers about everything that the forward is
given.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..collectives import all_gather
from ..fingerprint import MULTIPLIER, fingerprint, fingerprint_of_text, leaves
from ..upstream.torch import caches
from ..upstream.torch.fake import is_fake
from ..vocabulary import ADVICE, OutOfVocabulary, stray
from . import randomness

IGNORE_INDEX = -100


LABELS = ("labels", "shift_labels")


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class Message:
    """A number that rides on the check: what this rank says, and the largest that any rank said in the last training
    forward. All ranks hear the same in the same forward."""

    said: int = 0
    heard: int = 0


message = Message()


_beside: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("_beside", default=None)


@contextlib.contextmanager
def beside(**given: Any) -> Iterator[None]:
    """While inside, compare `given` as part of the batch, although the forward is not given it.

    TRL, for example, keeps the labels to itself. `_batch` is the whole batch of a Trainer, which may keep some of it
    for a loss of its own. What it keeps is compared over the ranks, but not with the vocabulary, because such a loss
    may take any labels.
    """
    token = _beside.set({**(_beside.get() or {}), **given})
    try:
        yield
    finally:
        _beside.reset(token)


def install(model: nn.Module, mesh: DeviceMesh) -> None:
    """Compare the batch over the ranks before each forward of `model` that trains or evaluates: one all-gather of 64
    bytes. If a script has seeded the ranks of a TP group differently, they take over their first rank's state
    (`randomness.py`).

    The forward raises `ValueError`, on every rank, before anything is computed from the batch. With gradients, all
    ranks of the job take part. Without, only the ranks that share parameters do (`dp_shard` and `tp`), because other
    replicas may have another number of batches.
    """
    inner, calls = model.forward, 0
    names = list(inspect.signature(inner).parameters)

    # The Trainer reads the signature of the forward.
    @functools.wraps(inner)
    def forward(*args, **kwargs):
        nonlocal calls
        caches.bound()
        given = {**(_beside.get() or {}), **dict(zip(names, args, strict=False)), **kwargs}
        kept = {n: x for n, x in given.pop("_batch", {}).items() if n not in given and isinstance(x, Tensor)}
        if kept:
            given["batch"] = kept
        if torch.is_grad_enabled() or any(given.get(n) is not None or n in kept for n in LABELS):
            calls += 1
            check(model, given, mesh, calls)
        return inner(*args, **kwargs)

    model.forward = forward


def check(model: nn.Module, given: dict[str, Any], mesh: DeviceMesh, step: int) -> None:
    """Raise `ValueError` unless all ranks of each TP group are `given` the same, and all tokens and labels are in the
    vocabulary."""
    batch = {n: x for n, x in leaves(given).items() if not isinstance(x, DTensor)}
    device = torch.device(mesh.device_type)
    ranges = _ranges(model, given, device)
    edges = (edge for edges in ranges.values() for edge in edges[:2])
    values, texts, said = _digests(batch, device)
    mine = torch.stack([values, texts, randomness.digest(device), said, *edges])
    group = dist.group.WORLD if torch.is_grad_enabled() else mesh["dp_shard_tp"].get_group()
    everyones = all_gather(mine, group).view(group.size(), -1).cpu()
    # A simulated world (`hf_tpsp.estimate`) has sizes, and no values to compare.
    if is_fake(everyones):
        return
    if torch.is_grad_enabled():
        message.heard = int(everyones[:, 3].max())
    digests, edges = everyones[:, :3].unflatten(0, (-1, mesh["tp"].size())), everyones[:, 4:]
    same_batch, same_seed = (digests == digests[:, :1]).all(dim=(0, 1)).split([2, 1])
    sizes = torch.tensor([size for *_, size in ranges.values()])
    is_inside = bool(((edges[:, ::2] >= 0) & (edges[:, 1::2] < sizes)).all())
    if same_batch.all() and is_inside:
        # All ranks see the same digests, so all of them enter this collective, or none.
        if not same_seed:
            randomness.agree(mesh["tp"])
        return
    reports: list[Any] = [None] * group.size()
    dist.all_gather_object(reports, (dist.get_rank(), _numbers(batch), _strays(model, given)), group=group)
    _raise(reports, mesh["tp"].size(), step)


def _digests(batch: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Three int64 on `device`: digests of the tensors' values in `batch`, and of the names, dtypes and other values; and
    the message, because a copy to the device takes its time whatever is in it."""
    tensors = {n: x for n, x in batch.items() if isinstance(x, Tensor)}
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, x in sorted(tensors.items()):
        total = total * MULTIPLIER + (fingerprint(x).to(device) ^ fingerprint_of_text(name))
    texts = sorted((n, _text(x)) for n, x in batch.items())
    return [total, *torch.tensor([fingerprint_of_text(str(texts)), message.said], device=device)]


def _text(x: Any) -> str:
    """The text by which an argument is compared; for a tensor only the kind of its values, which have a digest."""
    if isinstance(x, Tensor):
        return "integers" if x.dtype in INTEGERS else str(x.dtype)
    return repr(x) if isinstance(x, (bool, int, float, str)) else type(x).__name__


def _numbers(batch: dict[str, Any]) -> dict[str, Any]:
    """Argument → what is compared of it, so that an error can name the arguments that differ."""
    return {n: (int(fingerprint(x)) if isinstance(x, Tensor) else None, _text(x)) for n, x in batch.items()}


def vocabularies(model: nn.Module) -> dict[str, int]:
    """Argument → the size of the vocabulary that its values are indices of."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = {"input_ids": getattr(embedding, "num_embeddings", None)}
    sizes |= dict.fromkeys(LABELS, getattr(head, "out_features", None) if has_labels_of_words(model) else None)
    return {name: size for name, size in sizes.items() if size is not None}


def has_labels_of_words(model: nn.Module) -> bool:
    """Whether the model's loss is transformers' causal loss, whose labels are tokens. Others take any labels."""
    loss = model.loss_function
    return "CausalLM" in getattr(loss, "__name__", "") or getattr(loss, "__name__", "") == "causal_lm_loss"


def _ranges(model: nn.Module, given: dict[str, Any], device: torch.device) -> dict[str, tuple[Tensor, Tensor, int]]:
    """For the tokens and for the labels: the smallest value, the largest value, and the size of the vocabulary."""
    sizes, zero = vocabularies(model), torch.zeros((), dtype=torch.int64, device=device)
    found = {"input_ids": (zero, zero, 1), "labels": (zero, zero, 1)}
    for name, size in sizes.items():
        x = given.get(name)
        if isinstance(x, Tensor) and not isinstance(x, DTensor) and not x.is_floating_point() and x.numel():
            if name in LABELS:
                x = x.masked_fill(x == _ignored(given), 0)
            slot = "labels" if name in LABELS else name
            found[slot] = (*(edge.long().to(device) for edge in x.aminmax()), size)
    return found


def _ignored(given: dict[str, Any]) -> int:
    index = given.get("ignore_index")
    return index if isinstance(index, int) else IGNORE_INDEX


def _strays(model: nn.Module, given: dict[str, Any]) -> list[str]:
    """The first token and the first label that are outside their vocabulary, each in words."""
    found = []
    for name, size in vocabularies(model).items():
        x = given.get(name)
        if isinstance(x, Tensor) and not x.is_floating_point():
            found += stray(name, x, size, _ignored(given) if name in LABELS else None)
    return found


def _raise(reports: list[tuple[int, dict[str, Any], list[str]]], tp_size: int, step: int) -> None:
    strays = [f"{text}, on rank {rank}" for rank, _, found in reports[::tp_size] for text in found]
    differences = []
    for start in range(0, len(reports), tp_size):
        first, expected, _ = reports[start]
        for rank, numbers, _ in reports[start + 1 : start + tp_size]:
            names = [n for n in dict.fromkeys([*expected, *numbers]) if expected.get(n) != numbers.get(n)]
            if names:
                differences.append(
                    f"rank {rank} got other {' and '.join(names)} than rank {first}, in the same TP group"
                )
    if differences:
        raise ValueError(
            f"Forward {step}: {'; '.join(differences)}. All ranks of a TP group must get the same batch: let accelerate "
            "deal the batches (prepare the DataLoader), and shuffle with the same seed on every rank."
        )
    raise OutOfVocabulary(f"Forward {step}: {'; '.join(strays)}. {ADVICE}")
