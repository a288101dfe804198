"""Ask a saved model something, in one process: `python recipes/sample.py FOLDER "question"`. Plain transformers."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f'usage: {sys.argv[0]} FOLDER "question"')
    folder, question = sys.argv[1:]
    logging.disable_progress_bar()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    print(f"{question}\n{tokenizer.decode(answer[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
