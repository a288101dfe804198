"""Head and vocab-parallel cross entropy together, a chunk of tokens at a time, so no `[tokens, vocab / tp]` tensor
exists.

Each rank multiplies a chunk of the hidden states by its rows of the head and reduces the logits to a few numbers per
token. One all-gather of those numbers gives the loss; every rank sums them in the same order, so the loss is bitwise
the same on all. The gradients of the logits are formed in place while the chunk is in memory:

    lse_r = log Σ_{v of rank r} exp x_v      lse = log Σ_r exp lse_r      nll = lse - x_label
    d nll / d x_v = exp(x_v - lse) - [v = label]

Collectives, with sequence parallelism: one all-gather of the hidden states, one of 8 to 20 bytes per token in fp32 (8
for the loss alone, in as many pieces as there are chunks), one reduce-scatter of the hidden states' gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

from ..collectives import SEQUENCE, all_gather, all_gather_sequence, reduce_scatter_sequence, shard_width

CHUNK_BYTES = 64 * 2**20
"""Bytes of a chunk's fp32 logits on one rank. This is large enough for efficient matrix products (2,048 tokens of a
128,256-word vocabulary over 16 ranks, 1,024 over 8), and small compared with the model."""


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each token from one pass over the vocabulary: tensors `[tokens]`, the same on all TP ranks.

    Args:
        nll: cross entropy of the label, 0 where the label is ignored.
        entropy: entropy of the predicted distribution, in nats; None unless asked for.
        is_top1: whether the label is the arg-max of the logits (the first, if several are equal); None unless asked
            for.
        mean_logit: mean of the logits over the vocabulary; None unless asked for.
    """

    nll: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None


@dataclass(frozen=True)
class ChunkedHead:
    """The cross entropy on this rank's rows of the head. It holds no tensors of a step.

    Args:
        mesh: the one-dimensional TP mesh.
        placements: placements of the hidden states on the mesh: sharded over the sequence, or replicated.
        shape: shape of the whole hidden states, `[..., hidden]`.
        vocab_size: number of rows of the whole head.
        pointwise: functions between head and loss (scale, softcap). Each takes a chunk's logits and the number of their
            first column.
        statistics: whether entropy, top-1 and mean logit are asked for.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    vocab_size: int
    pointwise: tuple = ()
    ignore_index: int = -100
    smoothing: float = 0.0
    statistics: bool = False

    @property
    def first_row(self) -> int:
        return self.rows_per_rank * self.mesh.get_local_rank()

    @property
    def rows_per_rank(self) -> int:
        """Rows on each rank, in DTensor's way of sharding unevenly: the last ranks may have fewer."""
        return shard_width(self.vocab_size, self.mesh.size())

    def gather(self, hidden: Tensor) -> Tensor:
        """Local hidden states → the hidden states of all tokens, `[tokens, hidden]`."""
        if self.placements == (SEQUENCE,):
            hidden = all_gather_sequence(hidden, self.shape[1], self.mesh)
        return hidden.reshape(-1, self.shape[-1])

    def scatter(self, partial: Tensor) -> Tensor:
        """A partial tensor `[tokens, hidden]` → its sum over the ranks, in the layout of the hidden states."""
        partial = partial.view(self.shape)
        if self.placements == (SEQUENCE,):
            return reduce_scatter_sequence(partial, self.mesh)
        dist.all_reduce(partial, group=self.mesh.get_group())
        return partial

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of the tokens of `hidden` `[tokens, hidden]`, the same on every rank; the last may be shorter."""
        size = max(1, CHUNK_BYTES // (self.rows_per_rank * torch.promote_types(hidden.dtype, torch.float32).itemsize))
        # Matrix units work on whole tiles, so the size is a multiple of 16 if it can be.
        size = size // 16 * 16 or size
        return (slice(i, i + size) for i in range(0, hidden.shape[0], size))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool):
        """Return `(raw, shaped, x)`.

        `raw` is the product of `hidden` and the head, and `shaped` is `raw` after `pointwise`; both are None if there
        is no `pointwise`. `x` holds the resulting logits in fp32 or wider, and may be overwritten; it is a copy only if
        it must be.
        """
        raw = F.linear(hidden, weight, bias)
        dtype = torch.promote_types(raw.dtype, torch.float32)
        if not self.pointwise:
            return None, None, raw.to(dtype)
        with torch.set_grad_enabled(needs_grad):
            shaped = raw.requires_grad_(needs_grad)
            for operation in self.pointwise:
                shaped = operation(shaped, self.first_row)
        return raw, shaped, shaped.detach().to(dtype, copy=True)

    def owned(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """For each label, whether this rank has its row, `[tokens]`, and the local index of that row, `[tokens, 1]`
        (else 0)."""
        local = labels - self.first_row
        owned = (local >= 0) & (local < rows) & (labels != self.ignore_index)
        return owned, local.masked_fill(~owned, 0).unsqueeze(1)

    def reduce(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, TokenStatistics]:
        """Logits `x` `[chunk, rows]` → their row maxima, the log-sum-exp over all ranks, and the statistics.

        One all-gather of `[k, chunk]`. Leaves `exp(x - maximum)` in `x`.
        """
        size, valid = self.mesh.size(), labels != self.ignore_index
        owned, local = self.owned(labels, x.shape[1])
        largest = x.amax(1)
        # All of this rank's words are masked for these tokens.
        is_empty = largest == -torch.inf
        maximum = largest.masked_fill(is_empty, 0)
        label_logit = x.gather(1, local).squeeze(1).masked_fill(~owned, 0)
        terms = [maximum, label_logit]
        if self.smoothing or self.statistics:
            terms.append(x.sum(1))
        if self.statistics:
            # To find whether the label is the arg-max, each rank sends a rival of the label's logit. The rank that owns
            # the label sends -inf if the label is the arg-max of its rows, and +inf if not; other ranks send their
            # largest logit.
            here = torch.where(x.argmax(1) == local.squeeze(1), -torch.inf, torch.inf)
            terms.append(torch.where(owned, here, largest))
        exponentials = x.sub_(maximum.unsqueeze(1)).exp_()
        total = exponentials.sum(1)
        terms[0] = total.log() + maximum
        if self.statistics:
            # The entry is Σ p x over the softmax of this rank's own logits. entr(e) = -e log e, and 0 at 0.
            entropies = torch.special.entr(exponentials).sum(1) / total
            terms.append((maximum - entropies).masked_fill(is_empty, 0))

        terms = torch.stack(terms)
        gathered = all_gather(terms, self.mesh).unflatten(0, (size, -1))
        lse_of = gathered[:, 0]
        lse, label_logit = lse_of.logsumexp(0), gathered[:, 1].sum(0)
        nll = lse - label_logit
        mean_logit = gathered[:, 2].sum(0) / self.vocab_size if self.smoothing or self.statistics else None
        if self.smoothing:
            # With smoothing e the loss is (1 - e) nll - e mean_v log p_v.
            nll = nll + self.smoothing * (label_logit - mean_logit)
        nll = nll * valid
        entropy = is_top1 = None
        if self.statistics:
            entropy = lse - ((lse_of - lse).exp() * gathered[:, -1]).sum(0)
            owner = labels.div(self.rows_per_rank, rounding_mode="floor")
            ranks = torch.arange(size, device=x.device).unsqueeze(1)
            rival = gathered[:, -2]
            is_top1 = valid & torch.where(ranks < owner, rival < label_logit, rival <= label_logit).all(0)
        return torch.where(is_empty, lse, maximum), lse, TokenStatistics(nll, entropy, is_top1, mean_logit)

    def gradient_(self, x: Tensor, scale: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
        """Overwrite `x` with the gradient of `Σ upstream * nll`, given that `scale * x` are the probabilities."""
        # A product would not do: `upstream` is infinite in a step without a label (it divides by 0), where one process
        # has gradients of exactly 0.
        upstream = torch.where(labels != self.ignore_index, upstream, 0)
        owned, local = self.owned(labels, x.shape[1])
        x.mul_((scale * upstream).unsqueeze(1))
        if self.smoothing:
            x.sub_((self.smoothing / self.vocab_size * upstream).unsqueeze(1))
        return x.scatter_add_(1, local, ((self.smoothing - 1) * upstream * owned).unsqueeze(1))


class _Gradients:
    """Gradients of the hidden states, the head's weight and its bias, collected over the chunks in fp32 or wider.

    Attributes:
        BLOCK: rows of a low-precision product that are added to the fp32 sum at a time.
    """

    BLOCK = 4096

    def __init__(self, full: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = full.new_empty(full.shape, dtype=dtype) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None

    def add(
        self, chunk: slice, grad: Tensor, raw: Tensor | None, shaped: Tensor | None, hidden: Tensor, weight: Tensor
    ) -> None:
        """Add the contribution of a chunk whose logits have the gradient `grad` `[chunk, rows]`.

        `grad` is first propagated back from `shaped` to `raw` (`ChunkedHead.logits`).
        """
        if shaped is not None:
            (grad,) = torch.autograd.grad(shaped, raw, grad.to(shaped.dtype))
        grad = grad.to(weight.dtype)
        if self.hidden is not None:
            if self.hidden.dtype == weight.dtype:
                torch.mm(grad, weight, out=self.hidden[chunk])
            else:
                self.hidden[chunk] = grad @ weight
        if self.weight is not None:
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(grad.t(), hidden)
            else:
                for rows, columns in zip(self.weight.split(self.BLOCK), grad.split(self.BLOCK, dim=1), strict=True):
                    rows += columns.t() @ hidden
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)


class _SummedLoss(torch.autograd.Function):
    """`Σ nll / divisor`, a scalar. The gradients are formed in forward, and only scaled in backward.

    Logits, hidden gradient and weight gradient take one matrix product each.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: ChunkedHead, labels: Tensor, divisor: Tensor
    ):
        full = head.gather(hidden)
        wanted = ctx.needs_input_grad[:3]
        total = None
        grads = _Gradients(full, weight, bias, wanted) if any(wanted) else None
        for chunk in head.chunks(full):
            raw, shaped, x = head.logits(full[chunk], weight, bias, any(wanted))
            maximum, lse, statistics = head.reduce(x, labels[chunk])
            part = statistics.nll.sum()
            total = part if total is None else total + part
            if grads is not None:
                grad = head.gradient_(x, (maximum - lse).exp(), labels[chunk], 1 / divisor.to(x.dtype))
                grads.add(chunk, grad, raw, shaped, full[chunk], weight)
            # Free this chunk before the next one is made.
            raw = shaped = x = grad = None
        if grads is not None:
            ctx.grads, ctx.any_label = grads, (labels != head.ignore_index).any()
            if grads.hidden is not None:
                grads.hidden = head.scatter(grads.hidden)
        return total / divisor

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "The chunked loss frees its gradients in its first backward; there can be no second one."
            )
        upstream = torch.where(ctx.any_label, upstream, 0)
        hidden, weight, bias = (
            None if grad is None else grad.mul_(upstream) for grad in (grads.hidden, grads.weight, grads.bias)
        )
        # Autograd casts the gradients to the dtypes of the inputs.
        return hidden, weight, bias, None, None, None


class _PerTokenLoss(torch.autograd.Function):
    """`(nll, entropy, is_top1, mean_logit)` of each token.

    Backward multiplies by the head once more, because the upstream gradient may differ from token to token. Its only
    collectives are those of the hidden states.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: ChunkedHead, labels: Tensor):
        full = head.gather(hidden)
        parts, lses = [], []
        for chunk in head.chunks(full):
            _, _, x = head.logits(full[chunk], weight, bias, False)
            _, lse, statistics = head.reduce(x, labels[chunk])
            parts.append(statistics)
            lses.append(lse)
            # Free this chunk before the next one is made.
            x = None
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(lses))
        nll = torch.cat([p.nll for p in parts])
        if not head.statistics:
            return nll, None, None, None
        others = [torch.cat([getattr(p, name) for p in parts]) for name in ("entropy", "is_top1", "mean_logit")]
        ctx.mark_non_differentiable(*others)
        return nll, *others

    @staticmethod
    def backward(ctx, upstream: Tensor, *_):
        head = ctx.head
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        full = head.gather(hidden)
        grads = _Gradients(full, weight, bias, ctx.needs_input_grad[:3])
        for chunk in head.chunks(full):
            raw, shaped, x = head.logits(full[chunk], weight, bias, True)
            x.sub_(lse[chunk].unsqueeze(1)).exp_()
            grad = head.gradient_(x, torch.ones_like(lse[chunk]), labels[chunk], upstream[chunk])
            grads.add(chunk, grad, raw, shaped, full[chunk], weight)
            # Free this chunk before the next one is made.
            raw = shaped = x = grad = None
        return None if grads.hidden is None else head.scatter(grads.hidden), grads.weight, grads.bias, None, None


def summed_loss(
    head: ChunkedHead, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor
):
    """`Σ nll / divisor` of `labels` `[tokens]`, a scalar. `hidden`, `weight` and `bias` are local tensors."""
    return _SummedLoss.apply(hidden, weight, bias, head, labels, divisor)


def token_statistics(head: ChunkedHead, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor):
    """`TokenStatistics` of `labels` `[tokens]`. Gradients flow through `nll`."""
    return TokenStatistics(*_PerTokenLoss.apply(hidden, weight, bias, head, labels))
