"""The callback without `enable()`, what is refused, and one process, in which nothing changes."""

import functools
import os

import models
import parity
import pytest
import torch
import torch.distributed as dist
import transformers
import trl
from training import (
    MESH_2x2,
    assert_equal_logs,
    train,
)
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_tpsp
from hf_tpsp import TPSPCallback, TPSPConfig
from hf_tpsp.integrations import session
from hf_tpsp.integrations.registry import check_arguments
from hf_tpsp.launch import environment


def with_the_callback(model: str, out: str) -> list[dict]:
    """No enable(): the model is in memory when the Trainer, launched with a preset, is made."""
    os.environ.update(environment(MESH_2x2))
    callback = TPSPCallback()
    try:
        loaded = models.build("qwen2", tied=True, vocab_size=132, seed=dist.get_rank())
        with torch.no_grad():
            if dist.get_rank() == 0:
                loaded.load_state_dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict())
        return train(loaded, out, 2, callbacks=[callback], save_strategy="no")
    finally:
        session.current().disable()


def test_callback_alone(ranks, tiny, expected, tmp_path):
    assert_equal_logs(ranks.run(4, with_the_callback, tiny, str(tmp_path))[0], expected)


# Name → options of the Trainer that are refused at set-up, and what the refusal says.
REFUSALS = {
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "set per_device_train_batch_size"),
    "torch_compile": ({"torch_compile": True}, "HF_TPSP_COMPILE=true"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel=True puts kernels"),
    "gather_object": ({"eval_use_gather_object": True}, "eval_use_gather_object=True"),
    "adafactor": ({"optim": "adafactor"}, "optim='adafactor' has not been shown to work on shards; of the Trainer's, adamw_torch,"),
    "torchao": ({"optim": "adamw_torch_8bit"}, "optim='adamw_torch_8bit' has not"),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, 'use "group_by_length"'),
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    "selective": (
        {"gradient_checkpointing_kwargs": {"selective": True}}, "set HF_TPSP_ACTIVATION_CHECKPOINTING=selective"
    ),
    "fsdp": (
        {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
        "'TRANSFORMER_BASED_WRAP' wraps a model that is sharded; leave `fsdp` out",
    ),
    "two at once": ({"auto_find_batch_size": True, "optim": "adafactor"}, "per_device_train_batch_size; optim='adafactor'"),
}  # fmt: skip
TRL_REFUSALS = {
    "activation_offloading": "HF_TPSP_ACTIVATION_CHECKPOINTING=full",
    "use_weighting": "leave it out",
    "precompute_ref_log_probs": "leave it out",
    "sync_ref_model": "leave it out",
}


def refusals(model: str, out: str) -> dict[str, str]:
    texts = {}

    def note(name, run):
        with hf_tpsp.enable(TPSPConfig(tp_size=2)), pytest.raises(ValueError) as error:
            run()
        texts[name] = str(error.value)

    config = models.config("qwen2", vocab_size=132)
    for name, (options, _) in REFUSALS.items():
        arguments = TrainingArguments(out, use_cpu=True, report_to=[], **options)
        note(name, functools.partial(Trainer, AutoModelForCausalLM.from_config(config), arguments))
    for name in TRL_REFUSALS:
        cls = trl.SFTConfig if name == "activation_offloading" else trl.DPOConfig
        arguments = cls(out, use_cpu=True, bf16=False, **{name: True})
        note(name, functools.partial(check_arguments, arguments))
    for cls in (trl.GRPOConfig, trl.RewardConfig):
        note(cls.__name__, functools.partial(check_arguments, cls(out, use_cpu=True, bf16=False)))

    arguments = TrainingArguments(out, use_cpu=True, report_to=[])
    larger = {"model": AutoModelForCausalLM.from_config(config), "processing_class": models.tokenizer(134)}
    note("tokenizer", functools.partial(Trainer, args=arguments, **larger))

    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        loaded.model.layers[0].adapter = torch.nn.Linear(4, 4)
    note("adapter", lambda: Trainer(loaded, TrainingArguments(out, use_cpu=True)))

    def on_another_mesh():
        os.environ["PARALLELISM_CONFIG_TP_SIZE"], os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = "1", "2"
        train(model, out, 1)

    note("another mesh", on_another_mesh)
    return texts


def test_refusals(ranks, tiny, tmp_path):
    """Everything that is refused at set-up is refused in one sentence, which says what to do."""
    texts = ranks.run(2, refusals, tiny, str(tmp_path))[0]
    for name, (_, words) in REFUSALS.items():
        assert texts[name].startswith("These TrainingArguments do not work") and words in texts[name], texts[name]
    for name, words in TRL_REFUSALS.items():
        assert f"{name}=True" in texts[name] and words in texts[name]
    for name in ("GRPOConfig", "RewardConfig"):
        assert f"{name}: of TRL's trainers, those of SFTConfig, DPOConfig are supported" in texts[name]
    assert "model.layers.0.adapter.weight, model.layers.0.adapter.bias" in texts["adapter"]
    assert "its pad_token '[PAD]' is 133. Call model.resize_token_embeddings(134)" in texts["tokenizer"]
    assert "(1, 2)" in texts["another mesh"] and "(2, 1)" in texts["another mesh"]


def one_process(model: str, out: str) -> bool:
    """enable() in a process that was not launched as one of several changes nothing."""
    with hf_tpsp.enable():
        log = train(model, out, 1, steps=2)
    return any("loss" in entry for entry in log) and not parity.dist.is_initialized()


def test_enable_in_one_process(tiny, tmp_path):
    assert not dist.is_initialized()
    assert one_process(tiny, str(tmp_path))
    assert transformers.Trainer.save_model.__module__ == "transformers.trainer"
