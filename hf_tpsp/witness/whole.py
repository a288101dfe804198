"""Compares a module as it trains, split over the ranks, with the module as its class was written, on the same input."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers import Cache

from ..collectives import chunk_of, shard_width, sharded_features, slice_sequence
from ..loss.cross_entropy import vocab_parallel_cross_entropy
from ..structure import DROPOUTS
from ..styles.head import Head
from ..styles.stream import Embedding
from ..upstream.peft import adapters_off
from ..upstream.torch.fake import without_modes
from ..upstream.torch.modules import drop_hooks, without_hooks

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of a block from the whole block, by the dtype it computes in. A wrong layout makes a
difference of about 1. The limit for fp64 is no smaller because transformers casts to fp32 inside norms and softmax."""


LIMIT_TF32 = 1e-2


TOKENS = 8
"""Positions of each row on which head and loss are compared."""


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of `module`, which is not sharded yet, as its class was written: on meta, without hooks and dropout."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(t): t.detach().to("meta") for t in tensors}
    memo = {
        key: nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        for (key, value), tensor in zip(memo.items(), {id(t): t for t in tensors}.values(), strict=True)
    }
    whole = copy.deepcopy(module, memo)
    for part in whole.modules():
        drop_hooks(part)
        for name in _random_rates(part):
            setattr(part, name, 0.0)
    return whole


def _random_rates(part: nn.Module) -> list[str]:
    """The attributes of `part` that are rates of dropout."""
    names = [n for n, v in vars(part).items() if isinstance(v, float) and "drop" in n and v]
    return [*names, "p"] if isinstance(part, DROPOUTS) and part.p else names


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """While inside, `module` has no dropout and its adapters are off, and running it leaves no trace: no hook sees it
    (transformers records routers' logits by hooks), nor any dispatch mode, the caller's checkpointing keeps nothing of
    it, and no generator advances."""
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in _random_rates(part)]
    try:
        for part, name, _ in before:
            setattr(part, name, 0.0)
        with (
            adapters_off(module),
            without_hooks(module),
            without_modes(),
            saved_tensors_hooks(lambda x: x, lambda x: x),
            torch.random.fork_rng(),
            torch.enable_grad(),
        ):
            yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def compare_with_whole(whole: nn.Module, module: nn.Module, args: tuple, kwargs: dict, mesh) -> list:
    """`[output, gradient of the input, limit]`: the relative differences of `module` from `whole`, and the limit of
    both; empty if `module` draws random numbers."""
    with _undisturbed(module):
        whole.train(module.training)
        style = _unwrapped(module)._tpsp_style
        if isinstance(style, Embedding):
            return _compare_lookup(whole, _unwrapped(module), args, kwargs, mesh)
        if isinstance(style, Head):
            return _compare_head(_unwrapped(module), args[0], mesh)
        values = {name: full(_counterpart(module, name)) for name, _ in _tensors(whole)}
        start = torch.get_rng_state()
        split_args, split_kwargs, x = _with_leaf(args, kwargs, keep=True)
        out = first_tensor(module.forward(*split_args, **split_kwargs))
        draws = not torch.equal(start, torch.get_rng_state())
        whole_args, whole_kwargs, whole_x = _with_leaf(args, kwargs, keep=False)
        expected = first_tensor(functional_call(whole, values, whole_args, whole_kwargs))
        limit = limit_of(expected.dtype, expected.device)
        if draws:
            return []
        if x is None or not expected.requires_grad:
            return [relative_error(out, expected), 0.0, limit]
        if not out.requires_grad:
            return [relative_error(out, expected), torch.inf, limit]
        # The output's gradient may be any direction except the output, along which a norm's output does not change.
        direction = (
            torch.cos(torch.arange(expected.numel(), device=expected.device)).view_as(expected).to(expected.dtype)
        )
        (expected_grad,) = torch.autograd.grad(expected, whole_x, direction)
        if isinstance(out, DTensor):
            direction = distribute_tensor(direction, out.device_mesh, out.placements, src_data_rank=None)
        (grad,) = torch.autograd.grad(out, x, direction)
        return [relative_error(out, expected), relative_error(grad, expected_grad), limit]


def _compare_lookup(whole: nn.Module, module: nn.Module, args: tuple, kwargs: dict, mesh) -> list:
    """`compare_with_whole` for the embedding, on the rows of this batch: the whole weight is never gathered."""
    (ids,) = args or kwargs.values()
    weight = module.weight.detach().to_local()
    looked_up, places = torch.unique(ids, return_inverse=True)
    local = looked_up - shard_width(module.num_embeddings, mesh.size()) * mesh.get_local_rank()
    owned = ((local >= 0) & (local < weight.shape[0])).unsqueeze(1)
    rows = weight[local.clamp(0, max(0, weight.shape[0] - 1))] * owned
    dist.all_reduce(rows, group=mesh.get_group())
    buffers = {name: _counterpart(module, name) for name, _ in whole.named_buffers()}
    # The index names a row of the whole vocabulary, and matters for gradients only.
    whole.padding_idx = None
    with torch.no_grad():
        expected = functional_call(whole, {**buffers, "weight": rows}, (places,))
        return [relative_error(module.forward(ids), expected), 0.0, limit_of(expected.dtype, expected.device)]


def _compare_head(head: nn.Module, stream: Tensor, mesh) -> list:
    """`compare_with_whole` for the head together with the loss, on a few tokens: the whole weight is never gathered."""
    some = full(stream)[:, :TOKENS].contiguous()
    labels = torch.arange(some.shape[:2].numel(), device=some.device).view(some.shape[:2]) * 7919 % head.out_features
    x = slice_sequence(some, mesh) if isinstance(stream, DTensor) else some.clone()
    x = x.detach().requires_grad_()
    loss = vocab_parallel_cross_entropy(head.forward(x), labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)

    weight, bias = (None if p is None else p.detach().to_local() for p in (head.weight, head.bias))
    logits = sharded_features(F.linear(some, weight, bias), head.out_features, mesh).full_tensor().requires_grad_()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    expected = F.cross_entropy(logits.flatten(0, 1).to(dtype), labels.flatten(), reduction="sum")
    (of_logits,) = torch.autograd.grad(expected, logits)
    expected_grad = chunk_of(of_logits, 2, mesh.get_local_rank(), mesh.size()) @ weight
    dist.all_reduce(expected_grad, group=mesh.get_group())
    return [relative_error(loss, expected), relative_error(grad, expected_grad), limit_of(some.dtype, some.device)]


def _with_leaf(args: tuple, kwargs: dict, keep: bool) -> tuple[tuple, dict, Tensor | None]:
    """Copies of the arguments, and the stream among them, which alone requires a gradient.

    Args:
        keep: whether DTensors stay DTensors; otherwise they become whole tensors.
    """

    def own(x: Tensor) -> Tensor:
        x = x.detach().clone()
        return x if keep else full(x)

    args, kwargs = tree_map_only(Tensor, own, (args, kwargs))
    # Caches are left out, because a cache must not take the same keys and values twice.
    args = tuple(None if isinstance(x, Cache) else x for x in args)
    kwargs = {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()}
    given = [*args, *kwargs.values()]
    streams = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    stream = next((x for x in streams if isinstance(x, DTensor)), kwargs.get("hidden_states"))
    if not isinstance(stream, Tensor):
        # A module that is given indices only, as an embedding is, has no stream.
        stream = streams[0] if streams else None
    return args, kwargs, None if stream is None else stream.requires_grad_()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _counterpart(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of `module`, looked up through the wrappers that peft has put around the modules on the way."""
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


def full(x: Tensor) -> Tensor:
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    found = full(found)
    if found.shape != expected.shape:
        found = (
            found.reshape(expected.shape) if found.numel() == expected.numel() else torch.full_like(expected, torch.inf)
        )
    found, expected = found.double(), expected.detach().double()
    return (found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)


def limit_of(dtype: torch.dtype, device: torch.device) -> float:
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    is_tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return LIMIT_TF32 if is_tf32 else LIMITS[dtype]
