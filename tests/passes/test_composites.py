"""Composite ops that have no rule are opened into parts that have, and nothing changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autotp.check import compare, prepare
from autotp.errors import CaptureError
from autotp.grid import as_grid
from autotp.passes.capture.model import capture
from tests.random_plans import random_plan


class Call(nn.Module):
    """One function of a parameter times the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x * self.scale)


COMPOSITES = {
    "moved": lambda x: x.movedim(1, 0),
    "tiled": lambda x: x.tile(2, 3),
    "taken along": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "contracted": lambda x: torch.tensordot(x, x, ([1], [1])),
    "spectrum": lambda x: torch.fft.rfft(x, dim=1).abs(),
    "median": lambda x: x.quantile(0.5, dim=1),
    "mean of numbers": lambda x: x.nanmean(1),
    "split": lambda x: torch.tensor_split(x, 4, dim=1),
    "stacked": lambda x: torch.hstack([x, x]),
    "conjugated": lambda x: torch.view_as_complex(x.unflatten(1, (3, 2))).conj().imag,
    "written": lambda x: torch.slice_scatter(x.new_empty(4, 8), x, 1, 1, 7)[:, 1:7],
    "begun empty": lambda x: torch.cat([torch.empty(0).type_as(x), x, x], dim=1),
    "leaks": lambda x: F.prelu(x, x.new_full((6,), 0.1)),
}


def captured(function, x):
    program = capture(Call(function), (x,), {}, train=True)
    return {str(n.target) for n in program.graph_module.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_is_opened_and_computes_the_same(name):
    x = torch.randn(4, 6, dtype=torch.float64)
    subject = prepare(Call(COMPOSITES[name]).double(), (x,), {})
    assert not subject.network.unruled
    for seed, grid in enumerate(((2,), (2, 2), (3,))):
        report = compare(subject, random_plan(subject, as_grid(grid), seed))
        assert report.ok, report


@pytest.mark.parametrize("cell", (nn.LSTMCell, nn.GRUCell, nn.RNNCell))
def test_cells_of_recurrent_networks_are_opened(cell):
    subject = prepare(cell(6, 8).double(), (torch.randn(4, 6, dtype=torch.float64),), {})
    assert not subject.network.unruled
    assert any("addmm" in str(op.call.op) for op in subject.network.ops)
    report = compare(subject, random_plan(subject, as_grid((2, 2)), 0))
    assert report.ok, report


def test_what_has_a_rule_stays_whole():
    linear = captured(lambda x: F.linear(x, x), torch.randn(4, 6))
    assert "aten.linear.default" in linear


def test_what_looks_at_values_stays_whole():
    found = captured(lambda x: torch.linalg.solve(x, x), torch.randn(3, 3))
    assert "aten.linalg_solve.default" in found


def transposed(x):
    return x.t().as_strided((2, 3, 4), (12, 4, 1)).sin()


def put_in_place(x):
    y = x.clone()
    y.as_strided((4, 2), (6, 3)).copy_(x[:, :2] * 2)
    return y.sin()


@pytest.mark.parametrize(
    "function",
    (lambda x: x.as_strided((3, 4), (2, 1), 3).sin(), transposed, put_in_place),
    ids=("windows", "transposed", "written"),
)
def test_what_reads_memory_by_strides_looks_up_what_lies_there(function):
    x = torch.randn(4, 6, dtype=torch.float64)
    subject = prepare(Call(function).double(), (x,), {})
    for seed, grid in enumerate(((2,), (2, 2), (3,))):
        report = compare(subject, random_plan(subject, as_grid(grid), seed))
        assert report.ok, report


def test_memory_beyond_the_operand_is_refused():
    with pytest.raises(CaptureError, match="as_strided reads memory beyond"):
        captured(lambda x: x[:, 1:].as_strided((2, 2), (1, 1)), torch.randn(4, 6))


@pytest.mark.parametrize("view", (True, False))
def test_dropout_in_place_stays_dropout(view):
    def drop(x):
        y = x.exp()
        return F.dropout(y.flatten() if view else y, 0.5, inplace=True)

    assert "aten.dropout.default" in captured(drop, torch.randn(4, 6))


def test_dropout_in_place_reaches_what_shares_its_memory():
    def drop(x):
        y = x.exp()
        z = y.flatten()
        F.dropout(z, 0.5, inplace=True)
        return y

    assert "aten.dropout.default" not in captured(drop, torch.randn(4, 6))
