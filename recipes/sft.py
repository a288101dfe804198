"""Supervised fine-tuning with the stock Trainer: chat-formatted data, loss on the assistant's words only.

    accelerate launch --config_file hf_tpsp/presets/cpu_2x2.yaml recipes/sft.py
    accelerate launch --config_file mesh.yaml recipes/sft.py --model Qwen/Qwen2.5-7B --dataset my.jsonl --bf16

An ordinary script but for the two lines marked below. Without them it runs the same under `-m hf_tpsp recipes/sft.py`,
and with plain `python` it trains in one process. By default it needs no network: it builds a small model and trains a
tokenizer on `recipes/data/`. Every `TrainingArguments` option is an option of this script.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from sample import QUESTION, report
from tiny_model import DATA, given_or_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_tpsp  # ← the change to the script:

hf_tpsp.enable()  # ← these two lines

IGNORED = -100


@dataclass
class Script:
    model: str | None = field(
        default=None, metadata={"help": "Local folder or hub name. Default: a tiny one, made here."}
    )
    dataset: str = field(default=str(DATA), metadata={"help": "JSONL file or hub dataset with a `messages` column."})
    split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    max_length: int = field(default=256, metadata={"help": "Longer conversations are cut to this many tokens."})
    eval_rows: int = field(default=24, metadata={"help": "Rows held out to evaluate on; 0 for none."})
    sample: str = field(default=QUESTION, metadata={"help": "Asked of the saved model at the end."})


@dataclass
class Arguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the small run."""

    output_dir: str = "runs/sft"
    num_train_epochs: float = 4
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 12
    learning_rate: float = 4e-3
    adam_beta2: float = 0.95
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 10
    weight_decay: float = 0.01
    logging_steps: float = 10
    eval_strategy: str = "epoch"
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = False
    include_num_input_tokens_seen: str = "non_padding"


def tokenize(row: dict, tokenizer, max_length: int) -> dict[str, list[int]]:
    """One conversation → `input_ids`, and `labels` that are ignored outside the assistant's turns."""
    messages = row["messages"]
    ids: list[int] = []
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(messages[: turn + 1], return_dict=False)
        if whole[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
            raise ValueError("This chat template rewrites earlier turns, so its completions cannot be told apart.")
        labels += [IGNORED] * (len(prompt) - len(ids)) + whole[len(prompt) :]
        ids = whole
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def main() -> None:
    script, args = HfArgumentParser((Script, Arguments)).parse_args_into_dataclasses()
    script.model = given_or_tiny(script.model, args.output_dir, args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model)
    if script.dataset.endswith((".json", ".jsonl")):
        data = load_dataset("json", data_files=script.dataset, split="train")
    else:
        data = load_dataset(script.dataset, split=script.split)
    with args.main_process_first(desc="tokenizing"):
        data = data.map(tokenize, fn_kwargs={"tokenizer": tokenizer, "max_length": script.max_length},
                        remove_columns=data.column_names)  # fmt: skip
    data = data.filter(lambda row: any(label != IGNORED for label in row["labels"][1:]))
    held_out = data.train_test_split(test_size=script.eval_rows, seed=args.seed) if script.eval_rows else None
    if held_out is None:
        args.eval_strategy = "no"

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype="float32"),
        args=args,
        train_dataset=held_out["train"] if held_out else data,
        eval_dataset=held_out["test"] if held_out else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    report(trainer, script.sample)


if __name__ == "__main__":
    main()
