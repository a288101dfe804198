"""torch's modules: what is registered on them and has no public form."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

from torch import nn


def drop_hooks(module: nn.Module) -> None:
    """Take every forward hook off `module` itself."""
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


@contextlib.contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """While inside, no forward hook of `module` or of a part of it is called. torch 2.13 has no public way for it."""
    hooks = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    for part, *_ in hooks:
        drop_hooks(part)
    try:
        yield
    finally:
        for part, after, before in hooks:
            part._forward_hooks, part._forward_pre_hooks = after, before


@contextlib.contextmanager
def without_compiled_code(module: nn.Module) -> Iterator[None]:
    """While inside, the compiled parts of `module` run uncompiled. torch 2.13's public switches are per process."""
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if part._compiled_call_impl is not None]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
