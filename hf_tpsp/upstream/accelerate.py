"""accelerate: FSDP on the CPU, and what it counts, deals and gathers once per process."""

from __future__ import annotations

import functools

import accelerate.state
from accelerate import Accelerator, ParallelismConfig
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, recursively_apply

from ..config import environment_flag


def _patch_accelerator_state(original):
    """accelerate 1.15 (state.py, `AcceleratorState.__init__`) knows FSDP only on accelerators: gloo ranks on the CPU are
    refused, although FSDP2 runs on them. Delete when MULTI_CPU is in that list."""

    @functools.wraps(original)
    def __init__(self, *args, cpu=False, **kwargs):
        cpu = cpu or environment_flag("ACCELERATE_USE_CPU")
        if accelerate.state.PartialState._shared_state == {} and cpu:
            accelerate.state.PartialState(cpu)
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU  # becomes FSDP before __init__ returns
        original(self, *args, cpu=cpu, **kwargs)

    return __init__


def _patch_dp_shard_enabled(original):
    """accelerate 1.15 (parallelism_config.py, `_validate_accelerator`) refuses FSDP with `dp_shard_size=1`, so pure TP
    has no sharded checkpoints. A `dp_shard` dim of size 1 is an ordinary mesh dim. Delete when it is accepted."""
    return property(lambda self: original.fget(self) or self.tp_size > 1)


def _patch_dispatch_batches(original):
    """accelerate 1.15 (data_loader.py, `DataLoaderDispatcher`, its default for an `IterableDataset`) gives one and the same
    batch to all ranks if there is a TP dim, to those of data parallelism too. Have each rank read the stream and keep its
    rows. Delete when it deals by the mesh."""

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
    """accelerate 1.15 (scheduler.py, `AcceleratedScheduler.step`) steps once for each process, because each is taken to
    have had a batch of its own; TP ranks share theirs. Delete when it divides by the TP size."""

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
            accelerate.state.AcceleratorState()  # takes over what is shared

    return step


def _patch_gather_for_metrics(original):
    """accelerate 1.15 (accelerator.py, `gather_for_metrics`) gathers each sample once per TP rank, and then cuts the
    copies of the last batch in the wrong place. Keep one rank's rows of each TP group. Delete when it gathers over the
    data-parallel ranks only."""

    @functools.wraps(original)
    def gather_for_metrics(self, input_data, use_gather_object=False):
        tp_size = self.parallelism_config.tp_size if self.parallelism_config else 1
        if tp_size == 1:
            return original(self, input_data, use_gather_object)

        def gather_once(data):
            gathered = type(self).gather(self, data)  # rows of rank 0, rank 1, …: tp is the innermost mesh dim
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
)
