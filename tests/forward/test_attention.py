"""The arguments of attention kernels on a mesh: right, and found once a forward. Kernels are stand-ins (`standins.py`)."""

import attention
import datasets
import models
import pytest
import standins
import torch
from training import Rows
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.forward import packing
from hf_tpsp.patching import swapped

TP, FULL = TPSPConfig(tp_size=2, check="off"), TPSPConfig(tp_size=2, dp_shard_size=2, activation_checkpointing="full")
CASES = [
    ("llama", "flash_attention_2", "plain", TPSPConfig(tp_size=2)),
    ("llama", "flash_attention_2", "packed", TP),
    ("mistral", "flash_attention_3", "packed", TP),
    ("gemma2", "flash_attention_2", "told", TP),
    ("deepseek_v3", "flash_attention_2", "padded", TP),
    ("gpt_oss", "flash_attention_4", "packed", TPSPConfig(tp_size=2)),
    ("phi3", "sdpa", "packed", TP),
    ("gemma3_text", "flex_attention", "packed", TPSPConfig(tp_size=2)),
    ("mistral", "flex_attention", "padded", TP),
]


def assert_equal(case: tuple, found: tuple) -> None:
    (_, kernel, layout, _), (errors, asked, calls) = case, found
    assert errors.within(1e-5), (case, errors)
    assert asked == 0, "transformers' layers asked for themselves"
    if "flash" in kernel and layout != "padded":
        # One call for each of a rank's row: a sequence of 17 tokens, or of 6 and 11.
        assert {starts for _, _, starts in calls} == {(0, 17) if layout == "plain" else (0, 6, 17)}, calls
    assert bool(calls) == (kernel != "sdpa")


def test_kernels_get_the_whole_row(ranks):
    for results in ranks.run(2, attention.compare_all, CASES):
        for case, found in zip(CASES, results, strict=True):
            assert_equal(case, found)


def test_kernels_get_the_whole_row_of_each_data_parallel_rank(ranks):
    cases = [("qwen3_moe", "flash_attention_2", "packed", FULL)]
    for results in ranks.run(4, attention.compare_all, cases):
        assert_equal(cases[0], results[0])


def asked_by_layers() -> int:
    with swapped((packing, "sequences", lambda original: lambda given: {})):
        return attention.compare("llama", "flash_attention_2", "packed", TP)[1]


def test_without_it_each_layer_asks(ranks):
    assert ranks.run(2, asked_by_layers) == [2, 2]


def trained(what: str, model: str, out: str) -> tuple[list[float], set]:
    """The losses of three steps of one packed row each, and the sequences that the kernels saw."""
    with standins.kernels_on_cpu():
        common = {
            "output_dir": out, "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [],
            "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "bf16": False,
        }  # fmt: skip
        loaded = {"dtype": torch.float32, "attn_implementation": "flash_attention_2"}
        if what == "Trainer":
            network = models_of(model, **loaded)
            collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
            trainer = Trainer(network, TrainingArguments(**common), train_dataset=Short(), data_collator=collator)
        else:
            trl = pytest.importorskip("trl")
            rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in Short()])
            how = {"packing": True, "per_device_train_batch_size": 1} if what == "packing" else {"padding_free": True}
            options = {
                **common,
                "max_length": 24 if what == "packing" else None,
                "gradient_checkpointing": False,
                **how,
            }
            args = trl.SFTConfig(
                **options, model_init_kwargs={"dtype": "float32", "attn_implementation": "flash_attention_2"}
            )
            trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=models.tokenizer(132))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {starts for _, _, starts in standins.calls}


class Short(Rows):
    """Rows of 3 to 9 tokens."""

    def __init__(self):
        super().__init__(32, 1)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(row)
        return {
            name: value[: 3 + row % 7] for name, value in super().__getitem__(row).items() if name != "attention_mask"
        }

    def __iter__(self):
        return (self[row] for row in range(len(self)))


def models_of(folder: str, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def trained_on_mesh(*args) -> list:
    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        return [trained(what, *args) for what in ("Trainer", "packing", "padding free")]


def test_packed_training_with_flash_attention(ranks, tmp_path):
    """The stock Trainer with flattened rows, and TRL's two ways, as in one process."""
    folder, out = str(tmp_path / "model"), str(tmp_path / "out")
    models.build("qwen2", vocab_size=132).save_pretrained(folder)
    models.tokenizer(132).save_pretrained(folder)
    expected = [trained(what, folder, out) for what in ("Trainer", "packing", "padding free")]
    for found in ranks.run(2, trained_on_mesh, folder, out):
        for (losses, starts), (right, right_starts) in zip(found, expected, strict=True):
            assert starts == right_starts and all(len(s) > 2 for s in starts)
            assert len(losses) == len(right) == 3
            assert all(abs(a - b) <= 1e-4 * b for a, b in zip(losses, right, strict=True)), (losses, right)
