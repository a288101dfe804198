"""Writes docs/api.md from the docstrings of the public names: `python docs/make_api.py`. `tests/test_docs.py` compares."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

import hf_tpsp

PAGE = Path(__file__).parent / "api.md"


def signature(name: str, value: object) -> str:
    found = inspect.signature(value)
    if is_dataclass(value):
        fields = [f"{p.name}={p.default!r}" for p in found.parameters.values()]
        return f"{name}({', '.join(fields)})"
    return name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(found))  # annotations are strings


def markdown(docstring: str) -> str:
    """Sections (`Args:`, `Returns:`, `Raises:`) become bold, their entries a list."""
    lines: list[str] = []
    entry = None
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            lines += [f"**{line[:-1]}**", ""]
            entry = line[:-1]
        elif entry and line.startswith(" " * 4) and not line.startswith(" " * 5):
            name, colon, text = line.strip().partition(": ")
            is_named = colon and entry != "Returns" and re.fullmatch(r"[\w, *]+", name)
            lines.append(f"- `{name}`: {text}" if is_named else f"- {line.strip()}")
        elif entry and line.startswith(" " * 5):
            lines.append(f"  {line.strip()}")
        else:
            entry = entry if not line else None
            lines.append(line)
    return "\n".join(lines).strip()


def page() -> str:
    parts = ["# API", "The public names, from their docstrings. Written by `docs/make_api.py`. Do not edit."]
    for name in sorted(hf_tpsp.__all__, key=str.lower):
        value = getattr(hf_tpsp, name)
        parts += [f"## {name}", f"```python\nhf_tpsp.{signature(name, value)}\n```", markdown(inspect.getdoc(value))]
    config = hf_tpsp.TPSPConfig
    for name in ("from_accelerate", "check_world", "check_model"):
        method = getattr(config, name)
        parts += [
            f"### TPSPConfig.{name}",
            f"```python\n{signature(name, method)}\n```",
            markdown(inspect.getdoc(method)),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
