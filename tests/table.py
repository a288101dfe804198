"""The README's table of models: measured errors against one process. `python tests/table.py` (about two minutes)."""

import models
import parity
import torch

from hf_tpsp import TPSPConfig
from hf_tpsp.ranks import RankPool

MESHES = {"1x2": TPSPConfig(tp_size=2), "2x2": TPSPConfig(tp_size=2, dp_shard_size=2)}
PECULIAR = {
    "llama": "biases on every projection",
    "qwen2": "q/k/v biases",
    "qwen3": "q_norm, k_norm",
    "mistral": "sliding window",
    "gemma2": "sandwich norms, softcaps, scaled embedding, hybrid attention",
    "gemma3_text": "q_norm, k_norm, sandwich norms, scaled embedding, hybrid attention",
    "phi3": "packed q/k/v and gate/up",
    "smollm3": "layers without rotary embedding",
    "granite": "embedding, residual and logit multipliers",
}


def main() -> None:
    pool = RankPool()
    print("| model type | what is peculiar | SP | loss parallel | " + " | ".join(
        f"{dtype} {mesh}" for dtype in ("fp32", "fp64") for mesh in MESHES) + " |")  # fmt: skip
    print("| --- | --- | --- | --- |" + " --- |" * 4)
    for model_type in models.ARCHITECTURES:
        cells = []
        for dtype in (torch.float32, torch.float64):
            for config in MESHES.values():
                worst = 0.0
                for length in (16, 17):
                    for errors in pool.run(
                        config.world_size, parity.compare, model_type, config, dtype=dtype, length=length
                    ):
                        worst = parity.larger(worst, parity.larger(errors["loss"], errors["grad"]))
                cells.append(f"{worst:.1e}")
        print(f"| `{model_type}` | {PECULIAR[model_type]} | yes | yes | {' | '.join(cells)} |", flush=True)
    pool.stop()


if __name__ == "__main__":
    main()
