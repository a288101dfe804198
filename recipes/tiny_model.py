"""A small Qwen2-shaped chat model and a tokenizer trained on the shipped data: what a recipe trains when it is given
neither a model nor a hub. Both are saved in the ordinary format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DATA = Path(__file__).parent / "data" / "instructions.jsonl"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the shipped conversations, with Qwen's chat markup."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=CHAT_TEMPLATE
    )


def save_tiny_model(folder: str | Path, seed: int = 0) -> None:
    """Write a random 4-layer Qwen2 of 3.7 M parameters (8 heads, 4 kv heads, tied) and its tokenizer to `folder`."""
    tokenizer = train_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def given_or_tiny(model: str | None, out: str, seed: int = 0) -> str:
    """`model`, or, if the script was given none, the folder of a tiny one, which the first process makes in `out`.

    Call it after the script's `TrainingArguments` or `Accelerator` are made."""
    if model is not None:
        return model
    folder, state = Path(out) / "tiny_model", PartialState()
    with state.main_process_first():
        if state.is_main_process:
            save_tiny_model(folder, seed)
    return str(folder)
