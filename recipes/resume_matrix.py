"""Does a checkpoint of any mesh go on on any other, and in one process, and back?

    python recipes/resume_matrix.py [--only qwen2 "qwen2 LoRA"] [--meshes 1x1x2 2x2x2] [-o table.md]

Random models of a few layers, on gloo ranks that it starts on this machine: 4 steps of AdamW with the stock Trainer, a
checkpoint after 2. Each mesh resumes from the checkpoint of 2 x 2 and from that of one process; one process resumes from
what `hf-tpsp export` makes of each mesh's checkpoint. Compared are all weights and AdamW's whole state, tensor by tensor:

- as soon as the checkpoint is loaded, with what had been saved: the largest difference must be 0;
- after 2 more steps, with the run that was not interrupted: relative, below 1e-4, because sums are rounded in other orders.

Exits with 1 if one is not. All of it takes about 5 minutes on 2 cores.
"""

import argparse
import contextlib
import math
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.tools.ranks import RankPool
from hf_tpsp.tools.verify.comparison import full, largest, relative
from hf_tpsp.tools.verify.verify import build

# dp_replicate x dp_shard x tp.
MESHES = ["1x1x2", "1x1x4", "1x2x1", "1x4x1", "1x2x2", "2x1x1", "2x1x2", "2x2x1", "2x2x2"]
SOURCE = "1x2x2"
# The type of model, and whether a LoRA adapter with a trained head is trained in place of all weights.
MODELS = {"qwen2": False, "phi3": False, "qwen3_moe": False, "qwen2 LoRA": True, "phi3 LoRA": True}
LIMIT = 1e-4  # relative, after further steps in fp32
VOCABULARY, ROWS, LENGTH = 132, 4, 17


class Rows(Dataset):
    """Rows with different numbers of targets."""

    def __init__(self):
        self.ids = torch.randint(3, VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        labels = self.ids[row].clone()
        labels[: row % 7] = -100
        return {"input_ids": self.ids[row], "labels": labels}


class Keep(TrainerCallback):
    """Keeps all weights and AdamW's state, whole: as loaded, as saved, and at the end."""

    def __init__(self):
        self.kept: dict[str, dict[str, Tensor]] = {}

    def _keep(self, when: str, model, optimizer) -> None:
        state = getattr(optimizer, "optimizer", optimizer).state
        found = {}
        for name, parameter in model.named_parameters():
            found[name] = full(parameter.detach()).clone()
            found |= {f"{name} {key}": full(value).clone() for key, value in state.get(parameter, {}).items()}
        self.kept[when] = found

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self._keep("loaded", model, optimizer)

    def on_save(self, args, state, control, model, optimizer, **kwargs):
        self._keep(f"step {state.global_step}", model, optimizer)


def train(
    mesh: str | None, model: str, has_adapter: bool, out: str, resume: str | None = None
) -> dict[str, dict] | None:
    """4 steps of 4 rows, or those that are left of them. Returns what rank 0 kept."""
    replicate, shard, tp = map(int, mesh.split("x")) if mesh else (1, 1, 1)
    config = TPSPConfig(dp_replicate_size=replicate, dp_shard_size=shard, tp_size=tp)
    with hf_tpsp.enable(config) if mesh else contextlib.nullcontext():
        arguments = TrainingArguments(
            out, max_steps=4, save_steps=2, per_device_train_batch_size=ROWS // config.dp_size, learning_rate=1e-3,
            warmup_steps=1, report_to=[], disable_tqdm=True, logging_strategy="no", log_level="error",
            use_cpu=True, seed=0,
        )  # fmt: skip
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if has_adapter:
            torch.manual_seed(5)
            network = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))
        trainer = Trainer(network, arguments, train_dataset=Rows(), callbacks=[keep := Keep()])
        trainer.train(resume_from_checkpoint=resume)
    return keep.kept if not mesh or dist.get_rank() == 0 else None


def compare(resumed: dict[str, dict], first: dict[str, dict]) -> tuple[float, float]:
    """The largest difference as loaded, and the largest relative one after the last step; infinite if names differ."""
    pairs = [(resumed["loaded"], first["step 2"]), (resumed["step 4"], first["step 4"])]
    if any(found.keys() != expected.keys() for found, expected in pairs):
        return math.inf, math.inf
    (loaded, saved), (last, whole) = pairs
    as_loaded = largest((loaded[name] - saved[name]).abs().max().item() for name in saved)
    return as_loaded, largest(relative(last[name], whole[name]) for name in whole)


def rows(name: str, meshes: list[str], pool: RankPool, folder: Path):
    """For each mesh, its differences in each of the three ways."""
    model = str(folder / "model")
    build(name.split()[0], torch.float32, VOCABULARY, {}).save_pretrained(model)
    has_adapter = MODELS[name]

    def run(mesh: str | None, out: Path, resume: Path | None = None, start: str = model) -> dict[str, dict]:
        task = partial(train, mesh, start, has_adapter, str(out), resume and str(resume))
        return task() if mesh is None else pool.run(math.prod(map(int, mesh.split("x"))), task)[0]

    first = {mesh: run(mesh, folder / mesh) for mesh in {*meshes, SOURCE}}
    alone = run(None, folder / "one")
    for mesh in meshes:
        saved, exported = folder / mesh / "checkpoint-2", folder / f"{mesh} exported"
        hf_tpsp.export(saved, exported)
        # The Trainer by itself does not load what transformers converts (experts): the model is loaded from the folder too.
        start = str(exported) if name == "qwen3_moe" else model
        yield (
            mesh,
            [
                compare(run(mesh, folder / f"{mesh} a", folder / SOURCE / "checkpoint-2"), first[SOURCE]),
                compare(run(mesh, folder / f"{mesh} b", folder / "one" / "checkpoint-2"), alone),
                compare(run(None, folder / f"{mesh} c", exported, start), first[mesh]),
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--meshes", nargs="+", default=MESHES, metavar="RxSxT")
    parser.add_argument("-o", "--output", type=Path, help="also write the table here, as Markdown")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ways = f"{SOURCE} → mesh", "one process → mesh", "mesh → export → one process"
    lines = [f"| model | mesh | {' | '.join(ways)} |", "| --- | --- | --- | --- | --- |"]
    print(*lines, sep="\n")
    is_right, pool = True, RankPool(preload=["peft"])
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            for mesh, differences in rows(name, args.meshes, pool, Path(folder)):
                lines.append(f"| {name} | {mesh} | {' | '.join(f'{a:.1g}, {b:.0e}' for a, b in differences)} |")
                print(lines[-1], flush=True)
                is_right &= all(loaded == 0 and last <= LIMIT for loaded, last in differences)
    pool.stop()
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
