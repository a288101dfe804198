"""accelerate: FSDP on the CPU, and what it counts, deals and gathers once per process."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import accelerate.state
import torch
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, recursively_apply
from torch import nn
from torch.utils.data import DataLoader

from ..inputs import environment_flag
from ..patching import set_environment
from ..state import is_parallelized
from .torch.unpickling import reads_restricted


def use_cpu_if_alone() -> Callable[[], None]:
    """Have accelerate run the ranks on the CPU if there is no accelerator. Returns the function that undoes it.

    accelerate 1.15 (utils/launch.py, `prepare_multi_gpu_env`) does not export ACCELERATE_USE_CPU, and without it the
    ranks of a machine without accelerators silently become single processes. Delete when it does.
    """
    alone = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    return set_environment({"ACCELERATE_USE_CPU": "true"} if alone else {})


@contextlib.contextmanager
def cpu_state_of_its_own() -> Iterator[None]:
    """While inside, accelerate has another state, on the CPU, which will find the process group that exists then.

    accelerate 1.15 (state.py, `PartialState`) keeps one state for a process, and has no public way to set it aside.
    """
    before = dict(PartialState._shared_state)
    PartialState._shared_state.clear()
    restore = set_environment({"ACCELERATE_USE_CPU": "true"})
    try:
        yield
    finally:
        restore()
        PartialState._shared_state.clear()
        PartialState._shared_state.update(before)


def forget_state() -> None:
    """Have accelerate start anew, as in a new process. accelerate 1.15 has no public way to."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepare_beside_sharded(accelerator: Accelerator, args: tuple, is_sharded: list[bool]) -> object:
    """`Accelerator.prepare` of `args`, which leaves the sharded models among them as they are.

    accelerate 1.15 (accelerator.py, `_prepare_tp` and `_prepare_fsdp2`) cannot take a model that is sharded already: it
    imports a class that transformers 5.23 does not have, matches parameters by data pointer (empty shards collide), and
    wants an optimizer beside every model (so `evaluate()` before `train()` raises). Nothing is left to shard, so the
    model is only noted, and the rest is prepared as always. Delete when `prepare` leaves sharded models alone.
    """
    for model in (arg for arg, ours in zip(args, is_sharded, strict=True) if ours):
        if not any(model is known for known in accelerator._models):
            accelerator._models.append(model)
    result = args
    # Schedulers are prepared in the second pass, because they need the prepared optimizers.
    for first_pass in (True, False):
        result = tuple(
            arg if ours else accelerator._prepare_one(arg, first_pass=first_pass)
            for arg, ours in zip(result, is_sharded, strict=True)
        )
    for item in result:
        if isinstance(item, (nn.Module, AcceleratedOptimizer, AcceleratedScheduler, DataLoader)):
            item._is_accelerate_prepared = True
    return result if len(result) > 1 else result[0]


def sharded_models(accelerator: Accelerator) -> list[nn.Module]:
    """The models that `save_state` would save and that hf_tpsp has sharded. accelerate 1.15 has no public list of them."""
    return [model for model in accelerator._models if is_parallelized(model)]


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether each rank writes its own shard, as `SHARDED_STATE_DICT` says, or rank 0 all of them."""
    plugin = accelerator.state.fsdp_plugin
    return plugin is not None and "SHARDED" in str(plugin.state_dict_type)


def _patch_accelerator_state(original):
    """accelerate 1.15 (state.py, `AcceleratorState.__init__`) knows FSDP only on accelerators: gloo ranks on the CPU
    are refused, although FSDP2 runs on them. Delete when MULTI_CPU is in that list."""

    @functools.wraps(original)
    def __init__(self, *args, cpu=False, **kwargs):
        cpu = cpu or environment_flag("ACCELERATE_USE_CPU")
        if accelerate.state.PartialState._shared_state == {} and cpu:
            accelerate.state.PartialState(cpu)
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            # The original `__init__` turns this into FSDP before it returns.
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, cpu=cpu, **kwargs)

    return __init__


def _patch_dp_shard_enabled(original):
    """accelerate 1.15 (parallelism_config.py, `_validate_accelerator`) refuses FSDP with `dp_shard_size=1`, so pure TP
    has no sharded checkpoints. A `dp_shard` dim of size 1 is an ordinary mesh dim. Delete when it is accepted."""
    return property(lambda self: original.fget(self) or self.tp_size > 1)


def _patch_dispatch_batches(original):
    """accelerate 1.15 (data_loader.py, `DataLoaderDispatcher`, its default for an `IterableDataset`) gives the same
    batch to all ranks if there is a TP dim, also to ranks of different TP groups. Here each rank reads the dataset and
    keeps its own rows. Delete when it deals by the mesh."""

    def dispatch_batches(self):
        asked = original.fget(self)
        if not self.parallelism_config or self.parallelism_config.tp_size == 1:
            return asked
        if asked:
            raise ValueError(
                "dispatch_batches=True does not deal batches by the mesh of hf_tpsp. Leave it out: each rank then reads the "
                "dataset and keeps its own rows."
            )
        return False

    return property(dispatch_batches)


def _patch_scheduler(original):
    """accelerate 1.15 (scheduler.py, `AcceleratedScheduler.step`) steps once for each process, because it assumes that
    each had a batch of its own. TP ranks share a batch. Delete when it divides by the TP size."""

    @functools.wraps(original)
    def step(self, *args, **kwargs):
        mesh = accelerate.state.AcceleratorState().parallelism_config
        shared = accelerate.state.PartialState._shared_state
        processes = shared["num_processes"]
        shared["num_processes"] = processes // (mesh.tp_size if mesh else 1)
        try:
            original(self, *args, **kwargs)
        finally:
            shared["num_processes"] = processes
            # AcceleratorState has a copy of the shared values, and takes them over when it is made.
            accelerate.state.AcceleratorState()

    return step


def _patch_gather_for_metrics(original):
    """accelerate 1.15 (accelerator.py, `gather_for_metrics`) gathers each sample once per TP rank, and then cuts the
    copies of the last batch in the wrong place. Here the rows of one rank of each TP group are kept. Delete when it
    gathers over the data-parallel ranks only."""

    @functools.wraps(original)
    def gather_for_metrics(self, input_data, use_gather_object=False):
        tp_size = self.parallelism_config.tp_size if self.parallelism_config else 1
        if tp_size == 1:
            return original(self, input_data, use_gather_object)

        def gather_once(data):
            # The rows come in the order of the ranks, and tp is the innermost mesh dim.
            gathered = type(self).gather(self, data)
            return recursively_apply(
                lambda t: t.unflatten(0, (self.num_processes // tp_size, tp_size, -1))[:, 0].flatten(0, 1), gathered
            )

        self.gather = gather_once
        try:
            return original(self, input_data, use_gather_object)
        finally:
            del self.gather

    return gather_for_metrics


PATCHES = (
    (accelerate.state.AcceleratorState, "__init__", _patch_accelerator_state),
    (ParallelismConfig, "dp_shard_enabled", _patch_dp_shard_enabled),
    (Accelerator, "dispatch_batches", _patch_dispatch_batches),
    (AcceleratedScheduler, "step", _patch_scheduler),
    (Accelerator, "gather_for_metrics", _patch_gather_for_metrics),
    (accelerate.accelerator, "load_fsdp_model", reads_restricted),
    (accelerate.accelerator, "load_fsdp_optimizer", reads_restricted),
)
