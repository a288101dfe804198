"""What the commands' arguments have in common: how they are read, refused in one line, and which stand for a mesh."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import TPSPConfig
from ..inputs import choice, nearest, parsed_number


class Parser(argparse.ArgumentParser):
    """Refuses arguments in one line, without the usage (which `--help` prints), with exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(found, "parser", self)
            options = re.findall(r"--[\w-]+", parser.format_usage())
            parser.error(f"there is no {unknown[0]!r}.{nearest(unknown[0], options)}")
        return found


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, whose `ValueError` argparse prints after the argument's name."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def whole(least: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""
    return _checked(lambda text: parsed_number("it", text, least))


def one_of(allowed: Iterable[str]) -> dict[str, Any]:
    """The settings of an argument that is one of `allowed`."""
    names = tuple(allowed)

    def read(text: str) -> str:
        choice("it", text, names)
        return text

    return {"type": _checked(read), "metavar": "{" + ",".join(names) + "}"}


@_checked
def output_file(text: str) -> Path:
    """The type of an argument that names a file to write. It is checked before the work whose result goes there."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise ValueError(f"{text!r} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name!r} in. Make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{text!r} cannot be written. Name a file in a folder that you may write in.")
    return path


def add_mesh_arguments(parser: argparse.ArgumentParser, tp: int = 1) -> None:
    for name, default, meaning in (
        ("tp", tp, "tensor-parallel size"),
        ("dp", 1, "FSDP shard size"),
        ("dp-replicate", 1, "HSDP replicas"),
    ):
        parser.add_argument(
            f"--{name}", type=whole(), default=default, metavar="N", help=f"{meaning} (default {default})"
        )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the code that a folder or hub repository has of its own (default: it is not run)",
    )  # fmt: skip


def mesh_config(args: argparse.Namespace, **settings) -> TPSPConfig:
    return TPSPConfig(tp_size=args.tp, dp_shard_size=args.dp, dp_replicate_size=args.dp_replicate, **settings)
