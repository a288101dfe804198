"""What trains is what was proven: for each style, `run` on the ranks equals `simulate_rank` in one process, and both make the whole."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_tpsp import TPSPConfig
from hf_tpsp.collectives import chunk_of, slice_sequence
from hf_tpsp.loss.logits import LazyLogits
from hf_tpsp.styles.base import TensorParallel
from hf_tpsp.styles.registry import STYLES, style_for

RANKS, HIDDEN, WIDTH, TOKENS = 2, 6, 8, 5  # five tokens: three on the first rank, two on the second


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.act, self.scale = nn.SiLU(), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        return self.down(self.act(self.up(x))) * self.scale(x)


class Convolution(nn.Module):
    """A depthwise convolution `[batch, seq, channels]` that is called, or whose weight and bias are read."""

    def __init__(self, is_called: bool):
        super().__init__()
        self.conv, self.is_called = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH), is_called

    def forward(self, x):
        x, seq = x.transpose(1, 2), x.shape[1]
        if self.is_called:
            out = self.conv(x)
        else:
            out = nn.functional.conv1d(x, self.conv.weight, self.conv.bias, padding=2, groups=x.shape[1])
        return out[..., :seq].transpose(1, 2)


class GatedConvolution(nn.Module):
    """Its entry packs three equal projections."""

    def __init__(self):
        super().__init__()
        self.entry, self.mixer = nn.Linear(HIDDEN, 3 * WIDTH), Convolution(is_called=False)
        self.down = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        b, c, x = self.entry(x).chunk(3, -1)
        return self.down(c * self.mixer(b * x))


class Scaled(nn.Module):
    """A layer that has a parameter of its own, and meets the stream with it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, hidden_states):
        return hidden_states * self.scale


@dataclass
class Case:
    """How a style is tried.

    Attributes:
        make: the module. rules: the plan inside it; "" is the module itself.
        given: the whole input → what a rank is given. joined: the ranks' outputs → the whole output.
        simulates: whether the proof makes the module what it is on one rank. Those whose place is on the stream are proven by
            other means (`SmallCopy.is_local`, the whole model's parity).
    """

    make: Callable[[], nn.Module]
    rules: dict[str, str]
    width: int = HIDDEN
    given: str = "whole"
    joined: str = "sum"
    simulates: bool = True


def conv(width_in: int, width_out: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = Conv1D(width_out, width_in)
        nn.init.normal_(layer.bias)
        return layer

    return make


MLP_RULES = {"": "split", "up": "colwise", "down": "rowwise", "act": "activation", "scale": "replicated_partial"}
GATED_RULES = {"": "split", "entry": "colwise_packed:8,8,8", "mixer.conv": "depthwise", "down": "rowwise"}
CASES = {
    "colwise": [
        Case(lambda: nn.Linear(HIDDEN, WIDTH), {"": "colwise"}, joined="cat"),
        Case(conv(HIDDEN, WIDTH), {"": "colwise"}, joined="cat"),
    ],
    "colwise_packed": [Case(lambda: nn.Linear(HIDDEN, 8), {"": "colwise_packed:4,4"}, joined="pairs")],
    "colwise_gathered": [
        Case(lambda: nn.Linear(HIDDEN, WIDTH), {"": "colwise_gathered"}, joined="alike"),
        Case(lambda: nn.Linear(HIDDEN, 8), {"": "colwise_gathered:4,4"}, joined="pairs"),
    ],
    "colwise_whole": [Case(lambda: nn.Linear(HIDDEN, WIDTH), {"": "colwise_whole"}, joined="alike")],
    "depthwise": [Case(lambda: Convolution(True), {"conv": "depthwise"}, width=WIDTH, given="features", joined="cat")],
    "rowwise": [
        Case(lambda: nn.Linear(WIDTH, HIDDEN), {"": "rowwise"}, width=WIDTH, given="features"),
        Case(conv(WIDTH, HIDDEN), {"": "rowwise"}, width=WIDTH, given="features"),
    ],
    "rowwise_sliced": [Case(lambda: nn.Linear(WIDTH, HIDDEN), {"": "rowwise_sliced"}, width=WIDTH)],
    "replicated_partial": [Case(lambda: nn.RMSNorm(HIDDEN), {"": "replicated_partial"}, joined="alike")],
    "replicated": [Case(lambda: nn.Linear(HIDDEN, HIDDEN), {"": "replicated"}, joined="alike")],
    "activation": [Case(nn.SiLU, {"": "activation"}, joined="alike")],
    "split": [
        Case(MLP, MLP_RULES, given="stream", joined="stream"),
        Case(MLP, MLP_RULES, joined="alike"),
        Case(GatedConvolution, GATED_RULES, given="stream", joined="stream"),
    ],
    "whole": [
        Case(MLP, {"": "whole", "up": "colwise_whole", "down": "replicated", "scale": "replicated"}, given="stream", joined="stream whole"),
    ],
    "norm": [Case(lambda: nn.RMSNorm(HIDDEN), {"": "norm"}, given="stream", joined="stream", simulates=False)],
    "stream": [Case(Scaled, {"": "stream"}, given="stream", joined="stream", simulates=False)],
    "enter": [Case(Scaled, {"": "enter"}, given="stream", joined="stream", simulates=False)],
    "embedding": [Case(lambda: nn.Embedding(7, HIDDEN), {"": "embedding"}, given="ids", joined="stream", simulates=False)],
    "head": [Case(lambda: nn.Linear(HIDDEN, 7), {"": "head"}, given="stream", joined="logits", simulates=False)],
    "lazy_head": [Case(lambda: nn.Linear(HIDDEN, 7), {"": "lazy_head"}, given="stream", joined="logits", simulates=False)],
}  # fmt: skip


def built(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = case.make().double()
    x = torch.randn(2, TOKENS, case.width, dtype=torch.float64)
    return module, torch.randint(0, 7, (2, TOKENS)) if case.given == "ids" else x


def given_to(rank: int, x: Tensor, case: Case) -> Tensor:
    return chunk_of(x, x.dim() - 1, rank, RANKS) if case.given == "features" else x


def simulated(case: Case, config: TPSPConfig, rank: int) -> Tensor:
    """What the proof has `rank` compute."""
    module, x = built(case)
    for part, rule in case.rules.items():
        style_for(rule, config).simulate_rank(module.get_submodule(part), rank, RANKS)
    return module(given_to(rank, x, case))


def trained(case: Case, config: TPSPConfig) -> Tensor:
    """What this rank computes in a run, gathered where it is a DTensor."""
    module, x = built(case)
    tp = TensorParallel(init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",)))
    styled = {module.get_submodule(part): style_for(rule, config) for part, rule in case.rules.items()}
    for part, style in styled.items():
        part._tpsp_style = style
    for part, style in styled.items():
        style.shard(part, tp)
        style.install(part, tp)
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor), name
    x = (
        slice_sequence(x, tp.mesh)
        if case.given == "stream" and config.sequence_parallel
        else given_to(tp.rank, x, case)
    )
    output = module(x)
    if isinstance(output, LazyLogits):
        return output.full_tensor().detach()
    return output.full_tensor().detach() if isinstance(output, DTensor) else output.detach()


def on_ranks(name: str, config: TPSPConfig) -> list[Tensor]:
    return [trained(case, config) for case in CASES[name]]


def joined(outputs: list[Tensor], how: str) -> Tensor:
    if how == "sum":
        return sum(outputs)
    if how == "cat":
        return torch.cat(outputs, -1)
    if how == "pairs":  # each rank has its part of both projections
        return torch.cat([torch.cat([o.chunk(2, -1)[i] for o in outputs], -1) for i in range(2)], -1)
    assert all(torch.equal(outputs[0], o) for o in outputs)
    return outputs[0]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "tp"])
@pytest.mark.parametrize("name", STYLES)
def test_what_trains_is_what_was_proven(ranks, name, sequence_parallel):
    config = TPSPConfig(tp_size=RANKS, sequence_parallel=sequence_parallel)
    found = ranks.run(RANKS, on_ranks, name, config)
    for case, *outputs in zip(CASES[name], *found, strict=True):
        module, x = built(case)
        expected = module(x).detach()
        torch.testing.assert_close(joined(outputs, case.joined), expected)
        if case.simulates:
            proven = [simulated(case, config, rank).detach() for rank in range(RANKS)]
            if name in ("split",):
                torch.testing.assert_close(sum(proven), expected)
            else:
                for output, of_rank in zip(outputs, proven, strict=True):
                    torch.testing.assert_close(output, of_rank)


def test_a_style_prints_itself():
    style = style_for("colwise_gathered:4,4", TPSPConfig(tp_size=2))
    assert repr(style) == "ColwiseGathered(forward: all-gather, backward: reduce-scatter)"
    assert copy.copy(style).parts == ("4", "4")
