"""What is written into logits before the loss acts, in the model's own forward and in the script after it."""

import models
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_tpsp
from hf_tpsp import TPSPConfig, vocab_parallel_cross_entropy
from hf_tpsp.integrations.trl import fused_forward
from hf_tpsp.loss.cross_entropy import vocab_parallel_statistics
from hf_tpsp.loss.logits import LazyLogits
from hf_tpsp.tools.verify.comparison import Errors, compare_gradients, full, relative, relative_number, shard_batch

LOSSES = ("chunked", "loss_parallel")
MIN, WORDS, FIRST = torch.finfo(torch.float32).min, 131, 97


def put(*key, value=MIN):
    def write(x):
        x[key] = value
        return x

    return write


def in_view(view, write=lambda v: v.fill_(-3.0)):
    def write_through(x):
        write(view(x))
        return x

    return write_through


def rows(x):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(x.shape[:2], generator=generator) > 0.5


def mul_and_bind(x):
    x *= 0.25
    x += 1.0
    return x


def before_and_after(x):
    scaled = x * 2.0
    x.mul_(0.25)
    return scaled + x


def seen_by_a_view(x):
    view = x[:, 1:]
    x.mul_(0.25)
    return torch.cat([x[:, :1] * 3.0, view], 1)


def without_gradient(x):
    with torch.no_grad():
        x.mul_(0.25)
        x[..., 5:9] = 1.0
    return x


def through_data(x):
    x.data.mul_(0.25)
    return x


def detached_view(x):
    x.detach()[..., 3:20].zero_()
    return x


def column_from_columns(x):
    x[..., 0] = x[..., 1:].mean(-1)
    return x


def then_scaled(x):
    x[rows(x)] = -1.0
    return (x / 2.0).float()


def alias(x):
    same = x.float()
    same[..., FIRST:] = MIN
    return x


# What can be noted down: no logits of all tokens are made for it.
NOTED = {
    "mul_": lambda x: x.mul_(0.25),
    "div_": lambda x: x.div_(3.0),
    "*= +=": mul_and_bind,
    "softcap": lambda x: x.div_(2.0).tanh_() * 2.0,
    "clamp_": lambda x: x.clamp_(-0.5, 0.5),
    "columns": put(..., slice(FIRST, None)),
    "columns of 3": put(slice(None), slice(None), slice(FIRST, None)),
    "column": put(..., 5),
    "list": put(..., [0, 7, 130, -2]),
    "words": put(slice(None), slice(None), torch.tensor([0, 7, 130])),
    "mask of words": put(..., torch.arange(WORDS) % 3 == 0, value=-4.0),
    "all words of a rank": put(..., slice(66, None), value=-torch.inf),
    "masked_fill_ words": lambda x: x.masked_fill_(torch.arange(WORDS) > FIRST, MIN),
    "masked_fill words": lambda x: x.masked_fill(torch.arange(WORDS) > FIRST, MIN),
    "index_fill_": lambda x: x.index_fill_(-1, torch.tensor([0, 130]), MIN),
    "twice": lambda x: put(..., slice(FIRST, None))(x.mul_(0.5)).mul_(0.5),
    "alias": alias,
}  # fmt: skip
WHOLE = {
    "tokens": put(slice(None), 3, value=0.5),
    "mask": lambda x: put(torch.sin(torch.arange(WORDS) + rows(x).float().unsqueeze(-1)) > 0.2, value=-1.0)(x),
    "rows": lambda x: put(rows(x), value=-1.0)(x),
    "masked_fill_": lambda x: x.masked_fill_(rows(x).unsqueeze(-1), -2.0),
    "bias": lambda x: x.add_(torch.linspace(-1, 1, WORDS)),
    "temperature of each token": lambda x: x.div_(1.0 + rows(x).float().unsqueeze(-1)),
    "in a view": in_view(lambda x: x[..., FIRST:]),
    "in a row": in_view(lambda x: x[0]),
    "in a narrowed view": in_view(lambda x: x.narrow(-1, 0, 70), lambda v: v.mul_(0.1)),
    "in a flat view": in_view(lambda x: x.view(-1, WORDS)[::2, 3:]),
    "scatter_": lambda x: x.scatter_(-1, rows(x).long().unsqueeze(-1), -2.0),
    "relu": lambda x: F.leaky_relu(x, 0.1, inplace=True),
    "columns mixed": column_from_columns,
    "seen by a view": seen_by_a_view,
    "detached": detached_view,
    "no_grad": without_gradient,
    "data": through_data,
    "then scaled": then_scaled,
    "noted, then whole": lambda x: put(rows(x), value=-1.0)(x.mul_(0.25)).mul_(2.0),
    "before and after": before_and_after,
}  # fmt: skip


class Writing(Qwen2ForCausalLM):
    """A model whose own forward writes into its logits."""

    write = staticmethod(lambda x: x)

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.write(self.lm_head(self.model(input_ids, use_cache=False).last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def built() -> Writing:
    model = Writing(models.config("qwen2", num_hidden_layers=1))
    model.load_state_dict(models.build("qwen2", num_hidden_layers=1).state_dict())
    return model.train()


def loss_of(logits, labels):
    """A script's own: on shards if that can be."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    if isinstance(logits, LazyLogits):
        return vocab_parallel_cross_entropy(logits, labels, reduction="sum")
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def errors_of_writes(config: TPSPConfig, names: list[str]) -> dict[str, Errors]:
    reference, model = built(), hf_tpsp.parallelize(built(), config)
    mesh, found = model._tpsp.mesh, {}
    batch = models.batch(2 * config.dp_size, 9)
    is_masked = (batch["labels"] < 20) | (batch["labels"] >= 66)  # as the label of some write is
    batch["labels"] = batch["labels"].masked_fill(is_masked, -100)
    mine = shard_batch(batch, mesh)
    items = (batch["labels"][:, 1:] != -100).sum()
    for name in names:
        write = {**NOTED, **WHOLE}[name]
        per_row = [{n: x[i * 2 : i * 2 + 2] for n, x in batch.items()} for i in range(config.dp_size)]
        for where in ("script", "forward", *(["script's own loss"] if name in ("*= +=", "columns", "rows") else [])):
            errors, losses, outputs = found.setdefault(f"{name}, {where}", Errors()), [], []
            Writing.write = staticmethod(write if where == "forward" else lambda x: x)
            for part, batches in ((reference, per_row), (model, [mine])):
                part.zero_grad()
                total = 0.0
                for b in batches:
                    if where == "forward":
                        out = part(**b, num_items_in_batch=items)
                        loss, logits = out.loss, out.logits
                    else:
                        logits = part(input_ids=b["input_ids"]).logits
                        returned = write(logits)
                        if where == "script's own loss":
                            x = returned[:, :-1].flatten(0, 1).float()
                            loss = F.cross_entropy(x, b["labels"][:, 1:].flatten(), reduction="sum") / items
                        else:
                            loss = loss_of(returned, b["labels"]) / items
                    (loss * config.dp_size if part is model else loss).backward()
                    total += loss.item()
                    outputs.append(full(logits.detach()).nan_to_num(neginf=-9.0))
                losses.append(total)
            compare_gradients(reference, model, errors, rounding=True)
            row = mesh["dp_shard"].get_local_rank()
            errors.add("norm", relative(outputs[-1], outputs[row]))  # of the same object, as it is now
            total = torch.tensor(losses[1], dtype=torch.float64)
            torch.distributed.all_reduce(total)
            errors.add("loss", relative_number(total.item() / config.tp_size, losses[0]))
    Writing.write = staticmethod(lambda x: x)
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("names", "config"),
    [
        (list(NOTED), {}),
        (list(WHOLE), {}),
        (["*= +=", "columns", "rows"], {"dp_shard_size": 2}),
        (["*= +=", "columns", "columns mixed", "data"], {"sequence_parallel": False}),
    ],
    ids=["noted", "whole", "2x2", "without SP"],
)
def test_writes(ranks, names, config, loss):
    config = TPSPConfig(tp_size=2, loss=loss, **config)
    for found in ranks.run(config.world_size, errors_of_writes, config, names):
        bad = {name: errors for name, errors in found.items() if not errors.within(1e-5)}
        assert not bad, bad


def what_is_noted() -> dict[str, int]:
    """How often each write that can be noted down makes the logits of all tokens, and whether it gives the same object."""
    model, runs = hf_tpsp.parallelize(built(), TPSPConfig(tp_size=2)), {}
    batch = models.batch(2, 9)
    materialize = LazyLogits.materialize
    for name, write in NOTED.items():
        runs[name] = 0

        def count(self, name=name):
            runs[name] += 1
            return materialize(self)

        LazyLogits.materialize = count
        logits = model(input_ids=batch["input_ids"]).logits
        written = write(logits)
        assert isinstance(written, LazyLogits) and (written is logits or name in ("softcap", "masked_fill words"))
        vocab_parallel_cross_entropy(written, batch["labels"]).backward()
        LazyLogits.materialize = materialize
    return runs


def test_what_is_noted_keeps_the_loss_chunked(ranks):
    for runs in ranks.run(2, what_is_noted):
        assert not any(runs.values()), runs


def half_masked(x):
    x[..., :66] = -torch.inf  # the first rank's
    x[..., 130] = -torch.inf
    return x


def statistics_after() -> dict[str, list[float]]:
    """Errors of what TRL's head reads, and of its loss's gradient."""
    reference, model, found = built(), hf_tpsp.parallelize(built(), TPSPConfig(tp_size=2)), {}
    batch = models.batch(2, 9)
    labels = batch["labels"].masked_fill((batch["labels"] < 66) | (batch["labels"] == 130), -100)
    for name, write in {"half masked": half_masked, "masked_fill_": WHOLE["masked_fill_"]}.items():
        reference.zero_grad()
        model.zero_grad()
        x = write(reference(input_ids=batch["input_ids"]).logits)
        mine = vocab_parallel_statistics(write(model(input_ids=batch["input_ids"]).logits), labels)
        nll = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(2, 9)
        nll.sum().backward()
        mine.nll.sum().backward()
        assert torch.equal(mine.is_top1, x.argmax(-1) == labels)
        errors = Errors()
        compare_gradients(reference, model, errors, rounding=True)
        entropy = torch.special.entr(x.softmax(-1)).sum(-1)
        found[name] = [
            errors.gradient,
            *(relative(a.detach(), b.detach()) for a, b in ((mine.nll, nll), (mine.entropy, entropy))),
        ]
    return found


def test_statistics(ranks):
    for found in ranks.run(2, statistics_after):
        assert all(error <= 1e-5 for errors in found.values() for error in errors), found


class Own(torch.autograd.Function):
    """A loss that knows nothing of tensors like these."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.ones_like(ctx.saved_tensors[0])


def beside(loss: str) -> dict[str, float]:
    """What looks at the logits, or at their gradient, in other ways."""
    reference, model = built(), hf_tpsp.parallelize(built(), TPSPConfig(tp_size=2, loss=loss))
    batch = models.batch(2, 9)
    ids, labels, errors = batch["input_ids"], batch["labels"], Errors()
    with pytest.raises(RuntimeError, match=r"logits\.full_tensor\(\)"):
        Own.apply(model(input_ids=ids).logits).backward()
    model.zero_grad()
    with pytest.raises(ValueError, match="changed the shape"):
        model(input_ids=ids).logits.transpose_(0, 1)
    # Looked at without gradients first, as a metric does; their gradient kept, and changed by a hook.
    hooked = []
    for part in (reference, model):
        logits = part(input_ids=ids).logits
        with torch.no_grad():
            logits.argmax(-1)
        logits.retain_grad()
        logits.register_hook(lambda grad: grad * 2.0)
        loss_of(logits, labels).backward()
        hooked.append(logits.grad)
    compare_gradients(reference, model, errors, rounding=True)
    found = {"gradients": errors.gradient, "kept gradient": relative(hooked[1], hooked[0])}
    for mode in (torch.no_grad, torch.inference_mode):  # evaluation
        with mode():
            expected, mine = (part(input_ids=ids, labels=labels).logits for part in (reference, model))
            for logits in (expected, mine):
                logits[..., FIRST:] = -4.0
                logits[:, 2].zero_()
                torch.mul(logits, 0.5, out=logits)
            found[f"{mode.__name__}: loss"] = relative(loss_of(mine, labels), loss_of(expected, labels))
            found[f"{mode.__name__}: logits"] = relative(full(mine), expected)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_beside(ranks, loss):
    for found in ranks.run(2, beside, loss):
        assert all(error <= 1e-5 for error in found.values()), found


def fused_on_plain_logits() -> Errors:
    """TRL's head over a model whose own code makes plain logits of the lazy ones."""
    reference, model = built(), hf_tpsp.parallelize(built(), TPSPConfig(tp_size=2))
    batch, bias = models.batch(2, 9), torch.linspace(-1, 1, 131)
    errors = Errors()
    logits = reference(input_ids=batch["input_ids"]).logits + bias
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 8
    expected.backward()
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits + bias
        return output

    model.forward = fused_forward(forward)
    found = model(input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=8, fused_lm_head=True).loss
    found.backward()
    errors.add("loss", relative_number(found.item(), expected.item()))
    compare_gradients(reference, model, errors, rounding=True)
    return errors


def test_fused_head_on_plain_logits(ranks):
    for errors in ranks.run(2, fused_on_plain_logits):
        assert errors.within(1e-5), errors
