"""Checks that all ranks of a TP group are fed the same batch, and that its tokens and labels are in the vocabulary.

The ranks of a TP group hold parts of one model. If they were fed different batches, nothing else would notice, and the
model would quietly train on a mixture. Nothing else would notice a token or a label that no rank has a row for either,
because each rank would take it for another rank's.

Before each forward that trains or evaluates, the ranks exchange a few numbers about everything that the forward is
given. Ranks on the CPU have nothing to wait for, and look at them at once. On an accelerator, what the hosts know
(shapes, dtypes, other values, random states) is compared at once by the hosts of a TP group, before a collective could
meet another shape; the tensors' values are compared on the device, and the outcome is read before the optimizer steps
(`late.py`).
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

from .. import devices
from ..collectives import all_gather
from ..fingerprint import MULTIPLIER, fingerprint, fingerprint_of_text, leaves
from ..upstream.torch import c10d, caches
from ..upstream.torch.fake import is_fake
from ..vocabulary import ADVICE, OutOfVocabulary, checked, stray
from . import late, randomness

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

    On the CPU the forward raises `ValueError`, on every rank, before anything is computed from the batch. On an
    accelerator it does so if the hosts know the difference, and else the optimizer's step does, before it changes
    anything; evaluation is not late. With gradients, all ranks of the job take part. Without, only the ranks that share
    parameters do (`dp_shard` and `tp`), because other replicas may have another number of batches.
    """
    inner, calls, ranks = model.forward, 0, Ranks(mesh)
    if ranks.hosts is not None:
        late.BEFORE_STEPS.keep_for(model)
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
            check(model, given, ranks, calls)
            found = {"labels" if n in LABELS else n for n in vocabularies(model) if isinstance(given.get(n), Tensor)}
            token = checked.set(frozenset(found))
            try:
                return inner(*args, **kwargs)
            finally:
                checked.reset(token)
        return inner(*args, **kwargs)

    model.forward = forward


class Ranks:
    """Who is compared with whom.

    Attributes:
        tp: the mesh of the ranks that must be given the same.
        sharing: the group of the ranks that share parameters.
        hosts: the TP group's group of hosts, where reading a value of the mesh's device would wait for it; else None.
    """

    def __init__(self, mesh: DeviceMesh):
        self.tp, self.sharing, self.device = mesh["tp"], mesh["dp_shard_tp"].get_group(), torch.device(mesh.device_type)
        # The ranks of a simulated world wait for nothing.
        is_late = devices.is_waited_for(self.device) and c10d.default_timeout() is not None
        self.hosts = late.hosts_of(self.tp) if is_late else None


def check(model: nn.Module, given: dict[str, Any], ranks: Ranks, step: int) -> None:
    """Raise `ValueError` unless all ranks of each TP group are `given` the same, and all tokens and labels are in the
    vocabulary; for a training forward on an accelerator, `late.settle` raises it.
    """
    batch = {n: x for n, x in leaves(given).items() if not isinstance(x, DTensor)}
    tp, hosts, device, is_training = ranks.tp, ranks.hosts, ranks.device, torch.is_grad_enabled()
    if hosts is not None:
        _compare_hosts(batch, ranks, step)
    ranges = _ranges(model, given, device)
    prints = {n: fingerprint(x).to(device) for n, x in sorted(batch.items()) if isinstance(x, Tensor)}
    # A number of the host goes to the device as the argument of a kernel, without the wait that a copy takes.
    words = {n: _text(x) for n, x in sorted(batch.items())}
    texts, said = (
        torch.full((), x, dtype=torch.int64, device=device)
        for x in (fingerprint_of_text(str(list(words.items()))), message.said)
    )
    seeds = torch.zeros_like(texts) if hosts is not None else randomness.digest(device)
    edges = (edge for edges in ranges.values() for edge in edges[:2])
    mine = torch.stack([_total(prints, device), texts, seeds, said, *edges])
    group = dist.group.WORLD if is_training else ranks.sharing
    everyones = all_gather(mine, group).view(group.size(), -1)
    # A simulated world (`hf_tpsp.estimate`) has sizes, and no values to compare.
    if is_fake(everyones):
        return
    verdict = _verdict(everyones, tp.size(), [size for *_, size in ranges.values()])
    # For the error, if there is one. Tokens and labels are small; of all else only the fingerprint is kept.
    kept = {n: x for n, x in given.items() if n in ("input_ids", *LABELS, "ignore_index")}

    def judge(same_batch: int, same_seed: int, is_inside: int, heard: int) -> None:
        if is_training:
            message.heard = heard
        if same_batch and is_inside:
            # All ranks see the same digests, so all of them enter this collective, or none.
            if not same_seed:
                randomness.agree(tp)
            return
        reports: list[Any] = [None] * group.size()
        # What is compared of each argument, so that the error can name those that differ.
        numbers = {n: (int(prints[n]) if n in prints else None, text) for n, text in words.items()}
        dist.all_gather_object(reports, (dist.get_rank(), numbers, _strays(model, kept)), group=group)
        _raise(reports, tp.size(), step)

    if hosts is None or not is_training:
        late.settle()
        judge(*verdict.numpy(force=True).tolist())
    else:
        late.add(verdict, judge)


def _verdict(everyones: Tensor, tp_size: int, sizes: list[int]) -> Tensor:
    """int64 `[4]`, on the device of what all ranks have sent: whether the TP groups' batches are the same, whether their
    random states are, whether all tokens and labels are below `sizes`, and the largest message."""
    digests, edges = everyones[:, :3].unflatten(0, (-1, tp_size)), everyones[:, 4:]
    same = (digests == digests[:, :1]).all(dim=1).all(dim=0)
    least, most = edges[:, ::2], edges[:, 1::2].unbind(1)
    is_inside = functools.reduce(
        torch.logical_and, [(column < size).all() for column, size in zip(most, sizes, strict=True)], (least >= 0).all()
    )
    return torch.stack([same[:2].all(), same[2], is_inside, everyones[:, 3].max()])


def _compare_hosts(batch: dict[str, Any], ranks: Ranks, step: int) -> None:
    """Compare what the hosts know before the device is given anything that depends on it: 16 bytes a rank."""
    facts = {n: (None, f"{_text(x)} {list(x.shape)}" if isinstance(x, Tensor) else _text(x)) for n, x in batch.items()}
    numbers = fingerprint_of_text(str(sorted(facts.items()))), randomness.host_digest(ranks.device)
    found = late.gather(numbers, ranks.hosts)
    if (found[:, 1] != found[0, 1]).any():
        randomness.agree(ranks.tp)
    if (found[:, 0] != found[0, 0]).any():
        reports: list[Any] = [None] * len(found)
        dist.all_gather_object(reports, (dist.get_rank(), facts, []), group=ranks.hosts)
        _raise(reports, len(found), step)


def _total(prints: dict[str, Tensor], device: torch.device) -> Tensor:
    """One int64 that stands for all tensors of the batch, given their fingerprints."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, number in prints.items():
        total = total * MULTIPLIER + (number ^ fingerprint_of_text(name))
    return total


def _text(x: Any) -> str:
    """The text by which an argument is compared; for a tensor only the kind of its values, which have a digest."""
    if isinstance(x, Tensor):
        return "integers" if x.dtype in INTEGERS else str(x.dtype)
    return repr(x) if isinstance(x, (bool, int, float, str)) else type(x).__name__


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
