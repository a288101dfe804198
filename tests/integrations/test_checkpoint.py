"""The short form of recipes/resume_matrix.py: weights and AdamW's state, from mesh to mesh, from and to one process."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_tpsp
from hf_tpsp.integrations.loading import load_weights
from hf_tpsp.tools.verify.verify import build

sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # last: it has a parity.py too
import resume_matrix


@pytest.mark.parametrize(
    ("model", "mesh"), [("phi3", resume_matrix.SOURCE), ("qwen3_moe", "1x1x2"), ("qwen2 LoRA", "1x1x2")]
)
def test_resumes_elsewhere(ranks, model, mesh, tmp_path):
    """Weights that are dealt in strides (gate and up in one), packed experts, an adapter with a trained head: loaded as
    they were saved, and further steps as those of the run that went on; bitwise on the same mesh."""
    ((_, differences),) = resume_matrix.rows(model, [mesh], ranks, tmp_path)
    assert [loaded for loaded, _ in differences] == [0, 0, 0]
    assert all(last <= resume_matrix.LIMIT for _, last in differences)
    if mesh == resume_matrix.SOURCE:
        assert differences[0] == (0, 0)
    checkpoint = tmp_path / mesh / "checkpoint-2"
    holds = {path.name for path in checkpoint.iterdir()}
    assert holds >= {"training_args.bin", "adapter_model.safetensors" if "LoRA" in model else "config.json"}
    assert "model.safetensors" not in holds


def train_whole(*args):
    """`resume_matrix.train` with checkpoints that rank 0 writes whole."""
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    return resume_matrix.train(*args)


def test_a_checkpoint_is_loaded_as_it_was_saved(ranks, tmp_path):
    """Saved whole: it holds the model, exports, and goes on in a run that saves shards."""
    model, whole, exported = str(tmp_path / "model"), str(tmp_path / "whole"), str(tmp_path / "exported")
    build("qwen2", torch.float32, 132, {}).save_pretrained(model)
    first = ranks.run(2, train_whole, "1x1x2", model, False, whole)[0]
    assert {path.name for path in Path(whole, "checkpoint-2").iterdir()} >= {
        "model.safetensors",
        "pytorch_model_fsdp.bin",
    }
    sharded = str(tmp_path / "sharded")
    again = ranks.run(2, resume_matrix.train, "1x1x2", model, False, sharded, f"{whole}/checkpoint-2")[0]
    assert resume_matrix.compare(again, first) == (0, 0)
    assert Path(sharded, "checkpoint-4", "pytorch_model_fsdp_0").is_dir()
    hf_tpsp.export(f"{whole}/checkpoint-2", exported)
    loaded, last = resume_matrix.compare(
        resume_matrix.train(None, model, False, str(tmp_path / "one"), exported), first
    )
    assert loaded == 0 and last <= resume_matrix.LIMIT


def refusal(model: str, other: str) -> str:
    """What a rank says when it is to load the weights in the folder `other` into a sharded `model`."""
    with hf_tpsp.enable(hf_tpsp.TPSPConfig(tp_size=2)):
        network = AutoModelForCausalLM.from_pretrained(model)
        before = network.model.norm.weight.to_local().clone()
        with pytest.raises(ValueError, match="has not the weights of this") as raised:
            load_weights(network, other)
    assert torch.equal(network.model.norm.weight.to_local(), before)
    return str(raised.value)


def test_weights_of_another_model(ranks, tmp_path):
    """The Trainer alone would warn, and train on. Here all ranks say what is wrong, and nothing has been loaded."""
    model, other = str(tmp_path / "model"), str(tmp_path / "other")
    build("qwen2", torch.float32, 132, {}).save_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    config.intermediate_size += 2
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    first, second = ranks.run(2, refusal, model, other)
    assert first == second and "model.layers.0.mlp.down_proj.weight" in first and "of another shape" in first


def test_nan_is_a_difference():
    """In a matrix, a state that is no number is never as it was saved."""
    bad, good = {"w": torch.tensor([math.nan])}, {"w": torch.ones(1)}
    found = resume_matrix.compare({"loaded": bad, "step 4": bad}, {"step 2": good, "step 4": good})
    assert not any(value <= math.inf for value in found)
