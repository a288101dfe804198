"""Options whose end was unclear are refused by name."""

import math

import accelerate
import models
import peft
import pytest
import torch
import torch.distributed as dist
import transformers

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.forward.options import check_dtypes
from hf_tpsp.integrations.registry import check_arguments
from hf_tpsp.state import parallelized_model
from hf_tpsp.tools.verify.comparison import (
    Errors,
    compare_gradients,
    full,
    relative,
    relative_number,
    shard_batch,
    train_beside,
)
from hf_tpsp.tools.verify.verify import build


def test_refused_by_name(tmp_path):
    option = {"gradient_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **option)
    with pytest.raises(ValueError, match="activation_checkpointing_kwargs"):
        check_arguments(args)


def trained(reference, model, optimizer, config, backward, steps=3):
    """Largest errors after `steps` steps of a loop of one's own; `optimizer` holds what the script made."""
    theirs = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    errors, mesh = Errors(), parallelized_model(model)._tpsp.mesh
    for step in range(steps):
        batch = models.batch(4, 17, seed=step)
        loss = reference(**batch).loss
        loss.backward()
        found = model(**shard_batch(batch, mesh), num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss
        backward(found * config.dp_size)
        total = found.detach().clone()
        dist.all_reduce(total)
        errors.add("loss", relative_number(total.item() / config.tp_size, loss.item()))
        compare_gradients(reference, model, errors, rounding=True)
        for each in (theirs, optimizer):
            each.step()
            each.zero_grad()
    for expected, weight in zip(reference.parameters(), model.parameters(), strict=True):
        errors.add("weight", relative(full(weight.detach()), expected.detach()))
    return errors


class Wrapper(torch.nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, **batch):
        return self.lm(**batch)


def adapted(model):
    torch.manual_seed(7)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


def prepared():
    config = TPSPConfig(tp_size=2, dp_shard_size=2)
    found = []
    with hf_tpsp.enable(config):
        accelerator = accelerate.Accelerator()
        for wrap, tied in ((None, True), (adapted, False), (Wrapper, False)):
            reference, model = (models.build("qwen2", tied=tied) for _ in range(2))
            if wrap is not None:
                reference, model = wrap(reference), wrap(model)
            groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}]
            optimizer = torch.optim.AdamW(groups, eps=1e-4)
            model, optimizer = accelerator.prepare(model, optimizer)
            assert {id(p) for p in model.parameters() if p.requires_grad} == {
                id(p) for group in optimizer.param_groups for p in group["params"]
            }
            found.append(trained(reference, model, optimizer, config, accelerator.backward))
        model = models.build("qwen2")
        optimizer = torch.optim.AdamW(model.parameters())
        model(**models.batch(2, 9)).loss.backward()
        optimizer.step()
        with pytest.raises(ValueError, match="has taken steps"):
            accelerator.prepare(model, optimizer)
        model = Wrapper(models.build("qwen2"))
        model.scale = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match=r"outside of the Qwen2ForCausalLM.*scale"):
            accelerator.prepare(model)
    return found


def test_prepare_of_a_whole_model(ranks):
    for errors in ranks.run(4, prepared)[0]:
        assert errors.within(1e-5, weight=1e-4), errors


def checkpointed(tp_size, dp_shard_size):
    config = TPSPConfig(tp_size=tp_size, dp_shard_size=dp_shard_size)
    found = []
    data = [[models.batch(4, 17, seed=i)] for i in range(2)]
    calls = [
        lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}),
        lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}),
        lambda m: m.activation_checkpointing_enable(every_n_layers=2),
        lambda m: m.activation_checkpointing_enable({"every_n_layers": 3}),
        lambda m: m.model.activation_checkpointing_enable(every_n_layers=2),
    ]
    for i, call in enumerate(calls):
        reference, model = (models.build("qwen2", num_hidden_layers=3) for _ in range(2))
        if i == 2:  # before it is sharded
            call(model)
            hf_tpsp.parallelize(model, config)
        else:
            hf_tpsp.parallelize(model, config)
            call(model)
        reference.train(), model.train()
        found.append(train_beside(reference, model, data, config, model._tpsp.mesh))
    with pytest.raises(ValueError, match="offload"):
        model.activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match="offload"):
        model.model.activation_checkpointing_enable({"offload": True})
    with pytest.raises(ValueError, match="selective"):
        model.gradient_checkpointing_enable({"selective": True})
    with pytest.raises(ValueError, match="use_kernels"):
        model.set_use_kernels(True)
    with pytest.raises(ValueError, match="use_kernels"):
        model.use_kernels = True
    model = models.build("qwen2")
    model.activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match="offload"):
        hf_tpsp.parallelize(model, config)
    return found


@pytest.mark.parametrize("sizes", [(2, 1)])
def test_checkpointing_by_the_script(ranks, sizes):
    for errors in ranks.run(sizes[0] * sizes[1], checkpointed, *sizes)[0]:
        assert errors.within(1e-5, weight=1e-4), errors


def kernels(folder):
    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        for name in ("use_kernels", "kernel_config"):
            with pytest.raises(ValueError, match=rf"from_pretrained\({name}"):
                transformers.AutoModelForCausalLM.from_pretrained(folder, **{name: True})
        return type(transformers.AutoModelForCausalLM.from_pretrained(folder, use_kernels=False)).__name__


def test_kernels_are_refused(ranks, tmp_path):
    models.build("qwen2").save_pretrained(tmp_path)
    assert all("Qwen2" in name for name in ranks.run(2, kernels, str(tmp_path)))


def inferred(tp_size, dp_shard_size, loss):
    config = TPSPConfig(tp_size=tp_size, dp_shard_size=dp_shard_size, loss=loss)
    reference, model = (models.build("qwen2") for _ in range(2))
    hf_tpsp.parallelize(model, config)
    batch = models.batch(4, 17)
    errors = Errors()
    with torch.inference_mode():
        reference.eval(), model.eval()
        expected, found = reference(**batch), model(**batch)
        errors.add("loss", relative_number(found.loss.item(), expected.loss.item()))
        errors.add("loss", relative(full(found.logits), expected.logits))
        ids = batch["input_ids"]
        errors.add("loss", relative(full(model(input_ids=ids).logits), reference(input_ids=ids).logits))
        hidden = model.model(input_ids=ids).last_hidden_state
        errors.add("loss", relative(full(hidden), reference.model(input_ids=ids).last_hidden_state))
        assert torch.is_inference_mode_enabled()
    reference.train(), model.train()
    trained = train_beside(reference, model, [[batch]] * 2, config, model._tpsp.mesh)
    with torch.inference_mode():  # between steps too
        errors.add("loss", relative(full(model(**batch).logits), reference(**batch).logits))
    again = train_beside(reference, model, [[batch]], config, model._tpsp.mesh)
    return errors, trained, again


@pytest.mark.parametrize("sizes", [(2, 1, "chunked"), (2, 2, "loss_parallel")])
def test_inference_mode_before_training(ranks, sizes):
    for errors in ranks.run(sizes[0] * sizes[1], inferred, *sizes)[0]:
        assert errors.within(2e-5, weight=1e-4), errors


def mixed_dtypes():
    model = models.build("qwen2", dtype=torch.bfloat16)
    model.model.layers[1].input_layernorm.float()
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2))
    with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight \(torch\.float32\).*bf16=True"):
        model(**models.batch(2, 9))
    model = models.build("qwen2", dtype=torch.bfloat16)
    model.model.layers[1].input_layernorm.float().requires_grad_(False)
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2))
    check_dtypes(model)  # frozen: FSDP2 takes it


def test_mixed_dtypes_are_named(ranks):
    ranks.run(2, mixed_dtypes)


def kept_in_fp32(folder: str) -> str:
    """A model of which transformers keeps some weights in fp32, loaded in bf16: in a loop of one's own, and with bf16=True."""
    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with pytest.raises(ValueError) as error:
            model(**models.batch(2, 9))
        args = transformers.TrainingArguments(
            f"{folder}/out", max_steps=1, bf16=True, use_cpu=True, report_to=[], disable_tqdm=True
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        rows = [{"input_ids": ids, "labels": ids} for ids in models.batch(8, 9)["input_ids"]]
        trainer = transformers.Trainer(model, args, train_dataset=rows)
        trainer.train()
        assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("ernie4_5_moe", "layers.1.mlp.gate.weight"), ("beam", "layers.1.mlp.gate.weight"), ("flint", "self_attn.sinks")],
)
def test_weights_kept_in_fp32(ranks, tmp_path, model_type, name):
    folder = str(tmp_path / "model")
    build(model_type, torch.float32, 132, {}).save_pretrained(folder)
    for text in ranks.run(2, kept_in_fp32, folder):
        assert f"{name} (torch.float32)" in text and "Train with bf16=True" in text


def narrow_experts(width):
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", **models.COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=width
    )
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        both.append(transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm"))
    config = TPSPConfig(tp_size=2)
    hf_tpsp.parallelize(both[1], config)
    errors = train_beside(*both, [[models.batch(2, 17)]], config, both[1]._tpsp.mesh, rounding=True)
    return errors, both[1].config._experts_implementation


@pytest.mark.parametrize("width", [32, 12])
def test_experts_narrower_than_grouped_products(ranks, width):
    errors, implementation = ranks.run(2, narrow_experts, width)[0]
    assert errors.within(1e-5, weight=1e-4), errors
    assert implementation == ("grouped_mm" if width == 32 else "eager")
