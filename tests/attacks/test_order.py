"""The order in which a script does things: what it looks at, and calls, before and between the steps of training."""

import functools

import models
import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import hf_tpsp
from attacks.pairs import BATCH, MESHES, gradient_error, pair, parallel, weighted
from hf_tpsp import TPSPConfig
from hf_tpsp.tools.verify.comparison import full, relative

# ---- 5: parameters between the steps -------------------------------------------------------------------------------


def looked_at(config: TPSPConfig, lora: bool, what: str) -> list[tuple[float, str]]:
    """A forward before the optimizer is made, and what a script may do next. Then two steps."""
    reference, model, batch = pair(config, lora=lora, tied=what == "tied")
    losses = {part: part(**b).loss for part, b in ((reference, BATCH), (model, batch))}
    if what == "raised":
        hook = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        hook.remove()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1, name
    assert isinstance(model.get_input_embeddings().weight, DTensor)
    assert model.get_input_embeddings().weight.device_mesh.ndim > 1
    if what == "state_dict":
        assert all(value.device_mesh.ndim > 1 for value in model.state_dict().values())
    if what == "accelerate":
        with hf_tpsp.enable(config):
            prepared = Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[1]
        optimizers = [torch.optim.SGD(reference.parameters(), lr=0.1), prepared]
    else:
        optimizers = [
            torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (reference, model)
        ]
    found = []
    if what in ("later", "twice"):  # the backward of the first forward
        for part, b in ((reference, BATCH), (model, batch)):
            loss = losses[part]
            if what == "twice":
                loss = loss + part(**b).loss
            part.zero_grad()
            loss.backward()
        found.append(gradient_error(reference, model))
    for _ in range(2):
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            part(**b).loss.backward()
            part(**b).loss  # noqa: B018 a look at the loss between backward and step
        found.append(gradient_error(reference, model))
        norms = [float(full(torch.nn.utils.clip_grad_norm_(p.parameters(), 1.0))) for p in (reference, model)]
        found.append((abs(norms[1] / norms[0] - 1), "norm"))
        for optimizer in optimizers:
            optimizer.step()
    for (name, expected), parameter in zip(reference.named_parameters(), model.parameters(), strict=True):
        found.append((relative(full(parameter.detach()), expected.detach()), f"weight {name}"))
    return found


@pytest.mark.parametrize(
    "mesh,lora,what",
    [
        ("1x2", False, "later"),
        ("2x2", False, "raised"),
        ("2x2", True, "later"),
        ("2x2", False, "twice"),
        ("2x2 kept", False, "state_dict"),
        ("2x2 loss_parallel", False, "tied"),
        ("hsdp", False, "accelerate"),
    ],
)
def test_forward_before_the_optimizer(ranks, mesh, lora, what):
    for found in ranks.run(MESHES[mesh].world_size, looked_at, MESHES[mesh], lora, what):
        for error, name in found:
            assert error < 1e-5, name


# ---- 6: parts of the model, called on their own ----------------------------------------------------------------------


def embedding_first(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    loss = model(inputs_embeds=embeds * 1.5, labels=batch["labels"]).loss
    return embeds, loss + embeds.square().mean()


def embedding_alone(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    return embeds, embeds.square().mean()


def decoder_first(model, batch):
    """The decoder, then a loss of one's own from the head, and the model itself in the same backward."""
    hidden = model.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())
    return hidden, loss + hidden.square().mean() + model(**batch).loss


def layer_by_layer(model, batch):
    base = model.get_decoder()
    hidden = model.get_input_embeddings()(batch["input_ids"])
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    tables = base.rotary_emb(hidden, positions)
    for layer in base.layers:
        hidden = layer(hidden, position_embeddings=tables, position_ids=positions)
    hidden = base.norm(hidden) + base.norm(hidden[:, 0]).unsqueeze(1)
    logits = model.lm_head(hidden)
    return hidden, F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def checkpointed(model, batch, use_reentrant=False):
    """The script's own checkpointing of what it calls."""
    run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    embeds = run(model.get_input_embeddings(), batch["input_ids"])
    embeds = embeds if embeds.requires_grad else model.get_input_embeddings()(batch["input_ids"])
    hidden = run(lambda x: model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state, embeds)
    layer, tables = model.get_decoder().layers[1], model.get_decoder().rotary_emb(hidden, torch.arange(17).unsqueeze(0))
    hidden = run(lambda x: layer(x, position_embeddings=tables), hidden)
    logits = run(lambda x: model.lm_head(x) * 1.0, hidden)
    return hidden, F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def direct_forward(model, batch):
    """`forward` and not the call: no hook runs."""
    out = model.forward(**batch)
    return out.loss, out.loss


def parts(config: TPSPConfig, tied: bool, lora: bool, calls: list) -> list[tuple[float, str]]:
    """Each of `calls` on one pair of models, the first of them before the model itself is."""
    found = []
    reference, model, batch = pair(config, tied=tied, lora=lora)
    inner = (reference.get_base_model(), model.get_base_model()) if lora else (reference, model)
    for call in calls:
        with torch.no_grad():
            call(inner[1], batch)
        (expected, loss), (value, own_loss) = (call(part, b) for part, b in zip(inner, (BATCH, batch), strict=True))
        for part, result in ((reference, loss), (model, own_loss)):
            part.zero_grad()
            result.backward()
        assert type(value) is torch.Tensor
        if value.dim():
            expected = parity.shard_batch({"x": expected}, parallel(model).mesh)["x"]
            found.append((relative(value.detach(), expected.detach()), f"{call.__name__}: value"))
        error, name = gradient_error(reference, model)
        found.append((error, f"{call.__name__}: {name}"))
        mean = own_loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        found.append((abs(mean.item() / loss.item() - 1), f"{call.__name__}: loss"))
    return found


@pytest.mark.parametrize(
    "mesh,tied,lora,calls",
    [
        ("1x2", True, False, [embedding_first, checkpointed]),
        ("2x2", False, False, [decoder_first, embedding_first, layer_by_layer, checkpointed, direct_forward]),
        ("2x2", True, False, [embedding_alone, decoder_first]),
        ("2x2", False, True, [layer_by_layer, embedding_first, decoder_first]),
        ("hsdp", False, False, [embedding_first, decoder_first]),
        ("2x2 no SP", False, False, [layer_by_layer, embedding_first]),
        ("2x2 loss_parallel", True, False, [layer_by_layer, decoder_first]),
    ],
)
def test_parts_on_their_own(ranks, mesh, tied, lora, calls):
    for found in ranks.run(MESHES[mesh].world_size, parts, MESHES[mesh], tied, lora, calls):
        for error, name in found:
            assert error < 1e-5, name


def inside_of_a_layer(config: TPSPConfig) -> list[str]:
    _, model, batch = pair(config)
    hidden, said = torch.randn(2, 17, 32), []
    for part in (model.model.layers[0].mlp, model.model.layers[1].self_attn.q_proj):
        with pytest.raises(ValueError) as error:
            part(hidden)
        said.append(str(error.value))
    model(**batch).loss.backward()
    return said


def test_inside_of_a_layer(ranks):
    for said in ranks.run(4, inside_of_a_layer, MESHES["2x2"]):
        assert all("is part of a decoder layer" in text and "Call the whole layer" in text for text in said)


def another_model_of_the_process() -> float:
    """openai-gpt's activation function is one object for all models: sharding one must leave the others as they are."""
    from hf_tpsp.tools.verify.verify import build

    reference, model = (build("openai-gpt", torch.float32, 131, {}).eval() for _ in range(2))
    ids = torch.arange(9).unsqueeze(0)
    expected = reference(ids).logits
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2))
    found = reference(ids).logits
    assert torch.equal(found, expected)
    return relative(model(ids).logits.full_tensor(), expected)


def test_another_model_of_the_process(ranks):
    assert all(error <= 1e-5 for error in ranks.run(2, another_model_of_the_process))


# ---- 7: backwards inside a backward ----------------------------------------------------------------------------------


def nested(config: TPSPConfig, lora: bool, what: str) -> list[tuple[float, str]]:
    reference, model, batch = pair(config, lora=lora)
    found = []
    for part in (reference, model):
        if lora:
            part.enable_input_require_grads()
        if what != "script":
            part.gradient_checkpointing_enable({"use_reentrant": True})
    both = ((reference, BATCH), (model, batch))
    if what == "raised":
        hook = model.get_decoder().layers[0].self_attn.o_proj.register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch).loss.backward()
        hook.remove()
        model.zero_grad()
    for part, b in both:
        if what == "script":
            for _ in range(2):
                embeds = part.get_input_embeddings()(b["input_ids"])
                embeds = embeds if embeds.requires_grad else embeds.requires_grad_()
                run = functools.partial(part, use_cache=False, labels=b["labels"])
                loss = torch.utils.checkpoint.checkpoint(
                    lambda x, run=run: run(inputs_embeds=x).loss, embeds, use_reentrant=True
                )
                (loss + part(**b).loss).backward()
        else:
            for step in range(3):
                if what == "no sync" and part is model:
                    parallel_model(model).set_requires_gradient_sync(step == 2)
                part(**b).loss.backward()
    found.append(gradient_error(reference, model))
    for part, b in both:
        part.zero_grad()
        part(**b).loss.backward()
    found.append(gradient_error(reference, model))
    return found


def parallel_model(model):
    return next(m for m in model.modules() if "_tpsp" in vars(m))


@pytest.mark.parametrize(
    "mesh,lora,what",
    [
        ("1x2", False, "accumulate"),
        ("2x2", True, "accumulate"),
        ("2x2", False, "no sync"),
        ("2x2", False, "raised"),
        ("2x2", True, "raised"),
        ("2x2", False, "script"),
    ],
)
def test_reentrant_checkpointing(ranks, mesh, lora, what):
    for found in ranks.run(MESHES[mesh].world_size, nested, MESHES[mesh], lora, what):
        for error, name in found:
            assert error < 1e-5, name


def autograd_grad(config: TPSPConfig, lora: bool) -> list[tuple[float, str]]:
    reference, model, batch = pair(config, lora=lora)
    found = []
    for _ in range(2):
        (expected,), (value,) = (
            torch.autograd.grad(part(inputs_embeds=(x := embeds.detach().requires_grad_()), labels=b["labels"]).loss, x)
            for part, b in ((reference, BATCH), (model, batch))
            for embeds in [part.get_input_embeddings()(b["input_ids"])]
        )
        expected = expected * config.dp_size  # the mean over fewer rows
        expected = parity.shard_batch({"x": expected}, parallel(model).mesh)["x"]
        found.append((relative(value, expected), "embeddings"))
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises((ValueError, RuntimeError), match=r"one rank's term|not have been used in the graph"):
            torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])
        for part, b in ((reference, BATCH), (model, batch)):
            part(**b).loss.backward()
        found.append(gradient_error(reference, model))
        for part in (reference, model):
            part.zero_grad()
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_autograd_grad(ranks, lora):
    for found in ranks.run(4, autograd_grad, MESHES["2x2"], lora):
        for error, name in found:
            assert error < 1e-5, name


# ---- 9: the model's own loss -----------------------------------------------------------------------------------------


def own_loss(config: TPSPConfig, what: str) -> list[tuple[float, str]]:
    reference, model = (models.build("qwen2").train() for _ in range(2))
    kwargs = {}
    for part in (reference, model):
        if part is model and what in ("after", "after a step"):
            hf_tpsp.parallelize(model, config)
            if what == "after a step":
                model(**BATCH).loss.backward()
                model.zero_grad()
        if what == "masked":
            part.loss_type = "ForMaskedLM"
        elif what == "kwargs":
            kwargs = {"label_smoothing": 0.2, "reduction": "sum", "ignore_index": 7}
        elif what == "partial":
            part.loss_function = functools.partial(ForCausalLMLoss, ignore_index=7)
        else:
            part.loss_function = weighted
            kwargs = {"scale": 3.0}
    if what not in ("after", "after a step"):
        hf_tpsp.parallelize(model, config)
    assert what != "masked" or reference.loss_function is LOSS_MAPPING["ForMaskedLM"]
    whole = BATCH
    if what in ("kwargs", "partial"):  # `ignore_index` is 7
        whole = {**BATCH, "labels": BATCH["labels"].where(BATCH["labels"] >= 0, 7)}
    batch = parity.shard_batch(whole, model._tpsp.mesh)
    losses = [part(**b, **kwargs).loss for part, b in ((reference, whole), (model, batch))]
    for loss in losses:
        loss.backward()
    mean = losses[1].detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return [gradient_error(reference, model), (abs(mean.item() / losses[0].item() - 1), "loss")]


@pytest.mark.parametrize(
    "mesh,what",
    [
        ("2x2", "before"),
        ("2x2", "after"),
        ("1x2", "after a step"),
        ("2x2", "masked"),
        ("1x2", "kwargs"),
        ("1x2", "partial"),
        ("2x2 loss_parallel", "masked"),
        ("2x2 loss_parallel", "after"),
    ],
)
def test_own_loss(ranks, mesh, what):
    for found in ranks.run(MESHES[mesh].world_size, own_loss, MESHES[mesh], what):
        for error, name in found:
            assert error < 1e-5, name
