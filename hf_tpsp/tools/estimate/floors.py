"""The fewest collectives and bytes that a layout needs, and the bytes a layer keeps, from formulas."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ...config import TPSPConfig

# Bytes of an fp32 element, for the floors.
ITEM = 4


# Kind of collective → bytes that one rank of t sends, as a multiple of (t - 1) / t times the whole tensor, by the ring
# algorithm. An all-reduce is a reduce-scatter and an all-gather.
RING_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


@dataclass
class Traffic:
    """Collectives of one kind.

    Args:
        count: how many.
        size: bytes of the whole tensors: the output of an all-gather, the input of a reduce-scatter, the tensor of an
            all-reduce.
        wire: bytes that this rank sends for them, by the ring algorithm: `(t - 1) / t` of the size over `t` ranks, and
            twice that for an all-reduce.
    """

    count: int = 0
    size: int = 0
    wire: float = 0.0

    def add(self, kind: str, size: int, ranks: int, count: int = 1) -> None:
        """Count `count` collectives of `kind` over `ranks` ranks, together `size` bytes."""
        self.count += count
        self.size += size
        self.wire += RING_PASSES[kind] * size * (ranks - 1) / ranks

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.size + other.size, self.wire + other.wire)

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other * -1

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.count * times, self.size * times, self.wire * times)


CHECK_BYTES = 8 * 8
"""What a rank sends of its batch to be compared (`forward/batch_check.py`)."""


def saved_activation_bytes(
    config: PreTrainedConfig, tokens: int, ranks: int, itemsize: int = ITEM, fused_activation: bool = False
) -> float:
    """Bytes of activations that one rank keeps of one decoder layer for backward, by Megatron's TP + SP scheme.

    Korthikanti et al. 2022 (arXiv 2205.05198), counted again for a gated MLP, grouped-query attention, no dropout and a
    fused attention. Elements per token, all split over the ranks, with `h` the hidden size, `q = heads * head_dim`,
    `kv = kv_heads * head_dim` and `f` the intermediate size:

        2 h           inputs of the two norms
        2 h           inputs of attention and MLP: each rank's shard, gathered again in backward
        q + 2 kv      query, key and value
        q             output of attention, the input of o_proj
        4 f           gate, up, act(gate), and act(gate) * up, the input of down_proj
        3 f           the same with activation and product in one kernel, which computes act(gate) again in backward

    With q = h: `(6 h + 2 kv + 4 f) / ranks`. Left out: the log-sum-exp of each token and head, the norms' factors.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    products = 3 if fused_activation else 4
    elements = 4 * config.hidden_size + 2 * q + 2 * kv + products * config.intermediate_size
    return tokens * elements * itemsize / ranks


def collective_floor(
    config: PreTrainedConfig, tokens: int, choices: TPSPConfig, itemsize: int = ITEM, replicated: int | None = None
) -> dict[str, Traffic]:
    """The collectives over the TP ranks that the plan of hf_tpsp needs in forward and backward, and no more.

    Args:
        tokens: of one TP group.
        itemsize: bytes of an element of the stream.
        replicated: bytes of the gradients that are summed over the TP ranks; those of two norms in each layer, and the
            last, if it is not given.
    """
    stream, layers, ranks = tokens * config.hidden_size * itemsize, config.num_hidden_layers, choices.tp_size
    if replicated is None:
        replicated = (2 * layers + 1) * config.hidden_size * ITEM
    floor = defaultdict(Traffic)

    def need(kind: str, count: int, size: int) -> None:
        floor[kind].add(kind, count * size, ranks, count)

    # Each layer has two tensor-parallel regions, attention and MLP. Each takes an all-gather and a reduce-scatter in
    # forward, and the reverse of both for the gradients.
    need("all-gather", 4 * layers, stream)
    need("reduce-scatter", 4 * layers, stream)
    # The inputs of both are gathered again in backward.
    if choices.regather_inputs or choices.activation_checkpointing != "none":
        need("all-gather", 2 * layers, stream)
    # Attention's output is computed again in backward. The MLP's is not needed.
    if choices.activation_checkpointing == "full":
        need("reduce-scatter", layers, stream)
    # The embedding.
    need("reduce-scatter", 1, stream)
    need("all-gather", 1, stream)
    # The head. The chunked loss adds the gradients of its hidden states up in fp32, and sends them so.
    need("all-gather", 1, stream)
    need("reduce-scatter", 1, stream // itemsize * ITEM if choices.loss == "chunked" else stream)
    if choices.loss == "chunked":
        # Each rank's log-sum-exp, and the label's logit.
        need("all-gather", 1, 2 * tokens * ranks * ITEM)
    else:
        # The maximum, the sum of exponentials, and the label's logit.
        need("all-reduce", 3, tokens * ITEM)
    if ranks == choices.world_size:
        need("all-gather", 1, CHECK_BYTES * ranks)
    # The gradients of all norms.
    need("all-reduce", 1, replicated)
    return dict(floor)


def check_floor(choices: TPSPConfig) -> dict[tuple[str, str], Traffic]:
    """`(mesh dim, kind)` → the traffic of the batch check. The dim is `"world"`, unless one mesh dim has all ranks. If
    that is TP, the check is part of `collective_floor`."""
    world = choices.world_size
    if world == choices.tp_size:
        return {}
    dim = next((d for d in ("dp_shard", "dp_replicate") if getattr(choices, f"{d}_size") == world), "world")
    floor = {(dim, "all-gather"): Traffic()}
    floor[dim, "all-gather"].add("all-gather", CHECK_BYTES * world, world)
    return floor


def fsdp_floor(
    units: list[int], choices: TPSPConfig, itemsize: int, gradient_itemsize: int
) -> dict[tuple[str, str], Traffic]:
    """The collectives that FSDP2 needs over `("dp_shard", kind)` and `("dp_replicate", kind)`, without padding.

    Args:
        units: elements of the parameters of each layer, and last of the root, on one TP rank.
        itemsize: bytes of a gathered element.
        gradient_itemsize: bytes of an element of a gradient that is reduced.
    """
    floor = defaultdict(Traffic)
    *layers, last, root = units
    gathered = layers + layers + [last, root] if choices.reshard_after_forward else units
    if (ranks := choices.dp_shard_size) > 1:
        floor["dp_shard", "all-gather"].add("all-gather", sum(gathered) * itemsize, ranks, len(gathered))
        floor["dp_shard", "reduce-scatter"].add("reduce-scatter", sum(units) * gradient_itemsize, ranks, len(units))
    if choices.dp_replicate_size > 1:
        size = sum(units) * gradient_itemsize // choices.dp_shard_size
        floor["dp_replicate", "all-reduce"].add("all-reduce", size, choices.dp_replicate_size, len(units))
    return dict(floor)


def wire_bytes(traffic: dict[str, Traffic]) -> float:
    """Bytes that one rank sends, all kinds together."""
    return sum(kind.wire for kind in traffic.values())
