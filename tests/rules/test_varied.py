"""Every rule against arithmetic, on generated calls: other sizes, operands and grids."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from autotp.errors import RuleError
from autotp.passes.rules import find, rows, table
from tests.fuzz.rules import prove
from tests.rules.varied import FIXED, SIZES, is_tensor, resized, runs

aten = torch.ops.aten
NAMES = {op.name().removeprefix("aten::"): op for op in FIXED}


@pytest.mark.parametrize("name", NAMES)
def test_generated_calls_prove_the_rule(name):
    assert prove(NAMES[name], examples=2)["strategies"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_generated_calls_prove_the_rule(name):
    assert prove(NAMES[name], examples=40)["strategies"]


def test_every_row_has_a_generator():
    assert {rule.op for rule in rows()} <= {find(op).op for op in FIXED if find(op)}


def test_factors_that_may_split_take_other_sizes():
    rigid = {op for op, fixed in FIXED.items() if not any(other_shapes(op, call) for call in fixed)}
    assert rigid <= WHOLE


WHOLE = {aten.embedding_bag.padding_idx, aten.histc.default, aten.stft.center}
"""Ops whose every factor is whole."""


def other_shapes(op, call):
    """Say whether a call can take another size, of its free factors or of all."""
    for size, all_of_them in itertools.product((3, 6), (False, True)):
        new = resized(lambda s: size if s is SIZES else all_of_them, op, *call)  # noqa: B023
        if runs(op, *new) and shapes(new) != shapes(call):
            return True
    return False


def shapes(call):
    return [t.shape for t in pytree.tree_leaves(call) if is_tensor(t)]


def test_a_wrong_rule_is_refuted_by_generated_calls(monkeypatch):
    wrong = replace(find(aten.mean.dim), average=None)
    monkeypatch.setitem(table._TABLE, aten.mean.dim, wrong)
    with pytest.raises(RuleError, match=r"rule of aten\.mean\.dim is wrong"):
        prove(aten.mean.dim, examples=20)
