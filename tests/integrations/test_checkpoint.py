"""The short form of recipes/resume_matrix.py: weights and AdamW's state, from mesh to mesh, from and to one process."""

import math
import sys
from pathlib import Path

import pytest

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


def test_nan_is_a_difference():
    """In a matrix, a state that is no number is never as it was saved."""
    import torch

    bad, good = {"w": torch.tensor([math.nan])}, {"w": torch.ones(1)}
    found = resume_matrix.compare({"loaded": bad, "step 4": bad}, {"step 2": good, "step 4": good})
    assert not any(value <= math.inf for value in found)
