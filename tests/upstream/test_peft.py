"""What peft does that hf_tpsp works around: each test passes as long as the defect is there, without any patch."""

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from .worlds import world

still_needed = pytest.mark.still_needed


def shard(module: nn.Module, sizes: tuple[int, ...]) -> None:
    """Turn `module`'s weight into a DTensor that is `Shard(0)` on the last dim of a mesh of `sizes`, whole on the others."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_shard", "tp")[-len(sizes) :])
    placements = [Shard(1), Shard(0)][-len(sizes) :]
    module.weight = nn.Parameter(
        distribute_tensor(module.weight.detach(), mesh, placements, src_data_rank=None), module.weight.requires_grad
    )


@still_needed("peft._patch_features")
def test_features_are_those_of_a_ranks_part():
    with world(4):
        layer = nn.Linear(8, 16, bias=False)
        shard(layer, (2, 2))
        assert _get_in_out_features(layer) == (4, 8)


@still_needed("peft._patch_save_pretrained")
def test_adapters_that_are_dtensors_are_not_saved(tmp_path):
    with world(2):
        model = get_peft_model(models.build("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
        for name, module in model.named_modules():
            if name.endswith("lora_B.default"):
                shard(module, (2,))
        with pytest.raises(RuntimeError, match="storage"):
            model.save_pretrained(str(tmp_path))


@still_needed("peft._patch_update")
def test_a_copy_goes_on_using_the_originals_parameters():
    layer = nn.Linear(4, 4)
    inner = layer.forward
    layer.forward = lambda x: inner(x)  # what sharding puts on a module
    copy = ModulesToSaveWrapper(layer, "default").modules_to_save["default"]
    with torch.no_grad():
        copy.weight.zero_()
        copy.bias.zero_()
        assert copy(torch.ones(1, 4)).count_nonzero()


@still_needed("peft._patch_update_layer")
def test_norms_of_a_sharded_weight_are_mixed_with_plain_tensors():
    with world(2):
        base = nn.Linear(8, 16, bias=False)
        shard(base, (2,))
        layer = DoraLinearLayer(fan_in_fan_out=False)
        with pytest.raises(RuntimeError, match="mixed"):
            layer.update_layer(base_layer=base, lora_A=torch.ones(2, 8), lora_B=torch.ones(16, 2), scaling=1.0)


@still_needed("peft.adapters_off")
def test_adapters_that_are_turned_off_are_not_trained_either():
    model = get_peft_model(models.build("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    with model.disable_adapter():
        assert not any(p.requires_grad for p in adapters)
