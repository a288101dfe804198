"""The mesh in accelerate's terms: the environment variables that it reads, and its config files.

`hf-tpsp config` prints such files; the files in `presets/` are its output.
"""

from __future__ import annotations

import os
from pathlib import Path

from .config import TPSPConfig, divisors
from .inputs import whole_number

FOLDER = Path(__file__).parent / "presets"


# Name of the file → (config, number of hosts, whether the ranks are on the CPU). TP stays inside a host, FSDP spans
# hosts.
SHIPPED: dict[str, tuple[TPSPConfig, int, bool]] = {
    "cpu_2x2": (TPSPConfig(dp_shard_size=2, tp_size=2), 1, True),
    "host8_2x4": (TPSPConfig(dp_shard_size=2, tp_size=4, mixed_precision="bf16"), 1, False),
    "host8_1x8": (TPSPConfig(dp_shard_size=1, tp_size=8, mixed_precision="bf16"), 1, False),
    "hosts2_2x8": (TPSPConfig(dp_shard_size=2, tp_size=8, mixed_precision="bf16"), 2, False),
    "hosts4_4x8": (TPSPConfig(dp_shard_size=4, tp_size=8, mixed_precision="bf16"), 4, False),
    "hosts4_hsdp_2x2x8": (
        TPSPConfig(dp_replicate_size=2, dp_shard_size=2, tp_size=8, mixed_precision="bf16"), 4, False,
    ),
}  # fmt: skip


def accelerate_config(config: TPSPConfig, hosts: int = 1, cpu: bool = False) -> dict:
    """The content of a file for `accelerate launch --config_file`, as a dict.

    Args:
        config: the mesh.
        hosts: number of machines. Each machine runs `world_size / hosts` ranks; give `--machine_rank` and
            `--main_process_ip` on each one's command line.
        cpu: run the ranks on the CPU (gloo).

    Raises:
        ValueError: `hosts` is no number of hosts, the ranks cannot be divided evenly over them, or a TP group would
            span two of them.
    """
    per_host, rest = divmod(config.world_size, whole_number("hosts", hosts))
    if rest:
        sizes = [n for n in divisors(config.world_size) if config.world_size // n % config.tp_size == 0]
        raise ValueError(
            f"{config.world_size} ranks do not spread evenly over {hosts} hosts; there can be one of {sizes}."
        )
    if per_host % config.tp_size:
        raise ValueError(
            f"tp_size={config.tp_size} does not divide the {per_host} ranks of a host, so a TP group would span hosts, "
            f"and its traffic with it. tp_size can be one of {divisors(per_host)}."
        )
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "FSDP",
        "enable_cpu_affinity": False,
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "NO_WRAP",
            "fsdp_activation_checkpointing": config.activation_checkpointing == "full",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_offload_params": False,
            "fsdp_reshard_after_forward": config.reshard_after_forward,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
        "machine_rank": 0,
        # Port 0 picks a free port, so that two runs on one machine do not collide.
        "main_process_port": 0 if hosts == 1 else 29500,
        "main_training_function": "main",
        "mixed_precision": config.mixed_precision,
        "num_machines": hosts,
        "num_processes": config.world_size,
        "parallelism_config": {
            "parallelism_config_dp_replicate_size": config.dp_replicate_size,
            "parallelism_config_dp_shard_size": config.dp_shard_size,
            "parallelism_config_tp_size": config.tp_size,
            "parallelism_config_cp_size": 1,
        },
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": cpu,
    }


def environment(config: TPSPConfig) -> dict[str, str]:
    """The environment variables that tell accelerate of this mesh: the ones that launching with a preset would export.

    accelerate deals out the batches and saves. It accepts no `dp_replicate` with a `dp_shard` of 1, so the two sizes
    are swapped then: for what accelerate does, they are the same.
    """
    replicate, shard = (config.dp_replicate_size, config.dp_shard_size)
    if shard == 1:
        replicate, shard = 1, replicate
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "FSDP_STATE_DICT_TYPE": os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"),
        "FSDP_RESHARD_AFTER_FORWARD": str(config.reshard_after_forward).lower(),
        # hf_tpsp checkpoints the layers itself; accelerate's wrapper needs a wrap policy.
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_TP_SIZE": str(config.tp_size),
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shard),
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(replicate),
        "ACCELERATE_MIXED_PRECISION": config.mixed_precision,
    }
