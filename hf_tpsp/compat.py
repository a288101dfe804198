"""Every workaround for a defect of a library we stand on, each with the condition on which it can be deleted.

`install` puts the patches in place and returns the function that takes them all out again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import accelerate.state
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, recursively_apply
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.data import DataLoader
from transformers.integrations import neftune
from transformers.trainer_utils import HubStrategy

from .collectives import chunk_of
from .config import environment_flag

# ---- FSDP2 (torch) -----------------------------------------------------------------------------------------------


def fsdp_parameters(module: nn.Module) -> Iterator:
    """FSDP2's records (`FSDPParam`) of the parameters in `module` that it manages.

    torch 2.13 has no public way to reach a parameter's sharded form while it is gathered, nor to change the mixed
    precision policy after `fully_shard`. Delete with `set_mixed_precision` and `sharded_parameter` when it has.
    """
    seen = set()
    for child in module.modules():
        if isinstance(child, FSDPModule):
            for group in child._get_fsdp_state()._fsdp_param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield from group.fsdp_params


def unsharded_numels(module: nn.Module) -> list[int]:
    """Elements of each parameter in `module` that FSDP2 manages, gathered: of this rank's TP shard."""
    return [record._orig_size.numel() for record in fsdp_parameters(module)]


def index_sharded_parameters(model: nn.Module) -> None:
    """Note on each module where FSDP2 keeps the sharded form of its parameters, for `sharded_parameter`."""
    for record in fsdp_parameters(model):
        info = record._module_info
        vars(info.module).setdefault("_tpsp_fsdp", {})[info.param_name] = record


def sharded_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter `name` of `module` as the optimizer holds it, also while FSDP2 has put the gathered one in place."""
    record = vars(module).get("_tpsp_fsdp", {}).get(name)
    return record.sharded_param if record is not None else module._parameters.get(name)


def fsdp_groups(model: nn.Module) -> list:
    """FSDP2's groups (`FSDPParamGroup`) of parameters that are gathered together, of the modules in `model`."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [group for state in states for group in state._fsdp_param_groups]


class HiddenGroup:
    """A group of FSDP2's whose modules can show the sharded parameters while the gathered ones are kept for backward.

    torch 2.13 has modules show whichever it holds. Delete when `parameters()` outside of a forward gives the sharded ones.
    """

    def __init__(self, group):
        self.group, self.is_hidden = group, False
        self._unshard, group.unshard = group.unshard, self.unshard

    @property
    def is_unsharded(self) -> bool:
        """Whether the gathered parameters are there, shown or hidden."""
        return self.group.is_unsharded

    def hide(self) -> None:
        """Have the modules show the sharded parameters."""
        if self.group.is_unsharded and not self.is_hidden:
            self.is_hidden = True
            for record in self.group.fsdp_params:
                record._setattr_on_modules(record.sharded_param)

    def reshard(self) -> None:
        self.is_hidden = False
        self.group.reshard()

    def unshard(self, async_op: bool = False) -> None:
        """The group's own `unshard`, with which every forward and backward begins."""
        if self.is_hidden:
            self.is_hidden = False
            if self.group.is_unsharded:  # not freed meanwhile, as `state_dict` does
                for record in self.group.fsdp_params:
                    record.to_unsharded()
        if self.group._training_state == TrainingState.POST_BACKWARD:
            # A checkpointed forward of the whole model, once more, in a backward that has been here: torch 2.13 would drop the
            # gradients that are still to come. This has it reduce them at the end.
            self.group._training_state = TrainingState.PRE_BACKWARD
        self._unshard(async_op)


def in_backward() -> bool:
    """Whether autograd is running in this thread. torch 2.13 has no public way to ask."""
    return torch._C._current_graph_task_id() != -1


def check_accumulates(node) -> None:
    """Raise `ValueError` if the running backward does not end in the `.grad` of a leaf, whose `AccumulateGrad` is `node`.

    torch 2.13 (`torch.autograd.grad`) hands out what arrives at a parameter: here one rank's term of its gradient. The question
    whether it will accumulate has no public form, and is answered by an exception if not.
    """
    try:
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:
        accumulates = False
    if not accumulates:
        raise ValueError(
            "torch.autograd.grad of a sharded model's parameters would give one rank's term of each gradient. Call "
            "`loss.backward()` and read `.grad`; gradients of activations are whole either way."
        )


def start_forward(model: nn.Module) -> None:
    """Ready FSDP2's root `model` for a forward of it or of a part of it, also after a backward that raised.

    torch 2.13 takes the first module that is called for its root, and after an exception it goes on where it stopped, unless
    `reset_iter_state` is called. Delete what it does itself.
    """
    from .options import check_dtypes

    state = model._get_fsdp_state()
    if state._is_root is None:  # the first forward: torch would fail in an assertion
        check_dtypes(model)
        state._lazy_init()
    else:
        follow_dtypes(model)
    if state._state_ctx.post_backward_final_callback_queued:  # and never ran
        for record in fsdp_parameters(model):  # what came of that backward
            if hasattr(record, "_unsharded_param"):
                record._unsharded_param.grad = record.unsharded_accumulated_grad = None
        model.reset_iter_state()


def end_forward(model: nn.Module) -> None:
    """Have FSDP2's root forget a forward that raised."""
    if model._get_fsdp_state()._state_ctx.iter_forward_root is not None:
        model.reset_iter_state()


# A packed weight (gate and up in one) is dealt to the TP ranks in strides: each has a piece of every part. torch 2.13 (tensor/_api.py)
# takes what a rank has for one piece, so that the ranks' pieces overlap and `torch.distributed.checkpoint` refuses to save them.
# Delete the four functions below when it writes each piece by itself.


def _pieces(tensor: DTensor) -> list[tuple[ChunkStorageMetadata, int, int, int]] | None:
    """Of a tensor that is dealt in strides: each piece, and where it is in the local tensor (dimension, start, length)."""
    strided = [(i, p) for i, p in enumerate(tensor.placements) if isinstance(p, _StridedShard)]
    if len(strided) != 1:
        return None
    at, placement = strided[0]
    if any(p.is_shard(placement.dim) for i, p in enumerate(tensor.placements) if i != at):
        return None  # FSDP2's own, on the dimension that TP shards: one piece
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    rank, size = tensor.device_mesh.get_local_rank(at), tensor.device_mesh.size(at)
    found, start = [], 0
    for part in torch.arange(tensor.shape[placement.dim]).chunk(placement.split_factor):
        own = chunk_of(part, 0, rank, size)
        if length := len(own):
            where = [torch.Size((*x[: placement.dim], n, *x[placement.dim + 1 :]))
                     for x, n in ((offsets, int(own[0])), (sizes, length))]  # fmt: skip
            found.append((ChunkStorageMetadata(*where), placement.dim, start, length))
        start += length
    return found


def _patch_write_items(original):
    @functools.wraps(original)
    def __create_write_items__(self, fqn, object):
        if (pieces := _pieces(self)) is None:
            return original(self, fqn, object)
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.size()))
            for chunk, *_ in pieces
        ]  # fmt: skip

    return __create_write_items__


def _patch_chunk_list(original):
    @functools.wraps(original)
    def __create_chunk_list__(self):
        pieces = _pieces(self)
        return original(self) if pieces is None else [chunk for chunk, *_ in pieces]

    return __create_chunk_list__


def _patch_tensor_shard(original):
    @functools.wraps(original)
    def __get_tensor_shard__(self, index):
        for chunk, dim, start, length in _pieces(self) or ():
            if chunk.offsets == index.offset:
                return original(self, index).narrow(dim, start, length)
        return original(self, index)

    return __get_tensor_shard__


def saved_tensors_are_hooked() -> bool:
    """Whether somebody's `torch.autograd.graph.saved_tensors_hooks` are active. torch 2.13 has no public way to ask."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def set_mixed_precision(model: nn.Module, param_dtype: torch.dtype | None) -> None:
    """Have FSDP2 gather parameters as `param_dtype` and reduce gradients in fp32, from the next forward on.

    The loading hook shards a model before its `TrainingArguments(bf16=…)` is known, and a script may have looked at it since.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            is_new = state._mp_policy != policy
            state._mp_policy = policy
            for group in state._fsdp_param_groups:
                group.mp_policy = policy
                if is_new and state._is_root is not None:
                    _look_at_dtypes_again(group)


def _look_at_dtypes_again(group) -> None:
    """torch 2.13 looks at the parameters' dtypes, and at whether any is trained, before its first forward only, and keeps the
    buffers that it gathers into. Delete when it notices that they have changed."""
    group.reshard()
    for record in group.fsdp_params:
        record.all_gather_outputs = []
        vars(record).pop("_unsharded_param", None)
    group._init_mp_dtypes()


def follow_dtypes(model: nn.Module) -> None:
    """Have FSDP2 notice that a script has cast `model` since its last forward, or trains what was frozen until then."""
    for group in fsdp_groups(model):
        first, *_ = group.fsdp_params or [None]
        if first is None:
            continue
        is_cast = first.sharded_param.dtype != first.orig_dtype
        if is_cast or (group._orig_dtype is None and any(r.sharded_param.requires_grad for r in group.fsdp_params)):
            _look_at_dtypes_again(group)


class _NotSequential(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "sequential" not in record.getMessage()


def quiet_redistribute() -> None:
    """torch 2.13 (tensor/_redistribute.py) warns on every rank that gathering a parameter which TP and FSDP shard on one
    dimension takes two collectives. That is FSDP2's own layout, and it is gathered at saves only. Delete when FSDP2's
    layout does not set the warning off."""
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_QUIET)


_QUIET = _NotSequential()


class _WholeParameter(torch.autograd.Function):
    """Sharded parameter → the whole one, on every rank. Backward: the mean over data parallelism, as FSDP2 takes it of all other
    gradients of this parameter; the ranks of a TP group, which have one batch, compute it alike."""

    @staticmethod
    def forward(ctx, param: DTensor) -> torch.Tensor:
        ctx.spec = param._spec
        return _full_tensor(param.detach())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        mesh, grad = ctx.spec.mesh, grad.clone(memory_format=torch.contiguous_format)
        for dim in mesh.mesh_dim_names[:-1]:
            dist.all_reduce(grad, group=mesh.get_group(dim))
            grad /= mesh[dim].size()
        return distribute_tensor(grad, mesh, ctx.spec.placements, src_data_rank=None)


_full_tensor = DTensor.full_tensor


def average_whole_parameters() -> None:
    """torch 2.13 (tensor/_api.py, `full_tensor`) takes it that all ranks compute the same from a whole parameter, those of data
    parallelism too: of a gradient, each would keep its own part of its own. Delete when FSDP2's parameters average there."""

    @functools.wraps(_full_tensor)
    def full_tensor(self, *, grad_placements=None):
        names = self.device_mesh.mesh_dim_names or ()
        is_ours = self.is_leaf and self.requires_grad and len(names) > 1 and names[-1] == "tp"
        if is_ours and torch.is_grad_enabled() and grad_placements is None:
            return _WholeParameter.apply(self)
        return _full_tensor(self, grad_placements=grad_placements)

    DTensor.full_tensor = full_tensor


# ---- patches -----------------------------------------------------------------------------------------------------


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


def _patch_prepare(original):
    """accelerate 1.15 (accelerator.py, `_prepare_tp` and `_prepare_fsdp2`) cannot take a model that is sharded already:
    it imports a class that transformers 5.23 does not have, matches parameters by data pointer (empty shards collide),
    and wants an optimizer beside every model (so `evaluate()` before `train()` raises). Nothing is left to shard: the
    model is noted and the rest prepared as always. Delete when `prepare` leaves sharded models alone."""

    @functools.wraps(original)
    def prepare(self, *args, device_placement=None):
        from .parallelize import is_parallelized
        from .trainer import parallelize_prepared, set_mixed_precision

        replaced = parallelize_prepared(args)
        sharded = [isinstance(arg, nn.Module) and is_parallelized(arg) for arg in args]
        if not any(sharded):
            _follow_parameters(args, replaced)
            return original(self, *args, device_placement=device_placement)
        for model in (arg for arg, ours in zip(args, sharded, strict=True) if ours):
            if self.mixed_precision not in ("no", "bf16"):
                raise ValueError(
                    f"Accelerator(mixed_precision={self.mixed_precision!r}) needs scaling that knows of the shards; use 'bf16'."
                )
            if self.mixed_precision == "bf16":  # a loop of one's own; a Trainer has done it
                set_mixed_precision(model)
            if not any(model is known for known in self._models):
                self._models.append(model)
        _follow_parameters(args, replaced)
        result = args
        for first_pass in (True, False):  # schedulers come second: they need the prepared optimizers
            result = tuple(
                arg if ours else self._prepare_one(arg, first_pass=first_pass)
                for arg, ours in zip(result, sharded, strict=True)
            )
        for item in result:
            if isinstance(item, (nn.Module, AcceleratedOptimizer, AcceleratedScheduler, DataLoader)):
                item._is_accelerate_prepared = True
        return result if len(result) > 1 else result[0]

    return prepare


def _follow_parameters(args: tuple, replaced: list[tuple[nn.Module, dict[str, nn.Parameter]]]) -> None:
    """Point the optimizers in `args` at the sharded parameters, as accelerate's own FSDP2 path does.

    Args:
        replaced: each model that has just been sharded, with the parameters that it had before, by name. Each remembers
            what took its place.

    Raises:
        ValueError: such an optimizer has taken steps; its state is of whole parameters.
    """
    for model, before in replaced:
        now = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in before.items():
            parameter._tpsp_replaced_by = now[name]
    for optimizer in args:
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        old = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "_tpsp_replaced_by")]
        if any(optimizer.state.get(p) for p in old):
            raise ValueError(
                "This optimizer has taken steps on the whole model that accelerator.prepare has sharded since. Make it, or "
                "load its state, after accelerator.prepare(model)."
            )
        for p in old:
            optimizer.state.pop(p, None)
        for group in optimizer.param_groups:
            group["params"] = [getattr(p, "_tpsp_replaced_by", p) for p in group["params"]]


def _write_folder(trainer: transformers.Trainer, output_dir: str | None = None) -> None:
    """Write the whole model as a Hugging Face folder, or its adapter as peft's. Every rank must call it."""
    from .integrations.peft import adapter_state_dict, is_adapted
    from .parallelize import full_state_dict

    model = trainer.model
    trainer._save(output_dir, state_dict=adapter_state_dict(model) if is_adapted(model) else full_state_dict(model))


def _patch_save_model(original):
    """transformers 5.23 (trainer.py, `save_model`) writes nothing, silently, under `SHARDED_STATE_DICT`. Write the
    Hugging Face folder that the caller asked for. Delete when upstream does or raises."""

    @functools.wraps(original)
    def save_model(self, output_dir=None, _internal_call=False):
        from .parallelize import is_parallelized

        if _internal_call or not is_parallelized(self.model):
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
        from .parallelize import is_parallelized

        at_checkpoint = original.__name__ == "_push_from_checkpoint"
        if is_parallelized(self.model) and not (at_checkpoint and self.args.hub_strategy == HubStrategy.END):
            _write_folder(self)
        return original(self, *args, **kwargs)

    return push


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


def _patch_neftune(original):
    """transformers 5.23 (integrations/neftune.py, `neftune_post_forward_hook`) draws the noise as a DTensor, for which each
    rank of a CPU mesh (torch 2.13, tensor/_random.py) draws the same numbers for another part of the sequence. Draw the
    whole noise on every TP rank, as one process does, and keep this rank's part. Delete when DTensor's random operations
    work on the CPU."""

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
    """transformers 5.23 (trainer.py, `_get_num_items_in_batch`) divides the count by the TP ranks, which it has been
    multiplied by only where it was gathered over all ranks (`average_tokens_across_devices`). Delete when it divides
    there."""

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


def keep_name(model: nn.Module, name: str) -> None:
    """Have `model` go by its class's own name after FSDP2 has renamed the class.

    transformers 5.23 (trainer.py, `compute_loss`) looks the name up to decide whether label smoothing shifts the
    labels, and `FSDPQwen2ForCausalLM` is not in its list. Delete when it strips the prefix there, as `save_pretrained`
    does."""
    model._get_name = lambda: name


def replace(*patches: tuple[object, str, Callable]) -> Callable[[], None]:
    """For each `(owner, name, make)`, put `make(original)` in the place of `owner.name`. Returns the function that puts
    the originals back."""
    originals = []
    for owner, name, make in patches:
        original = vars(owner)[name]
        setattr(owner, name, make(original))
        originals.append((owner, name, original))

    def restore() -> None:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)

    return restore


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
