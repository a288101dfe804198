"""Writes the table of docs/attention.md: `PYTHONPATH=tests python tests/attention_table.py` (about 4 minutes on 2 cores)."""

from pathlib import Path

import attention

from hf_tpsp import TPSPConfig
from hf_tpsp.tools.ranks import RankPool

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
MESHES = {"1x2": TPSPConfig(tp_size=2), "2x2": TPSPConfig(tp_size=2, dp_shard_size=2)}
KERNELS = ("sdpa", "flash_attention_2", "flex_attention")


def cell(pool: RankPool, family: str, kernel: str, layout: str, config: TPSPConfig) -> str:
    kernel = "flash_attention_4" if family == "gpt_oss" and "flash" in kernel else kernel
    try:
        results = pool.run(config.world_size, attention.compare, family, kernel, layout, config)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        if "not support" in last or "cannot be run on CPU" in last:
            return "-"
        return f"**{last[:80]}**"
    errors = [max((getattr(e, kind) for e, *_ in results), default=0.0) for kind in ("loss", "gradient")]
    asked = max(asked for _, asked, _ in results)
    return f"{errors[0]:.0e}, {errors[1]:.0e}" + (f" (asked {asked} times)" if asked else "")


def main() -> None:
    pool = RankPool()
    lines = [f"| family | mesh | rows | {' | '.join(KERNELS)} |", "| --- | --- | --- | --- | --- | --- |"]
    for family in attention.FAMILIES:
        for mesh, layouts in (("1x2", attention.LAYOUTS), ("2x2", ("packed", "padded"))):
            for layout in layouts:
                cells = [cell(pool, family, kernel, layout, MESHES[mesh]) for kernel in KERNELS]
                lines.append(f"| {family} | {mesh} | {layout} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    pool.stop()
    before, _, after = PAGE.read_text().partition("<!-- table -->\n")
    PAGE.write_text(
        f"{before}<!-- table -->\n" + "\n".join(lines) + "\n<!-- end -->" + after.partition("<!-- end -->")[2]
    )


if __name__ == "__main__":
    main()
