"""The moves of a plan as the program calls them: within products, shared, or beside other ops.

    called     within products as pinned or as is fastest; coalesce and overlap the others

Each product takes at most one of its moves, by the schedule that is pinned, else by price: the move
apart takes its call, or its share of one, less what would be hidden of it; in a ring it takes what
`passes.product_prices` says. Ties stay apart. What is gained by different products adds up, and the
choice is exact, unless they take moves of parameters out of shared calls, or compete for the ops
that hide them. Then products that are alike are changed together, and single ones, as long as the
step becomes faster. It never becomes slower than with all moves apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autotp.layouts import Layout
from autotp.passes.coalesce import Coalesced, coalesce
from autotp.passes.network import Network
from autotp.passes.overlap import overlap
from autotp.passes.pricing import RESULT
from autotp.passes.product_prices import Prices, gathers_again
from autotp.passes.products import Pair
from autotp.passes.schedule import sent_of
from autotp.passes.schedule_pins import Wanted
from autotp.plan import Decision, PlannedMove, Priced

WORK = 10_000
"""How many ops are looked at again, in all, to improve on what single products save."""

SAME = 1e-9
"""Share of a time by which sums of the same prices differ."""

Within = Mapping[int, tuple[Pair, str]]
"""By op the pair that it makes, and by which schedule."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the rings among some moves keep, beside what is held, within a limit if there is one."""

    bytes_of: Callable[[Sequence[PlannedMove]], int]
    held_bytes: int
    limit_bytes: float | None

    def fits(self, moves: Sequence[PlannedMove]) -> bool:
        """Say whether there is room for what the rings among these moves keep."""
        more = self.bytes_of(moves)
        limit = self.limit_bytes
        return not more or limit is None or self.held_bytes + more <= limit


@dataclass(frozen=True, slots=True)
class Case:
    """A plan whose moves are to be called: its ops and moves, and how its parameters rest."""

    network: Network
    decisions: Sequence[Decision]
    moves: Sequence[PlannedMove]
    rest: Mapping[str, Layout]
    prices: Prices
    kept: Kept

    def called(self, within: Within) -> Coalesced:
        """Return the moves as they are called where products make some of them."""
        planned = self.prices.planned
        moves, busy = list(self.moves), {}
        for op, (pair, how) in within.items():
            moves[pair.move], busy[op] = self._fused(pair, how)
        found = coalesce(moves, self.rest, self.network, planned)
        return overlap(found, self.rest, self.network, self.decisions, planned, busy)

    def _fused(self, pair: Pair, how: str) -> tuple[PlannedMove, tuple[float, float]]:
        m, planned = self.moves[pair.move], self.prices.planned
        price = self.prices(pair, self.decisions[pair.op], m, how)
        again = how == "panels" and gathers_again(pair, self.network)
        runs = [(m.forward, "")] * (1 + again) + [(m.backward, "")]
        ranks = planned.grid.sizes[planned.grid.axis(m.axis)]
        sent = sent_of(runs, m.size_bytes, ranks, self.network.values[m.value].dtype.itemsize)
        made = replace(
            m, seconds=price.seconds, sent=sent, again=again, by="", back_by="", schedule=how
        )
        return made, price.beside_s

    def ring_s(self, pair: Pair) -> float:
        """Return what a move takes in a ring."""
        d, m = self.decisions[pair.op], self.moves[pair.move]
        return self.prices(pair, d, m, "ring").seconds


def called(
    case: Case, pairs: Callable[[], Iterable[Pair]], wanted: Wanted | None
) -> tuple[Coalesced, tuple[Priced, ...]]:
    """Return the moves as they are called, and what products that may make some take for them.

    `pairs` are looked for only where something is asked for, or may be hidden. Where what rings
    gather would not fit, only those are taken that scatter, which keep no more.
    """
    if not (wanted or case.prices.planned.cluster.overlap):
        return case.called({}), ()
    found = list(pairs())
    given, free = _asked(found, case, wanted)
    without_s = _apart_s(case.called({}))
    within, moved = _by_price(free, case, given)
    if not case.kept.fits(moved.moves):
        within, moved = _by_price([p for p in free if p.slot == RESULT], case, given)
    made = {pair.move for pair, _ in within.values()}
    moves = tuple(
        replace(m, apart_s=without_s[n]) if n in made else m for n, m in enumerate(moved.moves)
    )
    return replace(moved, moves=moves), _priced(found, case, within, without_s)


def _apart_s(found: Coalesced) -> list[float]:
    """Return what each move takes, less its share of what is hidden of its call."""
    out = [m.seconds for m in found.moves]
    for b in found.buckets:
        for n in b.moves if b.hidden_s else ():
            share = found.moves[n].size_bytes / b.size_bytes if b.size_bytes else 0.0
            out[n] -= b.hidden_s * share
    return out


def _asked(
    pairs: Sequence[Pair], case: Case, wanted: Wanted | None
) -> tuple[dict[int, tuple[Pair, str]], list[Pair]]:
    """Return the schedules that are asked for, and the pairs of which nothing is asked."""
    returned = {*case.network.outputs}
    if not wanted:
        return {}, [p for p in pairs if case.moves[p.move].value not in returned]
    within: dict[int, tuple[Pair, str]] = {}
    free = []
    for pair in pairs:
        how = wanted(case.decisions[pair.op].name, case.moves[pair.move].axis, pair.schedules)
        if how in pair.schedules and pair.op not in within:
            within[pair.op] = pair, how
        elif how is None and case.moves[pair.move].value not in returned:
            free.append(pair)
    return within, [pair for pair in free if pair.op not in within]


def _by_price(pairs: Sequence[Pair], case: Case, given: Within) -> tuple[Within, Coalesced]:
    """Return the schedules of products, given ones and those that save time, and all calls."""
    apart = case.called(given)
    if not case.prices.planned.cluster.overlap:
        return given, apart
    without_s = _apart_s(apart)
    best: dict[int, tuple[float, Pair]] = {}
    for pair in (p for p in pairs if "ring" in p.schedules and p.op not in given):
        saved_s = without_s[pair.move] - case.ring_s(pair)
        if saved_s > max(SAME * without_s[pair.move], best.get(pair.op, (0.0, pair))[0]):
            best[pair.op] = saved_s, pair
    rings = {op: (pair, "ring") for op, (_, pair) in best.items()}
    found: tuple[Within, Coalesced] = {**given, **rings}, case.called({**given, **rings})
    expected_s = apart.seconds - sum(saved_s for saved_s, _ in best.values())
    if not math.isclose(found[1].seconds, expected_s, rel_tol=SAME):
        found = _improved(found, pairs, case, given)
    return found if found[1].seconds < apart.seconds * (1 - SAME) else (given, apart)


def _improved(
    found: tuple[Within, Coalesced], pairs: Sequence[Pair], case: Case, given: Within
) -> tuple[Within, Coalesced]:
    """Change the products that are alike together, as long as the step becomes faster."""
    pairs = [p for p in pairs if "ring" in p.schedules and p.op not in given]
    alike: dict[object, list[Pair]] = {}
    for p in pairs:
        m = case.moves[p.move]
        key = case.prices.case(p, case.decisions[p.op], m), m.value in case.rest
        alike.setdefault(key, []).append(p)
    kinds = [*alike.values(), *([p] for p in pairs)]
    tries, before_s = WORK // len(case.decisions), math.inf
    while found[1].seconds < before_s:
        before_s = found[1].seconds
        for kind in kinds:
            for within in _changed(found[0], kind):
                tries -= 1
                if tries < 0:
                    return found
                other = within, case.called(within)
                if other[1].seconds < found[1].seconds * (1 - SAME):
                    found = other
    return found


def _changed(within: Within, kind: Sequence[Pair]) -> Iterator[Within]:
    """Yield a choice with the pairs of one kind all apart, and all in rings."""
    count = sum(within.get(p.op, (None,))[0] == p for p in kind)
    rest = {op: w for op, w in within.items() if w[0] not in kind}
    if count:
        yield rest
    if count < len(kind):
        yield {**rest, **{p.op: (p, "ring") for p in kind}}


def _priced(
    pairs: Sequence[Pair], case: Case, within: Within, apart: Sequence[float]
) -> tuple[Priced, ...]:
    """Return what every product that may make a move takes, by it and apart."""
    out = []
    for p in pairs:
        d, m = case.decisions[p.op], case.moves[p.move]
        ways = [("once", apart[p.move])]
        ways += [(how, case.prices(p, d, m, how).seconds) for how in p.schedules]
        chosen = within[p.op][1] if p.op in within and within[p.op][0] == p else "once"
        out.append(Priced(d.name, m.axis, m.value, chosen, tuple(ways)))
    return tuple(out)
