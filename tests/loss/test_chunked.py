"""The head and the loss in chunks, and the logits that are computed only when read, against one process."""

import contextlib
import itertools

import models
import parity
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import hf_tpsp
from hf_tpsp import TPSPConfig, vocab_parallel_cross_entropy
from hf_tpsp.loss import chunked
from hf_tpsp.loss.cross_entropy import vocab_parallel_statistics
from hf_tpsp.loss.logits import LazyLogits
from hf_tpsp.styles.base import TensorParallel
from hf_tpsp.styles.head import LazyHead
from hf_tpsp.tools.estimate.moments import measure_step
from hf_tpsp.tools.estimate.recorders import CollectiveBytes

HIDDEN = 24
POINTWISE = {
    "plain": lambda x: x,
    "scaled": lambda x: x / 3.0,
    "softcapped": lambda x: 2.0 * torch.tanh(x / 2.0),
    "cast": lambda x: (x * 1.5).float(),
}


@contextlib.contextmanager
def chunks_of(tokens: int, vocab: int, world: int, itemsize: int = 4):
    before, chunked.CHUNK_BYTES = chunked.CHUNK_BYTES, tokens * -(-vocab // world) * itemsize
    yield
    chunked.CHUNK_BYTES = before


class Problem:
    """A head in one process and the same on vocabulary shards, with hidden states sharded over the sequence."""

    def __init__(self, vocab=131, dtype=torch.float32, length=7, bias=False, pointwise="plain", sequence_parallel=True):
        torch.manual_seed(0)
        world = torch.distributed.get_world_size()
        self.mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        self.head = nn.Linear(HIDDEN, vocab, bias=bias).to(dtype)
        self.hidden = (torch.randn(3, length, HIDDEN) * 3).to(dtype).requires_grad_()
        self.labels = torch.randint(0, vocab, (3, length))
        self.labels[0, : length // 2] = -100
        self.pointwise = POINTWISE[pointwise]

        self.sharded_head = nn.Linear(HIDDEN, vocab, bias=bias).to(dtype)
        self.sharded_head.load_state_dict(self.head.state_dict())
        style = LazyHead(TPSPConfig(tp_size=world, sequence_parallel=sequence_parallel))
        tp = TensorParallel(self.mesh)
        style.shard(self.sharded_head, tp)
        style.install(self.sharded_head, tp)
        placement = Shard(1) if sequence_parallel else Replicate()
        self.stream = distribute_tensor(self.hidden.detach(), self.mesh, [placement]).requires_grad_()

    def logits(self) -> torch.Tensor:
        return self.pointwise(self.head(self.hidden))

    def lazy(self) -> LazyLogits:
        logits = self.pointwise(self.sharded_head(self.stream))
        assert type(logits) is LazyLogits and logits._value is None
        return logits

    def errors(self) -> dict[str, float]:
        """Relative errors of the gradients; those that must not exist count as infinite."""
        pairs = {"hidden": (self.stream, self.hidden)}
        for (name, mine), theirs in zip(self.sharded_head.named_parameters(), self.head.parameters(), strict=True):
            pairs[name] = (mine, theirs)
        found = {}
        for name, (mine, theirs) in pairs.items():
            if mine.requires_grad:
                found[name] = parity.relative(mine.grad.full_tensor().double(), theirs.grad.double())
            else:
                found[name] = 0.0 if mine.grad is None else float("inf")
        return found


def reference(logits, labels, reduction="none", smoothing=0.0):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction, label_smoothing=smoothing)


def sweep(vocab, dtype, pointwise, chunk, sequence_parallel=True, frozen=()) -> dict[tuple, dict[str, float]]:
    results = {}
    for reduction, smoothing, bias in itertools.product(("none", "sum", "mean"), (0.0, 0.1), (False, True)):
        problem = Problem(vocab, dtype, bias=bias, pointwise=pointwise, sequence_parallel=sequence_parallel)
        for name in frozen:
            if name == "hidden":
                problem.stream.requires_grad_(False)
            else:
                problem.sharded_head.get_parameter(name).requires_grad_(False)
        expected = reference(problem.logits(), problem.labels, reduction, smoothing)
        upstream = torch.randn_like(expected) if reduction == "none" else torch.tensor(-2.7)
        expected.backward(upstream)
        with chunks_of(chunk, vocab, problem.mesh.size(), max(4, dtype.itemsize)):
            with CollectiveBytes() as sent:
                found = vocab_parallel_cross_entropy(
                    problem.lazy(), problem.labels, reduction=reduction, label_smoothing=smoothing
                )
            found.backward(upstream.view(found.shape))
        number, tokens = 3 if smoothing else 2, problem.labels.numel()
        gathered = sum(t.size for kind, t in sent.traffic.items() if kind == "all-gather")
        stream = problem.hidden.numel() // 7 * 8 * dtype.itemsize if sequence_parallel else 0  # 7 tokens, padded to 8
        assert gathered - stream == number * tokens * problem.mesh.size() * max(4, dtype.itemsize)
        results[reduction, smoothing, bias] = {
            "loss": parity.relative(found.detach().flatten(), expected.detach()), **problem.errors()
        }  # fmt: skip
    return results


def check(results, limit):
    for result in results:
        for case, errors in result.items():
            assert parity.largest(errors.values()) < limit, (case, errors)


@pytest.mark.parametrize("pointwise", POINTWISE)
@pytest.mark.parametrize(("world", "vocab"), [(2, 128), (2, 131), (4, 130)])
def test_fp64(ranks, world, vocab, pointwise):
    """Chunks of 4 of 21 tokens: five, and one of a single token."""
    dtype = torch.float32 if pointwise == "cast" else torch.float64
    check(ranks.run(world, sweep, vocab, dtype, pointwise, 4), 1e-6 if pointwise == "cast" else 1e-14)


@pytest.mark.parametrize("chunk", [1, 21, 100])
def test_fp32_and_chunk_sizes(ranks, chunk):
    check(ranks.run(2, sweep, 131, torch.float32, "plain", chunk), 1e-6)


def bf16_errors() -> list[tuple[dict, dict]]:
    """Errors of our gradients, and of autograd's in bf16, against fp64 from the same bf16 values."""
    results = []
    for reduction, chunk in itertools.product(("none", "sum"), (4, 21)):
        problem = Problem(dtype=torch.bfloat16, bias=True, length=65)
        upstream = torch.randn(problem.labels.numel()) if reduction == "none" else torch.tensor(-2.7)
        with chunks_of(chunk, 131, 2):
            found = vocab_parallel_cross_entropy(problem.lazy(), problem.labels, reduction=reduction)
            found.backward(upstream.view(found.shape))
        reference(problem.logits(), problem.labels, reduction).backward(upstream)
        theirs = {"hidden": problem.hidden.grad, **{n: p.grad for n, p in problem.head.named_parameters()}}
        problem.head, problem.hidden = problem.head.double(), problem.hidden.detach().double().requires_grad_()
        problem.head.zero_grad()
        reference(problem.logits(), problem.labels, reduction).backward(upstream.double())
        exact = {"hidden": problem.hidden.grad, **{n: p.grad for n, p in problem.head.named_parameters()}}
        results.append((problem.errors(), {n: parity.relative(g.double(), exact[n]) for n, g in theirs.items()}))
    return results


def test_bf16(ranks):
    """Nearly as close to the exact gradients as autograd without chunks. The terms of a sum over ranks or chunks are
    rounded to bf16 once, as every product is; the sum itself must not be rounded at each."""
    for mine, theirs in ranks.run(2, bf16_errors)[0]:
        for name, error in mine.items():
            assert error < 1.3 * theirs[name], (name, mine, theirs)


def test_without_sequence_parallel(ranks):
    check(ranks.run(2, sweep, 131, torch.float64, "softcapped", 4, sequence_parallel=False), 1e-14)


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",)])
def test_frozen(ranks, frozen):
    check(ranks.run(2, sweep, 131, torch.float64, "plain", 4, frozen=frozen), 1e-14)


def statistics() -> dict:
    problem = Problem(dtype=torch.float64)
    with torch.no_grad():  # two equal largest logits, one on each rank: the first counts
        for part in (problem.head.weight, problem.sharded_head.weight.to_local()):
            part[0] = 0.5
        problem.head.weight[100] = 0.5
        if problem.mesh.get_local_rank() == 1:
            problem.sharded_head.weight.to_local()[0] = problem.head.weight[66]
            problem.sharded_head.weight.to_local()[100 - 66] = 0.5
    problem.labels[2, :] = problem.logits()[2].argmax(-1)
    problem.labels[1, 0::2], problem.labels[1, 1::2] = 0, 100
    logits, valid = problem.logits(), problem.labels != -100
    log_probs = logits.log_softmax(-1)
    with chunks_of(4, 131, 2, 8), CollectiveBytes() as sent:
        found = vocab_parallel_statistics(problem.lazy(), problem.labels)
    found.nll.backward(upstream := torch.randn_like(found.nll))
    reference(logits, problem.labels).backward(upstream.flatten())
    return {
        "entropy": parity.relative(found.entropy, -(log_probs.exp() * log_probs).sum(-1)),
        "nll": parity.relative(found.nll, reference(logits, problem.labels).view(3, 7)),
        "mean logit": parity.relative(found.mean_logit, logits.mean(-1)),
        "is_top1": torch.equal(found.is_top1, (logits.argmax(-1) == problem.labels) & valid),
        "hits": int(found.is_top1.sum()),
        "gradients": problem.errors(),
        "bytes per token": (sent.traffic["all-gather"].size - 3 * 8 * HIDDEN * 8) / 21 / 2 / 8,
        "bitwise": found.nll.detach(),
    }


def test_statistics(ranks):
    first, second = ranks.run(2, statistics)
    assert (
        first["entropy"] < 1e-14
        and first["nll"] < 1e-14
        and first["mean logit"] < 1e-14
        and parity.largest(first["gradients"].values()) < 1e-14
    )
    assert first["is_top1"] and 7 <= first["hits"] < 18
    assert first["bytes per token"] == 5  # numbers: log-sum-exp, label's, sum of all, rival, mean under softmax
    assert torch.equal(first["bitwise"], second["bitwise"]), "all ranks hold the very same loss"


def reading() -> dict:
    """What makes lazy logits run the head, and what does not."""
    problem = Problem()
    lazy = problem.sharded_head(problem.stream)
    assert lazy.shape == (3, 7, 131) and lazy.dtype == torch.float32 and lazy.requires_grad and lazy.dim() == 3
    assert lazy.is_leaf in (True, False) and lazy._base is None and len(lazy) == 3 and "LazyLogits" in repr(lazy)
    halved = (lazy / 2).to(torch.float64)
    assert type(halved) is LazyLogits and halved.dtype == torch.float64 and lazy.to(lazy.device) is lazy
    assert lazy._value is None and halved._value is None
    called = []
    lazy.register_hook(lambda grad: called.append("before"))
    expected = problem.head(problem.hidden)
    errors = [
        parity.relative(halved.full_tensor(), (expected / 2).double()),
        parity.relative((lazy + 1).full_tensor(), expected + 1),
        parity.relative(torch.softmax(lazy.full_tensor(), -1), expected.softmax(-1)),
    ]
    assert type(lazy.detach()) is torch.Tensor and lazy.placements == (Shard(2),)
    scaled = problem.sharded_head(problem.stream)
    scaled *= 2.0
    errors.append(parity.relative(scaled.full_tensor(), expected * 2))
    lazy.full_tensor().sum().backward()
    (expected * 1).sum().backward()
    return {"errors": errors, "called": called, "gradients": problem.errors()}


def test_reading_runs_the_head(ranks):
    for result in ranks.run(2, reading):
        assert parity.largest(result["errors"]) < 1e-6 and parity.largest(result["gradients"].values()) < 1e-6
        assert result["called"] == ["before"]


def refusals() -> list[str]:
    problem = Problem()
    texts = []
    with pytest.raises(ValueError) as error:
        vocab_parallel_cross_entropy(problem.lazy(), problem.labels[:, 1:])
    texts.append(str(error.value))
    loss = vocab_parallel_cross_entropy(problem.lazy(), problem.labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    return [*texts, str(error.value)]


def test_refusals(ranks):
    shape, twice = ranks.run(2, refusals)[0]
    assert "(3, 6)" in shape and "(3, 7, 131)" in shape
    assert "first backward" in twice


def step_of_model(model_type, loss, length, after_forward=False) -> dict:
    model = models.build(model_type, vocab_size=2048, use_cache=False)
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2, loss=loss))
    model.train()
    ran = []
    materialize, LazyLogits.materialize = LazyLogits.materialize, lambda self: ran.append(1) or materialize(self)
    ids = torch.randint(0, 2048, (1, length))
    with chunks_of(16, 2048, 2):
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        found = measure_step(model, ids)
    LazyLogits.materialize = materialize
    return {"head ran": len(ran), **found}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])  # gemma2: softcap; granite: scale
def test_memory_is_flat(ranks, model_type):
    """Head and loss hold one chunk and what is of the hidden states' size, however long the sequence is."""
    peaks = {}
    for length in (64, 256):
        found = ranks.run(2, step_of_model, model_type, "chunked", length)[0]
        assert found["head ran"] == 0
        peaks[length] = found["loss_peak_bytes"]
    chunk, hidden = 16 * 1024 * 4, 32 * 4
    per_token = (peaks[256] - peaks[64]) / (256 - 64)
    assert per_token <= 3 * hidden  # gathered, its gradient, and the part of that which stays
    assert peaks[64] <= (6 if model_type == "gemma2" else 4) * chunk + 64 * 3 * hidden
    if model_type == "llama":
        torchs = ranks.run(2, step_of_model, model_type, "loss_parallel", 256)[0]["loss_peak_bytes"]
        assert torchs > 4 * 256 * 1024 * 4 and peaks[256] < 0.1 * torchs


def evaluation() -> dict:
    """Logits that are read after the forward, with FSDP, when the head's weight has been freed again."""
    original, model = models.build("gemma2").eval(), models.build("gemma2").eval()
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2, dp_shard_size=2))
    data = models.batch(4, 17)
    with torch.no_grad():
        expected, found = original(**data), model(**data)
        assert type(found.logits) is LazyLogits
        halved = (found.logits / 2).full_tensor()
        whole = found.logits.full_tensor()
        assert torch.equal(halved * 2, whole)
        assert torch.equal(found.logits[:, -1], whole[:, -1]) and type(found.logits[:, -1]) is torch.Tensor
    sharded = all(p.to_local().numel() <= p.numel() // 2 for p in model.parameters() if p.dim() == 2)
    return {"error": parity.relative(whole, expected.logits), "sharded": sharded}


def test_reading_after_the_forward(ranks):
    for result in ranks.run(4, evaluation):
        assert result["error"] < 1e-6 and result["sharded"]
