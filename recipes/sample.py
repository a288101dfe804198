"""Ask a saved model something, in one process: `python recipes/sample.py FOLDER "question"`. Plain transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.utils import logging

QUESTION = "What is the capital of France?"


def report(trainer: Trainer, question: str = QUESTION) -> None:
    """The first process says what a run has come to, and asks the model that it saved."""
    if not trainer.is_world_process_zero():
        return
    losses, folder = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.args.output_dir
    print(f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f}; saved to {folder}", flush=True)
    # What was saved is an ordinary checkpoint: one process, which knows nothing of hf_tpsp, answers from it.
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, __file__, folder, question], env=alone, check=True)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f'usage: {sys.argv[0]} FOLDER "question"')
    folder, question = sys.argv[1:]
    if not Path(folder).is_dir():
        sys.exit(f"there is no folder {folder!r}: give the one that a recipe has saved its model in")
    logging.disable_progress_bar()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    print(f"{question}\n{tokenizer.decode(answer[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
