"""The outcome of a layout that was tried, and its description."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# The largest relative difference of a proof, in fp32. A wrong layout is off by as much as the output itself.
LIMIT = 1e-4


@dataclass(frozen=True)
class Trial:
    """One layout of a kind of block, simulated rank by rank on the small copy.

    Attributes:
        owner: the class of the block.
        layout: the rules that were tried, by name inside the block; "" is the block itself.
        off_by: `evaluation` and `training` → the norm of the difference between the ranks' result and the whole block's
            output, over the norm of that output. After a mode that is over `LIMIT`, the other is not run.
        error: the error that the layout ended in, if there was nothing to compare; else empty.
        place: the line outside torch and hf_tpsp that raised the error: `modeling_doge.py:288`.
    """

    owner: str
    layout: dict[str, str]
    off_by: dict[str, float] = field(default_factory=dict)
    error: str = ""
    place: str = ""

    @property
    def adds_up(self) -> bool:
        return not self.error and bool(self.off_by) and all(off <= LIMIT for off in self.off_by.values())

    @property
    def outcome(self) -> str:
        """`off by 0.7 in evaluation`, or the error."""
        if self.error:
            return self.error
        mode, off = max(self.off_by.items(), key=lambda item: (item[1] != item[1], item[1]))
        return f"off by {off:.2g} in {mode}"

    def __str__(self) -> str:
        return brief(self.layout)


def brief(layout: dict[str, str]) -> str:
    """A layout in one line: the block's own rule, and the rules inside it:
    `split; colwise q_proj, k_proj; rowwise o_proj`."""
    named: dict[str, list[str]] = {}
    for name, rule in layout.items():
        # These rules split nothing, so they are left out.
        if name and rule not in ("replicated_partial", "replicated", "activation"):
            named.setdefault(rule, []).append(name)
    return "; ".join([layout[""], *(f"{rule} {', '.join(names)}" for rule, names in named.items())])


def why_not(trials: Iterable[Trial]) -> str:
    """Why none of `trials` was taken: how far the closest one was off, or the first one's error if all ended in
    errors."""
    trials = [trial for trial in trials if not trial.adds_up]
    if not trials:
        return "no layout is known for it"
    compared = [trial for trial in trials if not trial.error]
    if not compared:
        return f"the first layout, {trials[0]}, ends in {trials[0].error}"
    closest = min(compared, key=lambda trial: max(trial.off_by.values()))
    return f"the closest layout, {closest}, is {closest.outcome}"
