"""The pages say what is there: every public name, every variable, every file and command that they name."""

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hf_tpsp
from hf_tpsp import TPSPConfig, launch

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "recipes" / "README.md",
]
VARIABLE = r"\b(?:HF_TPSP|ACCELERATE|FSDP|PARALLELISM_CONFIG)_[A-Z_]*[A-Z]\b|\b(?:WORLD_SIZE|LOCAL_RANK|RANK)\b"


def test_the_api_page_is_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == make_api.page(), "run python docs/make_api.py"
    assert all(f"## {name}\n" in page for name in hf_tpsp.__all__)


def test_every_public_name_is_explained():
    for name in hf_tpsp.__all__:
        doc = getattr(hf_tpsp, name).__doc__
        assert doc and len(doc.split()) > 8, name
        assert f"{name}(" in (ROOT / "README.md").read_text(), name


def test_every_variable_is_documented():
    documented = set(re.findall(VARIABLE, (ROOT / "docs" / "environment.md").read_text()))
    code = {v for p in (ROOT / "hf_tpsp").rglob("*.py") for v in re.findall(rf"[\"']({VARIABLE})[\"']", p.read_text())}
    choices = {f"HF_TPSP_{f.name.upper()}" for f in fields(TPSPConfig) if f.type != "int"}
    sizes = {f"PARALLELISM_CONFIG_{n}_SIZE" for n in ("TP", "DP_SHARD", "DP_REPLICATE", "CP", "SP")}
    used = code | choices | sizes | set(launch.environment(TPSPConfig()))
    assert documented == used


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_a_page_names_is_there():
    for page in PAGES:
        for name in re.findall(
            r"`((?:hf_tpsp|tests|recipes|docs|styles|plan|forward|loss|upstream|integrations|tools)/[\w/.]*\w)`",
            page.read_text(),
        ):
            places = ROOT / name, ROOT / "hf_tpsp" / name
            assert any(p.exists() or p.with_suffix(".py").exists() for p in places), f"{page.name}: {name}"


def commands() -> list[str]:
    """The `hf-tpsp` commands in the pages' code blocks, one to a line, without what follows a `#` or a `>`."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            found += [
                line.partition("#")[0].partition(" > ")[0].strip()
                for line in block.splitlines()
                if line.startswith("hf-tpsp ")
            ]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    """Each is taken by the parser; those that need neither ranks nor a download are run."""
    _, name, *arguments = shlex.split(command)
    runs = name == "config" or name == "env"
    arguments = [a for a in arguments if a not in ("-o", "mesh.yaml")] if runs else [*arguments, "--help"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_tpsp.cli", name, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[\w-]+", done.stdout)) if not runs else None
    if known is not None:
        assert {a for a in arguments if a.startswith("--")} <= known
