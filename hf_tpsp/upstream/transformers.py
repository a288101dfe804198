"""transformers: what its Trainer saves and counts, and what it looks up by a class's name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import neftune
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from ..checkpoint import folders
from ..inputs import environment_flag
from ..state import is_parallelized, record_of, saved_state_dict
from .accelerate import saves_shards
from .torch.unpickling import reads_restricted

logger = logging.get_logger(__name__)


def _write_folder(trainer: transformers.Trainer, output_dir: str | None = None) -> None:
    """Write the whole model as a Hugging Face folder, or its adapter as peft's, and all of it or nothing. Every rank must
    call it, and all raise rank 0's error."""
    state_dict = saved_state_dict(trainer.model)
    with folders.filled(Path(trainer.args.output_dir if output_dir is None else output_dir)) as within:
        trainer._save(str(within), state_dict=state_dict)


def _write_beside_shards(trainer: transformers.Trainer, output_dir: str) -> None:
    """Write into a checkpoint what it holds in one process, but for the weights of the whole model: the adapter if there
    is one, configs, tokenizer and arguments. `hf-tpsp export` takes them from there. Every rank must call it."""
    has_adapter = record_of(trainer.model).saved is not None
    if trainer.args.should_save and not has_adapter:
        logger.warning_once(
            "hf_tpsp: checkpoints hold the weights in shards. `hf-tpsp export checkpoint-N OUT` makes a Hugging Face folder of one, "
            "from which a Trainer in one process resumes too."
        )
    # `save_pretrained` of no weights writes no file of weights, which its bar for them would say.
    state_dict = saved_state_dict(trainer.model) if has_adapter else {}
    has_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        trainer._save(output_dir, state_dict=state_dict)
    finally:
        if has_bar:
            logging.enable_progress_bar()


def _patch_save_model(original):
    """transformers 5.23 (trainer.py, `save_model`) writes nothing, silently, under `SHARDED_STATE_DICT`. Write the
    Hugging Face folder that the caller asked for, and into a checkpoint all of it but the weights that the shards hold.
    Delete when upstream does or raises."""

    @functools.wraps(original)
    def save_model(self, output_dir=None, _internal_call=False):
        if not is_parallelized(self.model):
            return original(self, output_dir, _internal_call)
        if _internal_call:
            if saves_shards(self.accelerator):
                return _write_beside_shards(self, output_dir)
            return original(self, output_dir, _internal_call)
        _write_folder(self, output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    return save_model


def _patch_push(original):
    """transformers 5.23 (trainer.py, `push_to_hub` and `_push_from_checkpoint`) pushes `args.output_dir`, into which,
    under `SHARDED_STATE_DICT`, nothing has written the weights. Delete with `_patch_save_model`."""

    @functools.wraps(original)
    def push(self, *args, **kwargs):
        at_checkpoint = original.__name__ == "_push_from_checkpoint"
        if is_parallelized(self.model) and not (at_checkpoint and self.args.hub_strategy == HubStrategy.END):
            _write_folder(self)
        return original(self, *args, **kwargs)

    return push


def checkpoint_folder(trainer: transformers.Trainer, trial: object) -> Path:
    """The folder that `_save_checkpoint` would write now. transformers 5.23 has no public way to ask for it."""
    return Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"


@contextlib.contextmanager
def checkpoint_in(trainer: transformers.Trainer, final: Path, folder: Path) -> Iterator[list[Callable[[], None]]]:
    """While inside, `_save_checkpoint` writes `folder` in place of `final`, and pushes nothing: the list gets what is to be
    called when `final` is there. The best checkpoint goes by its final name.

    transformers 5.23 (trainer.py, `_save_checkpoint`) has no hook between the choice of a folder and its files."""
    state, later, push = trainer.state, [], trainer._push_from_checkpoint
    best_step = state.best_global_step
    best = final.parent / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
    if best_step and (best == final or best.is_dir()):
        state.best_model_checkpoint = str(best)
    # The Trainer would look for it beside `folder`, after a barrier to which a rank that has failed does not come.
    state.best_global_step = None

    def save_to_json(path: str) -> None:
        state.best_global_step = best_step
        type(state).save_to_json(state, path)

    trainer._get_output_dir = lambda trial: str(folder.parent)
    trainer._push_from_checkpoint = lambda _: later.append(lambda: push(str(final)))
    state.save_to_json = save_to_json
    try:
        yield later
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint, state.save_to_json
        state.best_global_step = best_step


def _patch_neftune(original):
    """transformers 5.23 (integrations/neftune.py, `neftune_post_forward_hook`) draws the noise as a DTensor, for which
    each rank of a CPU mesh (torch 2.13, tensor/_random.py) draws the same numbers for another part of the sequence.
    Draw the whole noise on every TP rank, as one process does, and keep this rank's part. Delete when DTensor's random
    operations work on the CPU."""

    @functools.wraps(original)
    def neftune_post_forward_hook(module, input, output):
        if not isinstance(output, DTensor):
            return original(module, input, output)
        if not module.training:
            return output
        zeros = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        noise = original(module, input, zeros)
        return output + distribute_tensor(noise, output.device_mesh, output.placements, src_data_rank=None)

    return neftune_post_forward_hook


def _patch_track_tokens(original):
    """transformers 5.23 (trainer.py, `_track_num_input_tokens`) counts each batch once per TP rank. Delete when it
    divides by `get_tp_size()`, as it does for `num_items_in_batch`."""

    @functools.wraps(original)
    def _track_num_input_tokens(self, inputs):
        before = self.state.num_input_tokens_seen
        original(self, inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + int(seen) // self.get_tp_size()

    return _track_num_input_tokens


def _patch_num_items(original):
    """transformers 5.23 (trainer.py, `_get_num_items_in_batch`) divides the count by the number of TP ranks. That is
    right only if the count was gathered over all ranks (`average_tokens_across_devices`). Delete when it divides only
    then."""

    @functools.wraps(original)
    def _get_num_items_in_batch(self, *args, **kwargs):
        items = original(self, *args, **kwargs)
        if items is not None and not self.args.average_tokens_across_devices:
            items = items * self.get_tp_size()
        return items

    return _get_num_items_in_batch


def _patch_store_flos(original):
    """transformers 5.23 (trainer.py, `store_flos`) sums the FLOPs of all ranks, TP ranks of one batch included. Delete
    when it divides by `get_tp_size()`."""

    @functools.wraps(original)
    def store_flos(self):
        self.current_flos /= self.get_tp_size()
        original(self)

    return store_flos


def _patch_training_arguments(original):
    """transformers 5.23 (training_args.py, `_validate_args`) refuses bf16 on the CPU unless `use_cpu` is set, although
    `_setup_devices` takes ACCELERATE_USE_CPU for it. Delete when the check does too."""

    @functools.wraps(original)
    def __post_init__(self):
        self.use_cpu = self.use_cpu or environment_flag("ACCELERATE_USE_CPU")
        original(self)

    return __post_init__


@contextlib.contextmanager
def _whole_missing_parameters(model: PreTrainedModel) -> Iterator[None]:
    """While inside, the parameters that a checkpoint lacks are plain and whole on every rank, so that they are
    initialised as in one process. Each rank then keeps its shard. All ranks draw rank 0's numbers; a rank whose random
    state was another gets it back.

    transformers 5.23 (modeling_utils.py, `_initialize_missing_keys`) initialises them as DTensors, and every rank's
    shard gets the same numbers: half of a vocabulary would be a copy of the other half. Delete when each shard gets
    numbers of its own, alike on all meshes.
    """
    missing = [
        (module, name, param)
        for module in model.modules()
        for name, param in module._parameters.items()
        if isinstance(param, DTensor) and not getattr(param, "_is_hf_initialized", False)
    ]
    # The id of a DTensor → its whole parameter, so that tied parameters share one.
    wholes: dict[int, nn.Parameter] = {}
    for module, name, param in missing:
        if id(param) not in wholes:
            whole = torch.empty(param.shape, dtype=param.dtype, device=param._local_tensor.device)
            wholes[id(param)] = nn.Parameter(whole, requires_grad=param.requires_grad)
        module._parameters[name] = wholes[id(param)]
    before = torch.get_rng_state()
    common = before.to(PartialState().device)
    dist.broadcast(common, src=0)
    common = common.cpu()
    torch.set_rng_state(common)
    try:
        yield
    finally:
        if not torch.equal(common, before):
            torch.set_rng_state(before)
        for module, name, param in missing:
            module._parameters[name] = param
            cut = distribute_tensor(wholes[id(param)].detach(), param.device_mesh, param.placements, src_data_rank=None)
            with torch.no_grad():
                param._local_tensor.copy_(cut._local_tensor)
            param._is_hf_initialized = True


def _patch_initialize(original):
    @functools.wraps(original)
    def _initialize_missing_keys(self, is_quantized):
        with _whole_missing_parameters(self) if is_parallelized(self) else contextlib.nullcontext():
            return original(self, is_quantized)

    return _initialize_missing_keys


def keep_name(model: nn.Module, name: str) -> None:
    """Have `model` go by its class's own name after FSDP2 has renamed the class.

    transformers 5.23 (trainer.py, `compute_loss`) looks the name up to decide whether label smoothing shifts the
    labels, and `FSDPQwen2ForCausalLM` is not in its list. Delete when it strips the prefix there, as `save_pretrained`
    does."""
    model._get_name = lambda: name


def spare_grouped_mm(model: PreTrainedModel, tp_size: int) -> str | None:
    """Have the experts run one by one if grouped matrix products cannot take the width that each of `tp_size` ranks has
    of them. Returns a sentence about it; None if nothing was changed.

    torch 2.13 (`grouped_mm`) needs rows of a multiple of 16 bytes: 8 elements in bf16. Weights that are fp32 here count
    as bf16, because training may gather them so. Delete when it takes any width.
    """
    config = model.config.get_text_config()
    if getattr(config, "_experts_implementation", None) != "grouped_mm":
        return None
    widths = {
        local
        for p in model.parameters()
        if isinstance(p, DTensor) and p.dim() == 3
        for local, whole in zip(p.to_local().shape[1:], p.shape[1:], strict=True)
        if local != whole and local % 8
    }
    if not widths:
        return None
    model.set_experts_implementation("eager")
    listed = ", ".join(map(str, sorted(widths)))
    return (
        f"grouped matrix products take widths that divide by 8, and at tp {tp_size} each rank has {listed} of the experts'; "
        f"they run one by one (experts_implementation='eager'). A width that divides by {8 * tp_size}, or a smaller tp, is faster"
    )


def _without_scores(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention `[batch, heads, seq, head_dim]` without scores or a mask."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """While inside, `attn_implementation="fused"` is attention without scores or a mask.

    transformers 5.23 (masking_utils.py, `_ignore_causal_mask_sdpa`) builds the mask, seq² large, when tensors are fake;
    with real ones it leaves it out. It has no public way to take back what was registered. Delete when "sdpa" does
    without a mask there.
    """
    added = ((AttentionInterface, _without_scores), (AttentionMaskInterface, lambda *args, **kwargs: None))
    before = [interface._global_mapping.get("fused") for interface, _ in added]
    for interface, function in added:
        interface.register("fused", function)
    try:
        yield
    finally:
        for (interface, _), earlier in zip(added, before, strict=True):
            if earlier is None:
                del interface._global_mapping["fused"]
            else:
                interface.register("fused", earlier)


PATCHES = (
    (neftune, "neftune_post_forward_hook", _patch_neftune),
    (transformers.TrainingArguments, "__post_init__", _patch_training_arguments),
    (transformers.Trainer, "save_model", _patch_save_model),
    (transformers.Trainer, "push_to_hub", _patch_push),
    (transformers.Trainer, "_push_from_checkpoint", _patch_push),
    (transformers.Trainer, "_track_num_input_tokens", _patch_track_tokens),
    (transformers.Trainer, "store_flos", _patch_store_flos),
    (transformers.Trainer, "_get_num_items_in_batch", _patch_num_items),
    (transformers.trainer, "load_fsdp_model", reads_restricted),
    (transformers.trainer, "load_fsdp_optimizer", reads_restricted),
)

LOADING_PATCHES = ((PreTrainedModel, "_initialize_missing_keys", _patch_initialize),)
