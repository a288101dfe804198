"""Parity of an architecture with one process, shown on a small copy: loss, every gradient, and the weights after two
steps.

`verify` starts gloo ranks on this machine, builds the copy (`shrink.py`) twice on each, shards one of the two, and
trains both. This shows that the layouts of the architecture are right. What depends on the sizes of the user's model
(heads, kv heads, packed widths) is checked by the plan, on that model itself.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import logging

from ...config import TPSPConfig
from ...inputs import choice, instance, whole_number
from ...plan.shrink import shrunk_model
from ...sharding import shard
from ...state import record_of, style_of
from ...structure import decoder_layers
from ...styles.stream import Enter
from ..ranks import RankPool
from ..source import read
from .by_module import ModuleErrors, add_parameters, off_from, record, verdict
from .comparison import KeepFp64, set_training, train_beside

LIMITS = {"float32": 1e-5, "float64": 1e-6}
"""Largest relative error of loss and gradients. In fp64, transformers' own casts to fp32 are lifted (`KeepFp64`)."""


WEIGHTS_LIMIT = 1e-4


STEPS = 2


@dataclass
class Result:
    """What `verify` found for one architecture on one mesh.

    Attributes:
        loss, gradient, weights: the largest relative errors.
        parameter: the parameter whose gradient has the largest error.
        sequence_parallel: whether the stream was sharded over the sequence.
        loss_parallel: whether the logits were sharded over the vocabulary.
        notes: why they were not, and what is not split.
        collectives: kind → number in forward and backward of the decoder layer that has most, as its styles state them.
        worst: the ten parameters whose gradients are furthest off, and their relative errors.
        modules: with `by_module`, the errors of every module, in the order of execution.
        error: why there are no figures.
    """

    model_type: str
    dp_size: int
    tp_size: int
    length: int
    vocabulary: int
    dtype: str
    loss: float = 0.0
    gradient: float = 0.0
    weights: float = 0.0
    parameter: str = ""
    sequence_parallel: bool = True
    loss_parallel: bool = True
    notes: list[str] = field(default_factory=list)
    collectives: dict[str, int] = field(default_factory=dict)
    error: str = ""
    worst: list[tuple[str, float]] = field(default_factory=list)
    modules: list[ModuleErrors] = field(default_factory=list)

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]

    @property
    def weights_limit(self) -> float:
        return WEIGHTS_LIMIT

    @property
    def is_equal(self) -> bool:
        errors = (self.loss, self.limit), (self.gradient, self.limit), (self.weights, self.weights_limit)
        # NaN is never at most the limit.
        return not self.error and all(error <= limit for error, limit in errors)

    @property
    def off_from(self) -> tuple[str, str]:
        """With `by_module`: the first module whose output is off, and the first in the order of backward whose gradient
        is off. `""` if there is none."""
        return tuple(row.name if row else "" for row in off_from(self.modules, self.limit))

    @property
    def verdict(self) -> list[str]:
        """What `off_from` says, in words."""
        return verdict(self.modules, self.limit)


def compare(
    build: Callable[[], PreTrainedModel], config: TPSPConfig, length: int, by_module: bool = False
) -> dict[str, Any]:
    """Train the model that `build` makes, and a sharded one like it, on every rank. Returns fields of a `Result`."""
    reference, model = build(), build()
    # Sharding must take rank 0's weights, so those of the other ranks are zeroed.
    if dist.get_rank() > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    shard(model, config)
    set_training(reference, model)
    mesh, plan = record_of(model).mesh, record_of(model).plan
    vocabulary = reference.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (2 * config.dp_size, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 4] = -100
    items = (labels[:, 1:] != -100).sum()
    # A model that computes its loss itself takes the mean, whatever `num_items_in_batch` it is given.
    with torch.no_grad():
        sums = reference(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        sums = not torch.equal(sums, reference(input_ids=ids, labels=labels, num_items_in_batch=2 * items).loss)
    steps = [[{"input_ids": ids, "labels": labels}]] * STEPS
    recording = record(reference, model, steps[0][0], items, config, mesh, sums=sums) if by_module else None
    errors = train_beside(reference, model, steps, config, mesh, sums=sums, rounding=True)
    modules = recording.errors() if recording is not None else []
    add_parameters(modules, errors)
    collectives = max((collectives_of(layer) for layer in decoder_layers(model)), key=lambda c: sum(c.values()))
    return {
        "loss": errors.loss,
        "gradient": errors.gradient,
        "weights": errors.weight,
        "parameter": errors.parameter,
        "collectives": collectives,
        "sequence_parallel": plan.sequence_parallel,
        "loss_parallel": plan.loss_parallel,
        "notes": plan.notes,
        "worst": errors.worst(),
        "modules": modules,
    }


def collectives_of(layer: nn.Module) -> dict[str, int]:
    """The collectives on the activations of a parallelized decoder layer, forward and backward."""
    found: Counter[str] = Counter()
    for module in layer.modules():
        style = style_of(module)
        if style is None or isinstance(style, Enter):
            continue
        for count, kind in re.findall(
            r"(\d*) ?(all-gather|reduce-scatter|all-reduce)", f"{style.forward_collective}, {style.backward_collective}"
        ):
            found[kind] += int(count or 1)
    return dict(found)


def build(
    model: str | Path, dtype: torch.dtype, vocabulary: int, settings: dict[str, Any], trust_remote_code: bool = False
) -> PreTrainedModel:
    """The small copy of a model type, or of what is in a checkpoint folder."""
    source = read(model, trust_remote_code)
    text = source.config.get_text_config(decoder=True)
    for name, value in settings.items():
        if hasattr(text, name):
            setattr(text, name, value)
    with torch.random.fork_rng(devices=[]):
        try:
            return shrunk_model(source.config, source.cls, dtype=dtype, vocabulary=vocabulary)
        except Exception as error:
            if model not in CONFIG_MAPPING:
                raise
            raise ValueError(
                f"{error} (What the default config of {model} lacks belongs in COMPLETED in hf_tpsp/tools/source.py.)"
            ) from error


def _on_rank(
    model: str | Path, config: TPSPConfig, length: int, vocabulary: int, dtype: str, settings: dict,
    by_module: bool = False, trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch_dtype = getattr(torch, dtype)
    # What a run would end on is here what is to be compared.
    config = replace(config, on_nan="ignore", check="off" if by_module else config.check)
    with KeepFp64() if torch_dtype == torch.float64 else contextlib.nullcontext():
        try:
            return compare(
                lambda: build(model, torch_dtype, vocabulary, settings, trust_remote_code), config, length, by_module
            )
        except Exception as error:
            text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            return {"error": text.replace("\n", " ")[:600]}


def verify(
    source: str | Path,
    config: TPSPConfig,
    *,
    length: int = 17,
    vocabulary: int = 131,
    dtype: str = "float32",
    settings: dict[str, Any] | None = None,
    by_module: bool = False,
    trust_remote_code: bool = False,
    pool: RankPool | None = None,
    timeout: float = 120,
) -> Result:
    """Compare a small copy of an architecture under `config` with one process, on gloo ranks that are started here.

    Args:
        source: a model type of transformers (`"qwen3"`), a checkpoint folder, a config.json, a published model that
            comes with hf_tpsp, or a hub name.
        length: tokens of each of two rows for each data-parallel rank. vocabulary: of the copy. dtype: float32 or float64.
        settings: further fields of the copy's config; those that it does not have are left out.
        by_module: compare every module's output, and the gradient of that, too, to find where a difference begins. The check
            that a first step makes of itself is left out then: it would end what is to be compared.
        trust_remote_code: run the code that the folder has of its own.
        pool: ranks that are running already.

    Returns:
        The largest errors, or why there are none.

    Raises:
        ValueError: `source` cannot be read (`tools.source.read`), or another argument has no value of its kind.
        TypeError: `config` is no `TPSPConfig`.
    """
    instance("config", config, TPSPConfig, "Write verify(source, TPSPConfig(tp_size=…)).")
    # A row of one token has no next one to be predicted. The copy's tokens begin at 3.
    length, vocabulary = whole_number("length", length, 2), whole_number("vocabulary", vocabulary, 4)
    choice("dtype", dtype, LIMITS)
    note = read(source, trust_remote_code).note
    result = Result(str(source), config.dp_size, config.tp_size, length, vocabulary, dtype)
    own = pool or RankPool()
    try:
        arguments = source, config, length, vocabulary, dtype, settings or {}, by_module, trust_remote_code
        found = own.run(config.world_size, _on_rank, *arguments, timeout=timeout)[0]
    except RuntimeError as error:
        return replace(result, error=str(error).strip().splitlines()[-1][:300])
    finally:
        if pool is None:
            own.stop()
    result = replace(result, **found)
    return replace(result, notes=[note, *result.notes]) if note else result
