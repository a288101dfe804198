"""Blocks that write into their input; layers that are skipped or called by themselves; what a small copy cannot prove."""

import contextlib
import types

import models
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.plan.shrink import randomize
from hf_tpsp.tools.verify.comparison import full, larger, relative, shard_batch

SMALL = {
    "mixtral": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 131, "router_jitter_noise": 0.1},
    "phimoe": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 131, "input_jitter_noise": 0.1,
               "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4, "vocab_size": 131, "layerdrop": 0.5,
             "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 131,
            "layerdrop": 0.5, "dropout": 0.0, "word_embed_proj_dim": 32},
}  # fmt: skip


def build(model_type: str):
    import transformers

    if model_type not in SMALL:
        return models.build(model_type)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SMALL[model_type])
    config._attn_implementation = config._experts_implementation = "eager"
    return randomize(transformers.AutoModelForCausalLM.from_config(config))


@contextlib.contextmanager
def fixed_noise():
    """Jitter that depends on its shape alone: the whole sequence's, on every rank as in one process."""
    original = torch.Tensor.uniform_

    def uniform_(self, low=0.0, high=1.0, **kwargs):
        return self.copy_(low + (high - low) * torch.linspace(0, 7, self.numel()).cos().abs().view(self.shape))

    torch.Tensor.uniform_ = uniform_
    try:
        yield
    finally:
        torch.Tensor.uniform_ = original


def errors_of(reference, model, config, seed=None, around=contextlib.nullcontext, rows=2, length=13):
    """Largest relative error of the loss and of every gradient."""
    mesh, batch = model._tpsp.mesh, models.batch(rows * config.dp_size, length)
    items = (batch["labels"][:, 1:] != -100).sum()
    losses = []
    # One process takes the data-parallel ranks' rows one after the other: noise is that of their shape.
    parts = [{n: v.chunk(config.dp_size)[i] for n, v in batch.items()} for i in range(config.dp_size)]
    for part, data in ((reference, parts), (model, [shard_batch(batch, mesh)])):
        part.train()
        total = torch.zeros(())
        for rows_of in data:
            torch.manual_seed(seed or 0)
            with around():
                loss = part(**rows_of, num_items_in_batch=items).loss
                (loss * (config.dp_size if part is model else 1)).backward()
            total += loss.detach()
        losses.append(total)
    torch.distributed.all_reduce(losses[1])
    worst = {"loss": relative(losses[1] / config.tp_size, losses[0]), "grad": 0.0}
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        expected = q[1].grad
        if expected is None or not expected.norm() > 1e-6:
            assert p.grad is None or full(p.grad).norm() <= 1e-5, name
            continue
        error = relative(full(p.grad), expected)
        if larger(worst["grad"], error) is not worst["grad"]:
            worst["grad"], worst["parameter"] = error, name
    return worst


def check(results, limit=1e-5):
    for found in results:
        assert found["loss"] <= limit and found["grad"] <= limit, found


# ---- blocks that write into their input --------------------------------------------------------------------------


def jitter(model_type, config, rows=2):
    reference, model = build(model_type), build(model_type)
    hf_tpsp.parallelize(model, config)
    return errors_of(reference, model, config, around=fixed_noise, rows=rows)


CASES = [{}, {"dp_shard_size": 2}, {"sequence_parallel": False}, {"activation_checkpointing": "full"},
         {"activation_checkpointing": "selective"}]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jitter(ranks, case):
    config = TPSPConfig(tp_size=2, check="off", **case)
    check(ranks.run(config.world_size, jitter, "mixtral", config))
    check(ranks.run(config.world_size, jitter, "phimoe", config, rows=1))


def writes_first(self, x, inner):
    if self.training:
        x.view(-1, x.shape[-1]).mul_(1.1)
        x += 0.01
    return inner(x)


def computes_first(self, x, inner):
    kept = x * 1.0
    y = inner(x.clone())
    x.mul_(kept)
    return y + inner(x.clone())


def made_up(kind, where, config, rows=2):
    """`mlp`: of what the norm returned. `stream`: into the residual, which the layer adds afterwards."""
    reference, model = build("llama"), build("llama")
    hf_tpsp.parallelize(model, config)
    for part in (reference, model):
        for layer in part.model.layers:
            if where == "stream":
                layer.post_attention_layernorm.forward = lambda x: x
            inner = layer.mlp
            cls_forward = type(inner).forward
            original = types.MethodType(cls_forward, inner)
            block = types.MethodType(lambda self, x, o=original: kind(self, x, o), inner)
            if part is reference:
                inner.forward = block
            else:
                rewire(inner, block)
    return errors_of(reference, model, config, rows=rows)


def rewire(module, block):
    """The wrapped forward, around another block: as if the class had been written so."""
    style, tp = module._tpsp_style, None
    for cell in module.forward.__closure__:
        if type(cell.cell_contents).__name__ == "TensorParallel":
            tp = cell.cell_contents
    module.forward = lambda *args, **kwargs: style.run(module, block, tp, args, kwargs)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_write_reaches_backward_and_the_caller(ranks, sequence_parallel):
    for dp in (1, 2):
        config = TPSPConfig(tp_size=2, dp_shard_size=dp, sequence_parallel=sequence_parallel, check="off")
        for kind in (writes_first, computes_first):
            for where in ("mlp", "stream"):
                check(ranks.run(config.world_size, made_up, kind, where, config, rows=2 - (dp == 1)))


# ---- layers that are skipped or called by themselves ----------------------------------------------------------------


def dropped(model_type, config, seeds):
    worst = {"loss": 0.0, "grad": 0.0}
    reference, model = build(model_type), build(model_type)
    hf_tpsp.parallelize(model, config)
    for seed in seeds:
        for part in (reference, model):
            part.zero_grad()
        found = errors_of(reference, model, config, seed=seed)
        worst = {name: larger(worst[name], found[name]) for name in worst}
    return worst


@pytest.mark.parametrize("model_type", ["xglm", "opt"])
def test_layerdrop(ranks, model_type):
    """Seeds under which the first, the first two and all four layers are dropped, among others."""
    for config in (TPSPConfig(tp_size=2, check="off", **case) for case in CASES[:4]):
        check(ranks.run(config.world_size, dropped, model_type, config, seeds_that_drop()))


def seeds_that_drop() -> list[int]:
    wanted, found = {(True, False), (True, True), "all"}, []
    for seed in range(1, 500):
        torch.manual_seed(seed)
        drops = [bool(torch.rand([]) < 0.5) for _ in range(4)]
        for pattern in (tuple(drops[:2]), "all" if all(drops) else None):
            if pattern in wanted:
                wanted.discard(pattern)
                found.append(seed)
    return found


def alone(config):
    """A layer and a norm that the script calls with a plain tensor; a block, which holds a part of a layer that FSDP gathers whole."""
    reference, model = build("qwen3"), build("qwen3")
    hf_tpsp.parallelize(model, config)
    batch, worst = models.batch(2, 13), 0.0
    model(**batch).loss.backward()
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 13, 32, generator=generator)
    xs = []
    for part in (reference, model):
        x = values.clone().requires_grad_()
        positions = part.model.rotary_emb(x, torch.arange(13).unsqueeze(0))
        outs = [part.model.layers[0](x, position_embeddings=positions), part.model.norm(x)]
        assert not any(isinstance(out, DTensor) for out in outs)
        sum((out * out.tanh()).sum() for out in outs).backward()
        xs.append((x.grad, outs))
    with pytest.raises(ValueError, match="part of a decoder layer"):
        model.model.layers[1].mlp(values)
    worst = larger(worst, relative(xs[1][0], xs[0][0]))
    for a, b in zip(xs[1][1], xs[0][1], strict=True):
        worst = larger(worst, relative(a, b))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            worst = larger(worst, relative(full(p.grad), q.grad))
    return {"loss": 0.0, "grad": worst}


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_called_by_themselves(ranks, sequence_parallel):
    check(ranks.run(2, alone, TPSPConfig(tp_size=2, sequence_parallel=sequence_parallel)))


# ---- what a small copy cannot prove ---------------------------------------------------------------------------------


class MixingNorm(nn.Module):
    """A norm by its name, which takes its statistics over the sequence (in training only, or always)."""

    training_only = False

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x):
        dims = (1, 2) if self.training or not self.training_only else (2,)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + 1e-6)


class TrainingMixingNorm(MixingNorm):
    training_only = True


class WritingNorm(MixingNorm):
    """It is one of single positions, but writes into its input: the residual."""

    def forward(self, x):
        x.mul_(1.5)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class BranchingMLP(nn.Module):
    """Its output is a sum over the ranks in evaluation, and no sum in training."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        out = self.down(self.up(x).relu())
        return out.tanh() if self.training else out


class LongMLP(BranchingMLP):
    def forward(self, x):
        out = self.down(self.up(x).relu())
        if x.shape[1] > 1024:
            out = out.tanh()
        return self.limited(out)

    def limited(self, out):
        if self.up.in_features >= 96:
            return out * 2
        if out.shape[0] == 0:
            raise ValueError("no rows")
        return out


def with_part(norm=None, mlp=None, hidden_size=32):
    """A llama of which each layer has another norm, or MLP, as a script's own class has it."""
    from transformers.models.llama import modeling_llama

    class Layer(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            if norm is not None:
                self.post_attention_layernorm = norm(config.hidden_size)
            if mlp is not None:
                self.mlp = mlp(config)

    class Llama(modeling_llama.LlamaForCausalLM):
        def __init__(self, config):
            original, modeling_llama.LlamaDecoderLayer = modeling_llama.LlamaDecoderLayer, Layer
            try:
                super().__init__(config)
            finally:
                modeling_llama.LlamaDecoderLayer = original

    torch.manual_seed(0)
    return randomize(Llama(models.config("llama", hidden_size=hidden_size)))


def planned(part, config):
    reference, model = with_part(**part), with_part(**part)
    hf_tpsp.parallelize(model, config)
    return errors_of(reference, model, config)


@pytest.mark.parametrize("norm", [MixingNorm, TrainingMixingNorm, WritingNorm])
def test_a_norm_that_is_none(ranks, norm):
    notes = hf_tpsp.plan_for(with_part(norm), TPSPConfig(tp_size=2)).notes
    assert any(norm.__name__ in note and "whole sequence" in note for note in notes)
    for case in CASES[:3]:
        config = TPSPConfig(tp_size=2, check="off", **case)
        check(ranks.run(config.world_size, planned, {"norm": norm}, config))


def test_a_branch_of_training(ranks):
    check(ranks.run(2, planned, {"mlp": BranchingMLP}, TPSPConfig(tp_size=2, check="off")))


def test_a_branch_on_a_size_is_named():
    notes = hf_tpsp.plan_for(with_part(mlp=LongMLP, hidden_size=128), TPSPConfig(tp_size=2)).notes
    assert any("does not cover `x.shape[1] > 1024` (LongMLP.forward)" in note for note in notes)
    assert any("does not cover `self.up.in_features >= 96` (LongMLP.limited)" in note for note in notes)
    assert len(notes) == 2
    for model_type in models.ARCHITECTURES:
        assert not hf_tpsp.plan_for(models.build(model_type), TPSPConfig(tp_size=2)).notes
