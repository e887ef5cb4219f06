"""Closed forms: elements that one rank sends per transformer layer, forward and backward, in sympy.

sent_volume             sum of ring counts over symbolic collectives: a plan's own formula
megatron_1d             8 (p-1)/p T h
summa_ab, summa_abt     g (q-1)/q^2 (7 T h + 12 h^2), and 4 T h where fc2 is C = A B^T
weight_stationary       T h / (r c) (24 (r-1) + 8 (c-1))
batch_tensor            8 (n-1)/n T h / a + 24 (a-1)/(a n) h^2, n = p / a
fully_sharded           g (p-1)/p 12 h^2
ring_attention          2 (3p-2)/p T h
two_level_volume        inside nodes and between them, m ranks in each of k nodes
crossover               the tokens T = b s at which two of them are equal
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import sympy
from sympy import Expr, Integer, Symbol

from autotp.cost_model.collectives import FREE, ROUNDS
from autotp.cost_model.levels import STAGES

Collective = tuple[str, Expr, Expr]
"""A kind, the size of its whole buffer, its ranks."""

b, s, h, p, q, r, c, g, a = sympy.symbols("b s h p q r c g a", positive=True)
"""batch, sequence, hidden; ranks, side of a square grid, rows, columns; gathers, batch's axis."""

tokens = Symbol("T", positive=True)
"""b s, as `crossover` solves for it."""


def sent_volume(collectives: Iterable[Collective]) -> Expr:
    """Return what each rank sends in all `collectives`, in the unit of their sizes, factored.

    Source: Patarasuk and Yuan 2009, as in `collectives.sent_bytes`.

    >>> sent_volume([("all_reduce", b * s * h, p)] * 4)
    8*b*h*s*(p - 1)/p
    """
    sizes: dict[Expr, Expr] = defaultdict(lambda: Integer(0))
    for kind, size, ranks in collectives:
        if kind not in FREE:
            sizes[sympy.sympify(ranks)] += ROUNDS[kind] * size
    terms = [sympy.factor(size) * (n - 1) / n for n, size in sizes.items()]
    return sympy.factor_terms(sympy.Add(*terms))


def megatron_1d(p: Expr = p) -> Expr:
    """All-reduce every token's hidden state four times.

    With sequence parallelism each is a reduce-scatter and an all-gather: the same volume.

    Source: Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022, section 4.
    """
    return 8 * (p - 1) / p * b * s * h


def summa_ab(q: Expr = q, g: Expr = g) -> Expr:
    """Gather A along rows and B along columns of a q x q grid for each of the four linears.

    Source: van de Geijn and Watts 1997, "SUMMA"; g = 3 gathers again for backward, 2 keeps.
    """
    return g * (q - 1) / q**2 * (7 * b * s * h + 12 * h**2)


def summa_abt(q: Expr = q, g: Expr = g) -> Expr:
    """As `summa_ab`, with fc2 as C = A B^T, which moves its h-wide result, not its 4h-wide input.

    Source: van de Geijn and Watts 1997, "SUMMA", its form C = A B^T.
    """
    return g * (q - 1) / q**2 * (4 * b * s * h + 12 * h**2)


def weight_stationary(r: Expr = r, c: Expr = c) -> Expr:
    """Keep r x c blocks of each weight and all-reduce partial results over both axes.

    Source: Pope et al. 2022, "Efficiently scaling transformer inference", section 3.2.2; counts by
    orienting qkv and fc1 in/r out/c, proj and fc2 in/c out/r.
    """
    return b * s * h / (r * c) * (24 * (r - 1) + 8 * (c - 1))


def batch_tensor(a: Expr = a, n: Expr = p / a) -> Expr:
    """Split the batch over `a` ranks and each layer 1D over `n`; gradients are all-reduced over a.

    Source: Shoeybi et al. 2019 for each half; 12 h^2 / n elements of gradient per rank.
    """
    return 8 * (n - 1) / n * b * s * h / a + 24 * (a - 1) / (a * n) * h**2


def fully_sharded(p: Expr = p, g: Expr = g) -> Expr:
    """Gather every weight before use and reduce-scatter its gradient.

    Source: Rajbhandari et al. 2020, "ZeRO", section 7.2 (g = 3).
    """
    return g * (p - 1) / p * 12 * h**2


def ring_attention(p: Expr = p) -> Expr:
    """Let keys and values pass p-1 ranks forward and backward, and their gradients p, to be home.

    Source: Li et al. 2021, "Sequence Parallelism", section 3.2, arXiv 2105.13120.
    """
    return 2 * (3 * p - 2) / p * b * s * h


def two_level_volume(kind: str, size: Expr, m: Expr, k: Expr) -> tuple[Expr, Expr]:
    """Return what a rank sends inside its node and between nodes for a collective of two levels.

    Source: Cho et al. 2019, "BlueConnect", section 3.

    >>> two_level_volume("all_reduce", h, q, r)
    (2*h*(q - 1)/q, 2*h*(r - 1)/(q*r))
    """
    stages = STAGES[kind]
    inside = [(stage.kind, size, m) for stage in stages if stage.inside]
    between = [(stage.kind, size / m, k) for stage in stages if not stage.inside]
    return sent_volume(inside), sent_volume(between)


def crossover(first: Expr, second: Expr) -> Expr | None:
    """Return the tokens at which two volumes are equal, or None where they never are.

    >>> crossover(megatron_1d(Integer(4)), summa_ab(Integer(2), Integer(3)))
    12*h
    """
    gap = sympy.expand((first - second).subs(b, tokens / s))
    roots = [root for root in sympy.solve(gap, tokens) if root.is_positive is not False]
    return min(roots, key=sympy.default_sort_key) if roots else None
