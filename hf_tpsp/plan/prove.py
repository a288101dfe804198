"""The proof that a block can be split: its ranks are simulated one after the other, in one process, on a small copy.

A block can be split if its output is the sum of one partial output per rank. Then every gradient is right too: by the
chain rule, the ranks' gradients of shared tensors and parameters are partial (`ReplicatedPartial`), whatever the block
computes. So only the forward needs a proof. `try_layout` runs a block of the small copy (`record.py`) as rank 0 and as
rank 1 would run it under a layout: the two outputs must add up to the whole block's output. `try_norm` runs a norm on
parts of the sequence: each output must be that part of the whole norm's output. Both run in evaluation and in training
mode, without dropout.

A layout that does not fit may fail with any error, somewhere in the model's own code, where its shapes do not match.
That is an outcome, and the trial's `error` says where. A mistake in hf_tpsp's own code is not an outcome, and is
raised.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from ..collectives import chunk_of
from ..config import TPSPConfig
from ..structure import first_tensor
from ..styles.base import Style
from ..styles.registry import style_for
from .layouts import with_sizes
from .record import Call, SmallCopy, aside
from .trial import LIMIT, Trial

RANKS = 2


# Name of a mode → the argument of `Module.train`.
MODES = {"evaluation": False, "training": True}


# The errors that a mistake in Python code raises. All others may come from shapes that do not fit.
MISTAKES = (AttributeError, TypeError, NameError, AssertionError)
TORCH, HF_TPSP = f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}"


def try_layout(small: SmallCopy, name: str, layout: dict[str, str]) -> Trial:
    """Try whether the ranks' outputs of the block `name` under `layout` (without sizes) add up to the whole block's
    output."""
    call, whole = small.calls[name], small.modules[name]
    rules = with_sizes(layout, whole, TPSPConfig(tp_size=RANKS))
    if rules is None:
        return Trial(type(whole).__name__, layout, error=f"its heads do not divide over {RANKS} ranks")

    def total(training: bool) -> Tensor:
        return sum(_term(whole, rules, call, rank, training) for rank in range(RANKS))

    return _trial(whole, layout, call, total)


def try_norm(small: SmallCopy, name: str) -> Trial:
    """Try whether the module `name` acts as a norm does.

    Its output for a part of the sequence must be that part of its output for the whole sequence, and it must not write
    into its input.
    """
    call, whole = small.calls[name], small.modules[name]

    def joined(training: bool) -> Tensor:
        parts = []
        for rank in range(RANKS):
            args, kwargs = copy.deepcopy((call.args, call.kwargs))
            if args:
                args = (given := chunk_of(args[0], 1, rank, RANKS).clone(), *args[1:])
            else:
                first = next(iter(kwargs))
                kwargs[first] = given = chunk_of(kwargs[first], 1, rank, RANKS).clone()
            before = given.clone()
            parts.append(_run(_copy_of(whole), args, kwargs, training))
            if not torch.equal(before, given):
                raise ValueError("it writes into its input")
        return torch.cat(parts, dim=1)

    return _trial(whole, {"": "norm"}, call, joined)


def _trial(whole: nn.Module, layout: dict[str, str], call: Call, compute: Callable[[bool], Tensor]) -> Trial:
    """Measure how far `compute(training)` is from the output of the module `whole`, in evaluation and in training."""
    trial = Trial(type(whole).__name__, layout)
    for mode, training in MODES.items():
        failure = FailingOperation()
        try:
            with torch.no_grad(), aside():
                with failure:
                    output = compute(training)
                expected = call.output
                if training:
                    args, kwargs = copy.deepcopy((call.args, call.kwargs))
                    expected = _run(_copy_of(whole), args, kwargs, training)
        except Exception as error:
            if is_own_mistake(error):
                raise
            return Trial(trial.owner, layout, error=reason(error, failure), place=place(error))
        if output.shape != expected.shape:
            return Trial(trial.owner, layout, error=f"an output {list(output.shape)}, not {list(expected.shape)}")
        difference = (output - expected).norm()
        trial.off_by[mode] = (difference / expected.norm()).item() if difference != 0 else 0.0
        if not trial.off_by[mode] <= LIMIT:
            break
    return trial


def _term(whole: nn.Module, rules: dict[str, str], call: Call, rank: int, training: bool) -> Tensor:
    """The partial output that `rank` computes for the block `whole`."""
    block = _copy_of(whole)
    styles = simulate_rank(block, rules, rank)
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    args, kwargs, _ = styles[""].map_streams(args, kwargs, lambda x: x, RANKS, marked=False)
    return _run(block, args, kwargs, training)


def simulate_rank(block: nn.Module, rules: dict[str, str], rank: int) -> dict[str, Style]:
    """Turn `block` into what it is on `rank` under `rules`. Returns the styles by name inside the block."""
    config = TPSPConfig(tp_size=RANKS)
    of_parameters: dict[str, dict[str, str]] = {}
    for part in [part for part in rules if is_parameter(block, part)]:
        owner, _, parameter = part.rpartition(".")
        of_parameters.setdefault(owner, {})[parameter] = rules[part]
    modules = {part: rule for part, rule in rules.items() if not is_parameter(block, part)}
    styles = {part: style_for(rule, config, of_parameters.get(part)) for part, rule in modules.items()}
    for part, style in styles.items():
        style.simulate_rank(block.get_submodule(part), rank, RANKS)
    return styles


def is_parameter(module: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        return last in module.get_submodule(owner)._parameters
    return False


def _copy_of(module: nn.Module) -> nn.Module:
    """A deep copy of `module`, with the same config: a style that changes a size in it takes its own copy."""
    held = [value for part in module.modules() for value in vars(part).values()]
    return copy.deepcopy(module, {id(value): value for value in held if isinstance(value, PreTrainedConfig)})


def _run(module: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool) -> Tensor:
    """The first tensor that `module` returns. Every run draws the same random numbers."""
    # The copy runs on the CPU. `torch.manual_seed` also seeds the devices, and where there are none it keeps the seed,
    # and the stack of its caller, for each kind of device until one appears.
    torch.default_generator.manual_seed(0)
    return first_tensor(module.train(training)(*args, **kwargs))


class FailingOperation(TorchFunctionMode):
    """Records the torch operation that raised `error`, with the shapes of its tensors."""

    def __init__(self):
        self.error: Exception | None = None
        self.operation = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            listed = [y for x in args for y in (x if isinstance(x, (list, tuple)) else [x])]
            shapes = " and ".join(str(list(x.shape)) for x in listed if isinstance(x, Tensor))
            self.error, self.operation = error, f"{func.__name__} of {shapes}"
            raise


def reason(error: Exception, failure: FailingOperation) -> str:
    """`RuntimeError in its o_proj (Linear), linear of [2, 11, 64] and [64, 32]: …`.

    It names the innermost module inside the block in which `error` was raised, and the torch operation, if it was
    raised in one.
    """
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    where = ""
    if modules:
        names = {id(module): name for name, module in modules[0].named_modules()}
        inner = next(module for module in reversed(modules) if id(module) in names)
        where = f" in its {names[id(inner)]} ({type(inner).__name__})" if names[id(inner)] else " in its own forward"
    operation = f", {failure.operation}" if failure.error is error else ""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{where}{operation}: {message}"


def place(error: Exception) -> str:
    """File and line of the innermost frame that is in neither torch nor hf_tpsp; an empty string if there is none."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    lines = [f"{Path(file).name}:{line}" for file, line in lines if not file.startswith((TORCH, HF_TPSP))]
    return lines[-1] if lines else ""


def is_own_mistake(error: Exception) -> bool:
    """Whether `error` is a mistake in hf_tpsp's own code and not in the model's, judged by its type and by the
    innermost frame outside torch."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = next((file for file in reversed(files) if not file.startswith(TORCH)), "")
    return isinstance(error, MISTAKES) and raised_in.startswith(HF_TPSP)
