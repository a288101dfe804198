"""The exact number of collectives, by kind: a feature that is switched off, or one collective too many, shows here."""

from collections import Counter

import models
import pytest
import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

import hf_tpsp
from hf_tpsp import TPSPConfig

NAMES = {
    "all_gather_into_tensor": "all-gather",
    "all_to_all_single": "reduce-scatter",  # on gloo it is this and a sum: collectives.reduce_scatter
    "reduce_scatter_tensor": "reduce-scatter",
    "all_reduce": "all-reduce",
    "allreduce_": "all-reduce",
    "_allgather_base_": "FSDP all-gather",
    "_reduce_scatter_base_": "FSDP reduce-scatter",
}


def count(model_type: str, layers: int, config: TPSPConfig) -> dict[str, int]:
    """Collectives of one forward and backward, after a first one that lets everything initialize."""
    model = models.build(model_type, num_hidden_layers=layers, use_cache=False)
    hf_tpsp.parallelize(model, config)
    model.train()
    data = models.batch(2, 17)
    model(**data).loss.backward()
    model.zero_grad()
    with CommDebugMode() as mode:
        model(**data).loss.backward()
    counts = Counter()
    for op, number in mode.get_comm_counts().items():
        counts[NAMES[str(op).rsplit(".", 1)[-1]]] += number
    return dict(counts)


# Fixed for any depth: the embedding and the head (one of each), the loss (3), all replicated gradients together (1).
OUTSIDE = {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 4}


@pytest.mark.parametrize(
    ("model_type", "per_layer"),
    [("llama", 4), ("qwen3", 4), ("gemma2", 4), ("phi3", 5)],  # phi3: one more for its uneven packed projection
)
@pytest.mark.parametrize("layers", [2, 4])
def test_sequence_parallel(ranks, model_type, per_layer, layers):
    expected = {**OUTSIDE, "all-gather": 2 + per_layer * layers, "reduce-scatter": 2 + per_layer * layers}
    assert ranks.run(2, count, model_type, layers, TPSPConfig(tp_size=2)) == [expected] * 2


def test_with_fsdp(ranks):
    """FSDP adds, per layer, an all-gather in forward, one in backward (not for the last layer) and a reduce-scatter;
    for the root one all-gather and one reduce-scatter."""
    found = ranks.run(4, count, "llama", 4, TPSPConfig(tp_size=2, dp_shard_size=2))
    layers = {"all-gather": 18, "reduce-scatter": 18}
    assert found == [{**OUTSIDE, **layers, "FSDP all-gather": 8, "FSDP reduce-scatter": 5}] * 4


def test_activation_checkpointing_gathers_again(ranks):
    """Recomputing a layer repeats its two all-gathers and its first reduce-scatter; what comes after is not needed."""
    found = ranks.run(2, count, "llama", 3, TPSPConfig(tp_size=2, activation_checkpointing="full"))
    assert found == [{**OUTSIDE, "all-gather": 2 + 6 * 3, "reduce-scatter": 2 + 5 * 3}] * 2


def test_without_sequence_parallel(ranks):
    found = ranks.run(2, count, "llama", 2, TPSPConfig(tp_size=2, sequence_parallel=False))
    # 4 per layer, 1 at the embedding, 1 at the head, 3 in the loss. Norms see the whole sequence: nothing to add up.
    assert found == [{"all-reduce": 4 * 2 + 2 + 3}] * 2


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
