"""Patterns pin ops and parameters, each by its own words."""

import pytest
import torch

from autotp.errors import PinError
from tests.passes.test_codegen import Mlp, planned


def plan(pins):
    return planned(Mlp(), torch.randn(4, 8), (1, 2), pins)[3]


def test_a_wildcard_with_a_factor_pins_ops_and_leaves_parameters_alone():
    assert plan({"fc1*": {"col": "o"}})["fc1"].factors == {"col": "o"}


def test_a_wildcard_with_a_type_pins_parameters_and_leaves_ops_alone():
    params = plan({"fc*.weight": {"col": "S(1)"}}).params
    assert [str(params[f"fc{k}.weight"].layout[1]) for k in (1, 2)] == ["S(1)", "S(1)"]


@pytest.mark.parametrize(
    ("pins", "fact"),
    [
        ({"*.weight": {"col": "o"}}, "matches parameters only, and 'o' is not for them"),
        ({"relu*": {"col": "S(0)"}}, "matches ops only, and 'S(0)' is not for them"),
        ({"fc9": {"col": "o"}}, "matches no op and no parameter; nearest: fc2, fc1"),
        ({"fc1": {"cols": "o"}}, "no axis 'cols'; the grid has row, col"),
        ({"fc1": {"col": "z"}}, "'z' on axis 'col' of 2: legal are I, R, P0, P1, b, i, o"),
    ],
)
def test_a_pin_that_fits_nothing_is_refused_with_what_would(pins, fact):
    with pytest.raises(PinError) as refusal:
        plan(pins)
    assert fact in str(refusal.value)
