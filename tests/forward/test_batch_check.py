"""A batch that differs inside a TP group is refused on its step."""

import models
import pytest
import torch
import torch.distributed as dist

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.fingerprint import fingerprint


def mixed_up(what: str) -> tuple[str, bool]:
    model = models.build("qwen2")
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2, dp_shard_size=2))
    batch = models.batch(2, 17)
    if dist.get_rank() >= 2:  # another data-parallel group may have another batch
        batch = models.batch(2, 17, seed=9)
    model(**batch).loss.backward()
    if dist.get_rank() in (1, 3):
        if what == "input_ids":
            batch["input_ids"][0, [3, 4]] = batch["input_ids"][0, [4, 3]] + torch.tensor([0, 1])
        elif what == "labels":
            batch["labels"][1, 16] = -100
        else:
            batch = {name: value[:, :16] for name, value in batch.items()}
    with pytest.raises(ValueError) as error:
        model(**batch)
    model.eval()
    with torch.no_grad():  # generation is left alone
        model(input_ids=batch["input_ids"][:, :5])
    return str(error.value)


@pytest.mark.parametrize("what", ["input_ids", "labels", "shape"])
def test_mixed_up_batches(ranks, what):
    texts = ranks.run(4, mixed_up, what)
    for rank, text in enumerate(texts):
        first = rank // 2 * 2
        assert text.startswith("Forward 2: ")
        assert f"rank {first + 1} got other " in text and f"than rank {first}, in the same TP group" in text
        assert (what in text) or (what == "shape" and "input_ids and labels" in text)


def test_fingerprints_differ():
    ids = torch.randint(0, 1000, (4, 33), generator=torch.Generator().manual_seed(0))
    swapped, changed = ids.clone(), ids.clone()
    swapped[0, [1, 2]] = ids[0, [2, 1]]
    changed[3, 32] += 1
    variants = [ids, swapped, changed, ids.T.contiguous(), ids[:, :32], ids + 1, ids.view(2, 66), -ids]
    assert len({int(fingerprint(x)) for x in variants}) == len(variants)
    assert int(fingerprint(ids)) == int(fingerprint(ids.to(torch.int32)))
