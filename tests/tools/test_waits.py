"""No line of hf_tpsp waits for the device in a step, but the one that looks at the gradients before the weights change."""

import contextlib

import datasets
import models
import parity
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from training import Rows
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig, devices
from hf_tpsp.patching import swapped
from hf_tpsp.tools.waits import Waits

STEPS = 3


def as_on_an_accelerator() -> contextlib.AbstractContextManager:
    """The path of ranks that would wait for their device."""
    return swapped((devices, "is_waited_for", lambda original: lambda device: True))


class AfterTheFirstStep(TrainerCallback):
    """Counts from the second step on: the first one checks itself."""

    def __init__(self):
        self.waits = Waits()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.waits.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS:
            self.waits.__exit__(None, None, None)


def arguments(cls: type, out: str, **options):
    return cls(
        out, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, max_grad_norm=0.5, **options,
    )  # fmt: skip


def with_the_trainer(out: str, **options) -> Waits:
    counting = AfterTheFirstStep()
    args = arguments(TrainingArguments, out, logging_steps=10, **options)
    Trainer(models.build("qwen2", vocab_size=132), args, train_dataset=Rows(16, 1), callbacks=[counting]).train()
    return counting.waits


def with_trl(out: str) -> Waits:
    trl = pytest.importorskip("trl")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})), pad_token="a", eos_token="a")
    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in Rows(16, 1)])
    counting = AfterTheFirstStep()
    args = arguments(trl.SFTConfig, out, logging_steps=10, bf16=False, gradient_checkpointing=False)
    trl.SFTTrainer(
        models.build("qwen2", vocab_size=132),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[counting],
    ).train()
    return counting.waits


def with_a_loop(spoiled: bool = False) -> Waits:
    """Dropout on a rank's own heads draws from its own stream."""
    accelerator, model = Accelerator(cpu=True), models.build("qwen2", vocab_size=132, attention_dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(8, 1), batch_size=2))
    if spoiled:
        style = model.model.layers[0].mlp._tpsp_style
        run = style.run
        style.run = lambda *args, **kwargs: [run(*args, **kwargs), torch.ones(()).item()][0]
    waits = Waits()
    for step, batch in enumerate(loader):
        if step == 1:
            waits.__enter__()
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    waits.__exit__(None, None, None)
    return waits


def steps(out: str) -> dict[str, tuple[dict[str, int], str]]:
    found = {}
    for on_nan in ("stop", "ignore"):
        with as_on_an_accelerator(), hf_tpsp.enable(TPSPConfig(tp_size=2, on_nan=on_nan)):
            found[f"Trainer {on_nan}"] = with_the_trainer(out)
            found[f"loop {on_nan}"] = with_a_loop()
            if on_nan == "stop":
                found["TRL stop"] = with_trl(out)
            else:
                found["spoiled"] = with_a_loop(spoiled=True)
    return {name: (waits.by_owner(), waits.table()) for name, waits in found.items()}


def test_waits_of_a_step(ranks, tmp_path):
    for found in ranks.run(2, steps, str(tmp_path)):
        for name, (counts, table) in found.items():
            # Each step's one look at its gradients, before the weights change.
            looks = {"Trainer stop": STEPS - 1, "TRL stop": STEPS - 1, "loop stop": 3}.get(name, 0)
            assert counts.get("hf_tpsp", 0) == looks == table.count("finite.py") * looks, f"{name}\n{table}"
            assert counts.get("script", 0) == (3 if name == "spoiled" else 0), f"{name}\n{table}"
        # The Trainer's own, one for each micro-batch, which shows that the counter sees other people's.
        assert found["Trainer stop"][0]["transformers"] >= 2 * (STEPS - 1)


def mixed_up_late(what: str) -> tuple[str, bool, float]:
    """Two micro-batches, of which the second differs inside the TP group. What is raised, whether by the forward, and
    how far the weights have moved."""
    with as_on_an_accelerator():
        model = hf_tpsp.parallelize(models.build("qwen2"), TPSPConfig(tp_size=2, dp_shard_size=2, check="off"))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [parity.full(p.detach()).clone() for p in model.parameters()]
        odd, in_forward = dist.get_rank() in (1, 3), True
        with pytest.raises(ValueError) as error:
            for part in range(2):
                batch = models.batch(2, 17, seed=part)
                if part and odd:
                    if what == "shape":
                        batch = {name: value[:, :16] for name, value in batch.items()}
                    elif what == "vocabulary":
                        batch["input_ids"][1, 3] = 10**6
                    else:
                        batch[what][0, 3] = 5
                if part and what == "vocabulary":
                    batch["input_ids"][1, 3] = 10**6
                model(**batch).loss.backward()
            in_forward = False
            optimizer.step()
        moved = max(
            float((parity.full(p.detach()) - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True)
        )
    return str(error.value), in_forward, moved


@pytest.mark.parametrize("what", ["input_ids", "labels", "shape", "vocabulary"])
def test_a_late_error_comes_before_the_weights_change(ranks, what):
    for rank, (text, in_forward, moved) in enumerate(ranks.run(4, mixed_up_late, what)):
        assert text.startswith("Forward 2: ") and moved == 0
        # The hosts know the shapes, and a collective would meet them.
        assert in_forward == (what == "shape")
        if what == "vocabulary":
            assert "1000000" in text.replace(",", "")
        else:
            first = rank // 2 * 2
            assert f"rank {first + 1} got other " in text and f"than rank {first}, in the same TP group" in text
            assert what in text or what == "shape"


def seeded_apart() -> tuple[float, float]:
    """Dropout, with seeds of the ranks' own from the second step on: the loss, with and without."""
    losses = []
    for seeds in (0, 1):
        with as_on_an_accelerator():
            torch.manual_seed(0)
            model = hf_tpsp.parallelize(
                models.build("qwen2", attention_dropout=0.5), TPSPConfig(tp_size=2, check="off")
            )
            model.train()
            for step in range(2):
                torch.manual_seed(7 * step + seeds * step * dist.get_rank())
                loss = model(**models.batch(2, 17)).loss
            losses.append(float(parity.full(loss.detach())))
    return losses[0], losses[1]


def test_seeds_are_made_alike_before_a_late_forward(ranks):
    for alike, apart in ranks.run(2, seeded_apart):
        assert alike == apart
