"""Where each scheme wins by bytes, and the crossovers that bound the regions."""

from dataclasses import replace

import pytest
from sympy import Integer

from autotp import cli
from autotp.cost_model.closed_forms import (
    a,
    b,
    batch_tensor,
    fully_sharded,
    h,
    megatron_1d,
    p,
    q,
    s,
    summa_ab,
    tokens,
)
from autotp.cost_model.cluster import Link, bandwidth_bound
from autotp.errors import GridError
from autotp.regions import KEPT, candidates, crossings, win_regions

CHIPS = bandwidth_bound(1.0)
SEQ = 128


def test_a_candidate_takes_its_closed_form():
    found = {(c.scheme, c.grid): c for c in candidates(16)}
    forms = {
        ("1D", (16,)): megatron_1d(Integer(16)),
        ("FSDP", (16,)): fully_sharded(Integer(16), KEPT),
        ("batch x tensor", (2, 8)): batch_tensor(Integer(2), Integer(8)),
    }
    for key, form in forms.items():
        sent = float(form.subs({b: 4, s: SEQ, h: 96}))
        assert found[key].seconds_per_byte(CHIPS, 4, SEQ, 96) == pytest.approx(sent)


def test_the_regions_end_where_the_formulas_say():
    at = dict(crossings())["batch x tensor, FSDP"]
    batches, hidden = [4 * n for n in range(1, 40)], 512
    row = win_regions(4, CHIPS, SEQ, batches, [hidden]).winners[0]
    border = float(at.subs({a: 2, h: hidden})) / SEQ
    for batch, winner in zip(batches, row, strict=True):
        if batch != border:
            assert (winner.scheme == "FSDP") == (batch > border), (batch, border)


def test_crossings_are_where_both_send_the_same():
    found = dict(crossings())
    for names, one, other in [
        ("1D, FSDP", megatron_1d(), fully_sharded(g=KEPT)),
        ("1D, batch x tensor", megatron_1d(), batch_tensor()),
        ("1D, 2D (A B)", megatron_1d(q**2), summa_ab(g=KEPT)),
    ]:
        sizes = {p: 16, q: 4, a: 2, h: 64}
        both = [f.subs(b, tokens / s).subs(tokens, found[names]).subs(sizes) for f in (one, other)]
        assert both[0] == both[1] > 0


def test_a_slow_link_between_nodes_moves_the_border():
    slow = replace(CHIPS, ranks_per_node=4, inter=Link(0.0, 0.1))
    (row,) = win_regions(16, slow, SEQ, [16 * n for n in range(1, 200)], [512]).winners
    (same,) = win_regions(16, CHIPS, SEQ, [16 * n for n in range(1, 200)], [512]).winners
    count = [sum(w.scheme == "batch x tensor" for w in found) for found in (row, same)]
    assert count[0] != count[1]


def test_a_batch_that_does_not_divide_is_not_split():
    (row,) = win_regions(4, CHIPS, 10**6, [1, 2, 3, 4], [64]).winners
    assert all(n % w.batch_ranks == 0 for n, w in zip([1, 2, 3, 4], row, strict=True))
    assert row[3].scheme == "FSDP" and "FSDP" not in {w.scheme for w in row[:3]}


def test_the_map_and_the_command_line(capsys):
    assert cli.main(["regions", "--ranks", "16", "--cluster", "gloo_loopback"]) == 0
    out = capsys.readouterr().out
    assert "F FSDP" in out and "T = 3*h\n" in out and "2048 |" in out


def test_one_rank_sends_nothing():
    with pytest.raises(GridError, match="at least 2"):
        win_regions(1, CHIPS, SEQ, [1], [1])
