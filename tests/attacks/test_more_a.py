"""What a script does with tensors of the model: a term of the loss that is a DTensor; hooks and `retain_grad` on what it returns."""

import parity
import pytest
import torch
import torch.nn.functional as F

from attacks.pairs import BATCH, gradient_error, pair, weighted
from hf_tpsp import TPSPConfig, vocab_parallel_cross_entropy
from hf_tpsp.loss.cross_entropy import vocab_parallel_statistics
from hf_tpsp.loss.logits import LazyLogits
from hf_tpsp.tools.verify.comparison import full, relative

# ---- A: a term of the loss that a hook on a layer has kept, which is a DTensor ------------------------------------------


def per_token(logits, labels):
    if isinstance(logits, LazyLogits):
        return vocab_parallel_cross_entropy(logits, labels, reduction="none")
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def models_own(part, batch, term):
    return part(**batch).loss + term()


def models_own_times(part, batch, term):
    return part(**batch, return_dict=False)[0] * (1 + term())


def scripts_mean(part, batch, term):
    logits, labels = part(input_ids=batch["input_ids"]).logits, batch["labels"]
    compute = vocab_parallel_cross_entropy if isinstance(logits, LazyLogits) else lambda x, y: F.cross_entropy(x.mT, y)
    return compute(logits, labels) + term()


def scripts_per_token(part, batch, term):
    return per_token(part(input_ids=batch["input_ids"]).logits, batch["labels"]).mean() + term()


def scripts_statistics(part, batch, term):
    logits = part(input_ids=batch["input_ids"]).logits
    is_ours = isinstance(logits, LazyLogits)
    nll = vocab_parallel_statistics(logits, batch["labels"]).nll if is_ours else per_token(logits, batch["labels"])
    return nll.mean() + term()


def scripts_function(part, batch, term):
    part.loss_function = weighted
    return part(**batch).loss + term()


TERMS = (models_own, models_own_times, scripts_mean, scripts_per_token, scripts_statistics, scripts_function)


def with_a_kept_term(config: TPSPConfig) -> list[tuple[float, str]]:
    found = []
    for compute in TERMS:
        reference, model, batch = pair(config)
        losses = []
        for part, b in ((reference, BATCH), (model, batch)):
            kept = []
            part.model.layers[0].register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
            losses.append(compute(part, b, lambda kept=kept: 0.1 * kept[0].square().mean()))
            losses[-1].backward()
        found.append((relative(full(losses[1].detach()), losses[0].detach()), f"{compute.__name__}: loss"))
        error, name = gradient_error(reference, model)
        found.append((error, f"{compute.__name__}: {name}"))
    return found


@pytest.mark.parametrize("loss", ["chunked", "loss_parallel"])
def test_a_term_that_is_a_dtensor(ranks, loss):
    for found in ranks.run(2, with_a_kept_term, TPSPConfig(tp_size=2, loss=loss)):
        assert len(found) == 2 * len(TERMS)
        for error, name in found:
            assert error < 1e-5, name


# ---- B: the gradient of logits of which a loss is already there ----------------------------------------------------------


def keep_gradient(x):
    x.retain_grad()


def hook_gradient(x):
    x.register_hook(lambda grad: None)


def too_late(config: TPSPConfig) -> list[tuple[float, str]]:
    """What asks too late is refused; what asks in time has the whole gradient."""
    reference, model, batch = pair(config)
    found = []
    for ask in (keep_gradient, hook_gradient):
        refused = [model(**batch).logits]
        logits = model(input_ids=batch["input_ids"]).logits
        vocab_parallel_cross_entropy(logits, batch["labels"])
        refused += [logits, logits * 2.0]
        if config.loss == "chunked":
            refused.append(model(input_ids=batch["input_ids"]).logits)
            vocab_parallel_statistics(refused[-1], batch["labels"])
        for x in refused:
            with pytest.raises(RuntimeError, match="computed from these logits"):
                ask(x)
    for case in ("first", "after a metric", "after statistics of whole logits"):
        grads = []
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            logits = part(input_ids=b["input_ids"]).logits
            if case == "after a metric":
                with torch.no_grad():
                    per_token(logits, b["labels"])
            if case == "after statistics of whole logits" and part is model and config.loss == "loss_parallel":
                loss = vocab_parallel_statistics(logits, b["labels"]).nll.mean()
                logits.retain_grad()
            else:
                logits.retain_grad()
                loss = per_token(logits, b["labels"]).mean()
            loss.backward()
            grads.append(logits.grad)
        found.append((relative(grads[1], grads[0]), f"{case}: logits"))
        found.append(gradient_error(reference, model))
    return found


@pytest.mark.parametrize("loss", ["chunked", "loss_parallel"])
def test_the_gradient_of_logits(ranks, loss):
    for found in ranks.run(2, too_late, TPSPConfig(tp_size=2, loss=loss)):
        for error, name in found:
            assert error < 1e-5, name


# ---- C: hooks and retain_grad on hidden states and attentions ------------------------------------------------------------


def watched(config: TPSPConfig, model_type: str) -> list[tuple[float, str]]:
    """Hidden states and attentions whose gradient is kept, and changed by a hook; with and without a loss on them."""
    reference, model, batch = pair(config, model_type=model_type)
    found = []
    for own in (False, True):
        kept, rows = [], []
        for part, b in ((reference, BATCH), (model, batch)):
            part.zero_grad()
            out = part(**b, output_hidden_states=True, output_attentions=True)
            seen, tensors = [], [*out.hidden_states, *out.attentions]
            for x in tensors:
                x.retain_grad()
                x.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
            out.hidden_states[1].register_hook(lambda grad: grad * 2.0)
            out.attentions[1].register_hook(lambda grad: grad * torch.arange(1.0, 1 + grad.shape[1]).view(-1, 1, 1))
            removed = out.hidden_states[0].register_hook(lambda grad: grad * 0)
            removed.remove()
            loss = out.loss
            if own:
                loss = loss + sum(x.square().mean() for x in tensors[:2]) + out.attentions[0][..., 1:3].square().mean()
            loss.backward()
            kept.append([x.grad for x in tensors])
            rows.append(seen)
        assert len(rows[0]) == len(rows[1]) == len(kept[0])
        for expected, value in zip(kept[0] + rows[0], kept[1] + rows[1], strict=True):
            assert type(value) is torch.Tensor and expected is not None
            expected = parity.shard_batch({"x": expected * config.dp_size}, model._tpsp.mesh)["x"]
            found.append((relative(value, expected), f"gradient of an output, {own=}"))
        found.append(gradient_error(reference, model))
        out.hidden_states[1].grad = None
        assert out.hidden_states[1].grad is None
        leaf = out.hidden_states[1].detach().requires_grad_()
        leaf.square().sum().backward()
        assert torch.equal(leaf.grad, 2 * out.hidden_states[1].detach())
        leaf.grad = None
        assert leaf.grad is None
    return found


@pytest.mark.parametrize(
    "config,model_type",
    [
        (TPSPConfig(tp_size=2, dp_shard_size=2), "qwen3"),
        (TPSPConfig(tp_size=2, sequence_parallel=False), "llama"),
    ],
    ids=["2x2", "no SP"],
)
def test_the_gradient_of_what_a_model_returns(ranks, config, model_type):
    for found in ranks.run(config.world_size, watched, config, model_type):
        for error, name in found:
            assert error < 1e-5, name
