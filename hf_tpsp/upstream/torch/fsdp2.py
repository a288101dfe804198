"""FSDP2 (torch): what it has no public way for, and workarounds where a sharded model needs another behaviour."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState


def fsdp_parameters(module: nn.Module) -> Iterator:
    """FSDP2's records (`FSDPParam`) of the parameters in `module` that it manages.

    torch 2.13 has no public way to reach a parameter's sharded form while it is gathered, nor to change the mixed
    precision policy after `fully_shard`. Delete with `set_mixed_precision` and `sharded_parameter` when it has.
    """
    for group in fsdp_groups(module):
        yield from group.fsdp_params


def place_of(record) -> tuple[nn.Module, str]:
    """The module that holds the parameter of FSDP2's `record`, and the parameter's name in it."""
    return record._module_info.module, record._module_info.param_name


def unsharded_numels(module: nn.Module) -> list[int]:
    """The number of elements of each parameter in `module` that FSDP2 gathers: those of this rank's TP shard."""
    return [record._orig_size.numel() for record in fsdp_parameters(module)]


_records: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref]] = weakref.WeakKeyDictionary()


def plain_class(module: nn.Module) -> type:
    """The class of `module` before `fully_shard` made a subclass of it."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def index_sharded_parameters(model: nn.Module) -> None:
    """Note for each module where FSDP2 keeps the sharded form of its parameters, for `sharded_parameter`."""
    for record in fsdp_parameters(model):
        module, name = place_of(record)
        _records.setdefault(module, {})[name] = weakref.ref(record)


def sharded_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter `name` of `module` as the optimizer holds it, also while FSDP2 shows the gathered one."""
    record = _records.get(module, {}).get(name)
    return record().sharded_param if record is not None else module._parameters.get(name)


def fsdp_groups(model: nn.Module) -> list:
    """FSDP2's groups (`FSDPParamGroup`) in `model`. The parameters of a group are gathered together."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    # Modules that were wrapped together have one state.
    return list({id(group): group for group in groups}.values())


class HiddenGroup:
    """A group of FSDP2's whose modules can show the sharded parameters while the gathered ones are kept for backward.

    torch 2.13 has the modules show the gathered parameters for as long as it keeps them. Delete when `parameters()`
    outside of a forward gives the sharded ones.
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
            # The gathered parameters may have been freed meanwhile, as `state_dict` does.
            if self.group.is_unsharded:
                for record in self.group.fsdp_params:
                    record.to_unsharded()
        if self.group._training_state == TrainingState.POST_BACKWARD:
            # The whole model is checkpointed, and its forward runs again in a backward that has passed this group
            # already. torch 2.13 would drop the gradients that are still to come. This has it reduce them at the end.
            self.group._training_state = TrainingState.PRE_BACKWARD
        self._unshard(async_op)


def is_before_first_forward(model: nn.Module) -> bool:
    """Whether FSDP2's root `model` was never called, so that FSDP2 has yet to look at its parameters."""
    return model._get_fsdp_state()._is_root is None


def start_forward(model: nn.Module, groups: list) -> None:
    """Prepare FSDP2's root `model`, whose groups are `groups`, for a forward of it or of a part of it, also after a
    backward that raised.

    torch 2.13 makes the first module that is called its root. After an exception it continues where it stopped, unless
    `reset_iter_state` is called. Delete each part of this when torch does it itself.
    """
    state = model._get_fsdp_state()
    if is_before_first_forward(model):
        state._lazy_init()
    else:
        follow_dtypes(groups)
    # The callback was queued by a backward that raised, and so never ran. The gradients of that backward are dropped.
    if state._state_ctx.post_backward_final_callback_queued:
        for record in fsdp_parameters(model):
            if hasattr(record, "_unsharded_param"):
                record._unsharded_param.grad = record.unsharded_accumulated_grad = None
        model.reset_iter_state()


def end_forward(model: nn.Module) -> None:
    """Have FSDP2's root forget a forward that raised."""
    if model._get_fsdp_state()._state_ctx.iter_forward_root is not None:
        model.reset_iter_state()


def set_mixed_precision(model: nn.Module, param_dtype: torch.dtype | None) -> None:
    """Have FSDP2 gather parameters as `param_dtype` and reduce gradients in fp32, from the next forward on.

    The loading hook shards a model before its `TrainingArguments(bf16=…)` is known, and a script may have run it since.
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
    """torch 2.13 looks at the parameters' dtypes, and at whether any is trained, only before its first forward, and
    keeps the buffers that it gathers into. Delete when it notices that they have changed."""
    group.reshard()
    for record in group.fsdp_params:
        record.all_gather_outputs = []
        vars(record).pop("_unsharded_param", None)
    group._init_mp_dtypes()


def follow_dtypes(groups: list) -> None:
    """Have FSDP2 notice that a script has cast the parameters in `groups` since their last forward, or trains what was
    frozen until then."""
    for group in groups:
        first, *_ = group.fsdp_params or [None]
        if first is None:
            continue
        is_cast = first.sharded_param.dtype != first.orig_dtype
        if is_cast or (group._orig_dtype is None and any(r.sharded_param.requires_grad for r in group.fsdp_params)):
            _look_at_dtypes_again(group)
