"""NaN and Inf: nothing steps on them, all ranks say where they arose, and a step that is skipped leaves no trace."""

import models
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from training import Rows
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_tpsp
from hf_tpsp import TPSPConfig
from hf_tpsp.fingerprint import fingerprint
from hf_tpsp.forward.finite import guard_of
from hf_tpsp.tools.estimate.recorders import CollectiveBytes


class Odd(torch.autograd.Function):
    """A gradient of which one element is not finite."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[3] = ctx.value
        return grad, None


def state_of(model, optimizer) -> list[torch.Tensor]:
    tensors = [p.detach()._local_tensor for p in model.parameters()]
    for state in optimizer.state.values():
        tensors += [x._local_tensor if isinstance(x, DTensor) else x for x in state.values()]
    return [x.clone() for x in tensors]


def loop(where: str, value: float, clip: bool, on_nan: str) -> tuple[str, bool, int]:
    """A plain loop of four steps, the third with a value that is not finite on the last rank. Returns what is raised,
    whether weights and optimizer are those of two steps, and how many entries the optimizer's count then has."""
    model = hf_tpsp.parallelize(models.build("llama"), TPSPConfig(tp_size=2, on_nan=on_nan)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    odd = dist.get_rank() == dist.get_world_size() - 1
    text, before = "", []

    def spoil(module, args, output):
        if step != 2 or not odd:
            return None
        if where == "output":
            return output * torch.full_like(output, value)
        return Odd.apply(output, value)

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(spoil)
    for step in range(4):
        if step == 2:
            before = state_of(model, optimizer)
        if step == 3:
            same = all(map(torch.equal, before, state_of(model, optimizer)))
            handle.remove()
            if text:
                break
        for part in range(2):
            (model(**models.batch(2, 17, seed=10 * step + part)).loss / 2).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        try:
            optimizer.step()
        except FloatingPointError as error:
            text = str(error)
        optimizer.zero_grad()
    return text, same, guard_of(model).skipped if on_nan == "skip" else -1


@pytest.mark.parametrize(
    ("where", "value", "clip"),
    [("output", torch.nan, True), ("gradient", torch.inf, True), ("gradient", torch.nan, False)],
)
def test_stop_names_step_module_and_batch(ranks, where, value, clip):
    print_of = int(fingerprint(models.batch(2, 17, seed=20)["input_ids"])) % 2**64
    for text, same, _ in ranks.run(2, loop, where, value, clip, "stop"):
        assert same and "the gradient norm of step 3 is " in text
        met = "the output of" if where == "output" else "the gradient that comes to the output of"
        assert f"First, {met} model.layers.1.mlp" in text
        assert f"of micro-batch 1 of 2, input_ids [2, 17] with the fingerprint {print_of:016x} (rank 0, 1)" in text


def test_skip_and_ignore(ranks):
    for text, same, skipped in ranks.run(2, loop, "gradient", torch.nan, True, "skip"):
        assert (text, same, skipped) == ("", True, 1)
    assert all(not same and not text for text, same, _ in ranks.run(2, loop, "gradient", torch.nan, True, "ignore"))


class Spoils(TrainerCallback):
    """Puts an Inf into a weight's gradient in the third step, behind the loss, which stays finite."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            weight = model.model.layers[0].mlp.gate_proj
            self.handle = weight.register_forward_hook(lambda module, given, output: Odd.apply(output, torch.inf))


def under_the_trainer(out: str) -> tuple[str, int, dict[str, int]]:
    with hf_tpsp.enable(TPSPConfig(tp_size=2)):
        model = models.build("qwen2", vocab_size=132)
        args = TrainingArguments(
            out, max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, max_grad_norm=0.5,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=Rows(16, 1), callbacks=[spoils := Spoils()])
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        spoils.handle.remove()
        model(**models.batch(2, 17)).loss.backward()
        with CollectiveBytes() as sent:
            norm = trainer.accelerator.clip_grad_norm_(model.parameters(), 0.5)
            assert norm.item() > 0
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.step()
        return str(error.value), len(trainer.state.log_history), {k: t.count for k, t in sent.traffic.items()}


def test_under_the_trainer(ranks, tmp_path):
    for text, logged, sent in ranks.run(2, under_the_trainer, str(tmp_path)):
        assert "the gradient norm of step 3 is " in text and "model.layers.0." in text
        assert logged == 2
        # The clipping's own, which stands for the check and for what is logged too.
        assert sent == {"all-reduce": 1}
