"""LoRA with peft and the stock Trainer: adapters on every linear layer of a sharded, frozen model.

    accelerate launch --config_file hf_tpsp/presets/cpu_2x2.yaml recipes/sft_lora.py
    accelerate launch --config_file mesh.yaml recipes/sft_lora.py --model Qwen/Qwen2.5-7B --dataset my.jsonl --bf16

An ordinary script but for the two lines marked below; with plain `python` it trains in one process. The adapter is saved as
an ordinary peft folder, which one process loads, merges and answers from at the end. By default it needs no network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from sample import report
from tiny_model import DATA, given_or_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_tpsp  # ← the change to the script:

hf_tpsp.enable()  # ← these two lines


@dataclass
class Script:
    model: str | None = field(
        default=None, metadata={"help": "Local folder or hub name. Default: a tiny one, made here."}
    )
    dataset: str = field(default=str(DATA), metadata={"help": "JSONL file with a `messages` column."})
    max_length: int = field(default=256, metadata={"help": "Longer conversations are cut to this many tokens."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapters."})


@dataclass
class Arguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the small run."""

    output_dir: str = "runs/sft_lora"
    max_steps: int = 40
    per_device_train_batch_size: int = 4
    learning_rate: float = 1e-2
    warmup_steps: float = 4
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = False


def main() -> None:
    script, args = HfArgumentParser((Script, Arguments)).parse_args_into_dataclasses()
    script.model = given_or_tiny(script.model, args.output_dir, args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model)

    def tokenize(row: dict) -> dict:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        return {"input_ids": ids[: script.max_length]}

    data = load_dataset("json", data_files=script.dataset, split="train")
    with args.main_process_first(desc="tokenizing"):
        data = data.map(tokenize, remove_columns=data.column_names)

    model = AutoModelForCausalLM.from_pretrained(script.model, dtype="float32")
    adapter = LoraConfig(r=script.rank, lora_alpha=2 * script.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(model, adapter),
        args=args,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    report(trainer)


if __name__ == "__main__":
    main()
