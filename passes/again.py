"""What backward makes again instead of keeping it: the choice for given layouts.

One variable per root (see `passes.kept`): it is kept, made again, or, where nothing keeps it, not
there. What is made again needs all that its maker reads: a search problem of its own, solved like
that of the layouts (`search.solve`: exactly as far as a multiplier goes, else with a small gap),

    minimise   seconds of what is made again
    where      what is kept, and what is made again for as long as it is there, fits

What is there for a time depends on the whole choice. The limit is lowered by it until the choice
fits: near the least that can be held, more may be made again than would have to be.

Without a limit, or where all fits, nothing is made again but what is pinned:

    {"transformer.h.*.mlp.act": {"backward": "again"}}     or "keep"; ops and parameters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autotp.errors import BudgetError, PinError
from autotp.passes.kept import Copies, Copy, Maker
from autotp.passes.moves import Moves
from autotp.passes.network import Network
from autotp.passes.pins import is_wild, matches
from autotp.passes.pricing import Table, repeat_s
from autotp.passes.schedule import sent_of
from autotp.passes.search.problem import Problem
from autotp.passes.search.solve import SMALLEST, Solution, Solver
from autotp.plan import Decision, PlannedMove

KEEP, AGAIN = "keep", "again"
NONE = "none"
"""The state of a root that nobody needs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of backward.

    limit_bytes   what activations may take
    pins          what is kept, or made again
    near_s        how much longer than need be it may take, where to find the least takes longer
    """

    limit_bytes: float | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    near_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Again:
    """What backward makes again: decisions and moves, marked; what ops take, and what is held."""

    decisions: tuple[Decision, ...]
    moves: tuple[PlannedMove, ...]
    ops_s: float
    held_bytes: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Repeats:
    """What it costs to make again: `op_s` an op by number, a move its forward collective."""

    op_s: Callable[[int], float]
    planned: Moves

    def seconds(self, maker: Maker, moves: Sequence[PlannedMove]) -> float:
        """Return what it costs that backward runs a maker once more."""
        if maker.op is not None:
            return self.op_s(maker.op)
        assert maker.move is not None
        m = moves[maker.move]
        return self.planned.kind_s(m.forward, m.size_bytes, self.planned.grid.axis(m.axis))


def repeats(network: Network, picked: Sequence[tuple[Table, int]], moves: Moves) -> Repeats:
    """Return what it costs to make again, given what each op picked of its table.

    Ops that picked the same of one table, as those of repeated layers, cost the same.
    """
    known: dict[tuple[Table, int], float] = {}

    def op_s(n: int) -> float:
        if picked[n] not in known:
            known[picked[n]] = repeat_s(network.ops[n], *picked[n], moves)
        return known[picked[n]]

    return Repeats(op_s, moves)


def choose(
    copies: Copies,
    prices: Repeats,
    names_of: Callable[[Copy], Sequence[str]],
    asked: Asked,
) -> Again:
    """Return the cheapest way to meet what is asked, or what holds least if nothing meets it.

    Raises PinError for a pin that asks to make again what cannot be.
    """
    kept = {root: copies.bytes_of(saved) for root, saved in copies.saved.items()}
    inner = max((copies.bytes_of(inner) for inner in copies.inner.values()), default=0)
    every = inner + sum(kept.values())
    if not asked.pins and (asked.limit_bytes is None or every <= asked.limit_bytes):
        return Again(tuple(copies.decisions), tuple(copies.moves), 0.0, every, 0)
    states = _states(copies, names_of, asked.pins)
    base = inner + sum(n for root, n in kept.items() if root not in states)
    roots = list(states)
    seconds = {r: prices.seconds(m, copies.moves) for r, m in copies.makers.items() if r in states}
    problem = _problem(copies, states, kept, seconds)

    def held(solution: Solution) -> int:
        state = {r: states[r][k] for r, k in zip(roots, solution.choice, strict=True)}
        return base + peak_bytes(copies, state, kept)

    found = _within(problem, asked, base, held)
    again = [r for r, k in zip(roots, found.choice, strict=True) if states[r][k] == AGAIN]
    decisions, moves = _marked(copies, again, prices)
    ops_s = sum(seconds[r] for r in again if copies.makers[r].op is not None)
    return Again(decisions, moves, ops_s, held(found), every - held(found))


def _marked(
    copies: Copies, again: Sequence[Copy], prices: Repeats
) -> tuple[tuple[Decision, ...], tuple[PlannedMove, ...]]:
    """Return the decisions and moves, those marked and priced that backward repeats."""
    decisions, moves = list(copies.decisions), list(copies.moves)
    for maker in (copies.makers[root] for root in again):
        if (n := maker.op) is not None:
            d, once_s = decisions[n], prices.op_s(n)
            forth_s, back_s = d.seconds + once_s, d.backward_s + once_s
            decisions[n] = replace(d, again=True, seconds=forth_s, backward_s=back_s)
        elif (n := maker.move) is not None:
            moves[n] = _twice(moves[n], copies, prices.seconds(maker, moves))
    return tuple(decisions), tuple(moves)


def _twice(m: PlannedMove, copies: Copies, once_s: float) -> PlannedMove:
    """Return a move whose forward collective backward calls once more."""
    grid, itemsize = copies.planned.grid, copies.network.values[m.value].dtype.itemsize
    runs = [(m.forward, m.by)] * 2 + [(m.backward, m.back_by)]
    sent = sent_of(runs, m.size_bytes, grid.sizes[grid.axis(m.axis)], itemsize)
    return replace(m, again=True, seconds=m.seconds + once_s, sent=sent)


def _within(problem: Problem, asked: Asked, base: int, held: Callable[[Solution], int]) -> Solution:
    """Return the cheapest solution within the limit asked, else that of least memory.

    What is made again is there for a time: that is known once it is chosen, and taken off then.
    """
    solver, limit = Solver(problem), asked.limit_bytes
    found = solver.solve()
    if limit is None or held(found) <= limit:
        return found
    budget = limit - base
    while True:
        try:
            found = solver.solve(budget, asked.near_s)
        except BudgetError:
            found = solver.smallest()
        over = held(found) - limit
        if over <= 0 or found.method == SMALLEST:
            return found
        budget = found.memory_bytes - over


# The problem -------------------------------------------------------------------------------------


def _states(
    copies: Copies, names_of: Callable[[Copy], Sequence[str]], pins: Mapping[str, str]
) -> dict[Copy, tuple[str, ...]]:
    """Return the states of each root that may be made again, or that what may be reads.

    In the order in which they are made. Of states that cost the same the first is taken.
    """
    free = {r for r in copies.saved if r in copies.makers and r not in copies.fixed}
    wanted = dict.fromkeys(r for r in copies.saved if r in free)
    for root in copies.saved:
        _pinned(copies, root, names_of(root), pins)
    todo = list(wanted)
    for root in todo:
        for read in copies.makers[root].reads if root in copies.makers else ():
            if read not in copies.sources and read not in wanted:
                wanted[read] = None
                todo.append(read)
    out: dict[Copy, tuple[str, ...]] = {}
    for root in (r for r in copies.roots if r in wanted):
        may = root in copies.makers and root not in copies.fixed
        states = (KEEP, AGAIN) if may else (KEEP,)
        allowed = tuple(s for s in states if s in _pinned(copies, root, names_of(root), pins))
        out[root] = allowed if root in copies.saved else (NONE, *allowed)
    return out


def _pinned(
    copies: Copies, root: Copy, names: Sequence[str], pins: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the states that the pins on a root allow. Raises PinError."""
    on = {p: w for p, w in pins.items() if any(matches(p, name) for name in names)}
    may = root in copies.makers and root not in copies.fixed
    on = {p: w for p, w in on.items() if may or w == KEEP or not is_wild(p)}
    if len(set(on.values())) > 1:
        raise PinError(
            "pins that contradict each other: a value is kept or made again",
            at=[(p, f"backward: {w}") for p, w in on.items()],
            remedy="remove or change one of them",
        )
    if AGAIN in on.values() and not may and root in copies.why:
        why = copies.why[root] or "a checkpoint region, or the caller, has it"
        raise PinError(
            "a pin asks backward to make again what it cannot",
            at=[(next(iter(on)), why)],
            remedy="remove the pin, or use a pattern with wildcards, which skips such ops",
        )
    return tuple(dict.fromkeys(on.values())) if on and may else (KEEP, AGAIN)


def _problem(
    copies: Copies,
    states: Mapping[Copy, tuple[str, ...]],
    kept: Mapping[Copy, int],
    seconds: Mapping[Copy, float],
) -> Problem:
    number = {root: n for n, root in enumerate(states)}
    unary, memory = [], []
    pairs: list[tuple[int, int, np.ndarray]] = []
    for root, words in states.items():
        maker = copies.makers.get(root)
        size = kept[root] if root in kept else copies.bytes_of([root])
        costs = {NONE: (0.0, 0.0), KEEP: (0.0, float(size))}
        costs[AGAIN] = seconds.get(root, np.inf), float(maker.keeps) if maker is not None else 0.0
        unary.append(np.array([costs[w][0] for w in words]))
        memory.append(np.array([costs[w][1] for w in words]))
        for read in maker.reads if maker is not None and AGAIN in words else ():
            if read in number:
                rows = [
                    [np.inf if (a, b) == (NONE, AGAIN) else 0.0 for b in words]
                    for a in states[read]
                ]
                pairs.append((number[read], number[root], np.array(rows)))
    sizes = tuple(map(len, unary))
    return Problem(sizes, tuple(unary), tuple(pairs), tuple(memory))


# What is held ------------------------------------------------------------------------------------


def peak_bytes(copies: Copies, state: Mapping[Copy, str], kept: Mapping[Copy, int]) -> int:
    """Return the most bytes that are held at once while backward goes from last op to first.

    What is kept is there until the first op, in the order of forward, that needs it has gone back;
    what is made again from the last that needs it to that.
    """
    times = needed_at(copies, state)
    changes: dict[int, int] = {}
    at_end = 0
    for root, word in state.items():
        size = kept[root] if root in kept else copies.bytes_of([root])
        first, last = min(times[root], default=0), max(times[root], default=0)
        if word == KEEP:
            at_end += size
            changes[2 * first] = changes.get(2 * first, 0) - size
        elif word == AGAIN and root in times:
            at_end += copies.makers[root].keeps
            changes[2 * last + 1] = changes.get(2 * last + 1, 0) + size
            changes[2 * first] = changes.get(2 * first, 0) - size - copies.makers[root].keeps
    now = peak = at_end
    for time in sorted(changes, reverse=True):
        now += changes[time]
        peak = max(peak, now)
    return peak


def needed_at(copies: Copies, state: Mapping[Copy, str]) -> dict[Copy, list[int]]:
    """Return the ops, by number, in whose backward each root is read, also for what is made."""
    times = {root: list(copies.savers.get(root, ())) for root in state}
    for root in reversed(list(state)):
        if state[root] == AGAIN and times[root]:
            for read in copies.makers[root].reads:
                if read in times:
                    times[read].append(max(times[root]))
    return times
