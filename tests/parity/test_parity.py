"""What DTensor allows and we do not has its reason, and the page of it is up to date."""

import pytest
import torch

from autotp.layouts import I, P, shard
from tests.parity import dtensor
from tests.parity.compare import Found
from tests.parity.table import PAGE, compared, missing, render
from tests.rules.cases import calls, ints, mask, x

aten = torch.ops.aten

SAMPLE = [
    (aten.mm.default, (x(4, 8), x(8, 6)), {}),
    (aten.linear.default, (x(2, 3, 8), x(6, 8), x(6)), {}),
    (aten.embedding.default, (x(12, 6), ints(12, 3, 4)), {}),
    (aten.layer_norm.default, (x(2, 3, 6), [6], x(6), x(6)), {}),
    (aten.softmax.int, (x(4, 6), -1), {}),
    (aten.amax.default, (x(4, 6), [1]), {}),
    (aten.mean.dim, (x(4, 6), [1]), {}),
    (aten.any.default, (mask(4, 6),), {}),
    (aten.take.default, (x(4, 6), ints(24, 3)), {}),
    (aten.reshape.default, (x(2, 4, 6), [8, 6]), {}),
]


def test_a_sample_of_ops_differs_for_reasons():
    found = compared(SAMPLE)
    assert len(found) == len(SAMPLE)
    assert all(c.ours & set(c.theirs) for c in found if c.op not in ("amax", "any"))
    assert all(m.reason for c in found for m in missing(c))


def test_matmul_is_split_alike():
    (mm,) = compared(SAMPLE[:1])
    assert mm.ours == set(mm.theirs)
    assert Found(("S(1)", "S(0)"), ("P",)) in mm.ours


def test_a_call_that_would_move_an_operand_is_not_allowed():
    args = tuple(t.detach() for t in SAMPLE[0][1])
    with dtensor.fake_ranks() as mesh, dtensor.as_rank(mesh, 0):
        for types, allowed in (((shard(0), I), True), ((shard(0), P), False)):
            pieces = [dtensor.cut(t, k)[0] for t, k in zip(args, types, strict=True)]
            made = dtensor.run(mesh, SAMPLE[0][0], args, {}, types, pieces)
            assert (made is not None) is allowed


def test_a_wrong_answer_is_refuted():
    (conv,) = compared([(aten.conv1d.default, (x(4, 6, 7), x(8, 6, 3)), {})])
    assert conv.theirs[Found(("R", "P"), ("R",))] is False
    assert {m.reason for m in missing(conv)} == {"refuted", "edges"}


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__[:4] != "2.13", reason="the page is of torch 2.13")
def test_the_page_is_up_to_date_and_every_difference_has_its_reason():
    assert PAGE.read_text() == render(), "python -m tests.parity.table writes it"
    assert "None" not in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["view", "reduction", "loss"])
def test_no_difference_is_without_a_reason(family):
    assert [m for c in compared(calls(family)) for m in missing(c) if not m.reason] == []
