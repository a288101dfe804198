"""Imports run one way. What stands above imports what stands below; imports inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_tpsp"

# The rooms from top to bottom: each imports only what stands after it. The package's face is at the top.
ORDER = [
    "cli", "__main__", "__init__", "tools", "api", "integrations", "sharding", "witness", "plan", "styles", "forward", "loss",
    "upstream", "launch", "rules", "state", "hosts", "config", "structure", "sizes", "collectives", "vocabulary", "fingerprint",
    "devices",
    "checkpoint", "agreement", "departure",
    # What is known of torch alone and of versions, which know nothing of hf_tpsp: whoever needs it may use it.
    "upstream.torch", "upstream.versions", "patching", "inputs",
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name inside the package → file. A folder's `__init__` goes by the folder's name; the package's own stays."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that `name` imports anywhere, but for those that only a type checker sees."""
    package = path.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(path.read_text())
    unseen = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "hf_tpsp":
                base = ()
            else:
                continue
            stem = ".".join([*base, *((node.module or "").removeprefix("hf_tpsp").strip(".").split("."))]).strip(".")
            for alias in node.names:
                inner = f"{stem}.{alias.name}".strip(".")
                found.add(inner if inner in known else stem or "__init__")
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("hf_tpsp").strip(".") or "__init__"
                for a in node.names
                if a.name.startswith("hf_tpsp")
            }
    return found - {name}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def room(name: str) -> str:
    return max((r for r in ORDER if name == r or name.startswith(f"{r}.")), key=len, default=name)


def test_every_room_is_in_the_order():
    assert {room(name) for name in modules()} == set(ORDER)


def test_no_import_runs_up():
    up = [
        f"{name} → {target}"
        for name, targets in graph().items()
        for target in targets
        if ORDER.index(room(target)) < ORDER.index(room(name))
    ]
    assert not up


def test_no_circles():
    """Inside a room too: whatever imports nothing but what is already cleared is cleared, until nothing is left."""
    left = graph()
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_lazy_face_is_not_an_import_up():
    """`hf_tpsp/__init__.py` names its public functions' homes in strings: each is there, and is what it says."""
    import hf_tpsp

    for name in hf_tpsp.__all__:
        assert getattr(hf_tpsp, name).__name__ == name


def test_the_command_line_answers_without_torch():
    """`--help` and `config`, for each of which importing torch and transformers took seconds."""
    script = (
        "import contextlib, io, sys; from hf_tpsp.cli import main\n"
        "for arguments in (['--help'], ['config', '--tp', '2'], ['plan', '--help'], ['verify', '--help'], ['estimate', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(arguments)\n"
        "assert not {'torch', 'transformers', 'accelerate'} & sys.modules.keys(), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_no_file_is_too_long():
    files = [p for folder in ("hf_tpsp", "recipes", "tests") for p in (PACKAGE.parent / folder).rglob("*.py")]
    long = {str(p.relative_to(PACKAGE.parent)): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long
