"""Branches on sizes, which a proof on a small copy cannot cover.

The copy has other sizes than the model, and a short sequence. Where code compares such a size, the copy may take
another branch than training does. Those comparisons are found in the source of the proven modules, and named in the
plan's notes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

OPERATORS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
             ast.NotEq: operator.ne}  # fmt: skip


# A size of a tensor, which no config gives.
LENGTH = object()


# How many calls deep the functions called by a forward are searched.
DEPTH = 3


def uncovered(real: nn.Module, small: nn.Module) -> list[str]:
    """The comparisons of sizes in the code of `real` and its modules that may come out differently in the small copy
    `small`.

    Each is given as `source (function)`. A comparison of a tensor's size with a number or with a module's size may
    differ, unless that number is 2 or less. A comparison of two numbers or module sizes is listed if it comes out
    differently.
    """
    found: dict[str, None] = {}
    seen = set()
    copies = dict(small.named_modules())
    for name, module in real.named_modules():
        other = copies.get(name)
        if type(module) in seen or other is None or type(module).__module__.startswith("torch."):
            continue
        seen.add(type(module))
        for function in _functions(type(module)):
            for text in _comparisons(function, module, other):
                found[f"`{text}` ({function.__qualname__})"] = None
    return list(found)


def _functions(cls: type) -> Iterator[Any]:
    """`cls.forward`, and the functions of its own class or Python module that it calls, directly or not."""
    todo, seen = [(getattr(cls, "forward", None), 0)], set()
    while todo:
        function, depth = todo.pop()
        function = inspect.unwrap(function) if callable(function) else None
        if not inspect.isfunction(function) or function in seen:
            continue
        seen.add(function)
        yield function
        if depth == DEPTH or (tree := _parsed(function)) is None:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                if (
                    isinstance(called, ast.Attribute)
                    and isinstance(called.value, ast.Name)
                    and called.value.id == "self"
                ):
                    todo.append((inspect.getattr_static(cls, called.attr, None), depth + 1))
                elif isinstance(called, ast.Name):
                    given = getattr(sys.modules.get(function.__module__), called.id, None)
                    if inspect.isfunction(given) and given.__module__ == function.__module__:
                        todo.append((given, depth + 1))


@functools.lru_cache(maxsize=512)
def _parsed(function) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        # A function that was made at run time has no source.
        return None


def _comparisons(function, real: nn.Module, small: nn.Module) -> Iterator[str]:
    names, compared = _compared(function)
    for node in compared:
        sides = [_value(side, names, real, small) for side in (node.left, node.comparators[0])]
        if None not in sides and _differs(OPERATORS[type(node.ops[0])], *sides):
            yield ast.unparse(node)


@functools.lru_cache(maxsize=512)
def _compared(function) -> tuple[dict[str, ast.AST], list[ast.Compare]]:
    """What the names in `function` are assigned, and its comparisons of two values, without those that only check."""
    tree = _parsed(function)
    if tree is None:
        return {}, []
    names: dict[str, ast.AST] = {}
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                names.update({part.id: node.value for part in parts if isinstance(part, ast.Name)})
        checks = (
            isinstance(node, ast.If)
            and not node.orelse
            and all(isinstance(n, (ast.Raise, ast.Expr)) for n in node.body)
        )
        # A check raises or logs something, and computes nothing.
        if checks or isinstance(node, ast.Assert):
            skipped.update(map(id, ast.walk(node.test)))
    compared = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and id(node) not in skipped
        and len(node.ops) == 1
        and type(node.ops[0]) in OPERATORS
    ]
    return names, compared


def _value(node: ast.AST, names: dict[str, ast.AST], real: nn.Module, small: nn.Module, depth: int = 0) -> Any:
    """For a number, its values `(in the model, in the copy)`; LENGTH for a tensor's size; None for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value, node.value
    if isinstance(node, ast.Name) and node.id in names and depth < 4:
        return _value(names[node.id], names, real, small, depth + 1)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
        return LENGTH
    # This is the value of a name in `batch, length, _ = x.shape`.
    if isinstance(node, ast.Attribute) and node.attr == "shape":
        return LENGTH
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("size", "numel"):
        return LENGTH
    path, at = [], node
    while isinstance(at, ast.Attribute):
        path.append(at.attr)
        at = at.value
    if path and isinstance(at, ast.Name) and at.id == "self":
        values = [
            functools.reduce(lambda x, name: getattr(x, name, None), reversed(path), owner) for owner in (real, small)
        ]
        if all(type(value) in (int, float) for value in values):
            return tuple(values)
    return None


def _differs(compare, left: Any, right: Any) -> bool:
    """Whether the comparison may come out differently in the copy."""
    if left is LENGTH and right is LENGTH:
        return False
    if left is LENGTH or right is LENGTH:
        size = right if left is LENGTH else left
        # Comparisons with smaller numbers ask for a single token or a single row.
        return size[0] > 2
    return compare(left[0], right[0]) != compare(left[1], right[1])
