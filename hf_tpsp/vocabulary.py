"""Tokens and labels outside the vocabulary, which raise the same error wherever they are found."""

from __future__ import annotations

import contextvars

import torch
from torch import Tensor

from . import devices
from .upstream.torch.fake import is_fake

checked: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("checked", default=frozenset())
"""`"input_ids"` and `"labels"`, where the batch check looks at them in this forward."""


class OutOfVocabulary(ValueError, IndexError):
    """A token or a label that the model has no row for. It is an `IndexError` too, which a model in one process
    raises."""


def stray(name: str, x: Tensor, size: int, ignored: int | None = None) -> list[str]:
    """A list with one sentence on the first value of `x` that is not in `range(size)` (or `ignored`); empty if there is
    none."""
    outside = (x < 0) | (x >= size)
    if ignored is not None:
        outside &= x != ignored
    places = outside.nonzero()
    if not len(places):
        return []
    place = places[0].tolist()
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return [f"{name}[{', '.join(map(str, place))}] is {int(x[tuple(place)])}{more}, outside the vocabulary of {size}"]


def require_inside(name: str, x: Tensor, size: int, ignored: int | None = None) -> None:
    """Raise unless all values of `x` are in `range(size)`, or are `ignored`.

    It covers calls without a batch check (`checked`): generation, and a loss or an embedding that a script calls by
    itself. On the CPU it raises `OutOfVocabulary`, which says what and where. On other devices it is an assertion on the device, as in
    one process, and the host does not wait for it.
    """
    if is_fake(x) or torch.compiler.is_compiling() or name in checked.get():
        return
    inside = (x >= 0) & (x < size)
    if ignored is not None:
        inside |= x == ignored
    if not devices.is_waited_for(x.device):
        if not inside.all():
            raise OutOfVocabulary(f"{stray(name, x, size, ignored)[0]}. {ADVICE}")
    else:
        torch._assert_async(inside.all(), f"{name}: a value is outside the vocabulary of {size}. {ADVICE}")


ADVICE = (
    "A token that was added to the tokenizer needs a row: resize the model's embeddings before it is sharded. Labels that are to "
    "be ignored are -100."
)
