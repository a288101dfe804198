"""The order in which a script does things: what it looks at, and calls, before and between the steps of training."""

import functools

import models
import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.verify import full, larger, relative

MESHES = {
    "1x2": TPSPConfig(tp_size=2),
    "2x2": TPSPConfig(tp_size=2, dp_shard_size=2),
    "hsdp": TPSPConfig(tp_size=2, dp_replicate_size=2),
    "2x2 no SP": TPSPConfig(tp_size=2, dp_shard_size=2, sequence_parallel=False),
    "2x2 loss_parallel": TPSPConfig(tp_size=2, dp_shard_size=2, loss="loss_parallel"),
    "2x2 kept": TPSPConfig(tp_size=2, dp_shard_size=2, reshard_after_forward=False),
}
BATCH = models.batch(4, 17)


def pair(config: TPSPConfig, tied: bool = False, lora: bool = False, model_type: str = "qwen2", **settings):
    """The reference, the sharded model, and the rows of this rank."""
    reference, model = (models.build(model_type, tied=tied, **settings).train() for _ in range(2))
    hf_tpsp.parallelize(model, config)
    if lora:
        with hf_tpsp.enable(config):
            reference, model = (with_adapters(part) for part in (reference, model))
    return reference, model, parity.shard_batch(BATCH, parallel(model).mesh)


def with_adapters(model):
    """LoRA whose second matrix is not zero, so that both have gradients."""
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
            with torch.no_grad():
                parameter.copy_(
                    torch.distributed.tensor.distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                    if isinstance(parameter, DTensor)
                    else value
                )
    return model


def parallel(model):
    return next(m for m in model.modules() if "_tpsp" in vars(m))._tpsp


def gradient_error(reference, model) -> tuple[float, str]:
    """The largest relative error over all gradients, and whose it is."""
    worst, where = 0.0, ""
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            error = relative(full(parameter.grad), expected[name].grad)
            worst, where = (error, name) if larger(worst, error) is not worst else (worst, where)
    return worst, where


# ---- 5: parameters between the steps -------------------------------------------------------------------------------


def looked_at(config: TPSPConfig, lora: bool, what: str) -> list[tuple[float, str]]:
    """A forward before the optimizer is made, and what a script may do next. Then two steps."""
    reference, model, batch = pair(config, lora=lora, tied=what == "tied")
    losses = {part: part(**b).loss for part, b in ((reference, BATCH), (model, batch))}
    if what == "raised":
        hook = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        hook.remove()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1, name
    assert isinstance(model.get_input_embeddings().weight, DTensor)
    assert model.get_input_embeddings().weight.device_mesh.ndim > 1
    if what == "state_dict":
        assert all(value.device_mesh.ndim > 1 for value in model.state_dict().values())
    if what == "accelerate":
        with hf_tpsp.enable(config):
            prepared = Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[1]
        optimizers = [torch.optim.SGD(reference.parameters(), lr=0.1), prepared]
    else:
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (reference, model)]
    found = []
    if what in ("later", "twice"):  # the backward of the first forward
        for part, b in ((reference, BATCH), (model, batch)):
            loss = losses[part]
            if what == "twice":
                loss = loss + part(**b).loss
            part.zero_grad()
            loss.backward()
        found.append(gradient_error(reference, model))
    for _ in range(2):
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            part(**b).loss.backward()
            part(**b).loss  # noqa: B018 a look at the loss between backward and step
        found.append(gradient_error(reference, model))
        norms = [float(full(torch.nn.utils.clip_grad_norm_(p.parameters(), 1.0))) for p in (reference, model)]
        found.append((abs(norms[1] / norms[0] - 1), "norm"))
        for optimizer in optimizers:
            optimizer.step()
    for (name, expected), parameter in zip(reference.named_parameters(), model.parameters(), strict=True):
        found.append((relative(full(parameter.detach()), expected.detach()), f"weight {name}"))
    return found


@pytest.mark.parametrize(
    "mesh,lora,what",
    [
        ("1x2", False, "later"),
        ("2x2", False, "raised"),
        ("2x2", True, "later"),
        ("2x2", False, "twice"),
        ("2x2 kept", False, "state_dict"),
        ("2x2 loss_parallel", False, "tied"),
        ("hsdp", False, "accelerate"),
    ],
)
def test_forward_before_the_optimizer(ranks, mesh, lora, what):
    for found in ranks.run(MESHES[mesh].world_size, looked_at, MESHES[mesh], lora, what):
        for error, name in found:
            assert error < 1e-5, name
