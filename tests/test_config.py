"""TPSPConfig: sizes against the world and the model, and what accelerate exports."""

import os

import models
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

import hf_tpsp
from hf_tpsp import TPSPConfig, launch
from hf_tpsp.launch import FOLDER, SHIPPED, accelerate_config


def refused(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp_size": 0}, ["tp_size", "at least 1", "0"]),
        ({"dp_shard_size": 2.0}, ["dp_shard_size", "2.0"]),
        ({"loss": "cross"}, ["loss", "'loss_parallel'", "'cross'"]),
        ({"activation_checkpointing": True}, ["activation_checkpointing", "'full'", "True"]),
        ({"compile": True, "activation_checkpointing": "full"}, ["compile=True", "'full'", "uncompiled"]),
        ({"mixed_precision": "fp16"}, ["mixed_precision", "'bf16'", "'fp16'"]),
    ],
)
def test_fields(settings, words):
    message = refused(lambda: TPSPConfig(**settings))
    assert all(word in message for word in words), message


def test_world():
    TPSPConfig(tp_size=2, dp_shard_size=2, dp_replicate_size=2).check_world(8)
    message = refused(lambda: TPSPConfig(tp_size=2, dp_shard_size=2).check_world(8))
    assert "needs 4 ranks, but 8 were started" in message and "dp_shard_size=4 and tp_size=2 fit" in message
    message = refused(lambda: TPSPConfig(tp_size=4).check_world(6))
    assert "tp_size can be one of [1, 2, 3, 6]" in message


def test_model():
    TPSPConfig(tp_size=4).check_model(models.config("qwen2"))
    message = refused(lambda: TPSPConfig(tp_size=3).check_model(models.config("qwen2")))
    for word in ("tp_size=3", "num_attention_heads=8", "num_key_value_heads=4", "[1, 2, 4, 8]"):
        assert word in message
    TPSPConfig(tp_size=8).check_model(models.config("qwen2"))  # 2 ranks share a kv head
    message = refused(lambda: TPSPConfig(tp_size=4).check_model(models.config("qwen2", num_key_value_heads=3)))
    assert "num_key_value_heads=3" in message
    message = refused(lambda: TPSPConfig(tp_size=4).check_model(models.config("qwen2", vocab_size=5, pad_token_id=0)))
    assert "vocab_size=5" in message and "at most 3" in message


@pytest.fixture
def environment(monkeypatch):
    """An environment without accelerate's variables; returns a function that sets some."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "HF_TPSP_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)

    def set_all(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


def launched(path: str, *arguments: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file path` gives its ranks, by accelerate's own code."""
    args = launch_command_parser().parse_args(["--config_file", path, *arguments, "script.py"])
    args, _, _ = _validate_launch_command(args)
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k not in os.environ}


@pytest.mark.parametrize("name", SHIPPED)
def test_presets(environment, name):
    config, hosts, cpu = SHIPPED[name]
    path = FOLDER / f"{name}.yaml"
    assert yaml.safe_load(path.read_text()) == accelerate_config(config, hosts, cpu), (
        "write it again with `hf-tpsp config`"
    )
    machine = [] if hosts == 1 else ["--main_process_ip", "127.0.0.1", "--machine_rank", "1"]
    environment(launched(str(path), *machine))
    assert TPSPConfig.from_accelerate() == config


@pytest.mark.parametrize(
    "config",
    [
        TPSPConfig(tp_size=4, activation_checkpointing="full"),
        TPSPConfig(tp_size=2, dp_shard_size=2, reshard_after_forward=False, mixed_precision="bf16"),
    ],
)
def test_config_survives_accelerate(environment, tmp_path, config):
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(accelerate_config(config)))
    environment(launched(str(path)))
    assert TPSPConfig.from_accelerate() == config
    assert TPSPConfig.from_accelerate(sequence_parallel=False).sequence_parallel is False


def test_config_of_several_hosts():
    message = refused(lambda: accelerate_config(TPSPConfig(tp_size=8, dp_shard_size=1), hosts=2))
    assert "TP group would span hosts" in message and "4 ranks" in message
    message = refused(lambda: accelerate_config(TPSPConfig(tp_size=3), hosts=2))
    assert "3 ranks do not spread evenly over 2 hosts" in message


def test_without_a_launcher(environment):
    environment({})
    assert TPSPConfig.from_accelerate() == TPSPConfig()
    environment({"WORLD_SIZE": "4"})
    message = refused(TPSPConfig.from_accelerate)
    assert "4 ranks were started without a mesh" in message and "hf-tpsp config --dp 2 --tp 2" in message
    assert TPSPConfig.from_accelerate(tp_size=4).tp_size == 4
    with pytest.raises(TypeError, match=r"no field 'tp'\. Did you mean tp_size\?"):
        TPSPConfig.from_accelerate(tp=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, ["fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP", "NO_WRAP"]),
        ({"FSDP_VERSION": "1"}, ["fsdp_version: 2"]),
        ({"ACCELERATE_USE_FSDP": "false"}, ["distributed_type: FSDP"]),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, ["fsdp_offload_params"]),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, ["context parallelism", "set it to 1"]),
        ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, ["Ulysses"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["fp16", "bf16"]),
    ],
)  # fmt: skip
def test_configs_that_are_refused(environment, change, words):
    environment({**launch.environment(TPSPConfig(tp_size=2)), **change})
    message = refused(TPSPConfig.from_accelerate)
    assert all(word in message for word in words), message


def test_choices_in_the_environment(environment):
    environment({"HF_TPSP_LOSS": "loss_parallel", "HF_TPSP_COMPILE": "true", "HF_TPSP_REGATHER_INPUTS": "0"})
    config = TPSPConfig.from_accelerate(compile=False)
    assert (config.loss, config.compile, config.regather_inputs) == ("loss_parallel", False, False)
    environment({"HF_TPSP_LOSS": "chunk"})
    assert "HF_TPSP_LOSS must be one of 'chunked', 'loss_parallel'" in refused(TPSPConfig.from_accelerate)
    environment({"HF_TPSP_LOSS": "chunked", "HF_TPSP_TP_SIZE": "2"})
    assert "HF_TPSP_TP_SIZE" in refused(TPSPConfig.from_accelerate)
    environment({"HF_TPSP_COMPILE": "maybe"})
    assert "'maybe'" in refused(TPSPConfig.from_accelerate)


def async_tp_on_the_cpu() -> str:
    config = TPSPConfig(tp_size=2, async_tp=True, compile=True)
    return refused(lambda: hf_tpsp.parallelize(models.build("qwen2"), config))


def test_async_tp_needs_what_it_stands_on(ranks):
    assert "compile=True" in refused(lambda: TPSPConfig(tp_size=2, async_tp=True))
    assert "CUDA only; these ranks are on cpu" in ranks.run(2, async_tp_on_the_cpu)[0]
