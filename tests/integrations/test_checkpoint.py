"""Sharded checkpoints of weights that are dealt in strides (gate and up in one): whole, on any mesh."""

import functools

import pytest
import torch
from training import Rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.tools.verify.comparison import largest, relative
from hf_tpsp.tools.verify.verify import build

MESHES = {"1x2": TPSPConfig(tp_size=2), "2x2": TPSPConfig(tp_size=2, dp_shard_size=2)}


def train(config: TPSPConfig, folder: str, out: str, steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
    """Weights and AdamW's second moments after `steps`, whole."""
    with hf_tpsp.enable(config):
        arguments = TrainingArguments(
            out, max_steps=steps, save_steps=2, per_device_train_batch_size=4 // config.dp_size, report_to=[], disable_tqdm=True,
            use_cpu=True, seed=0, lr_scheduler_type="constant", logging_strategy="no",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = Trainer(model, arguments, train_dataset=Rows(16, 1))
        trainer.train(resume_from_checkpoint=resume)
    moments = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    found = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    found |= {
        f"{n} moment": moments[p]["exp_avg_sq"].full_tensor() for n, p in model.named_parameters() if p in moments
    }
    return found


@pytest.mark.parametrize("model_type", ["phi3", "qwen3_moe"])
def test_resume_on_either_mesh(ranks, model_type, tmp_path):
    """Resumed on its own mesh bitwise; on another one, weights and moments are the same."""
    folder = str(tmp_path / "model")
    build(model_type, torch.float32, 132, {}).save_pretrained(folder)
    run = functools.partial(ranks.run, 4, train, MESHES["2x2"], folder)
    out = str(tmp_path / "out")
    whole = run(out, 4)[0]
    again = run(out, 4, f"{out}/checkpoint-2")[0]
    assert whole.keys() == again.keys()
    assert not [name for name in whole if not torch.equal(whole[name], again[name])]
    start = run(out, 2, f"{out}/checkpoint-2")[0]
    other = ranks.run(2, train, MESHES["1x2"], folder, str(tmp_path / "other"), 2, f"{out}/checkpoint-2")[0]
    assert start.keys() == other.keys() and any("moment" in name for name in start)
    # The Trainer takes one step more, in which the ranks' sums are rounded in another order.
    assert largest(relative(other[name], start[name]) for name in start) < 1e-5
