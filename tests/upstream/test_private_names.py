"""What a library keeps private is used in hf_tpsp/upstream alone, but for names that much else stands on too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_tpsp

PACKAGE = Path(hf_tpsp.__file__).parent
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets")


ALLOWED = {
    # torch's own documentation of subclasses and modes uses these.
    "_pytree", "_python_dispatch", "_make_wrapper_subclass", "_disabled_torch_function_impl", "_C",
    # A tensor's and a DTensor's, on every hot path.
    "_version", "_spec", "_local_tensor", "_assert_async",
    # A module's registries, which every library on top of torch reads. (`_parameters` is also a name of ours.)
    "_buffers", "_modules", "_get_name",
    # Operations, and where functional collectives are registered: for lists of what checkpointing keeps, and storages' identity.
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_c10d_functional", "_cdata",
    # Python's own.
    "_exit",
    # Settings that transformers keeps on models and configs.
    "_from_config", "_attn_implementation", "_experts_implementation", "_tp_plan", "_keys_to_ignore_on_save",
}  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_tpsp"))


def own_names(trees: list[ast.AST]) -> set[str]:
    """The private names that hf_tpsp gives to things of its own."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return set(filter(is_private, found))


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each private import and attribute that is not ours."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            paths = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                paths = [f"{node.module}.{path}" for path in paths]
            for path in paths:
                if path.partition(".")[0] in LIBRARIES:
                    yield from ((node.lineno, part) for part in path.split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr


def uses() -> list[tuple[str, int, str]]:
    """File, line and name of each use outside of upstream/."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    outside = {p: t for p, t in trees.items() if p.relative_to(PACKAGE).parts[0] != "upstream"}
    own = own_names(list(outside.values()))
    return [(str(p.relative_to(PACKAGE)), *use) for p, t in outside.items() for use in foreign_names(t, own)]


def test_private_names_are_used_in_upstream_alone():
    strays = [f"{path}:{line} {name}" for path, line, name in uses() if name not in ALLOWED]
    assert not strays, f"put these behind a function in hf_tpsp/upstream: {strays}"
