"""What a script does with the parameters: penalties on them, hooks, casts, freezing, whole state dicts, copies."""

import copy

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import hf_tpsp
from attacks.pairs import BATCH, MESHES, gradient_error, pair
from attacks.test_logits import built
from hf_tpsp import TPSPConfig, vocab_parallel_cross_entropy
from hf_tpsp.loss.logits import LazyLogits
from hf_tpsp.tools.verify.comparison import Errors, compare_gradients, full, relative

# ---- D: what a script computes from the parameters, and hooks on them ----------------------------------------------------


def squares(part) -> torch.Tensor:
    return sum(p.square().sum() for p in part.parameters() if p.requires_grad)


def first_the_penalty(part, batch):
    return 0.01 * squares(part) + part(**batch).loss


def last_the_penalty(part, batch):
    loss = part(**batch).loss
    return loss + 0.01 * squares(part)


def the_penalty_by_itself(part, batch):
    (0.01 * squares(part)).backward()
    loss = part(**batch).loss
    loss.backward(retain_graph=False)
    return 0.02 * squares(part)


def penalized(config: TPSPConfig, lora: bool) -> list[tuple[float, str]]:
    """Penalties on the weights, accumulated over two backwards."""
    reference, model, batch = pair(config, lora=lora)
    found = []
    for compute in (first_the_penalty, last_the_penalty, the_penalty_by_itself):
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            for _ in range(2):
                compute(part, b).backward()
        error, name = gradient_error(reference, model)
        found.append((error, f"{compute.__name__}: {name}"))
    return found


def hooked(config: TPSPConfig, lora: bool) -> list[tuple[float, str]]:
    """The gradient that hooks on the parameters see, in two backwards that accumulate; and an optimizer in such hooks."""
    reference, model, batch = pair(config, lora=lora)
    found, seen = [], ({}, {})
    for part, b, values in ((reference, BATCH, seen[0]), (model, batch, seen[1])):
        handles = [
            p.register_post_accumulate_grad_hook(
                lambda p, name=name, values=values: values.setdefault(name, []).append(full(p.grad).clone())
            )
            for name, p in part.named_parameters()
            if p.requires_grad
        ]
        for _ in range(2):
            part(**b).loss.backward()
        for handle in handles:
            handle.remove()
    assert seen[0].keys() == seen[1].keys()
    for name, expected in seen[0].items():
        assert len(expected) == len(seen[1][name]) == 2, name
        found += [(relative(b, a), f"hook on {name}") for a, b in zip(expected, seen[1][name], strict=True)]

    def step(p):
        with torch.no_grad():
            p.add_(p.grad, alpha=-0.1)
        p.grad = None

    for part, b in ((reference, BATCH), (model, batch)):
        part.zero_grad()
        handles = [p.register_post_accumulate_grad_hook(step) for p in part.parameters() if p.requires_grad]
        for _ in range(2):
            part(**b).loss.backward()
        assert all(p.grad is None for p in part.parameters())
        for handle in handles:
            handle.remove()
        part(**b).loss.backward()
    found.append(gradient_error(reference, model))
    trained = [
        p for p in model.parameters() if p.requires_grad
    ]  # a backward that raises leaves the modules with others
    for parameter in trained[:3]:
        handle = parameter.register_hook(lambda grad: grad * 2)
        with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
            model(**batch).loss.backward()
        handle.remove()
    for parameters, part, b in ((reference.parameters(), reference, BATCH), (trained, model, batch)):
        for parameter in parameters:
            parameter.grad = None
        part(**b).loss.backward()
    found.append(gradient_error(reference, model))
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("what", [penalized, hooked])
def test_penalties_and_hooks(ranks, what, lora):
    for found in ranks.run(4, what, MESHES["2x2"], lora):
        for error, name in found:
            assert error < 1e-5, name


# ---- E: a whole parameter ------------------------------------------------------------------------------------------------


def whole_parameters(config: TPSPConfig, lora: bool) -> list[tuple[float, str]]:
    """What is computed from whole parameters and the batch, which is another one on each data-parallel rank."""
    reference, model, batch = pair(config, lora=lora)
    found = []
    for _ in range(2):
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            weights = [full(p) for p in part.parameters() if p.requires_grad]
            scale = b["input_ids"].float().mean() / 131
            loss = scale * sum(w.sin().sum() for w in weights) + part(**b).loss
            loss.backward()
        found.append(gradient_error(reference, model))
    return found


def whole_tensors_of_others() -> list[tuple[float, str]]:
    """A DTensor that is not ours, and has a mesh of the same shape and names, is as torch has it."""
    # Not by `init_device_mesh`, of which the pool of ranks keeps the meshes.
    mesh = DeviceMesh("cpu", torch.arange(4).view(1, 2, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    before = DTensor.full_tensor
    hf_tpsp.parallelize(models.build("qwen2", num_hidden_layers=1), MESHES["2x2"])
    hf_tpsp.parallelize(models.build("qwen2", num_hidden_layers=1), MESHES["2x2"])
    x = torch.arange(24.0).view(8, 3)
    mine = nn.Parameter(distribute_tensor(x, mesh["dp_shard", "tp"], [Shard(0), Shard(0)]))
    weight = torch.full_like(x, 1.0 + dist.get_rank())
    (mine.full_tensor() * weight).sum().backward()
    assert torch.equal(mine.grad._local_tensor, torch.full_like(mine.grad._local_tensor, 1.0 + dist.get_rank()))
    assert DTensor.full_tensor.__wrapped__ is getattr(before, "__wrapped__", before)
    return [(relative(mine.detach().full_tensor(), x), "value")]


@pytest.mark.parametrize("mesh,lora", [("2x2", False), ("2x2", True), ("hsdp", False)])
def test_whole_parameters(ranks, mesh, lora):
    for found in ranks.run(4, whole_parameters, MESHES[mesh], lora):
        for error, name in found:
            assert error < 1e-5, name


def test_whole_tensors_of_others(ranks):
    for found in ranks.run(4, whole_tensors_of_others):
        assert all(error == 0 for error, _ in found)


# ---- F: dtypes and freezing between forwards -----------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def changed_between(config: TPSPConfig, what: str) -> list[tuple[float, str]]:
    """Gradients of a model that is changed after a first step, and of one that is changed before it."""
    found = []
    for first in ("forward", "step", "evaluation"):
        results, outputs = [], []
        for late in (False, True):
            _, model, batch = pair(config)
            if late:
                with torch.set_grad_enabled(first != "evaluation"):
                    loss = model(**batch).loss
                if first == "step":
                    loss.backward()
                    model.zero_grad()
            if what == "mixed precision":
                with hf_tpsp.enable(config):
                    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
            else:
                model.to(torch.bfloat16)
            hook = model.model.layers[1].mlp.register_forward_hook(
                lambda m, i, out, outputs=outputs: outputs.append(out.dtype)
            )
            model(**batch).loss.backward()
            hook.remove()
            results.append(gradients(model))
        assert outputs == [torch.bfloat16] * 2, outputs
        dtype = torch.float32 if what == "mixed precision" else torch.bfloat16
        for name, value in results[0].items():
            assert value.dtype == results[1][name].dtype == dtype
            found.append((float(not torch.equal(value, results[1][name])), f"{first}: {name}"))
    return found


def unfrozen(config: TPSPConfig, _) -> list[tuple[float, str]]:
    """A head that is trained first, the rest from the third step on; a backward of a graph of before comes last."""
    reference, model, batch = pair(config)
    found = []
    for part in (reference, model):
        part.requires_grad_(False)
        part.lm_head.requires_grad_(True)
    for step in range(4):
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            if step == 2:
                part.requires_grad_(True)
            part(**b).loss.backward()
        found.append(gradient_error(reference, model))
    return found


@pytest.mark.parametrize(
    "case,what",
    [(changed_between, "mixed precision"), (changed_between, "cast"), (unfrozen, "")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_changes_between_forwards(ranks, case, what):
    for found in ranks.run(4, case, MESHES["2x2"], what):
        for error, name in found:
            assert error < 1e-5, name


# ---- G: whole state dicts, and copies ------------------------------------------------------------------------------------


def loaded(config: TPSPConfig, tied: bool) -> list[tuple[float, str]]:
    """The whole weights of another model, loaded after a first forward; of which one has another shape."""
    reference, model, batch = pair(config, tied=tied, model_type="phi3")
    model(**batch)
    other = models.build("phi3", tied=tied, seed=5)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    assert not any(model.load_state_dict(state))
    assert all(not isinstance(value, DTensor) for value in state.values())  # the script's own dictionary is as it was
    reference.load_state_dict(state)
    found = [
        (relative(full(p.detach()), q.detach()), f"weight {name}")
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
    ]
    for part, b in ((reference, BATCH), (model, batch)):
        part(**b).loss.backward()
    found.append(gradient_error(reference, model))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "model.norm.weight": torch.ones(7)})
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_whole_state_dicts(ranks, tied):
    for found in ranks.run(4, loaded, MESHES["2x2"], tied):
        for error, name in found:
            assert error < 1e-5, name


def copied(config: TPSPConfig, lora: bool) -> list[str]:
    _, model, batch = pair(config, lora=lora)
    base = parallel_model(model)
    said = []
    for part in (model, base, base.model, base.lm_head, base.model.layers, base.model.layers[0].mlp.down_proj):
        with pytest.raises(ValueError) as error:
            copy.deepcopy(part)
        said.append(str(error.value))
    with pytest.raises(ValueError):
        torch.optim.swa_utils.AveragedModel(model)
    copy.deepcopy(model.config)
    model(**batch).loss.backward()
    return said


def parallel_model(model):
    return next(m for m in model.modules() if "_tpsp" in vars(m))


@pytest.mark.parametrize("lora", [False, True])
def test_copies(ranks, lora):
    for said in ranks.run(2, copied, MESHES["1x2"], lora):
        assert all("cannot copy a sharded model" in text for text in said)


# ---- H: logits that the model's own code has made plain ------------------------------------------------------------------


def on_plain_logits(config: TPSPConfig) -> Errors:
    reference, model = built(), hf_tpsp.parallelize(built(), config)
    bias, labels, errors = torch.linspace(-1, 1, 131), BATCH["labels"], Errors()
    for options in (
        {"reduction": "mean"},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "none", "ignore_index": 7},
    ):
        own = labels.where(labels >= 0, 7) if "ignore_index" in options else labels
        losses = []
        for part in (reference, model):
            part.zero_grad()
            x = part(input_ids=BATCH["input_ids"]).logits + bias
            assert not isinstance(x, LazyLogits)
            if part is reference:
                loss = F.cross_entropy(x.flatten(0, 1), own.flatten(), **options)
            else:
                loss = vocab_parallel_cross_entropy(x, own, **options)
                assert loss.shape == (own.shape if options["reduction"] == "none" else ())
            (loss.flatten() * torch.arange(1.0, 1 + loss.numel())).sum().backward()
            losses.append(loss.detach().flatten())
        errors.add("loss", relative(losses[1], losses[0]))
        compare_gradients(reference, model, errors, rounding=True)
    x = torch.zeros(2, 3, 5, dtype=torch.bfloat16)
    assert vocab_parallel_cross_entropy(x, torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float32
    with pytest.raises(ValueError, match="do not match"):
        vocab_parallel_cross_entropy(x, torch.zeros(2, 2, dtype=torch.long))
    return errors


def test_plain_logits(ranks):
    for errors in ranks.run(2, on_plain_logits, TPSPConfig(tp_size=2)):
        assert errors.within(1e-5), errors
