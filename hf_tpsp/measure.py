"""What a step holds and what it sends, in bytes: counted, by watching every operation of a process, and at the least.

    with CollectiveBytes() as sent, TensorBytes() as held:
        model(**batch).loss.backward()
    max(held.timeline()), sent.traffic["all-gather"].size

Both are `TorchDispatchMode`s and see an operation after autograd and after tensor subclasses (DTensor) have taken
themselves apart. Neither needs a GPU, and neither sees what compiled code does inside a kernel.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from hf_tpsp import TPSPConfig

aten = torch.ops.aten
ITEM = 4  # bytes of an fp32 element, for the floors
# Formulas of FLOPs by operation. torch 2.13 lacks the CPU's fused attention, on which a simulation runs.
FLOPS_OF = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
# Kind of collective → bytes that one rank of t sends, as a multiple of (t - 1) / t times the whole tensor, by the ring
# algorithm. An all-reduce is a reduce-scatter and an all-gather.
RING_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_wrappers(types: Collection[type]) -> bool:
    """Whether an operation is still one on DTensors or the like. Its parts on plain tensors are what counts."""
    plain = Tensor.__torch_dispatch__
    return not all(t.__torch_dispatch__ is plain or issubclass(t, FakeTensor) for t in types)


@dataclass
class _Storage:
    key: int
    size: int  # bytes
    reference: weakref.ref


class TensorBytes(TorchDispatchMode):
    """Bytes of all tensors that come to life while the mode is active, from allocation until they are freed.

    A storage counts from the operation that returns it, unless that is an argument's, until its last reference is gone,
    and once for all its views. Those from before the mode (parameters, inputs) do not count; if one is resized, as FSDP2
    does to gather parameters and free them again, the change does. Not seen: scratch memory inside one operation.

    Time is the number of changes so far: `now` is the current moment, `timeline()[moment]` the bytes live then. `label`,
    set from outside, is noted with each storage that comes to life.
    """

    def __init__(self):
        super().__init__()
        self.label: str | None = None
        self.labels: list[str | None] = []  # of each storage, by key
        self.changes: list[tuple[int, int]] = []  # (key of the storage, bytes)
        self._storages: dict[int, _Storage] = {}  # by address

    @property
    def now(self) -> int:
        return len(self.changes)

    def timeline(self, without: Collection[int] = ()) -> list[int]:
        """Live bytes at each moment from 0 to `now`, not counting the storages with keys in `without`."""
        return list(accumulate((0 if key in without else change for key, change in self.changes), initial=0))

    def key(self, tensor: Tensor) -> int | None:
        """What stands for the storage of plain `tensor` in `timeline(without=…)`; None if it is not counted."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        return storage.key if storage else None

    def __enter__(self):
        self._resize = original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int):  # not an operation, so no mode sees it
            self._track(storage, already=storage.nbytes())
            original(storage, size)
            self._track(storage)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        self._storages.clear()  # and with them the references that would call `_freed`
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _has_wrappers(types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        storages = [tensor.untyped_storage() for tensor in tensors_in(result) if not tensor.is_meta]
        if any(storage._cdata not in self._storages for storage in storages):
            given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
            storages = [s for s in storages if s._cdata in self._storages or s._cdata not in given]
        for storage in storages:
            self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage, already: int = 0) -> None:
        """Note the size of `storage`. Of one that is new here, `already` bytes are not counted."""
        address = storage._cdata
        if address not in self._storages:
            reference = weakref.ref(storage, partial(self._freed, address))
            self._storages[address] = _Storage(len(self.labels), already, reference)
            self.labels.append(self.label)
        known = self._storages[address]
        if known.size != storage.nbytes():
            self.changes.append((known.key, storage.nbytes() - known.size))
            known.size = storage.nbytes()

    def _freed(self, address: int, reference: weakref.ref) -> None:
        storage = self._storages.pop(address)
        self.changes.append((storage.key, -storage.size))


@dataclass
class Traffic:
    """Collectives of one kind.

    Args:
        count: how many.
        size: bytes of the whole tensors: the output of an all-gather, the input of a reduce-scatter, the tensor of an
            all-reduce.
        wire: bytes that this rank sends for them, by the ring algorithm: `(t - 1) / t` of the size over `t` ranks, and
            twice that for an all-reduce.
    """

    count: int = 0
    size: int = 0
    wire: float = 0.0

    def add(self, kind: str, size: int, ranks: int, count: int = 1) -> None:
        """Count `count` collectives of `kind` over `ranks` ranks, together `size` bytes."""
        self.count += count
        self.size += size
        self.wire += RING_PASSES[kind] * size * (ranks - 1) / ranks

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.size + other.size, self.wire + other.wire)

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other * -1

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.count * times, self.size * times, self.wire * times)


class CollectiveBytes(TorchDispatchMode):
    """Number and bytes of the collectives of each kind. Those of a group of one rank do not count.

    `by_group` has them by `(ranks of the process group, kind)`, `traffic` by kind. Each counts `times` times.
    """

    def __init__(self):
        super().__init__()
        self.times = 1
        self.by_group: defaultdict[tuple[frozenset[int], str], Traffic] = defaultdict(Traffic)

    @property
    def traffic(self) -> dict[str, Traffic]:
        total = defaultdict(Traffic)
        for (_, kind), found in self.by_group.items():
            total[kind] = total[kind] + found
        return dict(total)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _has_wrappers(types):
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (kind := _kind(func)) is not None:
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
            if (group := _group(given)).size() > 1:
                size = max(sum(t.nbytes for t in tensors_in(value)) for value in (*given.values(), result))
                ranks = frozenset(dist.get_process_group_ranks(group))
                self.by_group[ranks, kind].add(kind, size * self.times, group.size(), self.times)
        return result


class Flops(TorchDispatchMode):
    """Floating-point operations of matrix products and attention, in `total`, by torch's own table of formulas.

    Causal attention counts in full, as it does there and in most published figures. Each counts `times` times.
    """

    def __init__(self):
        super().__init__()
        self.times = 1
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _has_wrappers(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if (formula := FLOPS_OF.get(func._overloadpacket)) is not None:
            self.total += self.times * formula(*args, **(kwargs or {}), out_val=result)
        return result


def _kind(func: torch._ops.OpOverload) -> str | None:
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = func._opname.replace("_", "")  # allgatherbase, allgatherintotensor, …
    return next((kind for kind in RING_PASSES if name.startswith(kind.replace("-", ""))), None)


def _group(arguments: dict) -> dist.ProcessGroup:
    """The process group among a collective's arguments, by name: c10d has the group in a box of TorchScript's."""
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"])
    group = arguments["group_name"]
    return _resolve_process_group(group) if isinstance(group, str) else group


# ---- a step of a causal language model -------------------------------------------------------------------------------


def step(model: nn.Module, ids: Tensor) -> float:
    """Forward and backward. Returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


@dataclass
class Moments:
    """Moments of a `TensorBytes` in one step, and the keys of the gradients of the head's weight."""

    layers: dict[int, int] = field(default_factory=dict)  # start of the forward of each decoder layer
    head: int = 0  # start of the head
    head_done: int = 0  # its input's gradient is there
    head_gradients: set[int] = field(default_factory=set)


def local_part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextmanager
def moments_of(model: PreTrainedModel, memory: TensorBytes) -> Iterator[Moments]:
    """Note the moments of the step that is made inside."""
    moments = Moments()

    def settled() -> int:
        time.sleep(0.02)  # gloo's threads let go of what they have sent a moment after it has arrived
        return memory.now

    def start_layer(index: int) -> None:
        moments.layers.setdefault(index, settled())  # checkpointing starts it once more in backward

    def start_head(head: nn.Linear, args: tuple[Tensor]) -> None:
        moments.head = settled()
        args[0].register_hook(finish_head)
        handles.append(head.weight.register_hook(note_gradient))

    def finish_head(grad: Tensor) -> None:
        moments.head_done = memory.now

    def note_gradient(grad: Tensor) -> None:
        moments.head_gradients.add(memory.key(local_part(grad)))

    handles = [model.lm_head.register_forward_pre_hook(start_head)]
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: start_layer(index)))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def measure_step(model: PreTrainedModel, ids: Tensor) -> dict:
    """Bytes that one step holds and sends, on this rank.

    `peak_bytes`: most tensor bytes at once above parameters, buffers, inputs and gradients: activations, temporaries,
    and the parameters that FSDP2 has gathered. A gradient is whatever storage ends as a parameter's `.grad`; those are
    `gradient_bytes`.

    `saved_bytes_per_layer`: what is live at the start of a middle layer's successor, above what was live at its own
    start. A layer that FSDP2 gathers has been freed again by then and its successor gathered, which cancels.

    `loss_peak_bytes`: most tensor bytes at once from the start of the head to the gradient of its input, above those
    at its start (hidden states and everything before them) and the gradient of the head's weight, which is recognized
    as the storage that arrives at the weight. The whole model runs, because the step's own order decides what is live
    at the same time; no layer allocates or frees anything in between.
    """
    with CollectiveBytes() as sent, TensorBytes() as held, moments_of(model, held) as moments:
        loss = step(model, ids)
        gradients = [local_part(p.grad) for p in model.parameters()]
        keys = {held.key(grad) for grad in gradients}
        live = held.timeline(without=keys)
        in_loss = held.timeline(without=keys | moments.head_gradients)
    model.zero_grad()
    middle = (len(moments.layers) - 1) // 2
    return {
        "loss": loss,
        "peak_bytes": max(live),
        "gradient_bytes": sum(grad.nbytes for grad in gradients),
        "saved_bytes_per_layer": live[moments.layers[middle + 1]] - live[moments.layers[middle]],
        "loss_peak_bytes": max(in_loss[moments.head : moments.head_done + 1]) - in_loss[moments.head],
        "collectives": sent.traffic,
    }


def saved_by_a_layer(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes that a middle decoder layer keeps for backward, on this rank, from a forward alone; also on fake tensors."""
    with TensorBytes() as held, moments_of(model, held) as moments:
        stream = model.model(input_ids=ids).last_hidden_state
        live = held.timeline()
    del stream  # kept the graph until here
    middle = (len(moments.layers) - 1) // 2
    return live[moments.layers[middle + 1]] - live[moments.layers[middle]]


# ---- the least that theory allows ------------------------------------------------------------------------------------


CHECK_BYTES = 6 * 8
"""What a rank sends of its batch to be compared (`guard.py`)."""


def saved_activation_bytes(
    config: PreTrainedConfig, tokens: int, ranks: int, itemsize: int = ITEM, fused_activation: bool = False
) -> float:
    """Bytes of activations that one rank keeps of one decoder layer for backward, by Megatron's TP + SP scheme.

    Korthikanti et al. 2022 (arXiv 2205.05198), counted again for a gated MLP, grouped-query attention, no dropout and a
    fused attention. Elements per token, all split over the ranks, with `h` the hidden size, `q = heads * head_dim`,
    `kv = kv_heads * head_dim` and `f` the intermediate size:

        2 h           inputs of the two norms
        2 h           inputs of attention and MLP: each rank's shard, gathered again in backward
        q + 2 kv      query, key and value
        q             output of attention, the input of o_proj
        4 f           gate, up, act(gate), and act(gate) * up, the input of down_proj
        3 f           the same with activation and product in one kernel, which computes act(gate) again in backward

    With q = h: `(6 h + 2 kv + 4 f) / ranks`. Left out: the log-sum-exp of each token and head, the norms' factors.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    products = 3 if fused_activation else 4
    elements = 4 * config.hidden_size + 2 * q + 2 * kv + products * config.intermediate_size
    return tokens * elements * itemsize / ranks


def collective_floor(
    config: PreTrainedConfig, tokens: int, choices: TPSPConfig, itemsize: int = ITEM, replicated: int | None = None
) -> dict[str, Traffic]:
    """The collectives over the TP ranks that the plan of hf_tpsp needs in forward and backward, and no more.

    Args:
        tokens: of one TP group.
        itemsize: bytes of an element of the stream.
        replicated: bytes of the gradients that are summed over the TP ranks; those of two norms in each layer, and the
            last, if it is not given.
    """
    stream, layers, ranks = tokens * config.hidden_size * itemsize, config.num_hidden_layers, choices.tp_size
    if replicated is None:
        replicated = (2 * layers + 1) * config.hidden_size * ITEM
    floor = defaultdict(Traffic)

    def need(kind: str, count: int, size: int) -> None:
        floor[kind].add(kind, count * size, ranks, count)

    # In each layer two regions, attention and MLP, each: gather, reduce-scatter; and their gradients the other way.
    need("all-gather", 4 * layers, stream)
    need("reduce-scatter", 4 * layers, stream)
    if choices.regather_inputs or choices.activation_checkpointing != "none":  # the inputs of both, again in backward
        need("all-gather", 2 * layers, stream)
    if choices.activation_checkpointing == "full":  # attention's output; the MLP's is not needed
        need("reduce-scatter", layers, stream)
    need("reduce-scatter", 1, stream)  # embedding
    need("all-gather", 1, stream)
    need("all-gather", 1, stream)  # head
    # The chunked loss adds the gradients of its hidden states up in fp32, and sends them so.
    need("reduce-scatter", 1, stream // itemsize * ITEM if choices.loss == "chunked" else stream)
    if choices.loss == "chunked":  # the log-sum-exp of each rank and the label's logit
        need("all-gather", 1, 2 * tokens * ranks * ITEM)
    else:  # maximum, sum of exponentials, the label's logit
        need("all-reduce", 3, tokens * ITEM)
    if ranks == choices.world_size:
        need("all-gather", 1, CHECK_BYTES * ranks)
    need("all-reduce", 1, replicated)  # gradients of all norms
    return dict(floor)


def check_floor(choices: TPSPConfig) -> dict[tuple[str, str], Traffic]:
    """The check that all ranks were fed the same batch, over `(mesh dim, kind)`: `"world"`, unless all ranks are in one dim.
    Over TP it is part of `collective_floor`."""
    world = choices.world_size
    if world == choices.tp_size:
        return {}
    dim = next((d for d in ("dp_shard", "dp_replicate") if getattr(choices, f"{d}_size") == world), "world")
    floor = {(dim, "all-gather"): Traffic()}
    floor[dim, "all-gather"].add("all-gather", CHECK_BYTES * world, world)
    return floor


def fsdp_floor(
    units: list[int], choices: TPSPConfig, itemsize: int, gradient_itemsize: int
) -> dict[tuple[str, str], Traffic]:
    """The collectives that FSDP2 needs over `("dp_shard", kind)` and `("dp_replicate", kind)`, without padding.

    Args:
        units: elements of the parameters of each layer, and last of the root, on one TP rank.
        itemsize: bytes of a gathered element.
        gradient_itemsize: bytes of an element of a gradient that is reduced.
    """
    floor = defaultdict(Traffic)
    *layers, last, root = units
    gathered = layers + layers + [last, root] if choices.reshard_after_forward else units
    if (ranks := choices.dp_shard_size) > 1:
        floor["dp_shard", "all-gather"].add("all-gather", sum(gathered) * itemsize, ranks, len(gathered))
        floor["dp_shard", "reduce-scatter"].add("reduce-scatter", sum(units) * gradient_itemsize, ranks, len(units))
    if choices.dp_replicate_size > 1:
        size = sum(units) * gradient_itemsize // choices.dp_shard_size
        floor["dp_replicate", "all-reduce"].add("all-reduce", size, choices.dp_replicate_size, len(units))
    return dict(floor)


def wire_bytes(traffic: dict[str, Traffic]) -> float:
    """Bytes that one rank sends, all kinds together."""
    return sum(kind.wire for kind in traffic.values())
