"""`accelerate launch` on real processes: an unmodified script, and set-ups that must end at once with one clear line."""

import os
import signal
import subprocess
import sys
import time

import models
import pytest
import torch
import transformers
import yaml

from hf_tpsp import TPSPConfig
from hf_tpsp.launch import FOLDER, accelerate_config

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
folder, out, fail = sys.argv[1:]
# Before the arguments: the load itself must start the process group.
model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=folder, dtype=torch.float32)
arguments = TrainingArguments(output_dir=out, max_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
                              save_strategy="no", learning_rate=1e-2, lr_scheduler_type="constant", seed=0)
ids = torch.randint(3, 131, (16, 17), generator=torch.Generator().manual_seed(0))
class Fails(Trainer):
    def training_step(self, *args, **kwargs):
        if fail == str(self.args.process_index):
            raise RuntimeError("this rank fails")
        return super().training_step(*args, **kwargs)
trainer = Fails(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
trainer.train()
trainer.save_model(out)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny model, the script, and presets."""
    folder = tmp_path_factory.mktemp("launch")
    models.build("qwen2").save_pretrained(folder / "model")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "tp2.yaml").write_text(yaml.safe_dump(accelerate_config(TPSPConfig(tp_size=2), cpu=True)))
    return folder


def run(work, *arguments: str, limit: float = 120, launch: bool = True) -> tuple[int, str]:
    """Exit status and output. Raises TimeoutExpired, and ends all ranks, if they hang."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}
    command = [sys.executable, "-m", *(["accelerate.commands.launch"] if launch else []), *arguments]
    process = subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def test_an_unmodified_script(work):
    """On two ranks under `-m hf_tpsp`, and in one process without: the same weights come out."""
    status, output = run(work, "--config_file", "tp2.yaml", "-m", "hf_tpsp", "train.py", "model", "mesh", "no")
    assert status == 0, output
    status, output = run(
        work, "hf_tpsp", "train.py", "model", "one", "no", launch=False
    )  # and hf_tpsp alone is harmless
    assert status == 0, output
    mesh, one = (transformers.AutoModelForCausalLM.from_pretrained(work / name) for name in ("mesh", "one"))
    for a, b in zip(mesh.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    start = transformers.AutoModelForCausalLM.from_pretrained(work / "model")
    assert not torch.equal(start.lm_head.weight, mesh.lm_head.weight), "nothing was trained"


def test_a_wrong_set_up_ends_with_one_line(work):
    """One of the errors at set-up, which `test_config.py` and `test_loading.py` ask for without a launch."""
    options = ["--config_file", str(FOLDER / "cpu_2x2.yaml"), "--num_processes", "2"]
    status, output = run(work, *options, "-m", "hf_tpsp", "train.py", "model", "out", "no", limit=90)
    assert status != 0
    assert "hf_tpsp: " in output and "needs 4 ranks, but 2 were started" in output, output


def test_a_rank_that_fails_ends_the_others(work):
    start = time.monotonic()
    status, output = run(work, "--config_file", "tp2.yaml", "-m", "hf_tpsp", "train.py", "model", "out", "1", limit=120)
    assert status != 0 and "this rank fails" in output
    assert time.monotonic() - start < 90
