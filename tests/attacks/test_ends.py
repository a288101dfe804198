"""Options whose end was unclear are refused by name."""

import pytest
import transformers

from hf_tpsp.trainer import check_training_arguments


@pytest.mark.parametrize(
    "option",
    [
        {"enable_jit_checkpoint": True},
        {"gradient_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
    ],
    ids=lambda option: list(option)[-1],
)
def test_refused_by_name(tmp_path, option):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **option)
    with pytest.raises(ValueError, match=list(option)[-1]):
        check_training_arguments(args)
