"""What accelerate does that hf_tpsp works around: each test passes as long as the defect is there, without any patch."""

import os
from types import SimpleNamespace

import accelerate.scheduler
import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from .worlds import world

still_needed = pytest.mark.still_needed


@still_needed("accelerate.use_cpu_if_alone")
def test_the_launcher_of_fsdp_drops_use_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    args = launch_command_parser().parse_args(
        ["--use_fsdp", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
         "--main_process_port=0", "script.py"]
    )  # fmt: skip
    assert args.cpu
    assert "ACCELERATE_USE_CPU" not in prepare_multi_gpu_env(args)


def distributed_type() -> str:
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    return Accelerator(cpu=True).distributed_type.value


@still_needed("accelerate._patch_accelerator_state")
def test_ranks_on_the_cpu_do_not_get_fsdp(ranks):
    assert set(ranks.run(2, distributed_type)) == {"MULTI_CPU"}


@still_needed("accelerate._patch_dp_shard_enabled")
def test_fsdp_is_refused_over_a_dim_of_one():
    sizes = ParallelismConfig(tp_size=2, dp_shard_size=1)
    accelerator = SimpleNamespace(multi_device=True, num_processes=2, is_fsdp2=True)
    with pytest.raises(ValueError, match="no dimension for FSDP"):
        sizes._validate_accelerator(accelerator)


@still_needed("accelerate._patch_dispatch_batches")
def test_all_ranks_are_dealt_one_batch_if_there_is_a_tp_dim(monkeypatch):
    monkeypatch.setattr("accelerate.data_loader.broadcast_object_list", lambda objects: objects)
    with world(4):
        loader = SimpleNamespace(
            submesh_tp=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))["tp"], split_batches=False,
            state=SimpleNamespace(process_index=0, num_processes=4), _update_state_dict=lambda: None, _drop_last=False,
        )  # fmt: skip
        batch, _ = DataLoaderDispatcher._fetch_batches(loader, iter(torch.arange(8.0).view(4, 2, 1)))
    assert batch.equal(torch.tensor([[0.0], [1.0]]).repeat(4, 1))  # the other data-parallel rank's too


@still_needed("accelerate._patch_scheduler")
def test_the_schedule_steps_once_for_each_tp_rank(monkeypatch):
    state = SimpleNamespace(num_processes=2, parallelism_config=ParallelismConfig(tp_size=2))
    monkeypatch.setattr(accelerate.scheduler, "AcceleratorState", lambda: state)
    monkeypatch.setattr(accelerate.scheduler, "GradientState", lambda: SimpleNamespace(sync_gradients=True))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.step_was_skipped = False
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    AcceleratedScheduler(schedule, optimizer).step()
    assert schedule.last_epoch == 2


@still_needed("accelerate._patch_gather_for_metrics")
def test_metrics_have_each_sample_once_per_tp_rank():
    def gathered(remainder: int) -> list[int]:
        accelerator = SimpleNamespace(
            gather=lambda rows: torch.cat([rows, rows]), num_processes=2,
            parallelism_config=ParallelismConfig(tp_size=2),
            gradient_state=SimpleNamespace(end_of_dataloader=remainder > 0, remainder=remainder),
        )  # fmt: skip
        return Accelerator.gather_for_metrics(accelerator, torch.arange(3)).tolist()

    assert gathered(0) == [0, 1, 2, 0, 1, 2]
    assert gathered(2) == [0, 1]  # right by luck, where one TP group is all there is


@still_needed("accelerate.prepare_beside_sharded")
def test_a_model_that_is_sharded_cannot_be_prepared():
    with world(2):
        model = nn.Linear(4, 4, bias=False)
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))
        model.weight = nn.Parameter(
            distribute_tensor(model.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None)
        )
        accelerator = SimpleNamespace(
            is_fsdp2=True, torch_device_mesh=mesh,
            _get_named_parameters=lambda *args, drop_refs: dict(model.named_parameters()),
        )  # fmt: skip
        with pytest.raises(ImportError, match="ReplicateParallel"):
            Accelerator._prepare_tp(accelerator, model)
