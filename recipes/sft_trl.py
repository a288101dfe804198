"""Supervised fine-tuning with TRL's SFTTrainer: packed conversations, a model given by name.

    accelerate launch --config_file hf_tpsp/presets/cpu_2x2.yaml -m hf_tpsp recipes/sft_trl.py
    accelerate launch --config_file mesh.yaml -m hf_tpsp recipes/sft_trl.py --model Qwen/Qwen2.5-7B --dataset my.jsonl --bf16

Nothing in it knows of hf_tpsp; with plain `python` it trains in one process. TRL's own `trl/scripts/sft.py` runs the same
way. By default it needs no network: it builds a small model and trains a tokenizer on `recipes/data/`. Every `SFTConfig`
option is an option of this script.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from sample import report
from tiny_model import DATA, given_or_tiny
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class Script:
    model: str | None = field(
        default=None, metadata={"help": "Local folder or hub name. Default: a tiny one, made here."}
    )
    dataset: str = field(default=str(DATA), metadata={"help": "JSONL file or hub dataset with a `messages` column."})


@dataclass
class Arguments(SFTConfig):
    """`SFTConfig` with the defaults of the small run."""

    output_dir: str = "runs/sft_trl"
    max_steps: int = 40
    per_device_train_batch_size: int = 4
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 4
    max_length: int = 256
    packing: bool = True
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool | None = False
    gradient_checkpointing: bool = False
    dataloader_pin_memory: bool = False


def main() -> None:
    script, args = HfArgumentParser((Script, Arguments)).parse_args_into_dataclasses()
    script.model = given_or_tiny(script.model, args.output_dir, args.seed)
    local = script.dataset.endswith((".json", ".jsonl"))
    data = load_dataset("json", data_files=script.dataset) if local else load_dataset(script.dataset)
    trainer = SFTTrainer(model=script.model, args=args, train_dataset=data["train"])
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    report(trainer)


if __name__ == "__main__":
    main()
