"""The exact number of collectives, by kind: a feature that is switched off, or one collective too many, shows here."""

import itertools
import unittest.mock
from collections import Counter

import models
import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.collectives import all_gather_sequence, reduce_scatter_sequence
from hf_tpsp.tools.estimate.recorders import CollectiveBytes


def count(model_type: str, layers: int, config: TPSPConfig) -> dict[str, int]:
    """Collectives of one forward and backward, after a first one that lets everything initialize."""
    model = models.build(model_type, num_hidden_layers=layers, use_cache=False)
    hf_tpsp.parallelize(model, config)
    model.train()
    data = models.batch(2, 17)
    model(**data).loss.backward()
    model.zero_grad()
    with CollectiveBytes() as sent:
        model(**data).loss.backward()
    counts = Counter({kind: traffic.count for kind, traffic in sent.traffic.items()})
    counts["reduce-scatter"] += counts.pop("all-to-all", 0)  # what collectives.reduce_scatter is on gloo
    return +counts


def expected(layers: int, gathers: int, scatters: int, **more: int) -> dict[str, int]:
    """Outside the layers: embedding and head (one gather and one scatter each), the loss (one gather), the batch's check
    (one gather), all replicated gradients together (one all-reduce)."""
    counts = {"all-gather": 4 + gathers * layers, "reduce-scatter": 2 + scatters * layers, "all-reduce": 1}
    return {kind: number + more.get(kind, 0) for kind, number in counts.items()}


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [("llama", 0), ("qwen3", 0), ("gemma2", 0), ("phi3", 1)],  # phi3: one more for its uneven packed projection
)
@pytest.mark.parametrize("layers", [2, 4])
def test_sequence_parallel(ranks, model_type, extra, layers):
    """Each layer gathers twice and scatters twice, the same in backward, and gathers its two inputs once more."""
    found = ranks.run(2, count, model_type, layers, TPSPConfig(tp_size=2))
    assert found == [expected(layers, 6 + extra, 4 + extra)] * 2


def test_inputs_kept(ranks):
    found = ranks.run(2, count, "llama", 3, TPSPConfig(tp_size=2, regather_inputs=False))
    assert found == [expected(3, 4, 4)] * 2


def test_torchs_loss_parallel(ranks):
    """Three all-reduces for the loss in place of one all-gather."""
    found = ranks.run(2, count, "llama", 2, TPSPConfig(tp_size=2, loss="loss_parallel"))
    assert found == [expected(2, 6, 4, **{"all-gather": -1, "all-reduce": 3})] * 2


def test_with_fsdp(ranks):
    """FSDP adds, per layer, an all-gather in forward, one in backward (not for the last layer) and a reduce-scatter;
    for the root one all-gather and one reduce-scatter."""
    found = ranks.run(4, count, "llama", 4, TPSPConfig(tp_size=2, dp_shard_size=2))
    assert found == [expected(4, 6, 4, **{"all-gather": 8, "reduce-scatter": 5})] * 4


def test_activation_checkpointing_gathers_again(ranks):
    """Recomputing a layer repeats its two all-gathers and its first reduce-scatter; what comes after is not needed."""
    found = ranks.run(2, count, "llama", 3, TPSPConfig(tp_size=2, activation_checkpointing="full"))
    assert found == [expected(3, 6, 5)] * 2


def test_selective_checkpointing_keeps_what_was_scattered(ranks):
    found = ranks.run(2, count, "llama", 3, TPSPConfig(tp_size=2, activation_checkpointing="selective"))
    assert found == [expected(3, 6, 4)] * 2


def test_without_sequence_parallel(ranks):
    found = ranks.run(2, count, "llama", 2, TPSPConfig(tp_size=2, sequence_parallel=False))
    # 4 per layer, 1 at the embedding, 1 at the head, 1 for the biases of row-parallel layers. Norms see the whole sequence.
    assert found == [{"all-reduce": 4 * 2 + 3, "all-gather": 2}] * 2


def stream_layouts() -> dict[str, tuple]:
    """Where the activations are, seen from inside one forward: name → (type, placements, local and global shape)."""
    model = models.build("qwen2")
    hf_tpsp.parallelize(model, TPSPConfig(tp_size=2))
    seen = {}

    def note(name):
        def hook(module, args, kwargs, output):
            x = output[0] if isinstance(output, tuple) else output
            if isinstance(x, DTensor):
                seen[name] = (x.placements, tuple(x.shape), x.to_local().shape[1])
            else:
                seen[name] = ("plain", tuple(x.shape))

        return hook

    for name in (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1",
        "model.norm",
    ):
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
    output = model(**models.batch(2, 17))
    seen["logits"] = (output.logits.placements, tuple(output.logits.shape), output.logits.to_local().shape[2])
    seen["loss"] = type(output.loss) is torch.Tensor
    return seen


def test_layouts(ranks):
    """17 tokens on two ranks: 9 and 8, between all layers. Vocabulary of 131: 66 and 65."""
    for rank, seen in enumerate(ranks.run(2, stream_layouts)):
        stream = ((Shard(1),), (2, 17, 32), (9, 8)[rank])
        for name in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"):
            assert seen[name] == stream
        assert seen["model.layers.0.self_attn.q_proj"] == ("plain", (2, 17, 16))
        assert seen["logits"] == ((Shard(2),), (2, 17, 131), (66, 65)[rank])
        assert seen["loss"]


def sequence_collectives() -> list[tuple]:
    """Ours against DTensor's, forwards and adjoint, on even and odd lengths, shorter than the ranks too; and the
    reduce-scatter of other backends, which gloo has as well, against gloo's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    wrong = []
    for batch, length in itertools.product((1, 3), (1, 2, 3, 8, 17)):
        torch.manual_seed(0)
        full = torch.randn(batch, length, 5)
        shard = distribute_tensor(full, mesh, [Shard(1)]).to_local()
        if not torch.equal(all_gather_sequence(shard, length, mesh), full):
            wrong.append(("all-gather", batch, length))
        partial = full * (dist.get_rank() + 1)
        expected = DTensor.from_local(partial, mesh, [Partial()]).redistribute(placements=[Shard(1)]).to_local()
        if not torch.allclose(reduce_scatter_sequence(partial, mesh), expected, rtol=1e-6):
            wrong.append(("reduce-scatter", batch, length))
        with unittest.mock.patch("torch.distributed.get_backend", return_value="nccl"):
            if not torch.allclose(reduce_scatter_sequence(partial, mesh), expected, rtol=1e-6):
                wrong.append(("reduce-scatter of other backends", batch, length))
    return wrong


@pytest.mark.parametrize("world", [2, 4])
def test_sequence_collectives(ranks, world):
    assert ranks.run(world, sequence_collectives) == [[]] * world
