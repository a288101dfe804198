"""What a decoder layer keeps for backward, at the size of real models, on one rank of a simulated 8-way TP world.

    python recipes/activation_memory.py [--tp 8] [--tokens 8192] [--dtype bf16]

No weights, no devices, no second process: the real plan, layouts and recomputation run on fake tensors in a fake process
group, and `hf_tpsp.tools.estimate` counts the bytes that are live from one layer's start to the next one's. Beside them the
figure of Megatron's TP + SP, recomputed for gated MLPs and grouped-query attention: `(4 h + 2 q + 2 kv + 3 f) / tp`
elements per token (`tools.estimate.floors.saved_activation_bytes` has the derivation). Attention is fused: no scores.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.cli.arguments import Parser, one_of, whole
from hf_tpsp.tools.estimate.floors import saved_activation_bytes
from hf_tpsp.tools.estimate.moments import saved_by_a_layer
from hf_tpsp.tools.estimate.simulate import simulated_world

SHAPES = {
    "Llama-3-8B": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    }),
    "Qwen2.5-32B": ("qwen2", {
        "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8,
        "vocab_size": 152064,
    }),
}  # fmt: skip
CHOICES = {
    "inputs kept": {"regather_inputs": False},
    "default": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shape(name: str) -> PreTrainedConfig:
    """The config of one of `SHAPES`, with three decoder layers."""
    model_type, sizes = SHAPES[name]
    return AutoConfig.for_model(
        model_type, **sizes, num_hidden_layers=3, tie_word_embeddings=False, max_position_embeddings=131072,
        use_cache=False, attn_implementation="fused",
    )  # fmt: skip


def measure(config: PreTrainedConfig, choices: TPSPConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the middle layer keeps, on rank 0 of the world that the process group pretends to be."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    hf_tpsp.parallelize(model.train(), choices)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return saved_by_a_layer(model, torch.zeros(1, tokens, dtype=torch.long))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=whole(), default=8, help="ranks of the simulated TP group")
    parser.add_argument("--tokens", type=whole(), default=8192, help="sequence length of one row")
    parser.add_argument("--dtype", default="bf16", **one_of(DTYPES))
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    table = Table(
        "model", "kept", "MiB per layer", "/ Megatron", title=f"tp {args.tp}, {args.tokens} tokens, {args.dtype}"
    )
    for name in SHAPES:
        config = shape(name)
        floor = saved_activation_bytes(config, args.tokens, args.tp, dtype.itemsize, fused_activation=True)
        for kept, settings in CHOICES.items():
            with simulated_world(args.tp):
                found = measure(config, TPSPConfig(tp_size=args.tp, **settings), args.tokens, dtype)
            table.add_row(name, kept, f"{found / 2**20:.1f}", f"{found / floor:.3f}")
        table.add_row(name, "Megatron TP + SP", f"{floor / 2**20:.1f}", "1.000", end_section=True)
    Console().print(table)


if __name__ == "__main__":
    main()
