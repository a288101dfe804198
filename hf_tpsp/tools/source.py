"""What a command is given as a model: one reader for `plan`, `estimate` and `verify`. No weights are read.

A folder's own code (`auto_map` in its config.json) is run only if the caller trusts it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from ..inputs import nearest, whole_number
from ..integrations.loading import check_not_quantized
from ..sizes import size_of

SHIPPED = {path.stem.lower(): path for path in sorted((Path(__file__).parent / "estimate" / "models").glob("*.json"))}
"""Lower-case name → config.json of a published model that comes with hf_tpsp."""


COMPLETED: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoe_swa": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
                       "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
}  # fmt: skip
"""Model type → settings that transformers' default config lacks, or with which the copy has each kind of layer."""


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model that was asked for, without its weights.

    Args:
        name: as it was asked for.
        config: its config.
        cls: the class in the folder's own code; None for transformers' class.
        note: what of the folder was left out, if anything.
    """

    name: str
    config: PreTrainedConfig
    cls: type[PreTrainedModel] | None = None
    note: str = ""


def read(model: str | Path | PreTrainedConfig, trust_remote_code: bool = False) -> Source:
    """The model that `model` names: a model type of transformers, a checkpoint folder, a config.json, a published model
    that comes with hf_tpsp, a hub name, or a config.

    Args:
        trust_remote_code: run the code that a folder or a hub repository has of its own.

    Raises:
        ValueError: it is none of these; its config is broken, quantized, or not a causal language model's; or it has
            code of its own that it needs, and is not trusted.
        TypeError: it is not even a name.
    """
    if isinstance(model, PreTrainedConfig):
        source = Source(model.model_type, model)
    elif not isinstance(model, (str, os.PathLike)):
        kind = type(model).__name__
        raise TypeError(f"A model is named by a string, a path or a config of transformers, got a {kind}.")
    elif isinstance(model, str) and model in CONFIG_MAPPING:
        source = Source(model, _built(model, lambda: CONFIG_MAPPING[model](**COMPLETED.get(model, {}))))
    else:
        source = _from_file(os.fspath(model), trust_remote_code)
    _check(source)
    return source


def on_meta(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None, **options: Any) -> PreTrainedModel:
    """The model of a config, on meta. Raises `ValueError` if it cannot be built."""
    build = AutoModelForCausalLM.from_config if cls is None else cls._from_config
    try:
        with torch.device("meta"):
            return build(config, **options)
    except Exception as error:
        raise ValueError(
            f"transformers cannot build this {config.model_type} model from its config: {_reason(error)}"
        ) from error


def _from_file(name: str, trust_remote_code: bool) -> Source:
    path = _config_file(name)
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one object with the fields of a config, got a {type(values).__name__}.")
    kind, code = values.get("model_type"), values.get("auto_map") or {}
    known = kind in CONFIG_MAPPING
    if code and trust_remote_code:
        return _from_code(name, code.get("AutoModelForCausalLM"))
    files = ", ".join(sorted({f"{str(reference).rpartition('.')[0]}.py" for reference in code.values()}))
    if code and not known:
        raise ValueError(
            f"{name} has code of its own ({files}), which is not run unless you say so: read it, and then give "
            "--trust-remote-code to `hf-tpsp plan` or `verify` (trust_remote_code=True in Python). `estimate` runs none."
        )
    if kind is None:
        raise ValueError(f"{path} has no model_type (such as 'llama'), so it is no config of transformers.")
    if not known:
        raise ValueError(f"{path}: transformers knows no model type {kind!r}.{nearest(kind, CONFIG_MAPPING)}")
    text = values.get("text_config")
    for field, size in [*values.items(), *(text.items() if isinstance(text, dict) else ())]:
        # Other sizes are allowed to be null, or lists with a size for each layer.
        if field in SIZES and (isinstance(size, (int, float, str)) or (size is None and field == "vocab_size")):
            whole_number(f"{path}: {field}", size)
    note = (
        f"transformers' own {kind}: the code in {name} ({files}) is run only with --trust-remote-code" if code else ""
    )
    shipped = SHIPPED.get(path.stem.lower()) == path
    config = _built(str(path), lambda: CONFIG_MAPPING[kind].from_dict(values))
    return Source(path.stem if shipped else name, config, note=note)


def _from_code(name: str, reference: str | None) -> Source:
    """Runs the code of a folder or a hub repository."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        return Source(name, config, get_class_from_dynamic_module(reference, name) if reference else None)
    except Exception as error:
        raise ValueError(f"The code in {name} cannot be run: {_reason(error)}") from error


def _config_file(name: str) -> Path:
    """The config.json that `name` stands for. Raises `ValueError` if there is none."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        if (path / "adapter_config.json").is_file():
            raise ValueError(f"{name} holds an adapter: give the folder of the model that it was trained on.")
        inside = sorted(p.parent.as_posix() for p in path.glob("*/config.json"))[:3]
        hint = f" There is one in {', '.join(inside)}." if inside else ""
        raise ValueError(f"The folder {name!r} has no config.json.{hint}")
    if path.is_file():
        return path
    if shipped := SHIPPED.get(name.rpartition("/")[2].lower()):
        return shipped
    if name.count("/") == 1 and name[0] not in "./~" and name[-1] != "/":
        try:
            return Path(str(cached_file(name, "config.json")))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} is neither a folder (looked in {os.getcwd()}) nor a model that the hub or its local cache has."
            ) from error
    if "/" in name:
        raise ValueError(f"There is no folder or file {name!r} (looked in {os.getcwd()}).")
    raise ValueError(
        f"{name!r} is neither a model type of transformers, nor a folder with a config.json, nor a model that comes with "
        f"hf_tpsp.{nearest(name, [*CONFIG_MAPPING, *(path.stem for path in SHIPPED.values())])}"
    )


def _built(name: str, build: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    try:
        return build()
    except Exception as error:
        raise ValueError(f"{name}: {_reason(error)}") from error


def _check(source: Source) -> None:
    """Raise `ValueError` for a config that hf_tpsp cannot do anything with."""
    config, name = source.config, source.name
    if source.cls is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        near = nearest(config.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ValueError(f"{name}: {config.model_type!r} is not a causal language model of transformers.{near}")
    check_not_quantized(config, name)
    text = config.get_text_config(decoder=True)
    sizes = {field: size_of(text, field) for field in SIZES}
    for field, size in sizes.items():
        if size is not None:
            whole_number(f"{name}: {text.attribute_map.get(field, field)}", size)
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(f"{name}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")


def _reason(error: Exception) -> str:
    """An error's text in one line, with its class where that says more than ours."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, (ValueError, StrictDataclassError)) else f"{type(error).__name__}: {text}"
