"""What transformers does that hf_tpsp works around: each test passes as long as the defect is there, without any patch.

Methods of the Trainer are called on a stand-in for one of two ranks of a TP group, which has what they read.
"""

from types import SimpleNamespace

import models
import pytest
import torch
import transformers.trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook

from .worlds import world

still_needed = pytest.mark.still_needed


def rank_of_two(**more) -> SimpleNamespace:
    """One rank of a TP group of two, which is all there is."""
    return SimpleNamespace(
        get_tp_size=lambda: 2, get_cp_size=lambda: 1, get_sp_size=lambda: 1,
        accelerator=SimpleNamespace(
            gather=lambda x: torch.stack([x, x]), unwrap_model=lambda model: model, parallelism_config=None,
            state=SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")),
        ),
        args=SimpleNamespace(
            device=torch.device("cpu"), include_num_input_tokens_seen="all", average_tokens_across_devices=False, n_gpu=0,
            world_size=2, parallel_mode=transformers.training_args.ParallelMode.DISTRIBUTED, output_dir="out",
            push_to_hub=False, should_save=True, hub_model_id=None, hub_token=None,
        ),
        state=SimpleNamespace(num_input_tokens_seen=0, total_flos=0), model=SimpleNamespace(main_input_name="input_ids"),
        **more,
    )  # fmt: skip


@still_needed("transformers._patch_save_model")
def test_save_model_writes_nothing_under_sharded_state_dict():
    written = []
    trainer = rank_of_two(
        is_fsdp_enabled=True, is_deepspeed_enabled=False, _save=lambda *args, **kwargs: written.append(args)
    )
    Trainer.save_model(trainer, "out")
    assert not written


@still_needed("transformers._patch_push")
def test_a_push_saves_by_the_call_that_writes_nothing():
    class Stop(Exception):
        pass

    def save_model(*args, **kwargs):
        raise Stop(args, kwargs)

    trainer = rank_of_two(
        hub_model_id="one", save_model=save_model, control=None,
        callback_handler=SimpleNamespace(on_push_begin=lambda *args: None),
    )  # fmt: skip
    with pytest.raises(Stop) as stopped:
        Trainer.push_to_hub(trainer)
    assert stopped.value.args == ((), {"_internal_call": True})


@still_needed("transformers._patch_neftune")
def test_the_noise_of_neftune_is_the_same_for_each_part_of_the_sequence():
    drawn = []
    for rank in range(2):
        with world(2, rank):
            mesh = init_device_mesh("cpu", (2,))
            stream = distribute_tensor(torch.zeros(1, 8, 4), mesh, [Shard(1)], src_data_rank=None)
            torch.manual_seed(0)
            noisy = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=5.0), None, stream)
            drawn.append(noisy.to_local().clone())
    assert drawn[0].equal(drawn[1]) and drawn[0].count_nonzero()


@still_needed("transformers._patch_track_tokens")
def test_tokens_are_counted_once_per_tp_rank():
    trainer = rank_of_two(processing_class=None)
    Trainer._track_num_input_tokens(trainer, {"input_ids": torch.ones(2, 8, dtype=torch.long)})
    assert trainer.state.num_input_tokens_seen == 2 * 16


@still_needed("transformers._patch_num_items")
def test_the_count_of_labels_is_divided_though_it_was_not_gathered():
    trainer = rank_of_two(model_accepts_loss_kwargs=True, compute_loss_func=None, _loss_shifts_labels=True)
    batch = {"labels": torch.ones(2, 9, dtype=torch.long)}
    assert Trainer._get_num_items_in_batch(trainer, [batch], torch.device("cpu")) == 16 / 2


@still_needed("transformers._patch_store_flos")
def test_flops_of_one_batch_are_counted_once_per_tp_rank(monkeypatch):
    monkeypatch.setattr(
        transformers.trainer, "distributed_broadcast_scalars", lambda scalars, device: torch.tensor(scalars * 2)
    )
    trainer = rank_of_two(current_flos=5)
    Trainer.store_flos(trainer)
    assert trainer.state.total_flos == 2 * 5


@still_needed("transformers._patch_training_arguments")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="asks for bf16 on a machine that has nothing but a CPU")
def test_bf16_is_refused_where_accelerate_runs_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="use_cpu"):
        TrainingArguments(output_dir=str(tmp_path), bf16=True)


@still_needed("transformers._whole_missing_parameters", "transformers._patch_initialize")
def test_missing_parameters_get_the_same_numbers_on_each_rank():
    drawn = []
    for rank in range(2):
        with world(2, rank):
            model = models.build("llama", vocab_size=132)
            mesh, head = init_device_mesh("cpu", (2,)), model.lm_head
            head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
            for module in model.modules():  # all but the head's were in the checkpoint
                module._is_hf_initialized = False
            for name, parameter in model.named_parameters():
                parameter._is_hf_initialized = name != "lm_head.weight"
            torch.manual_seed(0)
            model._initialize_missing_keys(False)
            drawn.append(head.weight.to_local().detach().clone())
    assert drawn[0].equal(drawn[1])


@still_needed("transformers.keep_name")
def test_label_smoothing_does_not_know_a_model_by_the_name_that_fsdp2_gives_it(alone):
    model = models.build("llama")
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    asked = []

    def smoother(outputs, labels, shift_labels=False, num_items_in_batch=None):
        asked.append(shift_labels)
        return outputs.logits.sum()

    trainer = rank_of_two(label_smoother=smoother, compute_loss_func=None, model_accepts_loss_kwargs=False)
    Trainer.compute_loss(trainer, model, dict(inputs))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    Trainer.compute_loss(trainer, model, dict(inputs))
    assert asked == [True, False]


@still_needed("transformers.spare_grouped_mm")
def test_grouped_matrix_products_take_no_odd_widths():
    ends = torch.tensor([2, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError):
        nn.functional.grouped_mm(
            torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(2, 8, 12, dtype=torch.bfloat16), offs=ends
        )


@still_needed("transformers.fused_attention")
def test_sdpa_gets_a_mask_when_tensors_are_fake():
    """Whatever is registered stays: there is no public way to take it back."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return query.transpose(1, 2), None

    try:
        AttentionInterface.register("seen", attention)
        AttentionMaskInterface.register("seen", AttentionMaskInterface()["sdpa"])
        model = models.build("llama", attn_implementation="seen")
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.zeros(2, 8, dtype=torch.long), use_cache=False)
        assert seen and all(mask is not None and mask.shape[-2:] == (8, 8) for mask in seen)
        assert not hasattr(AttentionInterface, "unregister")
    finally:
        del AttentionInterface._global_mapping["seen"], AttentionMaskInterface._global_mapping["seen"]
