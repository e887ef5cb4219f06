"""Every rule that draws: what ranks draw apart has the structure of what one device draws."""

from dataclasses import replace

import pytest
import torch

from autotp.passes.rules import find, rows
from tests.rules.draws import CALLS, assert_drawn_like_one

aten = torch.ops.aten


@pytest.mark.parametrize(("op", "args", "kwargs"), CALLS, ids=[str(op) for op, *_ in CALLS])
def test_ranks_draw_together_what_one_device_could(op, args, kwargs):
    assert_drawn_like_one(op, args, kwargs)


def test_every_row_that_draws_has_a_call():
    assert {rule.op for rule in rows() if rule.random} == {op for op, *_ in CALLS}


def test_a_channel_that_is_dropped_in_part_is_noticed():
    op = aten.feature_dropout.default
    ((_, args, kwargs),) = [call for call in CALLS if call[0] is op]
    with pytest.raises(AssertionError):
        assert_drawn_like_one(op, args, kwargs, replace(find(op), sentence="n c x -> n c x"))
