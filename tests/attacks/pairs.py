"""A model beside itself on a mesh, for the attacks on the order of calls."""

import models
import parity
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.tools.verify.comparison import full, larger, relative

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


def weighted(logits, labels, vocab_size, scale=2.0, **kwargs):
    """A loss of the script's own, which reads and reorders the logits."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return scale * (each * torch.arange(1, labels.shape[1] + 1)).mean() + logits.logsumexp(-1).square().mean()
