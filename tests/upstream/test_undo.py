"""What hf_tpsp puts in place it takes back: the libraries, the environment and the loggers are afterwards as they were."""

import gc
import logging
import os
import sys
import types

import models

from hf_tpsp import TPSPConfig

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl")


def fingerprint() -> dict[tuple, int]:
    """Every attribute of every module and class of the libraries, by what it is; and what else a patch may touch."""
    import transformers.trainer
    from torch.distributed.tensor import DTensor

    found: dict[tuple, int] = {}

    def note(value: object, *key: str) -> None:
        if type(value) is not int:  # the libraries count what they have made
            found[key] = id(value)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in LIBRARIES or type(module) is not types.ModuleType:
            continue
        for key, value in list(vars(module).items()):
            note(value, name, key)
            if issubclass(type(value), type) and value.__module__.partition(".")[0] in LIBRARIES:
                for attribute, of_class in list(vars(value).items()):
                    note(of_class, value.__module__, value.__qualname__, attribute)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            found["logger", name] = hash((tuple(logger.filters), tuple(logger.handlers), logger.level))
    collections = {
        "callbacks": transformers.trainer.DEFAULT_CALLBACKS,
        "attention": sorted(transformers.AttentionInterface._global_mapping),
        "masks": sorted(transformers.AttentionMaskInterface._global_mapping),
        "operations": sorted(map(str, DTensor._op_dispatcher._custom_op_handlers)),
        "progress bar": transformers.utils.logging.is_progress_bar_enabled(),
    }
    found |= {("collection", name): hash(str(value)) for name, value in collections.items()}
    return found | {("environment", name): hash(value) for name, value in os.environ.items()}


def differences(before: dict[tuple, int], after: dict[tuple, int]) -> list[str]:
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    # A module that is imported meanwhile appears in its parent; a class has what it has.
    changed |= {key for key in before.keys() ^ after.keys() if len(key) == 3 or key[0] in ("environment", "logger")}
    known = {key[:2] for key in before if len(key) == 3}
    changed = {key for key in changed if len(key) != 3 or key[:2] in known}
    return sorted(".".join(key) for key in changed)


def train(config: TPSPConfig, folder: str, out: str) -> int:
    """A step with everything in place: a model that was loaded, adapters, a Trainer. Returns how much was put in place."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from trl import SFTConfig

    import hf_tpsp
    from hf_tpsp.integrations import registry

    before = fingerprint()
    with hf_tpsp.enable(config) as handle:
        settings = {
            "output_dir": out,
            "max_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        registry.install(handle, SFTConfig(**settings, bf16=False))
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        )
        ids = torch.arange(3, 20).repeat(16, 1)
        trainer = Trainer(
            model, TrainingArguments(**settings), train_dataset=[{"input_ids": x, "labels": x} for x in ids]
        )
        trainer.train()
        return len(differences(before, fingerprint()))


def around(config: TPSPConfig, folder: str, out: str) -> tuple[int, list[str]]:
    from accelerate.state import AcceleratorState

    from hf_tpsp.upstream.accelerate import forget_state

    train(config, folder, out)  # all is imported, and what the libraries keep from a first time is there
    gc.collect()
    forget_state()
    before = fingerprint()
    put = train(config, folder, out)
    gc.collect()  # the model, which keeps what it needs of torch, has circles
    after = fingerprint()
    AcceleratorState._reset_state(reset_partial_state=True)
    return put, differences(before, after)


def test_enable_is_undone(ranks, tmp_path):
    models.build("qwen2").save_pretrained(tmp_path / "model")
    for put, left in ranks.run(2, around, TPSPConfig(tp_size=2), str(tmp_path / "model"), str(tmp_path / "out")):
        assert put > 30
        assert not left


def test_a_simulated_world_is_undone():
    from hf_tpsp.tools.estimate.simulate import Job, simulate_step, simulated_world

    def simulate() -> int:
        before = fingerprint()
        with simulated_world(2):
            simulate_step(models.config("llama"), TPSPConfig(tp_size=2), Job(seq=16, dtype="fp32"))
            return len(differences(before, fingerprint()))

    simulate()
    gc.collect()
    before = fingerprint()
    assert simulate() > 3
    gc.collect()
    assert not differences(before, fingerprint())


def test_a_sharded_model_keeps_what_it_needs_without_enable(alone):
    from torch.distributed.tensor import DTensor

    import hf_tpsp

    original = DTensor.full_tensor
    one, other = (hf_tpsp.parallelize(models.build("llama"), TPSPConfig()) for _ in range(2))
    assert DTensor.full_tensor is not original
    del one
    gc.collect()
    assert DTensor.full_tensor is not original
    del other
    gc.collect()
    assert DTensor.full_tensor is original
