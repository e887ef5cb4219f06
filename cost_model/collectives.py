"""Collectives: what each sends, and how long it takes.

`size_bytes` is always N, the whole buffer of one rank's call: what an all-gather leaves on every
rank, what an all-reduce or a reduce-scatter reduces, what each rank of an all-to-all or of a
permute gives away.
With n ranks, a seconds of latency per step and w bytes per second sent:

    sent_bytes      (n-1)/n N for all_gather, reduce_scatter and all_to_all; twice that, all_reduce;
                    N for a permute, in which each rank sends all it has to one other
    collective_s    call + steps a + sent / w, steps and sum by the backend's algorithm; the least
                    over those algorithms whose rates the link knows
    fastest         the algorithm that this is, "" where it is the plain one
    hops_s          n-1 messages, each a call of N/n bytes: what goes round beside other work
    PLAIN           which algorithm a backend runs for a kind where none is asked for
    OTHERS          what else a kind may be made of: `autotp.algorithms` runs these
    level_bytes     what is sent inside nodes and between them where a group has two levels
"""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from autotp.cost_model.cluster import Levels, Link
from autotp.cost_model.levels import REORDERS, STAGES, fits, members_of, nodes_of

Amount = TypeVar("Amount", float, NDArray[np.float64])
"""Bytes or seconds: one number, or an array of them."""

FREE = frozenset({"none", "slice", "pad", "keep_one"})
"""The moves of `autotp.layouts.MOVES` that send nothing."""

ROUNDS = {"all_gather": 1, "all_reduce": 2, "all_to_all": 1, "reduce_scatter": 1}
"""How often (n-1)/n of the buffer passes each rank."""

OTHERS: dict[str, tuple[str, ...]] = {
    "all_gather": ("exchange", "ring"),
    "all_reduce": ("scatter_exchange", "scatter_gather", "scatter_ring"),
    "reduce_scatter": ("all_reduce", "exchange"),
}
"""The algorithms of each kind that every backend can run, beside its plain one.

    exchange          all_gather as an all-to-all of copies; reduce_scatter as an all-to-all whose
                      blocks each rank sums itself
    ring              all_gather as n-1 permutes, each of what came in last
    all_reduce        reduce_scatter as the whole sum, of which each rank keeps a block
    scatter_...       all_reduce as a reduce-scatter and an all-gather: plain, or by what is named

`algorithms` adds those of two levels, by groups inside nodes and between: `nodes_of_2`.
"""


def algorithms(kind: str, ranks: int) -> tuple[str, ...]:
    """Return the algorithms of a kind over a group of `ranks`, beside the plain one.

    >>> algorithms("reduce_scatter", 4)
    ('all_reduce', 'exchange', 'nodes_of_2')
    """
    levels = [m for m in range(2, ranks) if fits(m, ranks)] if kind in STAGES else []
    return (*OTHERS.get(kind, ()), *map(nodes_of, levels))


def is_one_call(kind: str, by: str) -> bool:
    """Say whether an algorithm of a kind is one call of the backend, and so can be on its way."""
    return not by or (by == "exchange" and kind in ("all_gather", "reduce_scatter"))


def wire_bytes_by(kind: str, by: str, size_bytes: int, ranks: int, itemsize: int) -> int:
    """Return the whole buffer of an algorithm: scattered sums are filled up to equal blocks."""
    if kind != "all_reduce" or not by:
        return size_bytes
    return -(-size_bytes // (itemsize * ranks)) * itemsize * ranks


def rounds(kind: str, by: str = "") -> int:
    """Return how often (n-1)/n of the buffer passes each rank by an algorithm."""
    return ROUNDS["all_reduce" if by == "all_reduce" else kind]


def sent_bytes(kind: str, size_bytes: int, ranks: int, by: str = "") -> Fraction:
    """Return the exact bytes that each of `ranks` sends for a collective over a whole buffer.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations": no algorithm sends less.

    >>> print(*(sent_bytes(kind, 12, 4) for kind in ("all_gather", "all_reduce", "pad")))
    9 18 0
    """
    if kind in FREE or ranks == 1:
        return Fraction(0)
    if kind == "permute":
        return Fraction(size_bytes)
    return Fraction(rounds(kind, by) * size_bytes * (ranks - 1), ranks)


def level_bytes(kind: str, size_bytes: int, ranks: int, members: int) -> tuple[Fraction, Fraction]:
    """Return what each rank sends inside its node and between nodes by an algorithm of two levels.

    Together they are `sent_bytes`.

    >>> print(*level_bytes("all_gather", 12, 4, 2), *level_bytes("all_reduce", 12, 4, 2))
    6 3 12 6
    """
    sent = {True: Fraction(0), False: Fraction(0)}
    for stage in STAGES[kind]:
        met, part = (members, 1) if stage.inside else (ranks // members, members)
        sent[stage.inside] += Fraction(ROUNDS[stage.kind] * size_bytes * (met - 1), met * part)
    return sent[True], sent[False]


def collective_s(kind: str, size_bytes: Amount, ranks: int, link: Link, backend: str) -> Amount:
    """Return the seconds of `kind` over buffers of `size_bytes`: of the fastest known algorithm."""
    seconds = plain_s(kind, size_bytes, ranks, link, backend)
    for by in _known(kind, ranks, link):
        seconds = _faster(seconds, _by_s(kind, size_bytes, ranks, link, backend, by))
    return seconds


def plain_s(kind: str, size_bytes: Amount, ranks: int, link: Link, backend: str) -> Amount:
    """Return the seconds of what a backend runs for `kind`, by the link's faster protocol."""
    if kind in FREE or ranks == 1:
        return size_bytes * 0.0
    seconds = PLAIN[backend][kind](size_bytes, ranks, link)
    if link.low_latency is None:
        return seconds
    return _faster(seconds, PLAIN[backend][kind](size_bytes, ranks, link.low_latency))


def fastest(kind: str, size_bytes: int, ranks: int, link: Link, backend: str) -> str:
    """Return the algorithm that takes least, the plain one ("") among equals."""
    known = _known(kind, ranks, link)
    if not known:
        return ""
    ways = [(_by_s(kind, float(size_bytes), ranks, link, backend, by), by) for by in known]
    return min([(plain_s(kind, float(size_bytes), ranks, link, backend), ""), *ways])[1]


def hops_s(kind: str, size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Return the seconds of an all_gather or a reduce_scatter as n-1 messages, each a call.

    By the permutes that were measured, else by the steps that the kind itself takes.
    """
    if link.rate("permute", ranks) in link.rates:
        summed = _sum_s(size_bytes, ranks, link) if kind == "reduce_scatter" else 0.0
        return one_step(size_bytes / ranks, ranks, link) * (ranks - 1) + summed
    seconds = RINGS[kind](size_bytes, ranks, link) + (ranks - 2) * link.call_s
    if link.low_latency is None:
        return seconds
    return _faster(seconds, hops_s(kind, size_bytes, ranks, link.low_latency))


def _known(kind: str, ranks: int, link: Link) -> tuple[str, ...]:
    """Return the algorithms of a kind, beside the plain one, whose price a link knows.

    Those that were measured, and that of its two levels.
    """
    if kind in FREE or ranks == 1:
        return ()
    levels = (nodes_of(link.levels.members),) if link.levels and kind in STAGES else ()
    found = dict.fromkeys((*link.measured(kind), *levels))
    return tuple(by for by in found if not (m := members_of(by)) or fits(m, ranks))


def _by_s(kind: str, size_bytes: Amount, ranks: int, link: Link, backend: str, by: str) -> Amount:
    """Return the seconds of a known algorithm: as measured, else of its stages."""
    if by in link.measured(kind):
        return _steps_s(kind, size_bytes, ranks, link, by)
    assert link.levels is not None, by
    return two_level_s(kind, size_bytes, ranks, link.levels, backend)


def _faster(a: Amount, b: Amount) -> Amount:
    return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)


# Algorithms ------------------------------------------------------------------------------------


def _steps_s(kind: str, size_bytes: Amount, ranks: int, link: Link, by: str = "") -> Amount:
    """Send N/n in each of n-1 steps, ROUNDS times over; a measured rate holds all else."""
    rate = link.rate(kind, ranks, by)
    step_s = size_bytes / (ranks * rate.bandwidth_bytes_per_s) + rate.latency_s
    return step_s * (ROUNDS[kind] * (ranks - 1)) + link.call_s


def ring_all_gather(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Pass blocks around a ring: n-1 steps of N/n.

    Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
    operations in MPICH".
    """
    return _steps_s("all_gather", size_bytes, ranks, link)


def ring_reduce_scatter(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Pass partial sums around a ring: n-1 steps of N/n, each summed on arrival.

    Source: Patarasuk and Yuan 2009.
    """
    return _steps_s("reduce_scatter", size_bytes, ranks, link) + _sum_s(size_bytes, ranks, link)


def ring_all_reduce(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Reduce-scatter, then all-gather, on a ring: 2(n-1) steps of N/n.

    A measured rate of all_reduce holds its summing already.

    Source: Patarasuk and Yuan 2009.
    """
    return _steps_s("all_reduce", size_bytes, ranks, link)


def pairwise_all_to_all(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Exchange a block with every other rank: n-1 steps of N/n.

    Source: Thakur, Rabenseifner and Gropp 2005, pairwise exchange.
    """
    return _steps_s("all_to_all", size_bytes, ranks, link)


def all_to_all_reduce_scatter(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Exchange blocks pairwise, then sum the n that arrived: gloo's own sends twice as much.

    Source: gloo sends 1.50 N for reduce_scatter_tensor over 4 ranks and 0.75 N this way.
    """
    return _steps_s("reduce_scatter", size_bytes, ranks, link) + size_bytes / link.sum_bytes_per_s


def one_step(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    """Send the whole buffer to one other rank while that of another comes in."""
    rate = link.rate("permute", ranks)
    return size_bytes / rate.bandwidth_bytes_per_s + (rate.latency_s + link.call_s)


def two_level_s(kind: str, size_bytes: Amount, ranks: int, levels: Levels, backend: str) -> Amount:
    """Run the stages of `kind` one after the other: inside nodes over N, between them over N/m.

    All m groups between nodes run at once: each rank has its share of the node's network. Blocks
    are put in order by a copy, which reads and writes N.

    Source: Cho et al. 2019, "BlueConnect", section 3, without its pipelining of stages.
    """
    m, k = levels.members, ranks // levels.members
    seconds = size_bytes * 0.0
    for stage in STAGES[kind]:
        size, met = (size_bytes, m) if stage.inside else (size_bytes / m, k)
        link = levels.inside if stage.inside else levels.between
        seconds = seconds + plain_s(stage.kind, size, met, link, backend)
    if kind in REORDERS:
        seconds = seconds + (size_bytes * (2 / levels.copy_bytes_per_s) + levels.op_s)
    return seconds


def _sum_s(size_bytes: Amount, ranks: int, link: Link) -> Amount:
    return size_bytes * ((ranks - 1) / ranks / link.sum_bytes_per_s)


class Algorithm(Protocol):
    """Seconds of one call on buffers of a size, or of many sizes."""

    def __call__(self, size_bytes: Amount, ranks: int, link: Link, /) -> Amount:
        """Return the seconds of one call over buffers of `size_bytes`."""
        ...


RINGS: dict[str, Algorithm] = {
    "all_gather": ring_all_gather,
    "all_reduce": ring_all_reduce,
    "all_to_all": pairwise_all_to_all,
    "permute": one_step,
    "reduce_scatter": ring_reduce_scatter,
}

PLAIN: dict[str, dict[str, Algorithm]] = {
    "gloo": {**RINGS, "reduce_scatter": all_to_all_reduce_scatter},
    "nccl": RINGS,
    "ring": RINGS,
}
"""backend -> kind -> algorithm. "ring" is the textbook's."""
