"""Where each scheme wins, over batch and hidden size, by what one transformer layer sends.

    win_regions   the scheme that sends in the least time at each batch and hidden size
    crossings     the tokens T = b s at which two schemes send the same, in symbols

The volumes are the closed forms of `cost_model.closed_forms`. What grows with the tokens goes over
the inner axis of a grid, what grows with the weights over the outer one, each at the bandwidth of
its link; a grid whose both parts grow with the tokens is taken at the slower. Latency is left out,
and compute, which all divide alike: `autotp.grids` plans a model with both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
from rich.text import Text
from sympy import Expr, Integer, Poly

from autotp.cost_model.closed_forms import (
    b,
    batch_tensor,
    crossover,
    fully_sharded,
    h,
    megatron_1d,
    q,
    s,
    summa_ab,
    summa_abt,
    weight_stationary,
)
from autotp.cost_model.cluster import Cluster
from autotp.errors import GridError
from autotp.formula import formula_text

KEPT = Integer(2)
"""g of the closed forms: what forward gathered is kept for backward."""

MARKS = {"1D": ("1", "blue"), "batch x tensor": ("B", "green"), "2D": ("2", "red")}
MARKS |= {"FSDP": ("F", "yellow")}
"""Per scheme, its letter and its color in the map."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scheme on one grid: the shares of T h and of h^2 that a rank sends, outer axis first.

    batch_ranks   what the batch must be a multiple of
    """

    scheme: str
    grid: tuple[int, ...]
    tokens: float
    weights: float
    batch_ranks: int = 1

    def seconds_per_byte(self, cluster: Cluster, batch: int, seq: int, hidden: int) -> float:
        """Return the seconds that a layer's elements take, at one byte each."""
        speeds = [
            cluster.link(self.grid, axis).bandwidth_bytes_per_s for axis in range(len(self.grid))
        ]
        inner = speeds[-1] if self.weights else min(speeds)
        tokens_s = self.tokens * batch * seq * hidden / inner
        return tokens_s + self.weights * hidden**2 / speeds[0]


@dataclass(frozen=True, slots=True)
class Regions:
    """The winners: one row per hidden size, one column per batch."""

    ranks: int
    cluster: str
    seq: int
    batches: tuple[int, ...]
    hiddens: tuple[int, ...]
    winners: tuple[tuple[Candidate, ...], ...]

    def __str__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        out = Text(
            f"fastest by bytes of one layer on {self.ranks} ranks of {self.cluster},"
            f" sequence {self.seq}\n\n"
        )
        for hidden, row in reversed(list(zip(self.hiddens, self.winners, strict=True))):
            out.append(f"{hidden:>8} |")
            for winner in row:
                mark, color = MARKS[winner.scheme]
                out.append(f"{mark:>6}", style=color)
            out.append("\n")
        out.append(f"{'hidden':>8} +" + "-" * 6 * len(self.batches) + "\n")
        out.append(" " * 10 + "".join(f"{n:>6}" for n in self.batches) + "  batch\n\n")
        seen = dict.fromkeys(winner.scheme for row in self.winners for winner in row)
        out.append("   ".join(f"{MARKS[name][0]} {name}" for name in MARKS if name in seen))
        out.append("\n\nas many bytes, over links of one bandwidth, at T = batch * sequence of\n")
        for names, formula in crossings():
            out.append(f"  {names:<24} T = {formula_text(formula)}\n")
        return out


def win_regions(
    ranks: int, cluster: Cluster, seq: int, batches: Sequence[int], hiddens: Sequence[int]
) -> Regions:
    """Return the scheme that sends in the least time at each batch and hidden size.

    Raises GridError for fewer than two ranks, of which none sends.
    """
    if ranks < 2:
        raise GridError(f"{ranks} ranks send nothing: at least 2 are needed", remedy="ranks=4")
    every = list(candidates(ranks))

    def winner(batch: int, hidden: int) -> Candidate:
        able = [c for c in every if batch % c.batch_ranks == 0]
        return min(able, key=lambda c: c.seconds_per_byte(cluster, batch, seq, hidden))

    winners = tuple(tuple(winner(batch, hidden) for batch in batches) for hidden in hiddens)
    return Regions(ranks, cluster.name, seq, tuple(batches), tuple(hiddens), winners)


def candidates(ranks: int) -> Iterator[Candidate]:
    """Yield every scheme on every grid of `ranks`; of equals the first is taken."""
    whole = Integer(ranks)
    yield _candidate("1D", (ranks,), megatron_1d(whole))
    yield _candidate("FSDP", (ranks,), fully_sharded(whole, KEPT), ranks)
    for outer in range(2, ranks):
        if ranks % outer == 0:
            grid = (outer, ranks // outer)
            sizes = [Integer(n) for n in grid]
            yield _candidate("batch x tensor", grid, batch_tensor(*sizes), outer)
            yield _candidate("2D", grid, weight_stationary(*sizes))
            if grid[0] == grid[1]:
                yield _candidate("2D", grid, summa_ab(sizes[0], KEPT), outer)
                yield _candidate("2D", grid, summa_abt(sizes[0], KEPT), outer)


def _candidate(scheme: str, grid: tuple[int, ...], sent: Expr, batch_ranks: int = 1) -> Candidate:
    parts = Poly(sent, b, s, h)
    tokens, weights = (float(parts.coeff_monomial(term)) for term in (b * s * h, h**2))
    assert math.isfinite(tokens + weights)
    return Candidate(scheme, grid, tokens, weights, batch_ranks)


def crossings() -> list[tuple[str, Expr]]:
    """Return at how many tokens T two schemes send the same: p ranks, the batch over a, p = q^2."""
    pairs = [
        ("1D, FSDP", megatron_1d(), fully_sharded(g=KEPT)),
        ("1D, batch x tensor", megatron_1d(), batch_tensor()),
        ("batch x tensor, FSDP", batch_tensor(), fully_sharded(g=KEPT)),
        ("1D, 2D (A B)", megatron_1d(q**2), summa_ab(g=KEPT)),
        ("1D, 2D (A B^T)", megatron_1d(q**2), summa_abt(g=KEPT)),
        ("2D (A B^T), FSDP", summa_abt(g=KEPT), fully_sharded(q**2, KEPT)),
    ]
    found = [(names, crossover(one, other)) for names, one, other in pairs]
    return [(names, sympy.factor(at)) for names, at in found if at is not None]
