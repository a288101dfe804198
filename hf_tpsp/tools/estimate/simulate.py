"""One rank's training step, recorded: what it holds, moment by moment, what it sends, what it computes.

`record_step` records a real rank or a simulated one. `simulate_step` simulates one, with no device, no weights and no
other ranks: the model is built and sharded on meta, by the same `parallelize`, in a fake process group, and the step
runs on fake tensors, which have shapes and no values.

A model of 80 layers is not run whole. Its layers repeat in a pattern (of one layer, or of two where sliding and full
attention alternate). So two shallow models, one pattern apart, are recorded, and their difference is added as often as
the depth asks for. The step is cut into segments at the borders of the layers, because what happens *inside* the layers
repeats, while what is live around them adds up. The peak is then looked for in the step of full depth.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...api import parallelize
from ...collectives import stream_spec
from ...config import TPSPConfig
from ...inputs import choice, whole_number
from ...sharding import keep_fp32_masters
from ...state import record_of
from ...structure import decoder_layers
from ...upstream.accelerate import cpu_state_of_its_own
from ...upstream.torch.dtensor import local_part
from ...upstream.torch.fake import FakeTensorMode, fake_world, sgd
from ...upstream.torch.fsdp2 import unsharded_numels
from ...upstream.transformers import fused_attention
from ..source import on_meta
from .depth import deepen, depths, layer_kinds, shortened
from .floors import Traffic, check_floor, collective_floor, fsdp_floor
from .step import Step, record_step

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # This is the Trainer's default.
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": sgd,
    "sgd_momentum": functools.partial(sgd, momentum=0.9),
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
            if (value := getattr(self, name)) is not None or name != "lora":
                object.__setattr__(self, name, whole_number(name, value))
        for name, allowed in (("dtype", DTYPES), ("optim", OPTIMIZERS), ("attention", ATTENTION)):
            choice(name, getattr(self, name), allowed)


@contextmanager
def simulated_world(size: int, backend: str = "nccl") -> Iterator[None]:
    """Be rank 0 of `size` ranks that do not exist, with the collectives that ranks of `backend` would use.

    Raises:
        ValueError: this process is a rank of a real world.
    """
    if dist.is_initialized():
        raise ValueError("A world is simulated in a process of its own; this one has started a process group already.")
    with cpu_state_of_its_own(), fake_world(size, backend), fused_attention():
        try:
            yield
        finally:
            # The cache tells meshes apart by their shape, and would return those whose groups are gone.
            stream_spec.cache_clear()


def build_on_meta(config: PreTrainedConfig, job: Job) -> PreTrainedModel:
    """The model as a script would load it, without weights. Raises `ValueError` if it cannot be built."""
    low = job.dtype == "pure_bf16" or (job.dtype == "bf16" and job.lora)
    config = copy.deepcopy(config)
    config.use_cache = False
    with fused_attention():
        model = on_meta(config, dtype=torch.bfloat16 if low else torch.float32, attn_implementation=job.attention)
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
        # A step with zero gradients makes the optimizer's state, before the step that is recorded.
        for parameter in trained:
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
    sums = record_of(model).tp.gradients.summed()
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
