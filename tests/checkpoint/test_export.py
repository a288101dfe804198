"""`hf-tpsp export`: what it writes is what one process would have saved. The checkpoints here are made without ranks."""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from training import Rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.checkpoint import one_process
from hf_tpsp.checkpoint.sharded import ShardedState, by_layer
from hf_tpsp.cli import main
from hf_tpsp.tools.verify.verify import build


def trained(model_type: str):
    """A small model and its AdamW, after a step, with a parameter in each of two groups that had no gradient."""
    model = build(model_type, torch.float32, 132, {})
    model(**{k: v[None] for k, v in Rows(1, 1)[0].items()}).loss.backward()
    parameters = list(model.parameters())
    groups = [{"params": parameters[1::2], "weight_decay": 0.1}, {"params": parameters[::2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    parameters[0].grad = parameters[3].grad = None
    optimizer.step()
    return model, optimizer


def save(model, optimizer, folder):
    """A checkpoint as accelerate saves it on a mesh, of one rank without a process group."""
    state = {"model": get_model_state_dict(model)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "pytorch_model_fsdp_0"), no_dist=True)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "optimizer_0"), no_dist=True)
    torch.save(
        {"python": (3, (1, 2), None), "cpu": torch.get_rng_state(), "cuda": [torch.ones(2)]}, folder / "rng_state_0.pth"
    )
    torch.save({"last_epoch": 1}, folder / "scheduler.pt")
    model.save_pretrained(folder, state_dict={})


def weights_in(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            found |= {name: file.get_tensor(name) for name in names}
    return found


def assert_same(found, expected):
    """Nested containers are alike in keys, types and values."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "gemma2"])
def test_as_one_process_saves(model_type, tmp_path, monkeypatch):
    """Names, layouts and values of the weights; the optimizer's file; a layer at a time."""
    model, optimizer = trained(model_type)
    checkpoint, out, expected = (tmp_path / name for name in ("checkpoint-1", "out", "expected"))
    save(model, optimizer, checkpoint)
    largest = max(
        sum(p.nbytes for n, p in model.named_parameters() if n in layer) for layer in by_layer(model.state_dict())
    )
    read = ShardedState.read

    def little(self, paths):
        found = read(self, paths)
        assert sum(t.nbytes for t in found.values() if isinstance(t, torch.Tensor)) <= 2.1 * largest
        return found

    monkeypatch.setattr(ShardedState, "read", little)
    limit = 2 * largest
    main(["export", str(checkpoint), str(out), "--max-shard-size", str(limit / 1e9)])

    model.save_pretrained(expected)
    assert_same(weights_in(out), weights_in(expected))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights_in(expected).values())
    for name in {*index["weight_map"].values()}:
        with safe_open(out / name, "pt") as file:
            assert {*file.keys()} == {weight for weight, place in index["weight_map"].items() if place == name}
        assert (out / name).stat().st_size < 1.1 * limit
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert_same({**loaded.state_dict()}, {**model.state_dict()})

    saved, wanted = torch.load(out / "optimizer.pt", weights_only=True), optimizer.state_dict()
    assert_same(saved["state"], wanted["state"])
    assert_same(saved["param_groups"], wanted["param_groups"])
    assert torch.equal(torch.load(out / "rng_state.pth")["cuda"], torch.ones(2))
    assert {p.name for p in out.iterdir()} >= {"config.json", "generation_config.json", "scheduler.pt"}
    assert not list(tmp_path.glob("*.incomplete")) and not list(out.glob("*_0*"))


def remove_config(checkpoint, out):
    (checkpoint / "config.json").unlink()
    return "has neither an adapter nor a config.json"


def fill_out(checkpoint, out):
    out.mkdir()
    (out / "mine").touch()
    return "is not an empty folder"


def remove_shards(checkpoint, out):
    shutil.rmtree(checkpoint / "pytorch_model_fsdp_0")
    return "is not a checkpoint of the mesh"


def another_model(checkpoint, out):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}))
    return "is not one of a Qwen2ForCausalLM of its config.json: model.layers.1"


@pytest.mark.parametrize("spoil", [remove_config, fill_out, remove_shards, another_model])
def test_what_cannot_be_exported(spoil, tmp_path, capsys):
    """One line, exit 2, and nothing is left of it."""
    checkpoint, out = tmp_path / "checkpoint-1", tmp_path / "out"
    save(*trained("qwen2"), checkpoint)
    sentence = spoil(checkpoint, out)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(checkpoint), str(out)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_one_process_points_to_export(tmp_path):
    """A Trainer in one process, under `enable()`, that is given a checkpoint of the mesh."""
    save(*trained("qwen2"), tmp_path / "checkpoint-1")
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1)
    trainer = Trainer(build("qwen2", torch.float32, 132, {}), arguments, train_dataset=Rows(1, 1))
    with hf_tpsp.enable(TPSPConfig()), pytest.raises(ValueError, match=r"Run `hf-tpsp export .*checkpoint-1 OUT`"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "hf_tpsp" not in Trainer._load_from_checkpoint.__code__.co_filename


def test_another_optimizer(tmp_path):
    """An optimizer's file with other groups, or other shapes, is refused by name."""
    model, optimizer = trained("qwen2")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = torch.optim.AdamW(list(model.parameters())[:2])
    with pytest.raises(ValueError, match=r"optimizer.pt has parameter groups of \[13, 14\] parameters.* has \[2\]"):
        one_process.load_optimizer(other, tmp_path)
    groups = [[torch.nn.Parameter(torch.ones(2)) for _ in group["params"]] for group in optimizer.param_groups]
    other = torch.optim.AdamW([{"params": group} for group in groups])
    with pytest.raises(ValueError, match=r"optimizer.pt has a state of \[.*\] for a parameter of \[2\]"):
        one_process.load_optimizer(other, tmp_path)
