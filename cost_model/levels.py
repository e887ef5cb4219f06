"""Two levels: a collective of a group over several nodes, as collectives of its parts.

With n ranks in blocks of m on each of k nodes: a group of the m ranks inside each node, and m
groups between nodes, each of the ranks that stand at one place in every node.

    all_gather        between nodes, then inside: 1/m of the buffer passes between nodes
    reduce_scatter    inside, then between: its mirror
    all_reduce        reduce_scatter inside, all_reduce of 1/m between, all_gather inside

    nodes_of, members_of   the name of such an algorithm, and the m that it says
    STAGES                 which collectives a kind is made of, in order

Each sends what the one over all n sends, (n-1)/n N or twice that, and of it (k-1)/n N or twice that
between nodes. Inside first for an all_gather would send m times as much between them.

Source: Cho et al. 2019, "BlueConnect: decomposing all-reduce for deep learning on heterogeneous
network hierarchy", section 3; for gathers and scatters the same decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

NODES_OF = "nodes_of_"


def nodes_of(members: int) -> str:
    """Return the name of the algorithm over nodes of so many members: `nodes_of_2`."""
    return f"{NODES_OF}{members}"


def members_of(by: str) -> int:
    """Return how many ranks each node has by an algorithm; 0 where it has one level.

    >>> members_of("nodes_of_8"), members_of("ring")
    (8, 0)
    """
    number = by.removeprefix(NODES_OF)
    return int(number) if number != by and number.isdecimal() else 0


def fits(members: int, ranks: int) -> bool:
    """Say whether a group of `ranks` has two levels: several whole nodes of several members."""
    return 1 < members < ranks and ranks % members == 0


def between_share(ranks: int, members: int) -> Fraction:
    """Return the share of what a rank sends that leaves its node: (k-1)/(n-1), of every kind."""
    return Fraction(ranks // members - 1, ranks - 1)


@dataclass(frozen=True, slots=True)
class Stage:
    """A collective inside nodes, over the whole buffer, or between them, over 1/m of it."""

    kind: str
    inside: bool


STAGES: dict[str, tuple[Stage, ...]] = {
    "all_gather": (Stage("all_gather", False), Stage("all_gather", True)),
    "all_reduce": (
        Stage("reduce_scatter", True),
        Stage("all_reduce", False),
        Stage("all_gather", True),
    ),
    "reduce_scatter": (Stage("reduce_scatter", True), Stage("reduce_scatter", False)),
}

REORDERS = frozenset({"all_gather", "reduce_scatter"})
"""The kinds whose blocks must be put in the order of ranks: one copy of the whole buffer."""
