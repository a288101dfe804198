"""Cross entropy on vocabulary shards, and a model's own loss on them.

Logits `[batch, seq, vocab]` are sharded over the vocabulary and stay sharded: only per-token numbers are communicated.
They come as `LazyLogits` or as DTensors. With `loss="chunked"`, the head of `LazyLogits` and the loss are computed
together, a chunk of tokens at a time. Otherwise the logits of all tokens go through torch's `loss_parallel`: with
`loss="loss_parallel"`, for logits that something was written into, and for DTensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from ..collectives import SEQUENCE, shard_width
from ..inputs import choice, instance
from ..upstream.torch.autograd import without_inference_mode
from ..upstream.torch.dtensor import loss_parallel
from ..vocabulary import require_inside
from .chunked import ChunkedHead, TokenStatistics, summed_loss, token_statistics
from .logits import LazyLogits

logger = logging.get_logger(__name__)


IGNORE_INDEX = -100


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy `[tokens]` of local logits `[tokens, vocab / tp]`, by torch's `loss_parallel`.

    torch needs its context to be open in backward too. So the gradient for an upstream gradient of 1 is computed in
    forward, while the context is open, and saved (`[tokens, vocab / tp]`, in the logits' dtype) in place of the fp32
    log-probabilities. Backward multiplies it by the upstream gradient, which is exact, because tokens do not mix. Three
    all-reduces of `[tokens]` in forward, none in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local_logits: Tensor,
        labels: Tensor,
        mesh: DeviceMesh,
        vocab_size: int,
        ignore_index: int,
        smoothing: float,
    ) -> Tensor:
        shape = torch.Size((labels.numel(), vocab_size))
        dtype = local_logits.dtype
        local_logits = local_logits.detach().to(torch.promote_types(dtype, torch.float32))
        needs_grad = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(needs_grad), loss_parallel():
            logits = DTensor.from_local(
                local_logits, mesh, [Shard(1)], run_check=False, shape=shape, stride=(vocab_size, 1)
            ).requires_grad_(needs_grad)
            # The result is a DTensor.
            whole: Any = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
            grads: Any = torch.autograd.grad(whole, logits, torch.ones_like(whole)) if needs_grad else None
            grad = grads[0].to_local() if needs_grad else None
        loss = whole.detach().to_local()
        if smoothing:
            loss, grad = _smooth(loss, grad, local_logits, labels, mesh, vocab_size, ignore_index, smoothing)
        ctx.save_for_backward(grad.to(dtype) if needs_grad else None, labels != ignore_index)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, valid = ctx.saved_tensors
        # The upstream gradient is infinite if no token has a label.
        upstream = torch.where(valid, upstream, 0)
        return (grad * upstream.unsqueeze(-1)).to(grad.dtype), None, None, None, None, None


def _smooth(
    loss: Tensor,
    grad: Tensor | None,
    local_logits: Tensor,
    labels: Tensor,
    mesh: DeviceMesh,
    vocab_size: int,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor, Tensor | None]:
    """Label smoothing on top of the cross entropy: `(1 - e) * nll - e * mean_v(log p_v)`.

    Because `nll = lse - x_y` and `-mean_v(log p_v) = lse - mean_v(x_v)`, the loss is `nll + e * (x_y - mean_v(x_v))`.
    Its gradient is that of nll plus `e * (onehot_y - 1 / vocab)`. One all-reduce of `[2, tokens]`.
    """
    columns = local_logits.shape[1]
    start = shard_width(vocab_size, mesh.size()) * mesh.get_local_rank()
    valid = labels != ignore_index
    local = labels - start
    owned = (local >= 0) & (local < columns) & valid
    local = local.masked_fill(~owned, 0).unsqueeze(1)
    label_logit = local_logits.gather(1, local).squeeze(1).masked_fill(~owned, 0)
    terms = torch.stack([label_logit, local_logits.sum(1)])
    dist.all_reduce(terms, group=mesh.get_group())
    loss = loss + smoothing * (terms[0] - terms[1] / vocab_size) * valid
    if grad is not None:
        grad = grad - (smoothing / vocab_size) * valid.unsqueeze(1)
        grad = grad.scatter_add(1, local, (smoothing * owned).unsqueeze(1))
    return loss, grad


# DTensor has no cross entropy in inference mode.
@without_inference_mode()
def vocab_parallel_cross_entropy(
    logits: LazyLogits | DTensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.cross_entropy` for logits that are sharded over the vocabulary.

    Args:
        logits: `[..., vocab]`, as a parallelized model returns them: `LazyLogits`, or a DTensor that is `Shard(-1)` on
            a one-dimensional TP mesh. Plain logits must be whole and the same on every rank. Lazy logits become plain
            if the model's own code reads them, or if a loss function of the script's own is given whole logits.
        labels: plain integer tensor `[...]`, the same on every TP rank. Not shifted here.
        ignore_index: labels of this value give no loss and no gradient.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        reduction: `"none"` (`[...]`), `"sum"`, or `"mean"` over the labels that are not ignored.

    Returns:
        A plain tensor in fp32 (fp64 for fp64 logits), bitwise the same on every TP rank. Its gradient is exact for any
        upstream gradient, and backward needs no context.

    Raises:
        ValueError: a DTensor that is not vocabulary-sharded, labels of another shape or dtype, an unknown reduction, a
            smoothing that is not between 0 and 1.
        TypeError: logits or labels that are no tensors.
    """
    instance("logits", logits, Tensor, "Give it what the model returned, or a tensor [..., vocab].")
    instance("labels", labels, Tensor, "Give it a tensor of token ids, one for each row of the logits.")
    instance("ignore_index", ignore_index, int, "transformers uses -100.")
    _check(logits, labels, ignore_index)
    choice("reduction", reduction, ("none", "sum", "mean"))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing!r}.")
    flat = labels.reshape(-1).to(logits.device)
    if not isinstance(logits, (LazyLogits, DTensor)):
        whole = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        loss = with_plain_gradient(F.cross_entropy(whole, flat, **options))
        return loss.view(labels.shape) if reduction == "none" else loss
    valid = (flat != ignore_index).sum()
    if isinstance(logits, LazyLogits):
        logits.spend()
    if isinstance(logits, LazyLogits) and logits.is_chunked:
        head, tensors = _chunked_head(logits, ignore_index, label_smoothing, statistics=False)
        if reduction == "none":
            return with_plain_gradient(logits.hook(token_statistics(head, *tensors, flat).nll)).view(labels.shape)
        divisor = valid if reduction == "mean" else torch.ones_like(valid)
        return with_plain_gradient(logits.hook(summed_loss(head, *tensors, flat, divisor)))
    if isinstance(logits, LazyLogits):
        logits = logits.sharded()
    local = logits.to_local(grad_placements=logits.placements)
    loss = _VocabParallelCrossEntropy.apply(
        local.reshape(-1, local.shape[-1]), flat, logits.device_mesh, logits.shape[-1], ignore_index, label_smoothing
    )
    with_plain_gradient(loss)
    if reduction == "none":
        return loss.view(labels.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / valid


@without_inference_mode()
def vocab_parallel_statistics(
    logits: LazyLogits | Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> TokenStatistics:
    """Cross entropy, entropy, top-1 and mean logit of each token from one pass over the vocabulary.

    Arguments as in `vocab_parallel_cross_entropy`. The tensors of the result have the shape of `labels`; the gradient
    of `nll` is exact for any upstream gradient; the others have none. Plain logits (lazy logits that the model's own
    code has read) must be whole and the same on every rank.
    """
    _check(logits, labels, ignore_index)
    if not isinstance(logits, (LazyLogits, DTensor)):
        return _statistics_of_whole(logits, labels, ignore_index)
    if isinstance(logits, DTensor) or not logits.is_chunked:
        return _statistics_of_whole(logits.full_tensor(), labels, ignore_index)
    logits.spend()
    head, tensors = _chunked_head(logits, ignore_index, 0.0, statistics=True)
    found = token_statistics(head, *tensors, labels.reshape(-1).to(logits.device))
    nll, *others = (value.view(labels.shape) for value in (found.nll, found.entropy, found.is_top1, found.mean_logit))
    return TokenStatistics(with_plain_gradient(logits.hook(nll)), *others)


def _statistics_of_whole(logits: Tensor, labels: Tensor, ignore_index: int) -> TokenStatistics:
    """`vocab_parallel_statistics` from whole logits."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(x.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=ignore_index)
    with_plain_gradient(nll)
    x = x.detach()
    entropy = torch.special.entr(x.softmax(-1)).sum(-1)
    return TokenStatistics(nll.view(labels.shape), entropy, x.argmax(-1) == labels, x.mean(-1))


def with_plain_gradient(loss: Tensor) -> Tensor:
    """Register a hook on `loss` that makes its upstream gradient plain if that is a DTensor, and return `loss`.

    A DTensor gradient arises if the script adds a DTensor to the loss, such as one that a hook on a layer has kept.
    """
    if loss.requires_grad:
        loss.register_hook(lambda grad: grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return loss


def _check(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    if isinstance(logits, DTensor) and (
        len(logits.placements) != 1 or not logits.placements[0].is_shard(logits.ndim - 1)
    ):
        raise ValueError(
            f"logits must be plain, or a DTensor sharded on its last dimension over one mesh dim, got {logits.placements}."
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}.")
    if labels.is_floating_point():
        raise ValueError(f"labels must be token ids, of an integer dtype, got {labels.dtype}.")
    require_inside("labels", labels, logits.shape[-1], ignore_index)


def _chunked_head(
    logits: LazyLogits, ignore_index: int, smoothing: float, statistics: bool
) -> tuple[ChunkedHead, tuple[Tensor, Tensor, Tensor | None]]:
    """The head of `logits`, and its tensors: hidden states, weight and bias, as plain local ones."""
    hidden = logits.hidden
    # `ChunkedHead` knows two layouts: sharded over the sequence, and replicated.
    if hidden.placements != (SEQUENCE,):
        hidden = hidden.redistribute(placements=[Replicate()])
    with (logits.with_weights or contextlib.nullcontext)():
        # Chunked logits always have `parameters`.
        weight, bias = cast(Callable, logits.parameters)()
    head = ChunkedHead(
        hidden.device_mesh, hidden.placements, hidden.shape, logits.shape[-1], logits.pointwise, ignore_index,
        smoothing, statistics,
    )  # fmt: skip
    return head, (hidden.to_local(grad_placements=hidden.placements), weight, bias)


def causal_lm_loss(
    logits: LazyLogits | DTensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss` on vocabulary shards: the same arguments, the same scalar.

    `labels` `[batch, seq]` are shifted here; `shift_labels` `[batch, seq]` are taken as they are. With
    `num_items_in_batch` the sum is divided by it, else by the number of labels that are not ignored.
    """
    if shift_labels is None:
        shift_labels = F.pad(cast(Tensor, labels), (0, 1), value=ignore_index)[..., 1:]
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if num_items_in_batch is None:
        return vocab_parallel_cross_entropy(logits, shift_labels, reduction="mean", **options)
    total = vocab_parallel_cross_entropy(logits, shift_labels, reduction="sum", **options)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def on_shards(loss_function: Callable) -> Callable:
    """Return a function that computes `loss_function` from logits sharded over the vocabulary.

    transformers' causal loss is replaced by `causal_lm_loss`, with the arguments that transformers' loss knows; it
    ignores all others, such as `label_smoothing`. Any other loss is given whole logits `[batch, seq, vocab]`, plain and
    the same on every TP rank. Its gradient through them is exact and it may use them freely, but they take the memory
    of whole logits.
    """
    if loss_function is ForCausalLMLoss:

        @functools.wraps(ForCausalLMLoss)
        def loss(
            logits: Tensor,
            labels: Tensor | None,
            vocab_size: int,
            num_items_in_batch: Tensor | None = None,
            ignore_index: int = IGNORE_INDEX,
            shift_labels: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            # The plan leaves the logits whole where the head is part of a larger module.
            compute: Callable = causal_lm_loss if isinstance(logits, (LazyLogits, DTensor)) else ForCausalLMLoss
            return compute(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)

    else:
        name = getattr(loss_function, "__name__", type(loss_function).__name__)
        logger.warning_once(
            f"hf_tpsp: the model's loss is {name}, which knows nothing of shards, so the logits are gathered whole on every rank."
        )

        @functools.wraps(loss_function, updated=())
        def loss(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only((LazyLogits, DTensor), lambda x: x.full_tensor(), (args, kwargs))
            return loss_function(*args, **kwargs)

    loss._tpsp_on_shards = True  # type: ignore[attr-defined]  # a function takes any attribute
    return loss
