"""The from_pretrained hook: shards while it reads, saves whole, undoes itself, refuses by name."""

import ctypes
import gc
import os
import shutil
import threading
import time

import models
import parity
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from transformers.integrations import neftune
from transformers.trainer_pt_utils import LabelSmoother

import hf_tpsp
from hf_tpsp import TPSPConfig

MESH_2x2 = TPSPConfig(tp_size=2, dp_shard_size=2)


def save_on_rank_0(model) -> str:
    folder = parity.shared_folder()
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def anonymous_memory() -> int:
    """Bytes of this process that are not backed by a file (a mapped checkpoint is not held by it)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def load(*args, **kwargs):
    """Looks the method up at each call: the hook may have come since."""
    return transformers.AutoModelForCausalLM.from_pretrained(*args, **kwargs)


class PeakMemory:
    """The most that anonymous memory rose while inside, sampled every millisecond."""

    def __enter__(self):
        # What earlier tests have freed goes back to the system first, or taking it again would be no rise.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.start = self.peak = anonymous_memory()
        self._inside = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while self._inside:
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.001)

    def __exit__(self, *exc):
        self._inside = False
        self._thread.join()
        self.rise = max(self.peak, anonymous_memory()) - self.start


def peaks_while_loading() -> dict[str, float]:
    """Rise of host memory during from_pretrained, as a share of the model's size: sharded 4 ways, and whole."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32000, "num_hidden_layers": 6}
    if dist.get_rank() == 0:
        model = models.build("qwen2", **sizes)
        folders = [save_on_rank_0(model)]
        size = [sum(p.numel() * p.element_size() for p in model.parameters())]
        del model
    else:
        folders, size = [parity.shared_folder()], [0]
        dist.barrier()
    dist.broadcast_object_list(size)
    with hf_tpsp.enable(MESH_2x2):
        tiny = save_on_rank_0(models.build("qwen2"))
        load(tiny, dtype=torch.float32)  # what is made once: groups, imports
        with PeakMemory() as sharded:
            model = load(folders[0], dtype=torch.float32)
    own = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    del model
    with PeakMemory() as whole:
        model = load(folders[0], dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # off the mapped file, as training would take it
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])
    return {"sharded": sharded.rise / size[0], "own": own / size[0], "whole": whole.rise / size[0]}


def test_no_rank_ever_holds_the_model(ranks):
    for shares in ranks.run(4, peaks_while_loading):
        assert 0.24 < shares["own"] < 0.27, shares
        assert shares["sharded"] < 0.5, shares
        assert shares["whole"] > 0.9, "the measure would not have seen a whole model"


def round_trip(model_type: str, tied: bool) -> dict:
    """Save the sharded model from all ranks; load the folder plainly."""
    reference = models.build(model_type, tied=tied)
    folder, out = save_on_rank_0(reference), parity.shared_folder()
    with hf_tpsp.enable(MESH_2x2):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds = {type(p.data).__name__ for p in model.parameters()}
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(out)
    result = {"kinds": kinds, "tied": is_tied, "files": sorted(os.listdir(out))}
    if dist.get_rank() == 0:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        result["equal"] = all(
            torch.equal(a, b) for a, b in zip(reference.parameters(), loaded.parameters(), strict=True)
        )
        result["same config"] = loaded.config.to_dict() == transformers.AutoConfig.from_pretrained(folder).to_dict()
        with open(f"{out}/model.safetensors", "rb") as a, open(f"{folder}/model.safetensors", "rb") as b:
            result["same file"] = a.read() == b.read()
    return result


@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("qwen2", True), ("phi3", False)])
def test_round_trip(ranks, model_type, tied):
    results = ranks.run(4, round_trip, model_type, tied)
    for result in results:
        assert result["kinds"] == {"DTensor"}
        assert result["tied"] == tied
    assert results[0]["files"] == ["config.json", "generation_config.json", "model.safetensors"]
    assert results[0]["equal"] and results[0]["same file"]


PATCHED = [
    (transformers.AutoModelForCausalLM, "from_pretrained"),
    (transformers.PreTrainedModel, "from_pretrained"),
    (transformers.Trainer, "save_model"),
    (transformers.Trainer, "push_to_hub"),
    (transformers.Trainer, "_push_from_checkpoint"),
    (transformers.Trainer, "prediction_step"),
    (transformers.Trainer, "_track_num_input_tokens"),
    (transformers.Trainer, "store_flos"),
    (transformers.TrainingArguments, "__post_init__"),
    (LabelSmoother, "__call__"),
    (Accelerator, "prepare"),
    (Accelerator, "dispatch_batches"),
    (Accelerator, "gather_for_metrics"),
    (AcceleratedScheduler, "step"),
    (neftune, "neftune_post_forward_hook"),
    (AcceleratorState, "__init__"),
    (ParallelismConfig, "dp_shard_enabled"),
]


def snapshot() -> list:
    from transformers.distributed.mixin import DistributedMixin

    classes = {owner for owner, _ in PATCHED if isinstance(owner, type)} | {DistributedMixin}
    state = [(owner, name, value) for owner in sorted(classes, key=str) for name, value in sorted(vars(owner).items())]
    return [state, list(transformers.trainer.DEFAULT_CALLBACKS), dict(os.environ)]


def undo() -> dict:
    before = snapshot()
    with hf_tpsp.enable(TPSPConfig(tp_size=2)) as handle:
        changed = [vars(owner)[name] for owner, name in PATCHED]
        during = snapshot()
        assert hf_tpsp.enable(TPSPConfig(tp_size=2)) is handle, "enabling twice is enabling once"
        with pytest.raises(ValueError, match=r"disable\(\) that first"):
            hf_tpsp.enable(TPSPConfig(dp_shard_size=2))
    after = snapshot()
    originals = [vars(owner)[name] for owner, name in PATCHED]
    handle.disable()  # harmless
    return {
        "patched": all(a is not b for a, b in zip(changed, originals, strict=True)),
        "changed": during[0] != before[0] and during[1] != before[1] and during[2] != before[2],
        "undone": all(a[2] is b[2] for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:],
    }


def test_enable_undoes_itself(ranks):
    for result in ranks.run(2, undo):
        assert result == {"patched": True, "changed": True, "undone": True}


def refusals() -> dict[str, str]:
    folder = save_on_rank_0(models.build("qwen2", num_attention_heads=6, num_key_value_heads=3, head_dim=8))
    texts = {}

    def note(name, call):
        try:
            call()
        except (ValueError, OSError) as error:
            texts[name] = f"{type(error).__name__}: {error}"

    note("world", lambda: hf_tpsp.enable(MESH_2x2))
    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        note("heads", lambda: load(folder))
        note("missing", lambda: load(f"{folder}/nowhere"))
        note("device_map", lambda: load(folder, device_map="auto"))
        note(
            "to quantize", lambda: load(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))
        )
        quantized = models.build("qwen2")
        quantized.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        quantized = save_on_rank_0(quantized)
        note("quantized", lambda: load(quantized))
    note("world in memory", lambda: hf_tpsp.parallelize(models.build("qwen2"), MESH_2x2))
    model = models.build("qwen2")
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2))
    note("twice", lambda: hf_tpsp.parallelize(model, TPSPConfig(tp_size=2)))
    note("resize", lambda: model.resize_token_embeddings(200))
    model = models.build("llama")
    model.model.layers[0].mlp.scale = torch.nn.Parameter(torch.ones(3))
    note("uncovered", lambda: hf_tpsp.parallelize(model, TPSPConfig(tp_size=2)))
    texts["untouched"] = str(not any(isinstance(p, DTensor) for p in model.parameters()))
    return texts


def test_refusals(ranks):
    for texts in ranks.run(2, refusals):
        assert "needs 4 ranks, but 2 were started" in texts["world"]
        assert texts["world in memory"] == texts["world"]
        assert "num_key_value_heads=3" in texts["heads"] and "[1, 3, 6]" in texts["heads"]
        assert texts["missing"].startswith("OSError") and "nowhere' is neither a checkpoint folder" in texts["missing"]
        assert "from_pretrained(device_map=…)" in texts["device_map"]
        assert "from_pretrained(quantization_config=…)" in texts["to quantize"]
        assert "so QLoRA is not supported; use LoRA" in texts["quantized"]
        assert "already parallelized" in texts["twice"]
        assert "resize_token_embeddings" in texts["resize"]
        assert "(model.layers.0.mlp.scale) not in a small copy" in texts["uncovered"]
        assert texts["untouched"] == "True"


def other_models_are_left_alone() -> bool:
    folder = save_on_rank_0(models.build("qwen2"))
    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        model = transformers.AutoModel.from_pretrained(folder)
    return any(isinstance(p, DTensor) for p in model.parameters())


def test_only_causal_lms_are_sharded(ranks):
    assert ranks.run(2, other_models_are_left_alone) == [False, False]
