"""bf16, wherever the model and the accelerator come from."""

import contextlib

import models
import parity
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_tpsp
from attacks.pairs import BATCH, MESHES, parallel, with_adapters
from hf_tpsp import TPSPConfig


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, row):
        return {name: value[row % 4] for name, value in BATCH.items()}


class Seen(TrainerCallback):
    """Of what dtype a layer is given its stream, and the parameters are."""

    def __init__(self):
        self.dtypes = set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.dtypes.add(("parameter", *{p.dtype for p in model.parameters()}))
        model.get_decoder().layers[1].mlp.register_forward_hook(lambda m, i, o: self.dtypes.add(("output", o.dtype)))


def from_init(folder: str, out: str, config: TPSPConfig | None, init: bool, dtype: torch.dtype) -> tuple:
    with hf_tpsp.enable(config) if config else contextlib.nullcontext():

        def make():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

        args = TrainingArguments(
            out, use_cpu=True, bf16=True, max_steps=3, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
            learning_rate=1e-2, per_device_train_batch_size=4 // (config.dp_size if config else 1),
        )  # fmt: skip
        seen = Seen()
        given = {"model_init": make} if init else {"model": make()}
        trainer = Trainer(args=args, train_dataset=Rows(), callbacks=[seen], **given)
        trainer.train()
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e], seen.dtypes


def in_a_loop(folder: str, config: TPSPConfig | None, dtype: torch.dtype, lora: bool = False) -> tuple:
    """`Accelerator(mixed_precision="bf16")`, whose optimizer is made before `prepare`."""
    with hf_tpsp.enable(config) if config else contextlib.nullcontext():
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
        if lora:
            model = with_adapters(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        seen, losses = Seen(), []
        seen.on_train_begin(None, None, None, model=model)
        trained = [p for p in model.parameters() if p.requires_grad]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in trained} == held and {p.dtype for p in trained} == {torch.float32}
        batch = parity.shard_batch(BATCH, parallel(model).mesh) if config else BATCH
        for _ in range(3):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach().clone(), "mean").item())
        if config:
            with pytest.raises(ValueError, match="fp16"):
                accelerator.state._shared_state["_mixed_precision"] = "fp16"
                accelerator.prepare(model)
    return losses, seen.dtypes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    models.build("qwen2").save_pretrained(folder)
    return folder


def close(found: list, expected: list, limit: float) -> bool:
    return all(abs(a - b) <= limit * abs(b) for a, b in zip(found, expected, strict=True))


BF16 = {("parameter", torch.float32), ("output", torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_init(ranks, folder, tmp_path, dtype):
    expected, _ = from_init(folder, str(tmp_path), None, True, torch.float32)
    for (found, dtypes), (given, _) in zip(
        ranks.run(4, from_init, folder, str(tmp_path), MESHES["2x2"], True, dtype),
        ranks.run(4, from_init, folder, str(tmp_path), MESHES["2x2"], False, dtype),
        strict=True,
    ):
        assert dtypes == BF16 and found == given  # bitwise the run of a model that the Trainer was given
        for mine, theirs in zip(found, expected, strict=True):
            assert close(mine, theirs, 0.02)


@pytest.mark.parametrize("lora", [False, True])
def test_mixed_precision_of_a_loop(ranks, folder, lora):
    for dtype in (torch.float32, torch.bfloat16)[lora:]:
        expected, _ = in_a_loop(folder, None, torch.float32, lora)
        for found, dtypes in ranks.run(4, in_a_loop, folder, MESHES["2x2"], dtype, lora):
            assert close(found, expected, 5e-3) and ("output", torch.bfloat16) in dtypes
            assert lora or dtypes == BF16
