"""Each workaround that names the condition on which it goes has a test that shows that the condition is not met yet."""

import ast
from pathlib import Path

import hf_tpsp

UPSTREAM = Path(hf_tpsp.__file__).parent / "upstream"


# Those whose defect no test on a CPU can show, and why.
UNTESTED: dict[str, str] = {}


def workarounds() -> set[str]:
    """`file.function` of everything in upstream/ whose docstring says when to delete it."""
    found = set()
    for path in UPSTREAM.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and "Delete" in (ast.get_docstring(node) or ""):
                found.add(f"{path.stem}.{node.name}")
    return found


def tested() -> set[str]:
    """What the tests here say, by `@still_needed(...)`, that they are about."""
    calls = (
        node
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "still_needed"
    )
    return {argument.value for call in calls for argument in call.args}


def test_each_workaround_has_a_test():
    assert len(workarounds()) > 30
    missing = workarounds() - tested() - UNTESTED.keys()
    assert not missing, f"write a test in tests/upstream that shows that these are still needed: {sorted(missing)}"


def test_each_test_is_about_something_that_is_there():
    names = {
        f"{path.stem}.{node.name}"
        for path in UPSTREAM.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assert not tested() - names
    assert not UNTESTED.keys() - (workarounds() - tested())
