"""Every workaround for a defect of a library we stand on, each with the condition on which it can be deleted.

`install` puts the patches in place and returns the function that takes them all out again.
"""

from __future__ import annotations

from collections.abc import Callable

import accelerate.state
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.scheduler import AcceleratedScheduler
from torch.distributed.tensor import DTensor
from transformers.integrations import neftune

from ..integrations.prepare import _patch_prepare
from .accelerate import (
    _patch_accelerator_state,
    _patch_dispatch_batches,
    _patch_dp_shard_enabled,
    _patch_gather_for_metrics,
    _patch_scheduler,
)
from .dtensor import _patch_chunk_list, _patch_tensor_shard, _patch_write_items
from .patching import replace
from .transformers import (
    _patch_neftune,
    _patch_num_items,
    _patch_push,
    _patch_save_model,
    _patch_store_flos,
    _patch_track_tokens,
    _patch_training_arguments,
)


def install() -> Callable[[], None]:
    """Put every patch in place. Returns the function that restores the originals."""
    return replace(
        (accelerate.state.AcceleratorState, "__init__", _patch_accelerator_state),
        (ParallelismConfig, "dp_shard_enabled", _patch_dp_shard_enabled),
        (DTensor, "__create_write_items__", _patch_write_items),
        (DTensor, "__create_chunk_list__", _patch_chunk_list),
        (DTensor, "__get_tensor_shard__", _patch_tensor_shard),
        (Accelerator, "prepare", _patch_prepare),
        (Accelerator, "dispatch_batches", _patch_dispatch_batches),
        (AcceleratedScheduler, "step", _patch_scheduler),
        (Accelerator, "gather_for_metrics", _patch_gather_for_metrics),
        (neftune, "neftune_post_forward_hook", _patch_neftune),
        (transformers.TrainingArguments, "__post_init__", _patch_training_arguments),
        (transformers.Trainer, "save_model", _patch_save_model),
        (transformers.Trainer, "push_to_hub", _patch_push),
        (transformers.Trainer, "_push_from_checkpoint", _patch_push),
        (transformers.Trainer, "_track_num_input_tokens", _patch_track_tokens),
        (transformers.Trainer, "store_flos", _patch_store_flos),
        (transformers.Trainer, "_get_num_items_in_batch", _patch_num_items),
    )
