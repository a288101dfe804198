"""Vocab-parallel cross entropy against `torch.nn.functional.cross_entropy`."""

import itertools

import models
import parity
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

import hf_tpsp
from hf_tpsp import TPSPConfig, vocab_parallel_cross_entropy
from hf_tpsp.integrations.trainer import patch_label_smoother
from hf_tpsp.loss.cross_entropy import causal_lm_loss, vocab_parallel_statistics
from hf_tpsp.upstream.torch.dtensor import loss_parallel as _loss_parallel


def sharded(logits: torch.Tensor) -> DTensor:
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    return distribute_tensor(logits.detach(), mesh, [Shard(logits.dim() - 1)]).requires_grad_()


def problem(vocab=131, dtype=torch.float32, rows=3, length=7):
    torch.manual_seed(0)
    logits = (torch.randn(rows, length, vocab) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows, length))
    labels[0, :3] = -100
    return logits, labels


def errors(vocab, dtype, reduction, smoothing) -> tuple[float, float]:
    """Largest errors of loss and gradient, under an upstream gradient that is not 1."""
    logits, labels = problem(vocab, dtype)
    upstream = torch.randn(labels.shape) if reduction == "none" else torch.tensor(-2.7)
    expected = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction=reduction, label_smoothing=smoothing
    )
    expected.backward(upstream.flatten() if reduction == "none" else upstream)
    mine = sharded(logits)
    found = vocab_parallel_cross_entropy(mine, labels, reduction=reduction, label_smoothing=smoothing)
    assert type(found) is torch.Tensor
    found.backward(upstream)
    grad = mine.grad.full_tensor()
    assert grad.dtype == dtype
    assert grad[0, :3].abs().max() == 0, "ignored tokens have no gradient"
    return (
        (found.flatten() - expected).abs().max().item() / expected.abs().max().item(),
        parity.relative(grad.float(), logits.grad.float()),
    )


def sweep(vocab, dtype):
    return {
        (reduction, smoothing): errors(vocab, dtype, reduction, smoothing)
        for reduction, smoothing in itertools.product(("none", "sum", "mean"), (0.0, 0.1))
    }


@pytest.mark.parametrize(("world", "vocab"), [(2, 128), (2, 131), (4, 130)])
def test_equals_torch(ranks, world, vocab):
    for result in ranks.run(world, sweep, vocab, torch.float32):
        for case, (loss, grad) in result.items():
            assert loss < 1e-6 and grad < 1e-6, case


def test_bf16(ranks):
    """The loss is taken in fp32. Gradients are rounded to bf16 (2**-8) when saved and when multiplied."""
    for case, (loss, grad) in ranks.run(2, sweep, 131, torch.bfloat16)[0].items():
        assert loss < 1e-6 and grad < 2 * 2**-8, case


def statistics() -> dict[str, float]:
    """Errors of `vocab_parallel_statistics` of a DTensor, and of the gradient of its `nll`."""
    logits, labels = problem()
    mine, upstream = sharded(logits), torch.randn(labels.shape)
    found = vocab_parallel_statistics(mine, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    found.nll.backward(upstream)
    expected.backward(upstream)
    return {
        "nll": parity.relative(found.nll, expected),
        "gradient": parity.relative(mine.grad.full_tensor(), logits.grad),
        "entropy": parity.relative(found.entropy, torch.distributions.Categorical(logits=logits).entropy()),
        "mean_logit": parity.relative(found.mean_logit, logits.mean(-1)),
        "is_top1": (found.is_top1 != (logits.argmax(-1) == labels)).sum().item(),
    }


def test_statistics_of_a_dtensor(ranks):
    for found in ranks.run(2, statistics):
        assert max(found.values()) < 1e-6, found


def as_transformers() -> dict[str, tuple[float, float]]:
    """`causal_lm_loss` and transformers' `ForCausalLMLoss` and `LabelSmoother`, same arguments."""
    results = {}
    logits, labels = problem()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    cases = {
        "mean": {"labels": labels},
        "items": {"labels": labels, "num_items_in_batch": torch.tensor(5)},
        "items as int": {"labels": labels, "num_items_in_batch": 5},
        "shift_labels": {"labels": None, "shift_labels": shifted},
        "ignore_index": {"labels": labels, "ignore_index": int(labels[1, 2])},
    }
    for name, case in cases.items():
        case = dict(case)
        if name == "ignore_index":  # transformers would look up the row -100
            case["labels"] = labels.clamp(min=0)
        logits.grad = None
        expected = ForCausalLMLoss(logits, vocab_size=logits.shape[-1], **case)
        expected.backward()
        mine = sharded(logits)
        found = causal_lm_loss(mine, vocab_size=logits.shape[-1], **case)
        found.backward()
        results[name] = (abs(found.item() / expected.item() - 1), parity.relative(mine.grad.full_tensor(), logits.grad))
    for items in (None, torch.tensor(5)):
        logits.grad = None
        smoother = LabelSmoother(epsilon=0.1)
        expected = smoother({"logits": logits}, labels, shift_labels=True, num_items_in_batch=items)
        expected.backward()
        mine = sharded(logits)
        smooth = patch_label_smoother(LabelSmoother.__call__)
        found = smooth(smoother, {"logits": mine}, labels, shift_labels=True, num_items_in_batch=items)
        found.backward()
        results[f"smoothing, items {items}"] = (
            abs(found.item() / expected.item() - 1),
            parity.relative(mine.grad.full_tensor(), logits.grad),
        )
    return results


def test_equals_transformers(ranks):
    for case, (loss, grad) in ranks.run(2, as_transformers)[0].items():
        assert loss < 1e-6 and grad < 1e-6, case


def contexts() -> dict[str, float]:
    """The loss inside the caller's `loss_parallel`, after one that raised, and differentiated twice."""
    logits, labels = problem()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    found = {}
    mine = sharded(logits)
    with loss_parallel():
        vocab_parallel_cross_entropy(mine, labels).backward()
        # The caller's context is still open: torch's own loss works in it.
        theirs = sharded(logits)
        F.cross_entropy(theirs.flatten(0, 1), labels.flatten()).backward()
    found["nested"] = parity.relative(mine.grad.full_tensor(), logits.grad)
    found["after it"] = parity.relative(theirs.grad.full_tensor(), logits.grad)
    try:
        with _loss_parallel():
            raise KeyError
    except KeyError:
        pass
    assert torch.ops.aten._log_softmax.default not in DTensor._op_dispatcher._custom_op_handlers
    mine = sharded(logits)
    loss = vocab_parallel_cross_entropy(mine, labels)
    loss.backward(retain_graph=True)
    loss.backward()
    found["twice"] = parity.relative(mine.grad.full_tensor(), 2 * logits.grad)
    return found


def test_contexts(ranks):
    for case, error in ranks.run(2, contexts)[0].items():
        assert error < 1e-6, case


def refusals() -> list[str]:
    logits, labels = problem()
    mine = sharded(logits)
    texts = []
    for call in (
        lambda: vocab_parallel_cross_entropy(mine.redistribute(placements=[Shard(0)]), labels),
        lambda: vocab_parallel_cross_entropy(mine, labels[:, 1:]),
        lambda: vocab_parallel_cross_entropy(mine, labels, reduction="avg"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        texts.append(str(error.value))
    return texts


def test_refusals(ranks):
    placement, shape, reduction = ranks.run(2, refusals)[0]
    assert "Shard(dim=0)" in placement
    assert "(3, 6)" in shape and "(3, 7, 131)" in shape
    assert "'avg'" in reduction


def logits_of_calls() -> dict:
    """What a caller gets: sharded in training, whole without labels and gradients, and whole on request."""
    reference, model = models.build("qwen2").eval(), models.build("qwen2").eval()
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2))
    data = models.batch(2, 17)
    ids = {"input_ids": data["input_ids"]}
    with torch.no_grad():
        expected = reference(**data)
        evaluated, called, as_tuple = model(**data), model(**ids), model(**ids, return_dict=False)
        generated = [
            part.generate(data["input_ids"][:, :5], max_new_tokens=6, do_sample=False) for part in (reference, model)
        ]
    return {
        "kinds": [type(x).__name__ for x in (evaluated.logits, called.logits, as_tuple[0], model(**ids).logits)],
        "errors": [
            parity.relative(x, expected.logits) for x in (evaluated.logits.full_tensor(), called.logits, as_tuple[0])
        ],
        "loss": abs(evaluated.loss.item() / expected.loss.item() - 1),
        "generated": torch.equal(*generated),
    }


def test_logits_stay_reachable(ranks):
    for result in ranks.run(2, logits_of_calls):
        assert result["kinds"] == ["LazyLogits", "Tensor", "Tensor", "LazyLogits"]
        assert parity.largest(result["errors"]) < 1e-5
        assert result["loss"] < 1e-5
        assert result["generated"]


def generations(config: TPSPConfig) -> bool:
    """Greedy, 32 tokens, rows padded on the left: one process and the mesh, each data-parallel rank its own rows."""
    reference, model = models.build("qwen3").eval(), models.build("qwen3").eval()
    hf_tpsp.parallelize(model, config)
    data = models.batch(4, 9, padding="left")
    del data["labels"]
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    expected = parity.shard_batch({"out": reference.generate(**data, **options)}, model._tpsp.mesh)["out"]
    return torch.equal(model.generate(**parity.shard_batch(data, model._tpsp.mesh), **options), expected)


@pytest.mark.parametrize("config", [TPSPConfig(tp_size=2), TPSPConfig(tp_size=2, dp_shard_size=2)], ids=["1x2", "2x2"])
def test_generate(ranks, config):
    assert all(ranks.run(config.world_size, generations, config))
