"""The installed releases of the libraries, and the releases that the test suite was run on, as setup.cfg names them."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REACHED_INTO = ("torch", "transformers", "accelerate", "peft", "trl")
"""The libraries whose private names hf_tpsp uses, and whose methods it replaces: another release may have others."""


@dataclass(frozen=True)
class Library:
    """A library that hf_tpsp uses.

    Attributes:
        version: the installed version; None if it is not installed.
        tested: the versions that the suite was run on; None if setup.cfg names none.
    """

    name: str
    version: str | None
    tested: SpecifierSet | None

    @property
    def is_tested(self) -> bool:
        """Whether there is nothing to warn about: the version is in the range, or there is no version or no range."""
        return not self.version or self.tested is None or self.tested.contains(self.version, prereleases=True)


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared() -> dict[str, SpecifierSet]:
    """Library → the range of versions in setup.cfg; empty for a copy of hf_tpsp that was not installed."""
    try:
        lines = importlib.metadata.requires("hf_tpsp") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {r.name: r.specifier for r in map(Requirement, lines)}


def libraries(*names: str) -> list[Library]:
    ranges = declared()
    return [Library(name, version_of(name), ranges.get(name)) for name in names]


def untested() -> str | None:
    """A sentence that names the libraries whose versions the suite was not run on; None if there are none."""
    strange = [library for library in libraries(*REACHED_INTO) if not library.is_tested]
    if not strange:
        return None
    found = ", ".join(f"{library.name} {library.version} (tested: {library.tested})" for library in strange)
    return (
        f"hf_tpsp replaces methods of these libraries, and was not tested with the versions that are installed: {found}. "
        "`hf-tpsp verify` compares a model with one process; `hf-tpsp env` lists all versions."
    )
