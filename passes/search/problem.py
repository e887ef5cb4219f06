"""What the search is given, and how it is measured: numbers only.

minimise  sum_i unary_i[x_i] + sum_(i,j) pair_ij[x_i, x_j]   over one choice x_i per variable

Repeated layers share their arrays; `restrict`, `weigh` and `intern` keep what is shared shared, so
that what is done for one layer is done for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Problem:
    """Variables in graph order, the seconds of their choices, and of their meeting.

    sizes    number of choices, per variable
    unary    seconds per choice, per variable
    pairs    (i, j, seconds [choice of i, of j]); several of one pair add up; inf: unreachable
    memory   bytes per choice, per variable
    """

    sizes: tuple[int, ...]
    unary: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int, np.ndarray], ...]
    memory: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        for tables in (self.unary, self.memory):
            assert tables is None or [t.shape for t in tables] == [(n,) for n in self.sizes]
        for i, j, table in self.pairs:
            assert i != j and table.shape == (self.sizes[i], self.sizes[j]), (i, j, table.shape)

    def seconds(self, choice: Sequence[int]) -> float:
        """Return the cost of one choice per variable, added up in graph order."""
        alone = sum(float(u[k]) for u, k in zip(self.unary, choice, strict=True))
        return alone + sum(float(t[choice[i], choice[j]]) for i, j, t in self.pairs)

    def bytes(self, choice: Sequence[int]) -> float:
        """Return the memory of one choice per variable."""
        return sum(float(m[k]) for m, k in zip(self.memory or (), choice, strict=False))


@dataclass(slots=True)
class Shared:
    """Results of a function of arrays, one per distinct tuple of argument objects.

    Holds its arguments, so that the identity of one is never taken over by another.
    """

    make: Callable[..., np.ndarray]
    held: dict[tuple[int, ...], tuple[tuple[object, ...], np.ndarray]] = field(default_factory=dict)

    def __call__(self, *arguments: object) -> np.ndarray:
        """Return the result for these very objects."""
        key = tuple(map(id, arguments))
        if key not in self.held:
            self.held[key] = (arguments, self.make(*arguments))
        return self.held[key][1]


def restrict(problem: Problem, kept: Sequence[np.ndarray]) -> Problem:
    """Return `problem` with only the choices `kept[i]` of each variable i."""
    take = Shared(lambda table, rows: table[rows])
    block = Shared(lambda table, rows, columns: table[np.ix_(rows, columns)])
    memory = problem.memory
    return Problem(
        sizes=tuple(len(k) for k in kept),
        unary=tuple(take(u, k) for u, k in zip(problem.unary, kept, strict=True)),
        pairs=tuple((i, j, block(t, kept[i], kept[j])) for i, j, t in problem.pairs),
        memory=memory and tuple(take(m, k) for m, k in zip(memory, kept, strict=True)),
    )


def weigh(problem: Problem, seconds_per_byte: float) -> Problem:
    """Return `problem` with memory priced: seconds + seconds_per_byte * bytes."""
    assert problem.memory is not None
    priced = Shared(lambda unary, memory: unary + seconds_per_byte * memory)
    unary = tuple(priced(u, m) for u, m in zip(problem.unary, problem.memory, strict=True))
    return Problem(problem.sizes, unary, problem.pairs, problem.memory)


def only_memory(problem: Problem) -> Problem:
    """Return `problem` with bytes in place of seconds; what is unreachable stays so."""
    assert problem.memory is not None
    reach = Shared(lambda table: np.where(np.isinf(table), np.inf, 0.0))
    whole = Shared(lambda unary, memory: memory + np.where(np.isinf(unary), np.inf, 0.0))
    unary = tuple(whole(u, m) for u, m in zip(problem.unary, problem.memory, strict=True))
    return Problem(problem.sizes, unary, tuple((i, j, reach(t)) for i, j, t in problem.pairs))


def intern(arrays: Sequence[np.ndarray]) -> tuple[tuple[int, ...], tuple[np.ndarray, ...]]:
    """Number arrays by content: return the number of each, and the distinct ones as float64."""
    by_object: dict[int, int] = {}
    by_content: dict[tuple[tuple[int, ...], bytes], int] = {}
    distinct: list[np.ndarray] = []
    for array in arrays:
        if id(array) in by_object:
            continue
        table = np.asarray(array, dtype=np.float64)
        key = (table.shape, hashlib.blake2b(table.tobytes()).digest())
        if key not in by_content:
            by_content[key] = len(distinct)
            distinct.append(table)
        by_object[id(array)] = by_content[key]
    return tuple(by_object[id(array)] for array in arrays), tuple(distinct)
