"""A training loop of one's own on accelerate: prepare, accumulate, clip, save, resume.

    accelerate launch --config_file hf_tpsp/presets/cpu_2x2.yaml recipes/accelerate_loop.py
    accelerate launch --config_file mesh.yaml recipes/accelerate_loop.py --model Qwen/Qwen2.5-7B --dataset my.jsonl

An ordinary loop but for the two lines marked below; with plain `python` it trains in one process, with the same losses. It
saves its state half-way, goes on, and ends with an ordinary Hugging Face folder. By default it needs no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from tiny_model import DATA, given_or_tiny
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import hf_tpsp  # ← the change to the script:

hf_tpsp.enable()  # ← these two lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="local folder or hub name (default: a tiny one, made here)")
    parser.add_argument("--dataset", default=str(DATA), help="JSONL file with a `messages` column")
    parser.add_argument("--out", default="runs/accelerate_loop", help="folder of the state and of the trained model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="rows of all ranks together, for one backward")
    parser.add_argument("--resume", action="store_true", help="go on from the state that was saved half-way")
    args = parser.parse_args()
    if min(args.steps, args.batch) < 1:
        parser.error(f"--steps {args.steps} and --batch {args.batch} must both be at least 1")

    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    args.model = given_or_tiny(args.model, args.out)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset("json", data_files=args.dataset, split="train")
    with accelerator.main_process_first():
        data = data.map(
            lambda row: {"input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=False)[:256]},
            remove_columns=data.column_names,
        )
    # What is dealt to the ranks: ranks of one TP group get the same rows.
    mesh = accelerator.parallelism_config
    dp_size = mesh.data_parallel_size if mesh else accelerator.num_processes
    if args.batch % dp_size:
        parser.error(f"--batch {args.batch} must be a multiple of the {dp_size} data-parallel ranks")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(
        data, batch_size=args.batch // dp_size, shuffle=True, generator=order, collate_fn=collate, drop_last=True
    )

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()

    state, step, half = Path(args.out) / "state", 0, args.steps // 2
    if args.resume:
        accelerator.load_state(state)
        step = half
        loader = accelerator.skip_first_batches(loader, half * accelerator.gradient_accumulation_steps)
    while step < args.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                # Each row counts alike on every mesh: a batch's mean would weigh its tokens by how it was dealt.
                items = accelerator.reduce((batch["labels"][:, 1:] != -100).sum(), "sum")
                items = items / (accelerator.num_processes // dp_size)
                loss = model(**batch, num_items_in_batch=items).loss * dp_size
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            mean = accelerator.reduce(loss.detach().clone(), "mean")
            accelerator.print(f"step {step}: loss {mean.item():.6f}, gradient norm {float(norm):.6f}", flush=True)
            if step == half and not args.resume:
                accelerator.save_state(state)
            if step == args.steps:
                break

    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        args.out, state_dict=weights, is_main_process=accelerator.is_main_process
    )
    accelerator.print(f"saved to {args.out}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
