"""What torch does that hf_tpsp works around: each test passes as long as the defect is there, without any patch."""

import logging
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, _redistribute, distribute_tensor
from torch.distributed.tensor.debug import (
    CommDebugMode,
    _clear_sharding_prop_cache,
    _get_fast_path_sharding_prop_cache_stats,
)
from torch.distributed.tensor.parallel import loss_parallel
from torch.distributed.tensor.parallel.loss import _disable_custom_loss_ops
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_tpsp.patching import swapped
from hf_tpsp.upstream.torch import c10d, caches, dtensor

from .worlds import world

DIMS = ("dp_replicate", "dp_shard", "tp")
still_needed = pytest.mark.still_needed


class Seen(TorchDispatchMode):
    """The operations that a dispatch mode sees, and whether it saw fake tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.fakes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        self.fakes += isinstance(result, FakeTensor)
        return result


def sharded(rows: int = 8, mesh=None, placement=None) -> DTensor:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return distribute_tensor(torch.zeros(rows, 4), mesh, [placement or Shard(0)] * mesh.ndim, src_data_rank=None)


@still_needed("c10d.reduce_scatter")
def test_gloo_reduce_scatters_by_an_all_reduce(alone):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.reduce_scatter_tensor(torch.zeros(4), "sum", 1, dist.group.WORLD.group_name)
        )
    assert [event.name for event in profile.events() if event.name.startswith("gloo:")] == ["gloo:all_reduce"]


@still_needed("c10d._patch_new_timeout")
def test_a_new_group_does_not_take_the_timeout_of_the_default_group(alone):
    dist.group.WORLD.set_timeout(timedelta(seconds=5))
    assert c10d.default_timeout() == timedelta(seconds=5)
    timeouts = []
    for patches in ((), c10d.PATCHES):
        with swapped(*patches):
            timeouts.append(dist.new_group([0])._get_backend(torch.device("cpu")).options._timeout)
    assert timeouts[0] != timedelta(seconds=5) == timeouts[1]


def remembered() -> tuple[int, int]:
    return _get_fast_path_sharding_prop_cache_stats()[1], _redistribute._gen_transform_infos.cache_info().currsize


@still_needed("caches.bound")
def test_dtensor_remembers_every_shape(alone, monkeypatch):
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    for rows in range(1, 300):
        (sharded(rows) + 1).redistribute(placements=[Replicate()])
    decisions, plans = remembered()
    assert decisions >= 299 and plans >= 299
    monkeypatch.setattr(caches._bound, "limit", decisions + plans)
    caches.bound()
    assert remembered() == (decisions, plans)
    monkeypatch.setattr(caches._bound, "calls", caches.SOON)
    monkeypatch.setattr(caches._bound, "limit", decisions + plans - 1)
    caches.bound()
    assert remembered() == (0, 0) and caches._bound.limit == decisions + plans - 1
    (sharded(2) + 1).redistribute(placements=[Replicate()])
    monkeypatch.setattr(caches._bound, "limit", 1)
    caches.bound()  # soon again: these steps need more
    assert remembered() == (0, 0) and caches._bound.limit == 2


@still_needed("c10d.flatten")
def test_a_norm_takes_a_collective_for_each_dim():
    with world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        term = DTensor.from_local(torch.ones(()), mesh, [Partial(), Partial()])
        with CommDebugMode() as sent:
            term.full_tensor()
        assert sent.get_total_counts() == 2
        mesh._flatten()
        with CommDebugMode() as sent:
            term.full_tensor()
        assert sent.get_total_counts() == 1  # and this is what the workaround is for


@still_needed("dtensor._pieces")
def test_strided_shards_are_taken_for_one_piece():
    with world(2):
        mesh = init_device_mesh("cpu", (2,))
        rows = torch.arange(8.0).view(8, 1)[[0, 1, 4, 5]]  # rank 0's of two parts of four rows
        weight = DTensor.from_local(rows, mesh, [_StridedShard(0, split_factor=2)], shape=(8, 1), stride=(1, 1))
        assert len(weight.__create_chunk_list__()) == 1
        assert len(weight.__create_write_items__("weight", weight)) == 1


@still_needed("dtensor._quiet_redistribute")
def test_gathering_fsdp2s_own_layout_warns(caplog):
    with world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        layer = nn.Linear(4, 12, bias=False)
        layer.weight = nn.Parameter(
            distribute_tensor(layer.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None)
        )
        fully_shard(layer, mesh=mesh["dp_shard"])
        assert isinstance(layer.weight.placements[0], _StridedShard)
        logger = logging.getLogger("torch.distributed.tensor._redistribute")
        logger.addHandler(caplog.handler)
        try:
            layer.weight.full_tensor()
        finally:
            logger.removeHandler(caplog.handler)
    assert any("sequential" in record.getMessage() for record in caplog.records)


@still_needed("dtensor._patch_full_tensor")
def test_the_gradient_of_a_whole_parameter_is_not_averaged_over_data_parallelism():
    with world(2):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_shard", "tp"))
        weight = nn.Parameter(sharded(8, mesh))
        whole = weight.full_tensor()
        with CommDebugMode() as sent:
            (whole * torch.arange(32.0).view(8, 4)).sum().backward()
        assert sent.get_total_counts() == 0
        assert weight.grad.to_local().equal(torch.arange(32.0).view(8, 4)[: len(weight.grad.to_local())])


@still_needed("dtensor.loss_parallel")
def test_loss_parallel_survives_an_exception_and_ends_its_callers():
    handlers, operation = DTensor._op_dispatcher._custom_op_handlers, torch.ops.aten._log_softmax.default
    with pytest.raises(RuntimeError, match="the script's own"), loss_parallel():
        raise RuntimeError("the script's own")
    try:
        assert operation in handlers
    finally:
        _disable_custom_loss_ops()
    with pytest.raises(KeyError), loss_parallel(), loss_parallel():
        pass  # the inner one ends both, and the outer one finds nothing to end


@still_needed("dtensor._DrawByShard", "transformers._patch_neftune")
def test_on_the_cpu_each_rank_draws_the_same_for_another_part():
    drawn = []
    for rank in range(2):
        with world(2, rank):
            torch.manual_seed(0)
            drawn.append(sharded().uniform_().to_local().clone())
    assert drawn[0].equal(drawn[1])


def calls_to_scale(length: int) -> int:
    """How many Python functions run when a list of DTensors is scaled for the first time."""
    _clear_sharding_prop_cache()
    tensors, calls = [sharded(8) for _ in range(length)], 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        torch._foreach_mul_(tensors, torch.tensor(2.0))
    finally:
        sys.setprofile(None)
    return calls


@still_needed("dtensor._scale_lists")
def test_scaling_a_list_takes_a_time_that_is_quadratic_in_its_length():
    with world(2):
        few, more, most = (calls_to_scale(n) for n in (8, 40, 72))
        # The second difference of what is linear would be zero.
        assert most - more > 1.2 * (more - few)
        undo = dtensor._scale_lists()
        try:
            few, more, most = (calls_to_scale(n) for n in (8, 40, 72))
        finally:
            undo()
        assert most - more == more - few
    _clear_sharding_prop_cache()


def test_a_scaled_list_is_what_each_of_its_tensors_would_be():
    with world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        local = torch.arange(8.0).view(2, 4)
        layouts = ([Shard(0), Shard(0)], [Shard(1), Partial()], [Partial(), Partial()], [Replicate(), Shard(0)])
        factors = [torch.tensor(3.0), distribute_tensor(torch.tensor(3.0), mesh, [Replicate()] * 2, src_data_rank=None)]
        undo = dtensor._scale_lists()
        try:
            for factor in factors:
                tensors = [DTensor.from_local(local.clone(), mesh, layout, run_check=False) for layout in layouts]
                torch._foreach_mul_([*tensors, plain := local.clone()], factor)
                assert all(tensor.to_local().equal(local * 3) for tensor in tensors) and plain.equal(local * 3)
                assert [tensor.placements for tensor in tensors] == [tuple(layout) for layout in layouts]
        finally:
            undo()


@still_needed("fake.fake_world")
def test_dtensor_hands_out_meshes_whose_groups_are_gone():
    _clear_sharding_prop_cache()
    found = []
    for _ in range(2):
        with world(2):
            x = sharded()
            found.append(((x + x).device_mesh, x.device_mesh))
    _clear_sharding_prop_cache()
    (first, _), (second, own) = found
    assert second is first and second is not own


@still_needed("fake.told_apart")
def test_dispatch_modes_see_dtensors_own_fake_tensors():
    with world(2):
        _clear_sharding_prop_cache()
        x = sharded(24)
        with Seen() as seen:
            x * x
    assert seen.fakes


@still_needed("fake.watched_resizes")
def test_no_dispatch_mode_sees_a_storage_resized():
    x = torch.zeros(4)
    with Seen() as seen:
        x.untyped_storage().resize_(0)
    assert not seen.names


@still_needed("fake.sgd")
def test_fused_sgd_has_no_meta_kernel():
    values = [torch.zeros(4, device="meta")]
    with pytest.raises(NotImplementedError):
        torch._fused_sgd_(values, values, [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
                          nesterov=False, maximize=False, is_first_step=True)  # fmt: skip


@still_needed("fake.flop_formulas")
def test_no_flops_are_counted_for_attention_on_the_cpu():
    x = torch.zeros(1, 2, 8, 4)
    with FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert counter.get_total_flops() == 0


def fsdp(**settings) -> nn.Sequential:
    """Two linear layers under FSDP2, as `sharding.py` wraps a model: each layer, and the root, which stays gathered."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, **settings)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False, **settings)


@still_needed("fsdp2.fsdp_parameters")
def test_fsdp2_has_no_public_policy_nor_sharded_parameters():
    public = {name for name in dir(FSDPModule) if not name.startswith("_")}
    assert not {n for n in public if any(word in n for word in ("precision", "policy", "dtype", "sharded_param"))}


@still_needed("fsdp2.HiddenGroup")
def test_modules_show_gathered_parameters_after_a_forward(alone):
    model = fsdp()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    model(torch.ones(2, 4))
    assert not any(isinstance(p, DTensor) for p in model.parameters())


@still_needed("fsdp2.start_forward")
def test_the_first_module_called_is_taken_for_the_root(alone):
    model = fsdp()
    model[0](torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="lazily initialized"):
        model(torch.ones(2, 4))


@still_needed("fsdp2.start_forward", "fsdp2.end_forward")
def test_after_an_exception_fsdp2_goes_on_where_it_stopped(alone):
    model = fsdp()
    model(torch.ones(2, 4)).sum().backward()
    assert all(isinstance(p, DTensor) for p in model.parameters())  # freed, and reduced, at the end of a backward

    def fail(grad):
        raise RuntimeError("the script's own")

    out = model[1].register_forward_pre_hook(lambda module, args: args[0].register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="the script's own"):
        model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    out.remove()
    model(torch.ones(2, 4)).sum().backward()
    assert not all(isinstance(p, DTensor) for p in model.parameters())  # the callback that ends it counts as queued


@still_needed("fsdp2._look_at_dtypes_again")
def test_fsdp2_does_not_notice_a_cast_nor_what_is_trained_since(alone):
    model = fsdp()
    for p in model.parameters():
        p.requires_grad_(False)
    model(torch.ones(2, 4))
    for layer in [model, *model]:
        layer.reshard()
    model.to(torch.float64)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4, dtype=torch.float64))
