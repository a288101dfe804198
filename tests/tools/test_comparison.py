"""The comparison itself: NaN, infinity and what is missing are errors, wherever they stand."""

import math

import pytest
import torch
from torch import nn

from hf_tpsp.tools.verify.comparison import KINDS, Errors, compare_gradients, larger, largest, relative, relative_number


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (0.0, math.nan, 2.0)])
def test_nan_is_the_largest(order):
    assert math.isnan(largest(order)) and not largest(order) <= 1e9
    assert math.isnan(larger(*order[:2]) if len(order) == 2 else larger(larger(*order[:2]), order[2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 2e-5])
def test_one_bad_value_is_not_within(kind, bad):
    errors = Errors()
    for value in (0.0, bad, 1e-9):
        errors.add(kind, value, "name")
    assert not errors.within(1e-5) and Errors().within(1e-5)


def test_relative():
    x = torch.ones(3)
    assert relative(x, x) == 0 and math.isnan(relative(x * math.nan, x)) and math.isnan(relative(x, x * math.nan))
    assert relative(torch.zeros(2), torch.zeros(2)) == 0 and relative(torch.ones(2), torch.zeros(2)) > 1
    assert math.isnan(relative_number(1.0, math.nan)) and math.isnan(relative_number(math.nan, 1.0))


def gradients(change) -> Errors:
    reference, model = nn.Linear(3, 2), nn.Linear(3, 2)
    for part in (reference, model):
        for parameter in part.parameters():
            parameter.grad = torch.ones_like(parameter)
    change(model)
    errors = Errors()
    compare_gradients(reference, model, errors)
    return errors


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.bias.grad.fill_(math.nan),
        lambda model: model.weight.grad.fill_(math.nan),  # the first of the two: the second must not hide it
        lambda model: model.weight.grad.mul_(2),
        lambda model: setattr(model.bias, "grad", None),
    ],
)
def test_wrong_gradients(change):
    assert gradients(lambda model: None).within(0.0) and not gradients(change).within(1e-1)
