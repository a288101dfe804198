"""Odd data: tokens and labels that nobody has a row for, steps without a label, batches that differ inside a TP group."""

import models
import parity
import pytest
import torch
import torch.distributed as dist
import transformers
from training import Rows, assert_equal_logs, train, train_on_mesh

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.integrations.trl import fused_forward
from hf_tpsp.loss.cross_entropy import causal_lm_loss
from hf_tpsp.vocabulary import OutOfVocabulary

MESH_1x2, MESH_2x2 = TPSPConfig(tp_size=2), TPSPConfig(tp_size=2, dp_shard_size=2)
LOSSES = ("chunked", "loss_parallel")


def stray(what: str, value: int, loss: str) -> list[str]:
    """What is raised where one of all ranks' tokens or labels is `value`: in training, in evaluation, and beside the model."""
    model = hf_tpsp.parallelize(models.build("qwen2"), TPSPConfig(tp_size=2, dp_shard_size=2, loss=loss))
    model.train()
    batch = models.batch(2, 17, seed=dist.get_rank() // 2)
    if dist.get_rank() >= 2:  # the other data-parallel group's batch is as it should be
        batch[what][1, 5] = value
    texts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(IndexError) as error:
            model(**batch)
        texts.append(str(error.value))
        assert isinstance(error.value, (OutOfVocabulary, ValueError))
    return texts


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("what", "value"), [("input_ids", 131), ("input_ids", -1), ("labels", 131), ("labels", -1), ("labels", 4000)]
)
def test_outside_the_vocabulary(ranks, what, value, loss):
    for texts in ranks.run(4, stray, what, value, loss):
        for text in texts:
            assert f"{what}[1, 5] is {value}, outside the vocabulary of 131, on rank 2" in text


def stray_beside_the_model(loss: str) -> list[str]:
    model = hf_tpsp.parallelize(models.build("qwen2"), TPSPConfig(tp_size=2, loss=loss))
    batch = models.batch(2, 17)
    texts = []
    logits = model(batch["input_ids"]).logits
    for labels in (batch["labels"].clone().fill_(131), batch["labels"].clone().fill_(-7)):
        with pytest.raises(IndexError) as error:
            hf_tpsp.vocab_parallel_cross_entropy(logits, labels)
        texts.append(str(error.value))
    ids = batch["input_ids"].clone()
    ids[0, 3] = 131
    with torch.no_grad():
        for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
            with pytest.raises(IndexError) as error:
                call()
            texts.append(str(error.value))
    return texts


@pytest.mark.parametrize("loss", LOSSES)
def test_outside_the_vocabulary_beside_the_model(ranks, loss):
    for texts in ranks.run(2, stray_beside_the_model, loss):
        assert "labels[0, 0] is 131 (and 33 more)" in texts[0] and "labels[0, 0] is -7" in texts[1]
        assert all("input_ids[0, 3] is 131, outside the vocabulary of 131" in text for text in texts[2:])


def no_labels(loss: str, what: str) -> tuple[float, bool, parity.Errors]:
    """A step without a label, in between two that have some, accumulated."""
    config = TPSPConfig(tp_size=2, dp_shard_size=2, loss=loss)
    reference, model = models.build("llama"), hf_tpsp.parallelize(models.build("llama"), config)
    empty = models.batch(4, 17)
    empty["labels"].fill_(-100)
    mesh, found, zero = model._tpsp.mesh, [], []
    for part, batch in ((reference, empty), (model, parity.shard_batch(empty, mesh))):
        part.train()
        items = {"mean": None, "sum": torch.tensor(0), "int": torch.tensor(0.0)}[what]
        loss = part(**batch, **({} if items is None else {"num_items_in_batch": items})).loss
        loss.backward()
        found.append(loss.detach())
        zero.append(all(not parity.full(p.grad).any() for p in part.parameters() if p.grad is not None))
    assert torch.equal(found[0].isnan(), found[1].isnan()) and found[0].isnan() == found[1].isnan()
    for part in (reference, model):
        part.zero_grad()
    full = models.batch(4, 17)
    half = models.batch(4, 17)  # one data-parallel rank has no label
    half["labels"][:2] = -100
    return zero, parity.train_beside(reference, model, [[half, empty], [full]], config, mesh, every_gradient=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("what", ["mean", "sum"])
def test_step_without_a_label(ranks, loss, what):
    for zero, errors in ranks.run(4, no_labels, loss, what):
        assert zero == [True, True] and errors.within(1e-5, 1e-4), (zero, errors)


def no_labels_smoothed_or_fused(kind: str) -> list[bool]:
    config = TPSPConfig(tp_size=2, loss="loss_parallel" if kind == "torch's" else "chunked")
    model = hf_tpsp.parallelize(models.build("qwen2"), config).train()
    batch = models.batch(2, 17)
    labels = torch.full_like(batch["labels"], -100)
    if kind == "fused":  # TRL's head
        model.forward = fused_forward(model.forward)
        options = {"fused_lm_head": True, "num_items_in_batch": torch.tensor(0)}
        loss = model(batch["input_ids"], labels=labels, **options).loss
    else:
        logits = model(batch["input_ids"]).logits
        loss = causal_lm_loss(logits, labels, num_items_in_batch=torch.tensor(0), label_smoothing=0.1)
    loss.backward()
    return [not parity.full(p.grad).any() and not parity.full(p.grad).isnan().any() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["fused", "smoothed", "torch's"])
def test_step_without_a_label_smoothed_or_fused(ranks, kind):
    assert all(all(zero) and zero for zero in ranks.run(2, no_labels_smoothed_or_fused, kind))


GIVEN = {
    "attention_mask": lambda b, x: {"attention_mask": torch.ones_like(b["input_ids"]).index_fill(1, torch.tensor([x]), 0)},
    "position_ids": lambda b, x: {"position_ids": torch.arange(x, 17 + x).expand(2, 17), "use_cache": False},
    "num_items_in_batch": lambda b, x: {"num_items_in_batch": torch.tensor(10 + x)},
    "output_hidden_states": lambda b, x: {"output_hidden_states": bool(x)},
    "logits_to_keep": lambda b, x: {"logits_to_keep": x},
    "attention_mask.full_attention": lambda b, x: {"attention_mask": {"full_attention": torch.full((2, 1, 17, 17), -float(x))}},
}  # fmt: skip


def differing(name: str) -> str:
    model = hf_tpsp.parallelize(models.build("qwen2"), MESH_2x2).train()
    batch = models.batch(2, 17)
    odd = dist.get_rank() == 3
    if name == "inputs_embeds":
        embeds = torch.ones(2, 17, 32)
        embeds[1, 2, 3] += 1e-6 * odd
        given = {"inputs_embeds": embeds, "labels": batch["labels"]}
    elif name == "kind":  # a mask of integers is read in another way than one of booleans
        mask = torch.ones_like(batch["input_ids"])
        given = {**batch, "attention_mask": mask.bool() if odd else mask}
    elif name == "missing":
        given = {**batch, **({} if odd else {"attention_mask": torch.ones_like(batch["input_ids"])})}
    else:
        given = {**batch, **GIVEN[name](batch, int(odd))}
    with pytest.raises(ValueError) as error:
        model(**given)
    return str(error.value)


@pytest.mark.parametrize("name", [*GIVEN, "inputs_embeds", "missing", "kind"])
def test_differs_inside_a_tp_group(ranks, name):
    for text in ranks.run(4, differing, name):
        named = "attention_mask" if name in ("missing", "kind") else name
        assert f"Forward 1: rank 3 got other {named} than rank 2, in the same TP group" in text


class FullRows(Rows):
    """Rows that all have as many labels, so that a mean of means is the mean."""

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


@pytest.mark.parametrize(("config", "rows"), [(MESH_1x2, Rows), (MESH_2x2, FullRows)], ids=["1x2", "2x2"])
def test_average_tokens_across_devices(ranks, config, rows, tmp_path):
    folder = str(tmp_path / "model")
    models.build("qwen2", vocab_size=132).save_pretrained(folder)
    options = {
        "average_tokens_across_devices": False,
        "steps": 4,
        "given": {"train_dataset": rows(64, 1), "eval_dataset": rows(24, 3)},
    }
    expected = train(folder, str(tmp_path / "one"), 1, **options)
    for log in ranks.run(config.world_size, train_on_mesh, config, folder, str(tmp_path / "mesh"), **options):
        assert_equal_logs(log, expected)


def differing_labels_under_trl() -> str:
    model = hf_tpsp.parallelize(models.build("qwen2"), MESH_1x2).train()
    model.forward = fused_forward(model.forward)
    batch = models.batch(2, 17)
    batch["labels"][0, 9] += dist.get_rank()
    with pytest.raises(ValueError) as error:
        model(**batch, fused_lm_head=True)
    return str(error.value)


def test_labels_that_trl_keeps_to_itself(ranks):
    assert all("rank 1 got other labels than rank 0" in text for text in ranks.run(2, differing_labels_under_trl))


def in_another_order() -> bool:
    """What differs in order, or in the width of integers, is the same batch."""
    model = hf_tpsp.parallelize(models.build("qwen2"), MESH_1x2).train()
    batch = {**models.batch(2, 17), "position_ids": torch.arange(17).expand(2, 17)}
    if dist.get_rank() == 1:
        batch = {name: x.to(torch.int32) if name == "position_ids" else x for name, x in reversed(batch.items())}
    return bool(model(**batch).loss.isfinite())


def test_in_another_order(ranks):
    assert all(ranks.run(2, in_another_order))


class Mixed(Rows):
    """Rows whose labels are another rank's."""

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row] + dist.get_rank() % 2}


def differing_labels_that_a_trainer_keeps(folder: str, output: str, how: str) -> list[str]:
    options = {"label_smoothing_factor": 0.1} if how == "smoothed" else {}
    given = {} if how == "smoothed" else {"compute_loss_func": first_token}
    texts = []
    for steps in ("train", "evaluate"):
        with hf_tpsp.enable(MESH_1x2):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            args = transformers.TrainingArguments(
                output, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, **options
            )
            trainer = transformers.Trainer(model, args, train_dataset=Mixed(8, 1), eval_dataset=Mixed(8, 1), **given)
            with pytest.raises(ValueError) as error:
                getattr(trainer, steps)()
        texts.append(str(error.value))
    return texts


def first_token(outputs, labels, num_items_in_batch=None):
    return hf_tpsp.vocab_parallel_cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize("how", ["smoothed", "own loss"])
def test_labels_that_a_trainer_keeps_to_itself(ranks, tmp_path, how):
    folder = str(tmp_path / "model")
    models.build("qwen2", vocab_size=140).save_pretrained(folder)
    for texts in ranks.run(2, differing_labels_that_a_trainer_keeps, folder, str(tmp_path / "out"), how):
        assert all("rank 1 got other batch.labels than rank 0" in text for text in texts), texts
