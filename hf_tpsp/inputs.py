"""Values that come from outside (arguments, the environment, files), each read in one way, or refused in one sentence.

The sentence says which value is wrong, what it is, and what would be taken. Needs neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

# accelerate reads the same words in its environment variables.
FLAGS = dict.fromkeys(("true", "yes", "on", "1", "t", "y"), True) | dict.fromkeys(
    ("false", "no", "off", "0", "f", "n"), False
)

MOST_RANKS = 2**20
"""More than any world has. A size with a digit too many is refused, before tables of that length are made."""

Class = TypeVar("Class", bound=type)


def nearest(word: object, names: Iterable[str]) -> str:
    """` Did you mean …?` with up to three of `names` that begin like `word` or are spelt nearly so; or nothing."""
    text, names = str(word), list(names)
    begin = [name for name in names if len(text) > 1 and name.lower().startswith(text.lower())]
    # The dashes of options are alike in all of them.
    bare = {name.lower().lstrip("-"): name for name in names}
    alike = [bare[name] for name in difflib.get_close_matches(text.lower().lstrip("-"), bare, 3)]
    close = list(dict.fromkeys([*alike, *begin]))[:3]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as an int: it may be of numpy too, but neither a bool nor a float. Raises `ValueError` with `name`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}.")
    return number


def parsed_number(name: str, text: str, least: int = 1) -> int:
    """`whole_number` of a text."""
    try:
        value: object = int(text)
    except ValueError:
        value = text
    return whole_number(name, value, least)


def flag(name: str, value: object) -> bool:
    """`value` as a bool: it may be one of the words that accelerate takes, too. Raises `ValueError` with `name`."""
    found = FLAGS.get(str(value).lower())
    if found is None:
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return found


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` with `name` unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}."
            f"{nearest(value, allowed) if isinstance(value, str) else ''}"
        )


def instance(name: str, value: object, kind: type, instead: str) -> None:
    """Raise `TypeError` with `name` unless `value` is a `kind`. `instead` says where to get one."""
    if not isinstance(value, kind):
        found = " ".join(repr(value).split())[:80]
        raise TypeError(f"{name} must be of {kind.__name__}, got {found}. {instead}")


def environment_flag(name: str, default: str = "false") -> bool:
    """Whether the environment variable `name` is set to true. Raises `ValueError` if it is neither true nor false."""
    return flag(f"The environment variable {name}", os.environ.get(name, default))


def environment_number(name: str, default: int, least: int = 0) -> int:
    """The environment variable `name` as a number. Raises `ValueError` if it is not a whole one of at least `least`."""
    return parsed_number(f"The environment variable {name}", os.environ.get(name, str(default)), least)


def names_its_fields(cls: Class) -> Class:
    """A dataclass whose `TypeError` for an argument that is no field of it names those that are nearest to it."""
    init: Callable = cls.__init__  # type: ignore[misc]
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise TypeError(
                    f"{cls.__name__} has no field {name!r}.{nearest(name, names)} It has {', '.join(names)}."
                )
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls
