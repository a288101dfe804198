"""One rank's training step, recorded: what it holds, moment by moment, what it sends, what it computes.

`record_step` records a real rank or a simulated one alike. `simulate_step` does the latter, with no device, no weights and
no other ranks: the model is built and sharded on meta, by the same `parallelize`, in a fake process group, and the step runs
on fake tensors, which have shapes and no values.

A model of 80 layers is not run whole. Its layers repeat in a pattern (of one, or of two where sliding and full attention
alternate), so two shallow models, one pattern apart, are recorded and the difference is put in as often as the depth asks
for. The step is cut into segments at the borders of the layers, for what happens *inside* the layers repeats, and
what is live around them adds up: the peak is looked for afterwards, in the step of full depth, wherever it then lies.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .chunked import ChunkedHead
from .collectives import stream_spec
from .compat import replace, unsharded_numels
from .config import TPSPConfig
from .measure import CollectiveBytes, Flops, TensorBytes, Traffic, check_floor, collective_floor, fsdp_floor, local_part
from .parallelize import MESH_DIMS, parallelize, parallelized_model
from .plan import decoder_layers
from .trainer import keep_fp32_masters

CATEGORIES = ("parameters", "optimizer", "gradients", "activations", "loss", "gathered", "temporaries")
"""What the live bytes of a moment are made of.

    parameters   this rank's shards, masters included, and buffers
    optimizer    its state
    gradients    this rank's shards
    activations  made in the forward of a layer (or of the embedding), and still there when it is over
    loss         made between the last layer's forward and its backward; the head's unsharded gradient is one of them
    gathered     FSDP2's: gathered parameters, and the buffers of its all-gathers and reduce-scatters
    temporaries  all others: gone with the layer that made them, unsharded gradients, what is computed again
"""
Bytes = np.ndarray  # int64 [len(CATEGORIES)]


@dataclass(frozen=True)
class Segment:
    """A stretch of the step, relative to what is live at its start.

    Args:
        name: where in the step, as one says it: "forward of layer 3".
        change: live bytes at its end.
        rise: live bytes at the moment when they are most.
        most: of each category, live bytes at the moment when it is most.
    """

    name: str
    change: Bytes
    rise: Bytes
    most: Bytes


@dataclass(frozen=True)
class Step:
    """A step of training on one rank: forward, backward, optimizer, `zero_grad`.

    Args:
        start: bytes live before it.
        segments: `[embedding, forward of each layer, head and loss, backward of each layer, rest of backward, optimizer]`.
        traffic: collectives by `(mesh dim, kind)`.
        flops: of matrix products and attention on this rank.
        layers: number of decoder layers.
        floor: the least traffic that theory allows; empty where there is no formula.
    """

    start: Bytes
    segments: list[Segment]
    traffic: dict[tuple[str, str], Traffic]
    flops: int
    layers: int
    floor: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def _levels(self) -> Iterator[tuple[Segment, Bytes]]:
        """Each segment, with what is live at its start."""
        return zip(self.segments, accumulate((s.change for s in self.segments[:-1]), initial=self.start), strict=True)

    def peak(self) -> tuple[str, Bytes]:
        """Where in the step most bytes are live, and these."""
        return max(((s.name, level + s.rise) for s, level in self._levels()), key=lambda peak: peak[1].sum())

    def most(self) -> Bytes:
        """Of each category, its own most: not all at the same moment."""
        return np.max([level + s.most for s, level in self._levels()], axis=0)


# ---- recording -------------------------------------------------------------------------------------------------------


def _bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {(s := local_part(t).untyped_storage())._cdata: s.nbytes() for t in tensors}
    return sum(storages.values())


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def _outside_modes(original: Callable) -> Callable:
    @functools.wraps(original)
    def run(*args, **kwargs):
        with _disable_current_modes():
            return original(*args, **kwargs)

    return run


@contextmanager
def _told_apart(memory: TensorBytes) -> Iterator[None]:
    """Label what FSDP2's collectives allocate "gathered", and keep from `memory` the tensors by which DTensor works out the
    shape of a result when it meets a new operation. torch 2.13 (fsdp/_fully_shard/_fsdp_param_group.py,
    tensor/_sharding_prop.py) has no public place for either: delete when it has, or marks such tensors."""

    def label(original: Callable) -> Callable:
        @functools.wraps(original)
        def labelled(*args, **kwargs):
            before, memory.label = memory.label, "gathered"
            try:
                return original(*args, **kwargs)
            finally:
                memory.label = before

        return labelled

    restore = replace(
        (fsdp, "foreach_all_gather", label),
        (fsdp, "foreach_reduce", label),
        (fsdp.FSDPParamGroup, "wait_for_unshard", label),
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", _outside_modes),
    )
    try:
        yield
    finally:
        restore()


@contextmanager
def _alike_chunks_once(*counters: CollectiveBytes | Flops) -> Iterator[None]:
    """On fake tensors, run the first, the second and the last chunk of the loss, and count the second for all between."""

    def abridge(original: Callable) -> Callable:
        def chunks(self: ChunkedHead, hidden: Tensor) -> Iterator[slice]:
            every = list(original(self, hidden))
            shown = every if len(every) < 4 or not isinstance(hidden, FakeTensor) else [*every[:2], every[-1]]
            for index, chunk in enumerate(shown):
                for counter in counters:
                    counter.times = len(every) - 2 if index == 1 and shown is not every else 1
                yield chunk
            for counter in counters:
                counter.times = 1

        return chunks

    restore = replace((ChunkedHead, "chunks", abridge))
    try:
        yield
    finally:
        restore()


def record_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], settle: float = 0
) -> Step:
    """One step of `model`, which `parallelize` has sharded and `optimizer` has stepped before.

    Args:
        settle: seconds to wait at each mark, for gloo's threads to let go of what they have sent.
    """
    inner = parallelized_model(model)
    layers = decoder_layers(inner)
    names, marks = ["embedding"], [0]
    start = np.zeros(len(CATEGORIES), np.int64)
    start[CATEGORIES.index("parameters")] = _bytes_of([*model.parameters(), *model.buffers()])
    start[CATEGORIES.index("optimizer")] = _bytes_of(_state_of(optimizer))
    start[CATEGORIES.index("activations")] = _bytes_of(list(batch.values()))

    def mark(name: str) -> None:
        if name not in names:  # a checkpointed layer runs once more in backward
            time.sleep(settle)
            names.append(name)
            marks.append(memory.now)

    def enter(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mark(f"forward of layer {index}")
        if index == 0 and (stream := args[0] if args else kwargs["hidden_states"]).requires_grad:
            stream.register_hook(lambda grad: mark("embedding's backward and replicated gradients"))

    def leave(index: int, module: nn.Module, args: tuple, output: object) -> None:
        if index == len(layers) - 1:
            mark("head and loss")
        stream = output[0] if isinstance(output, tuple) else output
        if stream.requires_grad:  # not in the first of a checkpointed layer's two forwards without gradients
            stream.register_hook(lambda grad: mark(f"backward of layer {index}"))

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(functools.partial(enter, index), with_kwargs=True))
        handles.append(layer.register_forward_hook(functools.partial(leave, index)))
    try:
        gc.disable()  # so that what happens in a step does not depend on how much garbage there was before
        sent, computed, memory = CollectiveBytes(), Flops(), TensorBytes()
        with sent, computed, memory, _told_apart(memory), _alike_chunks_once(sent, computed):
            model(**batch).loss.backward()
            time.sleep(settle)
            gradients = {memory.key(local_part(p.grad)) for p in model.parameters() if p.grad is not None}
            mark("optimizer step")
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(settle)
            end = memory.now
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
    if "embedding's backward and replicated gradients" not in names:  # frozen: no gradient arrives there
        names.insert(-1, "embedding's backward and replicated gradients")
        marks.insert(-1, marks[-1])
    segments = _segments(memory, names, [*marks, end], gradients, len(layers))
    mesh = inner._tpsp.mesh
    dims = {frozenset(range(dist.get_world_size())): "world"}  # of the batch check, unless a dim has all ranks
    dims |= {frozenset(dist.get_process_group_ranks(mesh[dim].get_group())): dim for dim in MESH_DIMS}
    traffic = {(dims[group], kind): found for (group, kind), found in sent.by_group.items()}
    return Step(start, segments, traffic, computed.total, len(layers))


def _segments(
    memory: TensorBytes, names: list[str], marks: list[int], gradients: set[int], layers: int
) -> list[Segment]:
    """The changes of `memory` between `marks`, sorted into `CATEGORIES`."""
    number = np.searchsorted(marks, np.arange(memory.now), side="right") - 1  # segment of each change
    born: dict[int, int] = {}
    died: dict[int, int] = {}
    for moment, (key, size) in enumerate(memory.changes):
        born.setdefault(key, number[moment])
        if size < 0:
            died[key] = number[moment]
    loss, optimizer = layers + 1, len(names) - 1

    def category(key: int) -> int:
        if key in gradients:
            name = "gradients"
        elif memory.labels[key] == "gathered":
            name = "gathered"
        elif born[key] == loss:
            name = "loss"
        elif born[key] < loss and died.get(key, optimizer) > born[key]:
            name = "activations"
        else:
            name = "temporaries"
        return CATEGORIES.index(name)

    categories = {key: category(key) for key in born}
    segments = []
    for name, begin, end in zip(names, marks, marks[1:], strict=False):
        levels = np.zeros((end - begin + 1, len(CATEGORIES)), np.int64)
        for moment in range(begin, end):
            key, size = memory.changes[moment]
            levels[moment - begin + 1, categories[key]] = size
        levels = levels.cumsum(0)
        segments.append(Segment(name, levels[-1], levels[levels.sum(1).argmax()], levels.max(0)))
    return segments


def deepen(shallow: Step, deep: Step, layers: int) -> Step:
    """The step of a model with `layers` layers, from those of two that are one pattern of layers apart."""
    pattern = deep.layers - shallow.layers
    times = (layers - deep.layers) // pattern
    assert deep.layers + times * pattern == layers

    def outward(a, b):
        """What is `a` in the shallow step and `b` in the deep one."""
        return b + (b - a) * times

    def outside(name: str, a: Segment, b: Segment) -> Segment:
        return Segment(name, outward(a.change, b.change), outward(a.rise, b.rise), outward(a.most, b.most))

    n, middle = deep.layers, deep.layers - 1  # the last layer is another: its weights stay gathered
    forward, backward = deep.segments[1 : n + 1], deep.segments[n + 2 : 2 * n + 2][::-1]

    def repeated(segments: list[Segment], name: str) -> list[Segment]:
        """Layer 0 first."""
        start = middle - pattern
        order = [*range(middle), *(start + i % pattern for i in range(times * pattern)), *range(middle, n)]
        return [dataclasses.replace(segments[index], name=f"{name} of layer {at}") for at, index in enumerate(order)]

    first, loss, rest, last = (
        outside(b.name, a, b)
        for a, b in (
            (shallow.segments[0], deep.segments[0]),
            (shallow.segments[shallow.layers + 1], deep.segments[n + 1]),
            (shallow.segments[-2], deep.segments[-2]),
            (shallow.segments[-1], deep.segments[-1]),
        )
    )
    segments = [first, *repeated(forward, "forward"), loss, *repeated(backward, "backward")[::-1], rest, last]
    traffic, floor = (
        {key: outward(before.get(key, Traffic()), found) for key, found in after.items()}
        for before, after in ((shallow.traffic, deep.traffic), (shallow.floor, deep.floor))
    )
    return Step(
        outward(shallow.start, deep.start), segments, traffic, outward(shallow.flops, deep.flops), layers, floor
    )


# ---- a rank of a simulated world -------------------------------------------------------------------------------------


def fused_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention `[batch, heads, seq, head_dim]` without scores or a mask. transformers builds the mask, seq² large,
    when tensors are fake; with real ones it leaves it out, as here."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fused", fused_attention)
AttentionMaskInterface.register("fused", lambda *args, **kwargs: None)

# Not SGD's fused form: torch 2.13 (optim/sgd.py, `_fused_sgd`) runs it on real tensors of the global shapes when DTensors
# are fake. Use it when it has a meta kernel.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),  # the Trainer's default
    "sgd": functools.partial(torch.optim.SGD, foreach=False),
    "sgd_momentum": functools.partial(torch.optim.SGD, momentum=0.9, foreach=False),
}
DTYPES = ("bf16", "fp32", "pure_bf16")
ATTENTION = ("fused", "eager")


@dataclass(frozen=True)
class Job:
    """What is trained, beside the mesh.

    Args:
        batch: rows of one rank's micro-batch (of one TP group's, that is).
        seq: tokens of a row.
        dtype: "bf16", computing in bf16 with fp32 master weights and reduction; "fp32"; or "pure_bf16", all in bf16.
        optim: a key of `OPTIMIZERS`.
        lora: rank of LoRA adapters on every linear layer of the decoder layers, over a frozen base in the dtype that is
            computed in; None to train all weights.
        attention: "fused", without scores; or "eager", transformers' own, which keeps them.
    """

    seq: int
    batch: int = 1
    dtype: str = "bf16"
    optim: str = "adamw"
    lora: int | None = None
    attention: str = "fused"

    def __post_init__(self):
        for name in ("seq", "batch", "lora"):
            value = getattr(self, name)
            if not (value is None and name == "lora") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name, allowed in (("dtype", DTYPES), ("optim", tuple(OPTIMIZERS)), ("attention", ATTENTION)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")


@contextmanager
def simulated_world(size: int, backend: str = "nccl") -> Iterator[None]:
    """Be rank 0 of `size` ranks that do not exist, which send as those of `backend` do.

    Raises:
        ValueError: this process is a rank of a real world.
    """
    if dist.is_initialized():
        raise ValueError("A world is simulated in a process of its own; this one has started a process group already.")
    state, variable = dict(PartialState._shared_state), os.environ.get("ACCELERATE_USE_CPU")
    PartialState._shared_state.clear()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    restore = replace((dist, "get_backend", lambda original: lambda group=None: backend))
    try:
        yield
    finally:
        restore()
        dist.destroy_process_group()
        stream_spec.cache_clear()  # both know meshes by their shape, and would hand out those whose groups are gone
        _clear_sharding_prop_cache()  # delete when torch compares meshes by their groups too (2.13 does not)
        PartialState._shared_state.clear()
        PartialState._shared_state.update(state)
        if variable is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = variable


def build_on_meta(config: PreTrainedConfig, job: Job) -> PreTrainedModel:
    """The model as a script would load it, without weights. Raises `ValueError` if it is no causal language model."""
    low = job.dtype == "pure_bf16" or (job.dtype == "bf16" and job.lora)
    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if low else torch.float32, attn_implementation=job.attention
            )
    except ValueError as error:
        raise ValueError(
            f"{config.model_type} is not a causal language model that transformers can build: {error}"
        ) from error
    return model.train()


def simulate_step(config: PreTrainedConfig, choices: TPSPConfig, job: Job) -> Step:
    """A step of rank 0 of the simulated world. The model is run whole.

    Raises:
        ValueError: the mesh does not fit the world or the model, or hf_tpsp does not support the model.
    """
    model = build_on_meta(config, job)
    if job.lora:
        from peft import LoraConfig, get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, LoraConfig(r=job.lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    parallelize(model, choices)
    if choices.mixed_precision == "bf16":
        keep_fp32_masters(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS[job.optim](trained, lr=1e-3)
        for parameter in trained:  # a step of zeros: its state is there before the step that counts
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        ids = torch.zeros(job.batch, job.seq, dtype=torch.long)
        step = record_step(model, optimizer, {"input_ids": ids, "labels": ids.clone()})
    return dataclasses.replace(step, floor=_floor(model, choices, job))


def _floor(model: nn.Module, choices: TPSPConfig, job: Job) -> dict[tuple[str, str], Traffic]:
    if job.lora or not choices.sequence_parallel:
        return {}
    master = next(model.parameters()).dtype.itemsize
    computed = 2 if choices.mixed_precision == "bf16" else master
    sums = model._tpsp.gradients.summed()
    replicated = sum(local_part(p).numel() for p in sums) * master
    tp = collective_floor(model.config, job.batch * job.seq, choices, computed, replicated)
    if choices.tp_size == 1:
        tp = {}
    layers = decoder_layers(model)
    units = [sum(unsharded_numels(layer)) for layer in layers]
    units.append(sum(unsharded_numels(model)) - sum(units))
    floor = {("tp", kind): found for kind, found in tp.items()}
    floor |= fsdp_floor(units, choices, computed, max(master, computed))
    for key, traffic in check_floor(choices).items():
        floor[key] = floor.get(key, Traffic()) + traffic
    return floor


# ---- the pattern of the layers ---------------------------------------------------------------------------------------


def layer_kinds(model: PreTrainedModel) -> list[tuple]:
    """For each decoder layer what tells it from others: its modules, its parameters' shapes, its entry in the config."""
    layers = decoder_layers(model)
    lists = _lists_of(model.config.get_text_config())
    return [
        (
            tuple((name, type(module).__name__) for name, module in layer.named_modules()),
            tuple(tuple(p.shape) for p in layer.parameters()),
            tuple(str(values[index]) for values in lists.values()),
        )
        for index, layer in enumerate(layers)
    ]


def _lists_of(config: PreTrainedConfig) -> dict[str, list]:
    """The config's lists with an entry for each layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
    }


def depths(kinds: list) -> tuple[int, int] | None:
    """Two depths, one pattern apart, from which `deepen` can make the whole; None if it must be run whole.

    With `n` layers cut off at the end, the others are what they were, and so is the last one if whole patterns were cut.
    """
    whole = len(kinds)
    for pattern in range(1, whole):
        first = next(  # from here on the pattern repeats
            i for i in range(whole) if all(a == b for a, b in zip(kinds[i:], kinds[i + pattern :], strict=False))
        )
        least = first + 3  # the first two layers and the last are unlike others in what FSDP2 has fetched ahead
        shallow = least + (whole - least) % pattern
        if shallow + 2 * pattern <= whole:
            return shallow, shallow + pattern
    return None


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """`config` with its first `layers` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, values in _lists_of(text).items():
        setattr(text, name, list(values[:layers]))
    text.num_hidden_layers = layers
    return config


def simulate(config: PreTrainedConfig, choices: TPSPConfig, job: Job, kinds: list | None = None) -> Step:
    """A step of rank 0 of the simulated world, at the depth of `config`, from shallow models where the layers repeat.

    Args:
        kinds: `layer_kinds` of the model, if they are known.
    """
    kinds = kinds or layer_kinds(build_on_meta(config, job))
    if (found := depths(kinds)) is None:
        return simulate_step(config, choices, job)
    shallow, deep = (simulate_step(shortened(config, n), choices, job) for n in found)
    return deepen(shallow, deep, len(kinds))
