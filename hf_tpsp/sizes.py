"""The names that configs and modules have for sizes, in one table for all readers."""

from __future__ import annotations

# Names in attention modules and their configs, in the order in which a module is searched for them.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
WIDTHS = ("hidden_size", "embed_dim", "split_size", "d_model", "inner_dim", "all_head_size", "n_embd")
# Further names in configs. No block is split by them, but a small copy has smaller values there (`plan/shrink.py`).
OTHER_HEADS = ("attention_heads", "decoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads",
               "swa_num_attention_heads", "index_n_heads", "n_mamba_heads")  # fmt: skip
OTHER_KV_HEADS = ("swa_num_key_value_heads", "num_query_groups")
OTHER_WIDTHS = ("embedding_dim", "attention_hidden_size", "word_embed_proj_dim", "embedding_size", "input_embedding_size",
                "output_embedding_size", "lru_width", "mamba_d_ssm")  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
          "num_layers_per_stack", "encoder_layers", "num_encoder_layers")  # fmt: skip


def size_of(owner: object, name: str) -> int | None:
    """The size `name` of a config or a module; None if it has no such size, or not one size for all layers."""
    try:
        size = getattr(owner, name, None)
    except Exception:
        # transformers raises for sizes that differ from layer to layer.
        return None
    return size if isinstance(size, int) and not isinstance(size, bool) else None
