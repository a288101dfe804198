"""What a proof on a small copy cannot show, checked on the user's own model, batch and sizes: `TPSPConfig(check=…)`.

In the first training forward (or in every N-th), before anything has been trained on it:

* what all ranks must agree on is compared: the versions of the libraries, the config, the plan, and bit by bit every parameter
  and buffer of which several ranks hold the same piece;
* one block and one norm of each kind are given their very input twice: as they train, and whole, on one rank, as the class was
  written. Outputs and gradients of the input must agree within the dtype's tolerance;
* what the TP ranks compute alike is compared: the loss and the states of the random number generators bit by bit, and after
  backward the gradients of the parameters that they share.

A difference raises on all ranks, before the optimizer steps, and names the module. Each of the three takes one small exchange
and one wait for the device.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from .collectives import all_gather_world, shard_width
from .compat import sharded_parameter
from .config import TPSPConfig
from .plan import rule_for, wildcard
from .styles import STYLES, Block, Embedding, Norm, Replica, ReplicatedGradients

logger = logging.get_logger(__name__)

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of a block from the whole block, by the dtype it computes in. An error of the layouts is of the
order of 1; fp64 cannot be asked for more, because transformers casts to fp32 inside norms and softmax."""
LIMIT_TF32 = 1e-2
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "hf_tpsp")
DRAWS = "it draws random numbers, or has no gradient"
PIECE = 2**22
"""Elements that are hashed at a time: the hash needs 16 bytes for each."""


class Witness:
    """Compares a parallelized model with itself whole, and its ranks with each other. Made before the model is sharded.

    Args:
        model: not sharded yet; its modules may be on meta.
        plan: how it will be.
    """

    def __init__(self, model: PreTrainedModel, plan: dict[str, str], config: TPSPConfig):
        self.config, self.plan = config, plan
        first, _, every = config.check.partition(":")
        self.every = {"off": 0, "first": 0, "every": int(every or 1)}[first]
        self.next = None if first == "off" else 0
        self.forwards = 0
        self.wholes: dict[str, nn.Module] = {}
        if self.next is None:
            return
        seen = set()
        for name, module in model.named_modules():
            rule = rule_for(name, plan)
            style = STYLES.get((rule or "").partition(":")[0])
            kind = (wildcard(name), type(module), rule)
            if (
                style is None
                or not issubclass(style, (Block, Norm, Embedding))
                or issubclass(style, Replica)
                or kind in seen
            ):
                continue
            seen.add(kind)
            self.wholes[name] = _skeleton(module)

    def install(self, model: PreTrainedModel, gradients: ReplicatedGradients) -> None:
        """Wrap `model.forward`, the outermost of its wrappers."""
        if self.next is None:
            return
        self.model, self.gradients = model, gradients
        self.mesh = gradients.mesh
        inner = model.forward

        @functools.wraps(inner)  # the Trainer reads its signature
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
        """A simulated world (`hf_tpsp.estimate`) has sizes, and no values to compare."""
        return any(isinstance(getattr(p, "_local_tensor", p), FakeTensor) for p in self.model.parameters())

    def _checked(self, inner, args: tuple, kwargs: dict) -> Any:
        compare_setup(self.config, self.plan, self.model, self.mesh)
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
        """While inside, each of the chosen modules is compared with its whole when it is called for the first time. Layers that
        are compiled run as they are written meanwhile: what is compared would be compiled with them."""
        handles, compiled = [], []
        modules = dict(self.model.named_modules())

        def hook(name: str):
            def before(module, args, kwargs):
                if name not in errors:
                    try:
                        errors[name] = _compare_with_whole(self.wholes[name], module, args, kwargs, self.mesh)
                    except Exception as error:  # of a module that cannot be run by itself; its own run will tell
                        errors[name], self.reasons[name] = [], f"{type(error).__name__}: {error}".splitlines()[0]

            return before

        for name in self.wholes:
            if name in modules:
                handles.append(modules[name].register_forward_pre_hook(hook(name), with_kwargs=True, prepend=True))
        for module in modules.values():
            if module._compiled_call_impl is not None:
                compiled.append((module, module._compiled_call_impl))
                module._compiled_call_impl = None
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, call in compiled:
                module._compiled_call_impl = call

    def _judge_blocks(self, errors: dict[str, list[Tensor]]) -> None:
        """Raise `RuntimeError` on all ranks if on one of them a module and its whole differ."""
        device = next(self.model.parameters()).device
        names = list(self.wholes)
        table = torch.zeros(
            len(names), 3, dtype=torch.float64
        )  # output, gradient of the input, whether it was compared
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
        left_out = [n for n, compared in zip(names, table[:, 2].tolist(), strict=True) if not compared]
        if left_out and dist.get_rank() == 0:
            named = ", ".join(
                f"{n} ({self.reasons.get(n, 'not called' if n not in errors else DRAWS)})" for n in left_out
            )
            logger.warning_once(f"hf_tpsp: not compared with the whole block in the first step: {named}.")

    def _compare_alike(self, loss: Tensor | None) -> None:
        found = {"the loss": loss} if isinstance(loss, Tensor) and loss.dim() == 0 and type(loss) is Tensor else {}
        found["the state of torch's random number generator"] = torch.get_rng_state()
        device = self.mesh.device_type
        if device != "cpu":
            found[f"the state of its generator on {device}"] = getattr(torch, device).get_rng_state()
        names = list(found)
        rows = torch.stack([bits(x.detach().to(device)) for x in found.values()])
        table = all_gather_world(rows).cpu()
        for column, name in enumerate(names):
            if (ranks := _odd_ranks(table[:, column], _tp_groups(self.mesh))) is not None:
                raise RuntimeError(
                    f"{_preface(self.forwards)}{name} is another on rank {ranks[0]} than on rank {ranks[1]}, of the same TP group, "
                    "which must hold it alike. " + _WAY_OUT
                )

    def _compare_gradients(self, parameters: dict[str, nn.Parameter]) -> bool:
        """Whether there were gradients to compare, at the end of a backward; raises `RuntimeError` if they differ."""
        shared = {n: p for n, p in parameters.items() if isinstance(p, DTensor) and _replicates(p)}
        if not any(p.grad is not None for p in shared.values()):
            return not any(p.requires_grad for p in shared.values())
        # On local tensors: an operation on DTensors inside the engine's last callback crashes torch 2.13.
        grads = [None if p.grad is None else p.grad._local_tensor for p in shared.values()]
        rows = torch.stack([_outline(grad).to(self.mesh.device_type) for grad in grads])
        table = all_gather_world(rows).cpu()
        for column, (name, parameter) in enumerate(shared.items()):
            limit = _limit(parameter.dtype, parameter.device)
            if (ranks := _odd_ranks(table[:, column], _holders(parameter), limit)) is not None:
                raise RuntimeError(
                    f"{_preface(self.forwards)}the gradient of {name} is another on rank {ranks[0]} than on rank {ranks[1]}, though both "
                    "hold this parameter. Its sum over the ranks is missing or was taken twice. " + _WAY_OUT
                )
        return True


_WAY_OUT = (
    "Nothing has been trained on it: the optimizer has not stepped. (`HF_TPSP_CHECK=off` trains all the same; "
    "`hf-tpsp verify` compares the architecture with one process.)"
)


def _preface(forward: int) -> str:
    return f"hf_tpsp's check of training forward {forward}: "


# ---- what all ranks agree on ---------------------------------------------------------------------------------------


def compare_setup(config: TPSPConfig, plan: dict[str, str], model: PreTrainedModel, mesh) -> None:
    """Raise `ValueError` on all ranks unless they run the same versions, config, plan and model config."""
    given = {
        **{f"the version of {name}": version(name) for name in LIBRARIES},
        **{f"TPSPConfig's {name}": repr(value) for name, value in vars(config).items()},
        "the plan": json.dumps(dict(plan), sort_keys=True),
        "the model's class": type(model).__name__,
        "the model's config": model.config.to_json_string(),
    }
    digests = [
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True) for text in given.values()
    ]
    table = all_gather_world(torch.tensor(digests, device=mesh.device_type)).cpu()
    if (table == table[0]).all():
        return
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, given)
    for name in given:
        for rank, theirs in enumerate(everyones):
            if theirs[name] != everyones[0][name]:
                values = [t[name] if len(t[name]) < 80 else _first_difference(t[name], o[name])
                          for t, o in ((theirs, everyones[0]), (everyones[0], theirs))]  # fmt: skip
                raise ValueError(
                    f"hf_tpsp: {name} is {values[0]} on rank {rank}, but {values[1]} on rank 0. All ranks must run the same script "
                    "in the same environment."
                )


def _first_difference(text: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return f"…{text[max(0, at - 20) : at + 40]}…"


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as the optimizer knows them: inside the model's forward, FSDP has put gathered ones in some places."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name in module._parameters:
            if (parameter := sharded_parameter(module, name)) is not None:
                found.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
    return dict(found.values())


def compare_state(model: PreTrainedModel, mesh) -> None:
    """Raise `RuntimeError` on all ranks if two of them hold other values of the same piece of a parameter, or of a buffer."""
    shared = {n: p for n, p in sharded_parameters(model).items() if isinstance(p, DTensor) and _replicates(p)}
    buffers = dict(model.named_buffers())
    tensors = [p._local_tensor for p in shared.values()] + list(buffers.values())
    if not tensors:
        return
    table = all_gather_world(torch.stack([bits(x.detach()).to(mesh.device_type) for x in tensors])).cpu()
    groups = [_holders(p) for p in shared.values()] + [_tp_groups(mesh)] * len(buffers)
    for column, (name, holders) in enumerate(zip([*shared, *buffers], groups, strict=True)):
        if (ranks := _odd_ranks(table[:, column], holders)) is not None:
            raise RuntimeError(
                f"hf_tpsp: {name} has other values on rank {ranks[0]} than on rank {ranks[1]}, though both hold the same part of it, "
                "so they would train different models. Load the same folder on every rank, and change weights on all of them "
                "alike."
            )


def bits(x: Tensor) -> Tensor:
    """One int64 that depends on every bit of `x`, its place and the number of elements. No synchronization."""
    if x.dtype == torch.bool or x.element_size() == 1:
        flat = x.contiguous().reshape(-1).view(torch.uint8)
    elif x.is_complex():
        flat = (
            torch.view_as_real(x).contiguous().reshape(-1).view(torch.int64 if x.element_size() == 16 else torch.int32)
        )
    else:
        flat = x.contiguous().reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    total = torch.full((), x.numel(), dtype=torch.int64, device=x.device)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].long()
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=x.device)
        # A multiplicative hash modulo 2**64 (Knuth, TAOCP 3, 6.4).
        mixed = (piece + 1) * places * -7046029254386353131
        total += ((mixed ^ (mixed >> 29)) * -4417276706812531889).sum()
    return total


def _outline(local: Tensor | None) -> Tensor:
    """`[2]` int64 that hold what is compared of a gradient: its norm, and its product with fixed numbers, both fp64. None is
    none: infinite, and so equal to itself only."""
    if local is None:
        return torch.full((2,), torch.inf, dtype=torch.float64).view(torch.int64)
    local = local.detach().reshape(-1)
    norm, product = local.new_zeros((), dtype=torch.float64), local.new_zeros((), dtype=torch.float64)
    for start in range(0, local.numel(), PIECE):
        piece = local[start : start + PIECE].double()
        # As good as random, and no generator moves: fractional parts of multiples of the golden ratio (Weyl).
        places = torch.arange(start, start + piece.numel(), device=local.device, dtype=torch.float64)
        product = product + piece @ ((places * 0.6180339887498949).frac() - 0.5)
        norm = norm + piece.square().sum()
    return torch.stack([norm.sqrt(), product]).view(torch.int64)


def _replicates(parameter: DTensor) -> bool:
    sizes = parameter.device_mesh.mesh.shape
    return any(isinstance(p, Replicate) and n > 1 for p, n in zip(parameter.placements, sizes, strict=True))


def _holders(parameter: DTensor) -> Tensor:
    """`[groups, ranks]`: the ranks of each group hold the same piece of `parameter`."""
    ranks = parameter.device_mesh.mesh
    alike = [i for i, p in enumerate(parameter.placements) if isinstance(p, Replicate)]
    apart = [i for i in range(ranks.dim()) if i not in alike]
    size = int(torch.tensor([ranks.shape[i] for i in alike]).prod()) if alike else 1
    return ranks.permute(*apart, *alike).reshape(-1, size)


def _tp_groups(mesh) -> Tensor:
    """`[groups, tp]`: the ranks of each TP group. TP ranks are consecutive (`MESH_DIMS`)."""
    return torch.arange(dist.get_world_size()).view(-1, mesh.size())


def _odd_ranks(values: Tensor, groups: Tensor, limit: float | None = None) -> tuple[int, int] | None:
    """A rank whose entry of `values` `[world, …]` differs from that of the first rank of its group, and that rank; None if none
    does. With a `limit`, `values` are `_outline`s, which may differ by so much of their norm."""
    found = values[groups]
    differs = found != found[:, :1]
    if limit is not None:
        numbers = found.view(torch.float64)
        off = (numbers - numbers[:, :1]).abs() / numbers[..., :1].amax(1, keepdim=True)
        differs &= ~(off <= limit)  # NaN is not small, but NaN that all have alike is one process's too
    differs = differs.flatten(2).any(2) if differs.dim() > 2 else differs
    if not differs.any():
        return None
    group, rank = differs.nonzero()[0].tolist()
    return int(groups[group, rank]), int(groups[group, 0])


# ---- a block and its whole -----------------------------------------------------------------------------------------


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module that is not sharded yet, as its class was written, with parameters on meta and no dropout."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(t): t.detach().to("meta") for t in tensors}
    memo = {
        key: nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        for (key, value), tensor in zip(memo.items(), {id(t): t for t in tensors}.values(), strict=True)
    }
    whole = copy.deepcopy(module, memo)
    for part in whole.modules():
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        for name in _random_rates(part):
            setattr(part, name, 0.0)
    return whole


def _random_rates(part: nn.Module) -> list[str]:
    """The attributes of `part` that are rates of dropout."""
    names = [n for n, v in vars(part).items() if isinstance(v, float) and "drop" in n and v]
    return [*names, "p"] if isinstance(part, nn.modules.dropout._DropoutNd) and part.p else names


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """While inside, `module` has no dropout and its adapters are off; and what is computed is seen by no hook (transformers records
    routers' logits by them) and no dispatch mode, kept by no checkpointing of the caller's, and moves no generator."""
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in _random_rates(part)]
    # peft's layers, which run their base alone then. It has no public switch that leaves requires_grad alone.
    before += [
        (part, "_disable_adapters", False) for part in module.modules() if vars(part).get("_disable_adapters") is False
    ]
    hooks = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    try:
        for part, name, value in before:
            setattr(part, name, True if value is False else 0.0)
        for part, *_ in hooks:
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        with (
            _disable_current_modes(),
            saved_tensors_hooks(lambda x: x, lambda x: x),
            torch.random.fork_rng(),
            torch.enable_grad(),
        ):
            yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)
        for part, after, pre in hooks:
            part._forward_hooks, part._forward_pre_hooks = after, pre


def _compare_with_whole(whole: nn.Module, module: nn.Module, args: tuple, kwargs: dict, mesh) -> list:
    """Relative differences of `module`'s output and of its input's gradient from those of `whole`, and their limit; empty if it
    draws random numbers or has no gradient to compare."""
    with _undisturbed(module):
        whole.train(module.training)
        if isinstance(module._tpsp_style, Embedding):
            return _compare_lookup(whole, module, args, kwargs, mesh)
        values = {name: _full(_counterpart(module, name)) for name, _ in _tensors(whole)}
        start = torch.get_rng_state()
        split_args, split_kwargs, x = _with_leaf(args, kwargs, keep=True)
        out = _first(module.forward(*split_args, **split_kwargs))
        draws = not torch.equal(start, torch.get_rng_state())
        whole_args, whole_kwargs, whole_x = _with_leaf(args, kwargs, keep=False)
        expected = _first(functional_call(whole, values, whole_args, whole_kwargs))
        if draws or not out.requires_grad:
            return []
        # Any direction will do, but for a norm's own output, along which it does not change.
        direction = (
            torch.cos(torch.arange(expected.numel(), device=expected.device)).view_as(expected).to(expected.dtype)
        )
        (expected_grad,) = torch.autograd.grad(expected, whole_x, direction)
        if isinstance(out, DTensor):
            direction = distribute_tensor(direction, out.device_mesh, out.placements, src_data_rank=None)
        (grad,) = torch.autograd.grad(out, x, direction)
        limit = _limit(expected.dtype, expected.device)
        return [_relative(out, expected), _relative(grad, expected_grad), limit]


def _compare_lookup(whole: nn.Module, module: nn.Module, args: tuple, kwargs: dict, mesh) -> list:
    """The same for the embedding, on the rows that this batch looks up: the whole vocabulary is never gathered."""
    (ids,) = args or kwargs.values()
    weight = module.weight.detach().to_local()
    looked_up, places = torch.unique(ids, return_inverse=True)
    local = looked_up - shard_width(module.num_embeddings, mesh.size()) * mesh.get_local_rank()
    owned = ((local >= 0) & (local < weight.shape[0])).unsqueeze(1)
    rows = weight[local.clamp(0, max(0, weight.shape[0] - 1))] * owned
    dist.all_reduce(rows, group=mesh.get_group())
    buffers = {name: _counterpart(module, name) for name, _ in whole.named_buffers()}
    whole.padding_idx = None  # it concerns gradients alone, and names a row of the whole vocabulary
    with torch.no_grad():
        expected = functional_call(whole, {**buffers, "weight": rows}, (places,))
        return [_relative(module.forward(ids), expected), 0.0, _limit(expected.dtype, expected.device)]


def _with_leaf(args: tuple, kwargs: dict, keep: bool) -> tuple[tuple, dict, Tensor]:
    """The arguments, copied, with gradients for the stream alone, which is returned too. `keep`: DTensors stay DTensors."""

    def own(x: Tensor) -> Tensor:
        x = x.detach().clone()
        return x if keep else _full(x)

    args, kwargs = tree_map_only(Tensor, own, (args, kwargs))
    args = tuple(None if isinstance(x, Cache) else x for x in args)  # a cache must not take keys and values twice
    kwargs = {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()}
    given = [*args, *kwargs.values()]
    streams = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    stream = next((x for x in streams if isinstance(x, DTensor)), kwargs.get("hidden_states"))
    stream = streams[0] if not isinstance(stream, Tensor) else stream
    return args, kwargs, stream.requires_grad_()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _counterpart(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of `module`, inside whatever peft has put around the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        module = getattr(_unwrapped(module), part)
    module = _unwrapped(module)
    return module._parameters[last] if last in module._parameters else module._buffers[last]


def _unwrapped(module: nn.Module) -> nn.Module:
    for name in ("base_layer", "original_module"):
        if name in module._modules:
            return _unwrapped(module._modules[name])
    return module


def _full(x: Tensor) -> Tensor:
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    found = _full(found)
    if found.shape != expected.shape:
        found = (
            found.reshape(expected.shape) if found.numel() == expected.numel() else torch.full_like(expected, torch.inf)
        )
    found, expected = found.double(), expected.detach().double()
    return (found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)


def _limit(dtype: torch.dtype, device: torch.device) -> float:
    is_tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return LIMIT_TF32 if is_tf32 else LIMITS[dtype]
