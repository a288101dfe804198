"""A small random copy of an architecture: widths and counts reduced, the structure kept.

The copy keeps: the ratio of query to key/value heads (up to 4; one kv head stays one), whether weights are tied,
experts (4) and experts per token (2), one layer of each kind in the order of first appearance, MLA's two ranks, sliding
windows (shorter than a test's sequence), flags, multipliers and activation functions.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..sizes import HEADS, KV_HEADS, LAYERS, OTHER_HEADS, OTHER_KV_HEADS, OTHER_WIDTHS, WIDTHS

HEAD_DIM, ROPE_DIM, EXPERTS, VOCABULARY, LENGTH, WINDOW = 16, 8, 4, 131, 128, 8


LARGEST = 3_000_000
"""The most elements that a parameter of a copy may have. One with more was not shrunk: its size has a name unknown
here."""


CONFIG_HEADS = (*HEADS, *OTHER_HEADS)
CONFIG_KV_HEADS = (*KV_HEADS, *OTHER_KV_HEADS)
CONFIG_WIDTHS = (*WIDTHS, *OTHER_WIDTHS)


SIZES: dict[str, int] = {
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "attention_head_size", "dim_head", "d_head",
                     "qk_nope_head_dim", "v_head_dim", "swa_head_dim", "linear_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim", "query_pre_attn_scalar",
                     "global_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "rotary_ndims"), ROPE_DIM),
    "qk_head_dim": HEAD_DIM + ROPE_DIM, "index_head_dim": 2 * ROPE_DIM, "indexer_head_dim": HEAD_DIM, "index_topk": 6, "index_block_size": 4, "index_topk_blocks": 2,
    **dict.fromkeys(("q_lora_rank", "o_lora_rank"), 24), "kv_lora_rank": 16, "n_shared_experts": 2,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("linear_num_key_heads",), 2), **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length",
                     "max_target_positions", "max_source_positions", "original_max_position_embeddings"), LENGTH),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size",
                     "attention_chunk_size", "keep_window_size", "local_attn_chunk_length", "lsh_attn_chunk_length"), WINDOW),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "ngram_vocab_size_base"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "hc_lowrank", "adapter_rank", "router_hidden_size",
                     "gated_norm_rank", "d_rel"), ROPE_DIM),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), HEAD_DIM),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8), "n_groups": 2, "mamba_n_groups": 1,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 2 * WINDOW),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), ROPE_DIM),
    **dict.fromkeys(("ple_embed_dim",), 64), "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 4,
    "block_multiple_of": 8, "rel_extent": 16, "conv_kernel_size": 4,
}  # fmt: skip
"""Field of a config → its size in the copy. A field that is smaller already, or None, stays as it is."""


OF_LAYERS: dict[str, int] = {
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_kv_shared_layers"), 1),
    **dict.fromkeys(("full_attention_interval", "sliding_window_pattern", "global_attn_every_n_layers", "attn_layer_period",
                     "expert_layer_period", "no_rope_layer_interval", "layer_group_size", "n_layers_per_attn_res_block",
                     "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "max_window_layers"), 1),
}  # fmt: skip
"""The fields that say which layer is of which kind, and their values in the copy."""


# The endings of config fields that give the width of a feed-forward layer.
FEED_FORWARD_NAMES = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "inner_dim", "n_inner", "dim_ff", "dff", "d_inner",
                      "intermediate_size_mlp", "feed_forward_size", "emb_dim")  # fmt: skip


FILLED = ("head_dim", "n_shared_experts", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
"""Sizes that some configs leave open, though their models cannot be built without them."""


def shrunk_config(config: PreTrainedConfig, every_layer: bool = False) -> PreTrainedConfig:
    """A copy of `config` with small sizes, its sub-configs included.

    Args:
        every_layer: keep all layers, each of its kind, instead of one of each kind.
    """
    values = config.to_dict()
    _shrink(values, every_layer)
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if isinstance(sub, PreTrainedConfig):
            values[name] = shrunk_config(sub, every_layer)
    for name in ("model_type", "transformers_version", "architectures", "quantization_config"):
        values.pop(name, None)
    return type(config)(**{name: value for name, value in values.items() if value is not None})


def _first(values: dict, names: tuple[str, ...]) -> int | None:
    return next((values[n] for n in names if isinstance(values.get(n), int)), None)


def _shrink(values: dict[str, Any], every_layer: bool) -> None:
    heads = _first(values, CONFIG_HEADS) or 4
    kv_heads = _first(values, CONFIG_KV_HEADS) or heads
    if values.get("multi_query") and not values.get("new_decoder_architecture"):
        kv_heads = 1
    small_kv = 1 if kv_heads == 1 else 2
    ratio = heads // kv_heads
    small_heads = 4 if ratio == 1 or kv_heads == 1 else small_kv * min(ratio, 4)
    small_kv = small_heads if ratio == 1 else small_kv
    hidden = _first(values, CONFIG_WIDTHS) or 64
    small_hidden = small_heads * HEAD_DIM

    head_dim, rope_dim = values.get("head_dim"), values.get("qk_rope_head_dim")
    # The config derives its total number of layers from the number per stack.
    if stack := values.pop("num_layers_per_stack", None):
        values["num_hidden_layers"] = stack
    layers = _first(values, LAYERS) or 2
    kept = list(range(layers)) if every_layer else _kept_layers(values, layers)
    for name, value in list(values.items()):
        if value is None and name in FILLED:
            value = 1 << 30
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            values[name] = 0.0
        if isinstance(value, bool):
            continue
        if name == "mlp_only_layers" and not every_layer:
            values[name] = [i for i in value or () if i == 0]
        elif isinstance(value, (list, tuple)) and len(value) == layers > 1:
            values[name] = type(value)(value[i] for i in kept)
            if all(isinstance(v, int) and v >= hidden for v in values[name]):
                values[name] = type(value)(2 * small_hidden for _ in kept)
        elif not isinstance(value, int) or value <= 0 or (every_layer and name in OF_LAYERS):
            continue
        elif name in LAYERS:
            values[name] = len(kept)
        elif name in CONFIG_HEADS:
            values[name] = small_heads
        elif name in CONFIG_KV_HEADS:
            values[name] = small_kv
        elif name in CONFIG_WIDTHS:
            values[name] = small_hidden
        elif name in SIZES or name in OF_LAYERS:
            values[name] = min(value, (SIZES | OF_LAYERS)[name])
        elif name.endswith(FEED_FORWARD_NAMES):
            values[name] = min(value, 2 * small_hidden)
        elif name.endswith("_token_id"):
            values[name] = min(value, 2)

    # With MLA, `head_dim` is the size of the rotary part in some configs, and of the whole head in others.
    if values.get("head_dim") and values.get("qk_rope_head_dim"):
        values["head_dim"] = (
            ROPE_DIM if head_dim == rope_dim else ROPE_DIM + values.get("qk_nope_head_dim", HEAD_DIM - ROPE_DIM)
        )
    expand = values.get("mamba_expand") or values.get("expand")
    mamba_heads = next((n for n in ("mamba_n_heads", "n_mamba_heads", "num_heads") if n in values), None)
    if expand and mamba_heads and any(n in values for n in ("mamba_d_head", "mamba_headdim", "head_dim")):
        values[mamba_heads] = expand * small_hidden // HEAD_DIM
    if per_layer := values.get("per_layer_config"):
        by_layer = {int(layer): values for layer, values in per_layer.items()}
        values["per_layer_config"] = {
            i: _per_layer(by_layer[layer]) for i, layer in enumerate(kept) if layer in by_layer
        }


def _per_layer(values: dict[str, Any]) -> dict[str, Any]:
    """Shrink the sizes that one layer overrides. Its heads are wider than the other layers' in the copy too."""
    small = {"head_dim": 2 * HEAD_DIM, "global_head_dim": 2 * HEAD_DIM}
    return {
        n: small.get(n, min(v, SIZES[n]) if n in SIZES else v)
        for n, v in values.items()
        if n not in CONFIG_HEADS + CONFIG_KV_HEADS
    }


def _kept_layers(values: dict, layers: int) -> list[int]:
    """The first layer of each kind, judged by the config's lists with one entry per layer; up to 6 layers, at least
    two."""
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == layers > 1]
    if not lists:
        return list(range(min(layers, 4 if OF_LAYERS.keys() & values.keys() else 2)))
    rows = [str(row) for row in zip(*lists, strict=True)]
    first = sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values())[:6]
    return first if len(first) > 1 else [0, 1]


def shrunk_like(model: PreTrainedModel, every_layer: bool = False) -> PreTrainedModel:
    """A small random copy of `model`, of its own class.

    Args:
        every_layer: keep as many layers as the model has.

    Raises:
        ValueError: the copy cannot be built from a smaller config, or one of its sizes does not follow the config.
    """
    return shrunk_model(model.config, type(model), every_layer=every_layer)


def shrunk_model(
    config: PreTrainedConfig,
    cls: type | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    every_layer: bool = False,
) -> PreTrainedModel:
    """A random model of `shrunk_config(config)`. No parameter keeps a neutral initial value that could hide a wrong
    gradient.

    Args:
        cls: the model's class; by default the auto class's choice.
    """
    torch.manual_seed(seed)
    name = config.model_type
    try:
        small = shrunk_config(config, every_layer)
        if small.get_text_config(decoder=True).vocab_size == VOCABULARY:
            small.get_text_config(decoder=True).vocab_size = vocabulary
        build = AutoModelForCausalLM.from_config if cls is None else cls._from_config
        with torch.device("meta"):
            elements = {n: p.numel() for n, p in build(small).named_parameters()}
        largest = max(elements, key=elements.get)
        if elements[largest] > LARGEST:
            raise ValueError(
                f"{largest} would have {elements[largest]:,} elements in it. Add the size that it follows to `SIZES` in "
                "hf_tpsp/plan/shrink.py"
            )
        # Grouped kernels have no fp64.
        small._attn_implementation = small._experts_implementation = "eager"
        model = build(small)
    except Exception as error:
        raise ValueError(
            f"hf_tpsp cannot build a small copy of this {name} model to prove its plan on: {error}"
        ) from error
    return randomize(model).to(dtype)


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Move norms, biases and all (nearly) constant parameters away from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not parameter.std() > 0.05:
                parameter.normal_(std=0.1)
    return model
