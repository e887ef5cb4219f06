"""The layouts of an operand, and the cheapest ways between all that a value may have, as numbers.

In: the seconds of single moves (`passes.moves` prices them). Out: those of the cheapest ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from autotp.layouts import Layout
from autotp.passes.spaces import Space

TIE = 1e-12
"""Share by which ways that cost the same may differ."""


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """The layouts of one operand or result under each choice: long, and so compared by identity.

    distinct   the layouts, in the order of their first choice
    which      the number of its layout, per choice
    """

    distinct: tuple[Layout, ...]
    which: np.ndarray

    def __len__(self) -> int:
        return len(self.which)

    def __iter__(self) -> Iterator[Layout]:
        return map(self.distinct.__getitem__, self.which.tolist())

    def __getitem__(self, choice: int) -> Layout:
        return self.distinct[self.which[choice]]


@dataclass(frozen=True, slots=True, eq=False)
class MoveTable:
    """The cheapest ways between all layouts of one value.

    single    [from, to] seconds of one move, inf where there is none
    seconds   [from, to] of the cheapest way, inf where there is none
    """

    space: Space
    single: np.ndarray
    seconds: np.ndarray

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """All layouts that the value may have."""
        return self.space.layouts

    @property
    def number(self) -> Mapping[Layout, int]:
        """The place of each layout."""
        return self.space.number

    def following(self, at: int, end: int) -> int:
        """Return the first step from one layout to another: at once, else the lowest of equals."""
        costs = self.single[at] + self.seconds[:, end]
        costs[at] = np.inf
        cheapest = costs <= costs.min() * (1 + TIE)
        return end if cheapest[end] else int(np.argmax(cheapest))


def closed(single: np.ndarray) -> np.ndarray:
    """Return the seconds of the cheapest ways, given those of single moves.

    Round after round each layout asks those that one move reaches, to all ends at once, until no
    way gets cheaper: some six rounds, as moves reach few layouts and ways have few moves.
    Source: Bellman 1958, "On a routing problem".

    By torch, whose loops over broadcast doubles take about half of numpy's time.
    """
    seconds = torch.from_numpy(single.copy())
    before, through = torch.full_like(seconds, torch.nan), torch.empty_like(seconds)
    moves = _moves(single)
    while not torch.equal(before, seconds):
        before.copy_(seconds)
        for following, step_s in moves:
            torch.index_select(seconds, 0, following, out=through).add_(step_s)
            torch.minimum(seconds, through, out=seconds)
    return seconds.numpy()


def _moves(single: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first move of every layout, its second, and so on: where it leads, what it takes.

    A layout that has fewer than others has moves that take for ever.
    """
    reached = np.isfinite(single) & ~np.eye(len(single), dtype=bool)
    most = int(reached.sum(axis=1).max(initial=0))
    ends = np.argsort(~reached, axis=1, kind="stable")[:, :most]
    own = np.where(reached, single, np.inf)
    steps = np.take_along_axis(own, ends, axis=1)
    return [
        (torch.from_numpy(ends[:, k].copy()), torch.from_numpy(steps[:, k : k + 1].copy()))
        for k in range(most)
    ]
