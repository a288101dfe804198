"""Tiny random models with the structure of real ones, and batches for them."""

from __future__ import annotations

import tokenizers
import torch
import transformers

COMMON = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.1, "attn_implementation": "eager",
}  # fmt: skip
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}

# Model type → what its config has beyond COMMON. Each keeps what is peculiar to the architecture.
ARCHITECTURES: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},  # biases of row-parallel layers too
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": dict(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gemma3_text": dict(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0
    },
}  # fmt: skip


def config(model_type: str, *, tied: bool = False, **overrides) -> transformers.PreTrainedConfig:
    settings = {**COMMON, **ARCHITECTURES[model_type], "tie_word_embeddings": tied, **overrides}
    for name in ("layer_types", "no_rope_layers"):  # patterns of two layers, repeated to any depth
        if name in settings:
            settings[name] = [settings[name][i % 2] for i in range(settings["num_hidden_layers"])]
    return transformers.AutoConfig.for_model(model_type, **settings)


def build(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings
) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are not at their neutral start, so that a wrong gradient cannot hide."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def batch(
    rows: int = 4, length: int = 17, vocab: int = 131, seed: int = 1, padding: str | None = None, packed: bool = False
):
    """`input_ids`, `labels` (some ignored) and, where asked for, padding or restarting `position_ids`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    out = {"input_ids": ids, "labels": labels}
    if padding:
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            width = min(row, length - 2)
            part = slice(0, width) if padding == "left" else slice(length - width, length)
            mask[row, part], ids[row, part], labels[row, part] = 0, 0, -100
        out["attention_mask"] = mask
    if packed:
        first = length // 2
        out["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)]).repeat(rows, 1)
        labels[:, first] = -100
    return out


def tokenizer(size: int, pad_token: str = "[PAD]", **options) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of `size` words, whose last is `[PAD]`."""
    words = {f"w{i}": i for i in range(size - 1)} | {"[PAD]": size - 1}
    whole_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole_words, pad_token=pad_token, unk_token="w0", **options
    )
