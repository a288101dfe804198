"""Ranking, answers, the time model's links, the command, and what it says to wrong input."""

import json
from pathlib import Path

import models
import pytest
import yaml
from transformers import AutoConfig

from hf_tpsp import TPSPConfig
from hf_tpsp.cli import main
from hf_tpsp.tools.estimate.estimation import _largest, estimate
from hf_tpsp.tools.estimate.hardware import GIB, Hardware, parse_bytes
from hf_tpsp.tools.estimate.meshes import legal_meshes
from hf_tpsp.tools.estimate.simulate import Job, build_on_meta
from hf_tpsp.tools.source import SHIPPED


@pytest.mark.parametrize("limit", [0, 3, 7, 100, 12345])
def test_search(limit):
    """The last one that fits, with a headroom that is linear but for a kink."""
    asked = []

    def headroom(n: int) -> int:
        asked.append(n)
        return (limit - n) * (3 if n > limit else 2) * GIB

    here = headroom(8)
    assert _largest(headroom, 8, here, 16 if here > 0 else 4, 1) == limit
    assert len(asked) <= 7


def test_links():
    hosts = Hardware(link_inside=400, link_across=50)
    assert hosts.link(TPSPConfig(tp_size=8, dp_shard_size=4), "tp") == (False, 400)
    assert hosts.link(TPSPConfig(tp_size=8, dp_shard_size=4), "dp_shard") == (True, 50)
    assert hosts.link(TPSPConfig(tp_size=2, dp_shard_size=16), "dp_shard") == (True, 200)  # four rings leave a host
    assert hosts.link(TPSPConfig(tp_size=2, dp_shard_size=4), "dp_shard") == (False, 400)


def test_meshes():
    config = models.config("llama")  # 8 heads; 4 kv heads, which 8 ranks share
    found = {(m.dp_replicate_size, m.dp_shard_size, m.tp_size) for m in legal_meshes(config, 16, 8, None, None, None)}
    assert found == {(1, 16, 1), (2, 8, 1), (1, 8, 2), (2, 4, 2), (1, 4, 4), (2, 2, 4), (1, 2, 8), (2, 1, 8)}


PARAMETERS = {
    "Gemma-2-9B": 9_241_705_984, "Llama-3-8B": 8_030_261_248, "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800, "Llama-3.2-1B": 1_235_814_400, "Mistral-7B-v0.3": 7_248_023_552,
    "Phi-4": 14_659_507_200, "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-7B": 7_615_616_512, "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360, "Qwen3-30B-A3B": 30_532_122_624, "Qwen3-32B": 32_762_123_264,
}  # fmt: skip


def test_shipped_models():
    """Their sizes are those that their publishers state."""
    for path in SHIPPED.values():
        model = build_on_meta(AutoConfig.for_model(**json.loads(path.read_text())), Job(seq=1))
        if path.stem in PARAMETERS:
            assert sum(p.numel() for p in model.parameters()) == PARAMETERS.pop(path.stem), path
    assert not PARAMETERS


def test_ranking_and_answers():
    """What fits comes first, and the longest sequence is one granule short of what does not fit."""
    config = models.config("llama", num_hidden_layers=5, max_position_embeddings=8192)
    hardware = Hardware(memory=48 * 2**20, reserve=2**20)
    found = estimate(config, gpus=2, seq=512, dtype="fp32", hardware=hardware)
    assert {mesh.name for mesh in found.meshes} == {"1 x 2 x 1", "1 x 1 x 2"}
    assert [m.fits for m in found.meshes] == sorted((m.fits for m in found.meshes), reverse=True)
    assert all(m.peak == sum(m.at_peak.values()) for m in found.meshes)
    assert found.checkpointing["full"].peak < found.checkpointing["none"].peak == found.best.peak
    fixed = {"dp": found.best.dp_shard, "tp": found.best.tp, "dtype": "fp32", "hardware": hardware, "answers": False}
    assert found.longest_seq > 512
    assert not estimate(config, gpus=2, seq=found.longest_seq + 128, **fixed).best.fits
    json.dumps(found.to_dict())


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    models.config("llama", num_hidden_layers=5).save_pretrained(tmp_path)
    base = ["estimate", str(tmp_path), "--gpus", "8", "--seq", "64", "--tp", "2", "--gpu-memory", "8GB", "--no-answers"]
    main([*base, "--json", "--plot", str(tmp_path / "m.png"), "--write-config", str(tmp_path / "m.yaml")])
    found = json.loads(capsys.readouterr().out)
    assert (found["meshes"][0]["tp"], found["hardware"]["memory"]) == (2, 8 * 10**9)
    assert yaml.safe_load((tmp_path / "m.yaml").read_text())["num_processes"] == 8
    assert (tmp_path / "m.png").stat().st_size > 10_000
    main(base)
    shown = capsys.readouterr().out
    assert "1 x 4 x 2" in shown and "reduce-scatter" in shown and "Overlap" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Llama-3-8B", "--gpus", "8", "--tp", "3"], "tp=3 does not divide"),
        (["Llama-3-8B", "--gpus", "12"], "do not fill hosts of 8"),
        (["Llama-3-8B", "--gpus", "8", "--tp", "4", "--dp", "4"], "must be 8"),
        (["Qwen2.5-0.5B", "--gpus", "8", "--tp", "8"], "tp_size can be one of [1, 2, 14]"),
        (["Llama-3-9B", "--gpus", "8"], "Did you mean Llama-3-8B"),
        (["lama.json", "--gpus", "8"], "Did you mean llama"),
        (["Llama-3-8B", "--gpus", "8", "--gpu-memory", "80"], "such as 80GiB"),
        (["Llama-3-8B", "--gpus", "8", "--gpu-memory", "1GiB"], "leaves nothing"),
        (["Llama-3-8B", "--gpus", "8", "--dtype", "fp8"], "dtype must be one of"),
        (["Llama-3-8B", "--gpus", "8", "--optim", "lion"], "optim must be one of"),
    ],
)
def test_wrong_input(arguments, message, tmp_path, monkeypatch, capsys):
    """One line, exit 2."""
    monkeypatch.chdir(tmp_path)
    Path("lama.json").write_text('{"model_type": "lama"}')
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", *arguments, "--seq", "64"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bytes():
    assert [parse_bytes(text) for text in ("80GiB", "80 GB", "1.5gib", 7)] == [80 * 2**30, 80 * 10**9, 3 * 2**29, 7]
