"""`TPSPConfig`: the sizes of the mesh and what runs on it, checked against the world and the model."""

from __future__ import annotations

import math
import os
import re
from dataclasses import Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .inputs import (
    MOST_RANKS,
    choice,
    environment_flag,
    environment_number,
    flag,
    names_its_fields,
    nearest,
    whole_number,
)
from .sizes import size_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


LOSSES = ("chunked", "loss_parallel")


ACTIVATION_CHECKPOINTING = ("none", "selective", "full")


MIXED_PRECISION = ("no", "bf16")


ON_NAN = ("stop", "skip", "ignore")


CHOICES = {
    "loss": LOSSES,
    "activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "mixed_precision": MIXED_PRECISION,
    "on_nan": ON_NAN,
}


def divisors(*numbers: int) -> list[int]:
    """The sizes that divide every one of `numbers`."""
    common = math.gcd(*numbers)
    small = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    return sorted({*small, *(common // n for n in small)})


@names_its_fields
@dataclass(frozen=True)
class TPSPConfig:
    """Sizes of the `(dp_replicate, dp_shard, tp)` mesh, and the choices for training on it.

    What is on or off may be given as a bool, or as a word of accelerate's (`"true"`, `"no"`, …).

    Args:
        tp_size: Ranks that share one copy of each layer, and one batch. Keep it inside a host.
        dp_shard_size: Ranks over which FSDP2 shards parameters, gradients and optimizer state. Each sees its own batch.
        dp_replicate_size: Copies of that sharded group (HSDP): gradients are all-reduced between them.
        sequence_parallel: Keep the residual stream sharded over the sequence between the blocks (Megatron SP). `False`
            is plain tensor parallelism: the same layout of the weights, with all-reduces in place of reduce-scatter +
            all-gather.
        loss: How cross entropy on vocabulary shards is computed: `"chunked"`, together with the head, a chunk of tokens
            at a time; or `"loss_parallel"`, torch's, on the logits of all tokens.
        regather_inputs: Keep only the sequence shard of a block's input for backward and gather it once more there,
            instead of keeping the whole input; and compute norms and activation functions again. This adds one
            all-gather per block.
        activation_checkpointing: `"none"`; `"full"`: each decoder layer keeps only its input, and runs again in
            backward (the Trainer's `gradient_checkpointing=True` does the same); or `"selective"`: a layer also keeps
            the results of matrix products, attention and reduce-scatters, and runs the rest again. `regather_inputs`
            adds nothing to `"full"` and `"selective"`.
        compile: Run each decoder layer through `torch.compile`: one graph, compiled once for layers that are alike. The
            compiler then decides what is kept for backward, instead of `regather_inputs`.
        async_tp: With `compile`, let the compiler split the gathers and reduce-scatters and overlap them with the
            matrix products (torch's "async TP", over symmetric memory). CUDA only; untested on a GPU.
        mixed_precision: `"bf16"` computes in bf16 with fp32 master weights and fp32 gradient reduction.
            `TrainingArguments(bf16=True)` does the same.
        reshard_after_forward: Free a layer's gathered weights after forward and gather them again in backward (ZeRO-3);
            `False` keeps them (ZeRO-2). The last layer's weights are always kept, because backward needs them first.
        check: When to compare the ranks with each other, and one block of each kind with the whole block, on the
            model's own input (`witness.py`): in the `"first"` training forward, in `"every"` one, in every n-th
            (`"every:n"`), or `"off"`.
        async_save: The Trainer copies what it saves to the host's memory, and trains on while that is written. The next
            save and the end of training wait for it, and raise its error.
        on_nan: What happens before the optimizer steps on gradients whose norm is not finite: `"stop"` raises on all
            ranks and names where it arose; `"skip"` leaves the step out, with weights and optimizer as they were;
            `"ignore"` steps.
    """

    tp_size: int = 1
    dp_shard_size: int = 1
    dp_replicate_size: int = 1
    sequence_parallel: bool = True
    loss: str = "chunked"
    regather_inputs: bool = True
    activation_checkpointing: str = "none"
    compile: bool = False
    async_tp: bool = False
    mixed_precision: str = "no"
    reshard_after_forward: bool = True
    check: str = "first"
    async_save: bool = False
    on_nan: str = "stop"

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _value(field, getattr(self, field.name), field.name))
        if self.compile and self.activation_checkpointing != "none":
            raise ValueError(
                f"compile=True does not combine with activation_checkpointing={self.activation_checkpointing!r}: a "
                "checkpointed layer would run uncompiled. Leave one of them out."
            )
        if self.async_tp and not (self.compile and self.sequence_parallel):
            raise ValueError("async_tp=True needs compile=True and sequence_parallel=True.")

    @property
    def dp_size(self) -> int:
        """Number of distinct batches per step: `dp_replicate_size * dp_shard_size`."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp_size

    @classmethod
    def from_accelerate(cls, **overrides: Any) -> TPSPConfig:
        """The config of the preset that `accelerate launch` was given, read from the environment that it exports.

        All fields but the sizes can also be set by `HF_TPSP_<FIELD>` (`HF_TPSP_COMPILE=true`), for scripts that are run
        unmodified. `overrides` replace single fields. A process that was not launched as one of several gets all sizes
        1.

        Raises:
            ValueError: several ranks were launched without a `parallelism_config`, or with settings that hf_tpsp does
                not run (another wrap policy than `NO_WRAP`, context parallelism, fp16, CPU offload, …), or a variable
                that is read has no value of its kind.
            TypeError: an override that is no field.
        """
        overrides = {**_choices_in_environment(cls), **overrides}
        if not environment_flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
            config = cls(**overrides)
            world_size = launched_ranks()
            if config.world_size == 1 and world_size > 1:
                raise ValueError(
                    f"{world_size} ranks were started without a mesh. Launch with one of hf_tpsp's presets "
                    f"(`hf-tpsp config --dp {world_size // 2 or 1} --tp 2 > mesh.yaml`, `accelerate launch --config_file mesh.yaml …`), or "
                    f"pass the sizes: `enable(TPSPConfig(tp_size=2, dp_shard_size={world_size // 2 or 1}))`."
                )
            return config
        check_launch_environment()
        sizes = {
            name: environment_number(f"PARALLELISM_CONFIG_{name.upper()}", 1, least=1)
            for name in ("tp_size", "dp_shard_size", "dp_replicate_size")
        }
        return cls(
            **{
                **sizes,
                "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
                "activation_checkpointing": "full" if environment_flag("FSDP_ACTIVATION_CHECKPOINTING") else "none",
                "reshard_after_forward": environment_flag("FSDP_RESHARD_AFTER_FORWARD", "true"),
                **overrides,
            }
        )

    def check_world(self, world_size: int) -> None:
        """Raise `ValueError` unless the mesh has exactly `world_size` ranks, naming the sizes that would fit."""
        if self.world_size == world_size:
            return
        message = (
            f"The mesh dp_replicate {self.dp_replicate_size} x dp_shard {self.dp_shard_size} x tp {self.tp_size} needs "
            f"{self.world_size} ranks, but {world_size} were started. "
        )
        inner = self.dp_replicate_size * self.tp_size
        if world_size % inner == 0:
            fit = replace(self, dp_shard_size=world_size // inner)
            message += f"With {world_size} ranks, dp_shard_size={fit.dp_shard_size} and tp_size={fit.tp_size} fit"
        else:
            message += f"With {world_size} ranks, tp_size can be one of {divisors(world_size)}"
        raise ValueError(f"{message}; or start {self.world_size} ranks (`num_processes` in the preset).")

    def check_model(self, model_config: PreTrainedConfig) -> None:
        """Raise `ValueError` if this architecture cannot be split `tp_size` ways, naming the sizes that work."""
        text = model_config.get_text_config(decoder=True)
        heads, kv_heads = (size_of(text, name) for name in ("num_attention_heads", "num_key_value_heads"))
        # If there are fewer kv heads than ranks, each rank has one, and several ranks share it.
        if heads and (heads % self.tp_size or (kv_heads and kv_heads % self.tp_size and self.tp_size % kv_heads)):
            kv_heads = kv_heads or heads
            sizes = [n for n in divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0]
            raise ValueError(
                f"tp_size={self.tp_size} does not divide the attention heads of {model_config.model_type} "
                f"(num_attention_heads={heads} and num_key_value_heads={kv_heads}). tp_size can be one of {sizes}; put the "
                "remaining ranks into dp_shard_size."
            )
        for name in ("vocab_size", "intermediate_size"):
            size = size_of(text, name)
            # DTensor gives each rank ceil(size / tp) rows, so the last ranks of a tiny dimension can end up with none.
            if size and -(-size // self.tp_size) * (self.tp_size - 1) >= size:
                most = max(n for n in range(1, size + 1) if -(-size // n) * (n - 1) < size and n <= self.tp_size)
                raise ValueError(
                    f"{name}={size} of {model_config.model_type} leaves a rank without a row at tp_size={self.tp_size}; "
                    f"tp_size can be at most {most}."
                )


def _value(field: Field, value: Any, label: str) -> Any:
    """`value` in the type of `field`. Raises `ValueError`, which calls it `label`, if it is none that the field can
    have."""
    if field.type == "int":
        return whole_number(label, value, most=MOST_RANKS)
    if field.type == "bool":
        return flag(label, value)
    if field.name in CHOICES:
        choice(label, value, CHOICES[field.name])
    elif not re.fullmatch(r"first|off|every(:[1-9]\d*)?", str(value)):
        raise ValueError(f"{label} must be 'first', 'every', 'every:<n>' or 'off', got {value!r}.")
    return value


def _choices_in_environment(cls: type) -> dict[str, object]:
    """The fields that `HF_TPSP_<FIELD>` variables set. Raises `ValueError` for the mesh's sizes, for unknown names, and
    for values that the field cannot have."""
    choices = {f"HF_TPSP_{f.name.upper()}": f for f in fields(cls) if f.type != "int"}
    found: dict[str, object] = {}
    for variable in (name for name in os.environ if name.startswith("HF_TPSP_")):
        if variable not in choices:
            near = nearest(variable, choices)
            raise ValueError(f"The environment sets {variable}; hf_tpsp reads {', '.join(choices)}.{near}")
        field = choices[variable]
        found[field.name] = _value(field, os.environ[variable], variable)
    return found


def launched_ranks() -> int:
    """How many ranks were started, by the launcher's environment. Raises `ValueError` for a variable of its that is no
    number, before torch waits for ranks that cannot come."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        environment_number(name, 0)
    return environment_number("WORLD_SIZE", 1, least=1)


def check_launch_environment() -> None:
    """Raise `ValueError` if the accelerate config asks for something that hf_tpsp does not run."""
    env = os.environ
    problems = []
    policy = env.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    if not environment_flag("ACCELERATE_USE_FSDP") or env.get("FSDP_VERSION", "1") != "2":
        problems.append("the config needs `distributed_type: FSDP` with `fsdp_version: 2`")
    if policy != "NO_WRAP":
        problems.append(
            f"`fsdp_auto_wrap_policy: {policy}` would wrap a model that hf_tpsp has already sharded; set it to NO_WRAP"
        )
    if environment_flag("FSDP_OFFLOAD_PARAMS"):
        problems.append("`fsdp_offload_params: true` is not supported; set it to false")
    for dim, meaning in (("CP", "context parallelism"), ("SP", "DeepSpeed-Ulysses sequence parallelism")):
        if environment_number(f"PARALLELISM_CONFIG_{dim}_SIZE", 1) > 1:
            problems.append(
                f"`parallelism_config_{dim.lower()}_size` ({meaning}) does not combine with hf_tpsp; set it to 1"
            )
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in MIXED_PRECISION:
        problems.append(f"`mixed_precision: {precision}` is not supported; use bf16 or no")
    if problems:
        raise ValueError("This accelerate config does not work with hf_tpsp: " + "; ".join(problems) + ".")
