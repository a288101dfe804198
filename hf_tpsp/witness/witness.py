"""Checks on the user's own model, batch and sizes what a proof on a small copy cannot show: `TPSPConfig(check=…)`.

The checks run in the first training forward (or in every N-th), before the optimizer steps on its gradients:

* what all ranks must agree on is compared: the plan and the model's config, which a script may have changed since the
  model was sharded, and bit by bit every parameter and buffer of which several ranks hold the same piece;
* the embedding, the head with its loss, and one block and one norm of each kind are run twice on the input that they
  get: as they train, and whole, as the class was written. Outputs and gradients of the input must agree within the
  dtype's tolerance;
* what the TP ranks compute alike is compared: the loss and the states of the random number generators bit by bit, and
  after backward the gradients of the parameters that they share.

A difference raises on all ranks, before the optimizer steps, and names the module. Each of the three takes one small
exchange and one wait for the device.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..agreement import agree
from ..config import TPSPConfig
from ..fingerprint import fingerprint
from ..rules import Rule, rule_for, wildcard
from ..styles.block import Block, ReplicatedPartial
from ..styles.gradients import ReplicatedGradients
from ..styles.head import Head
from ..styles.registry import STYLES
from ..styles.stream import Embedding, Norm
from ..upstream.torch.fake import is_fake
from ..upstream.torch.modules import without_compiled_code
from .alike import (
    compare_state,
    gather_over_world,
    holders,
    is_replicated,
    odd_ranks,
    outline,
    sharded_parameters,
    tp_groups,
)
from .whole import compare_with_whole, limit_of, skeleton

logger = logging.get_logger(__name__)


DRAWS, NOT_CALLED = "it draws random numbers", "it was not called"


class Witness:
    """Compares a sharded model's modules with the whole ones, and its ranks with each other.

    Args:
        model: the model, not sharded yet; its modules may be on meta.
        plan: the plan by which it will be sharded.

    Attributes:
        every: the period of the checks, in training forwards; 0 if they are not repeated.
        next: how many training forwards the model runs before the next check; None if none is to come.
        forwards: the number of training forwards so far.
        wholes: the name of a module that is compared → its whole copy.
    """

    def __init__(self, model: PreTrainedModel, plan: dict[str, str], config: TPSPConfig):
        self.config, self.plan = config, plan
        first, _, every = config.check.partition(":")
        self.every = {"off": 0, "first": 0, "every": int(every or 1)}[first]
        self.next = None if first == "off" else 0
        self.forwards = 0
        self.wholes: dict[str, nn.Module] = {}
        # On one TP rank no module is split, so there is none to compare with a whole one.
        if self.next is None or config.tp_size == 1:
            return
        seen = set()
        for name, module in model.named_modules():
            rule = rule_for(name, plan)
            style = STYLES.get(Rule.parse(rule or "").name)
            kind = (wildcard(name), type(module), rule)
            if (
                style is None
                or not issubclass(style, (Block, Norm, Embedding, Head))
                or issubclass(style, ReplicatedPartial)
                or kind in seen
            ):
                continue
            seen.add(kind)
            self.wholes[name] = skeleton(module)

    def install(self, model: PreTrainedModel, gradients: ReplicatedGradients) -> None:
        """Wrap `model.forward`. This is the outermost of its wrappers."""
        if self.next is None:
            return
        self.model, self.gradients = model, gradients
        self.mesh = gradients.mesh
        inner = model.forward

        # The Trainer reads the signature of the forward.
        @functools.wraps(inner)
        def forward(*args, **kwargs):
            if not torch.is_grad_enabled():
                return inner(*args, **kwargs)
            self.forwards += 1
            if self.next is None or self.forwards <= self.next or self._is_simulated():
                return inner(*args, **kwargs)
            self.next = self.forwards - 1 + self.every if self.every else None
            return self._checked(inner, args, kwargs)

        model.forward = forward

    def _is_simulated(self) -> bool:
        """Whether the world is simulated (`hf_tpsp.estimate`), and so has sizes, but no values to compare."""
        return any(is_fake(getattr(p, "_local_tensor", p)) for p in self.model.parameters())

    def _checked(self, inner, args: tuple, kwargs: dict) -> Any:
        agree("the first forward", setup_of(self.model, self.plan))
        compare_state(self.model, self.mesh)
        parameters = sharded_parameters(self.model)
        errors: dict[str, list[Tensor]] = {}
        self.reasons: dict[str, str] = {}
        with self._armed(errors):
            output = inner(*args, **kwargs)
        self._judge_blocks(errors)
        loss = output[0] if isinstance(output, tuple) else output.get("loss")
        self._compare_alike(loss)
        self.gradients.once_reduced = functools.partial(self._compare_gradients, parameters)
        return output

    @contextlib.contextmanager
    def _armed(self, errors: dict[str, list[Tensor]]) -> Iterator[None]:
        """While inside, compare each module in `wholes` with its whole copy when it is first called, and note the
        result in `errors`. Compiled layers run uncompiled meanwhile, because the comparison would be compiled with
        them."""
        handles = []
        modules = dict(self.model.named_modules())

        def hook(name: str):
            def before(module, args, kwargs):
                if name not in errors:
                    try:
                        errors[name] = compare_with_whole(self.wholes[name], module, args, kwargs, self.mesh)
                    except Exception as error:
                        # A module that cannot run by itself is left out. If the error is the model's, its own run
                        # raises it.
                        errors[name], self.reasons[name] = [], f"{type(error).__name__}: {error}".splitlines()[0]

            return before

        for name in self.wholes:
            if name in modules:
                handles.append(modules[name].register_forward_pre_hook(hook(name), with_kwargs=True, prepend=True))
        try:
            with without_compiled_code(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _judge_blocks(self, errors: dict[str, list[Tensor]]) -> None:
        """Raise `RuntimeError` on all ranks if a module differs from its whole copy on one of them."""
        device = next(self.model.parameters()).device
        names = list(self.wholes)
        # Columns: the errors of output and input gradient, as multiples of the limit; whether the module was compared.
        table = torch.zeros(len(names), 3, dtype=torch.float64)
        for row, name in enumerate(names):
            if errors.get(name):
                *found, limit = errors[name]
                table[row] = torch.tensor([*(float(e) / limit for e in found), 1.0])
        table = table.nan_to_num(nan=float("inf")).to(device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        table = table.cpu()
        for row, name in enumerate(names):
            *_, limit = errors.get(name) or [0.0]
            for what, over in zip(("output", "gradient of its input"), table[row, :2].tolist(), strict=True):
                if not over <= 1:
                    module = self.model.get_submodule(name)
                    raise RuntimeError(
                        f"{_preface(self.forwards)}{name} ({type(module).__name__}, laid out as {rule_for(name, self.plan)!r}) does "
                        f"not compute on its {self.mesh.size()} TP ranks what it computes whole: on the input of this very batch, "
                        f"the {what} is off by {over * limit:.1e} (limit {limit:.0e}). Its plan was proven on a small copy; look for "
                        "code that depends on a real size, or that mixes positions of the sequence. " + _WAY_OUT
                    )
        compared = table[:, 2].tolist()
        why = {name: self.reasons.get(name, DRAWS if name in errors else NOT_CALLED) for name in names}
        self.left_out = {name: why[name] for name, done in zip(names, compared, strict=True) if not done}
        named = ", ".join(f"{name} ({reason})" for name, reason in self.left_out.items() if reason != NOT_CALLED)
        if named and dist.get_rank() == 0:
            logger.warning_once(f"hf_tpsp: not compared with the whole module in the first step: {named}.")

    def _compare_alike(self, loss: Tensor | None) -> None:
        found = {"the loss": loss} if isinstance(loss, Tensor) and loss.dim() == 0 and type(loss) is Tensor else {}
        found["the state of torch's random number generator"] = torch.get_rng_state()
        device = self.mesh.device_type
        if device != "cpu":
            found[f"the state of its generator on {device}"] = getattr(torch, device).get_rng_state()
        names = list(found)
        rows = torch.stack([fingerprint(x).to(device) for x in found.values()])
        table = gather_over_world(rows)
        for column, name in enumerate(names):
            if (ranks := odd_ranks(table[:, column], tp_groups(self.mesh))) is not None:
                raise RuntimeError(
                    f"{_preface(self.forwards)}{name} is another on rank {ranks[0]} than on rank {ranks[1]}, of the same TP group, "
                    "which must hold it alike. " + _WAY_OUT
                )

    def _compare_gradients(self, parameters: dict[str, nn.Parameter]) -> bool:
        """Compare the gradients of shared parameters at the end of a backward; raise `RuntimeError` if they differ.

        Returns:
            False if none of these gradients is there yet, so that a later backward must be compared.
        """
        shared = {n: p for n, p in parameters.items() if isinstance(p, DTensor) and is_replicated(p)}
        if not any(p.grad is not None for p in shared.values()):
            return not any(p.requires_grad for p in shared.values())
        # Operations on DTensors crash here, so local tensors are used: see `at_end_of_backward`.
        grads = [None if p.grad is None else p.grad._local_tensor for p in shared.values()]
        rows = torch.stack([outline(grad).to(self.mesh.device_type) for grad in grads])
        table = gather_over_world(rows)
        for column, (name, parameter) in enumerate(shared.items()):
            limit = limit_of(parameter.dtype, parameter.device)
            if (ranks := odd_ranks(table[:, column], holders(parameter), limit)) is not None:
                raise RuntimeError(
                    f"{_preface(self.forwards)}the gradient of {name} is another on rank {ranks[0]} than on rank {ranks[1]}, though both "
                    "hold this parameter. Its sum over the ranks is missing or was taken twice. " + _WAY_OUT
                )
        return True


def setup_of(model: PreTrainedModel, plan: dict[str, str]) -> dict[str, str]:
    """What all ranks must have alike of a model beside its tensors, in words."""
    return {
        "the model's class": type(model).__name__,
        "the model's config": model.config.to_json_string(),
        "the plan": json.dumps(dict(plan), sort_keys=True),
    }


_WAY_OUT = (
    "Nothing has been trained on it: the optimizer has not stepped. (`HF_TPSP_CHECK=off` trains all the same; "
    "`hf-tpsp verify` compares the architecture with one process.)"
)


def _preface(forward: int) -> str:
    return f"hf_tpsp's check of training forward {forward}: "
