"""What moves may share a call, run beside ops, or be made by a product; the least they then take.

By their collectives forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from autotp.passes.moves import Moves


class Best(NamedTuple):
    """What a value is, for the least that its moves may take.

    what     "parameter", whose calls may be shared, or "activation"
    within   the collectives, forward, that a product which reads or makes it may make itself
    """

    what: str
    within: frozenset[str] = frozenset()


class Seen(NamedTuple):
    """What some plan pays of moves that are alike.

    calls    the share of what calls of their own take beyond their parts of full ones
    hidden   the share of their seconds that is hidden
    """

    calls: float = 1.0
    hidden: float = 0.0


def best_s(moves: Moves, kinds: Sequence[str], size_bytes: int, axis: int, best: Best) -> float:
    """Return the least that these collectives may take: shared, hidden, or in a ring.

    With `moves.seen`, what they take where they share and are hidden as much as in some plan. A
    ring hides no more of each message than of a collective (`passes.product_prices`).
    """
    forward, backward, again = kinds[0], kinds[-1], len(kinds) > 2
    is_shared = best.what == "parameter" and may_share(forward, backward, again)
    price = moves.share_s if is_shared else moves.kind_s
    seconds = sum(price(kind, size_bytes, axis) for kind in kinds)
    is_ring = may_ring(kinds, best)
    may_save = is_shared or may_hide(forward, backward, again)
    if moves.seen and (seen := moves.seen.get((best.what, forward, backward))):
        seconds += seen.calls * (moves.kinds_s(kinds, size_bytes, axis) - seconds)
        return seconds * (1 - seen.hidden) if may_save or is_ring else seconds
    shown = 1 - moves.cluster.overlap
    apart_s = seconds * shown if may_save else seconds
    if not is_ring:
        return apart_s
    return min(apart_s, shown * sum(moves.hops_s(k, size_bytes, axis) for k in kinds))


def may_ring(kinds: Sequence[str], best: Best) -> bool:
    """Say whether a product may make a move by these collectives itself."""
    forward, backward, again = kinds[0], kinds[-1], len(kinds) > 2
    return forward in best.within and (forward, backward) in RINGS and not again


def may_hide(forward: str, backward: str, again: bool) -> bool:
    """Say whether a move that is begun early may run beside other ops."""
    return not again and (forward, backward) in HIDDEN


HIDDEN = frozenset([("none", "all_reduce"), ("all_gather", "reduce_scatter")])
"""Moves that autotp.together begins early, of parameters or of what products read."""


RINGS = frozenset(
    [
        ("all_gather", "reduce_scatter"),
        ("all_gather", "none"),
        ("reduce_scatter", "all_gather"),
        ("reduce_scatter", "none"),
    ]
)
"""Moves that products may make themselves."""


def may_share(forward: str, backward: str, again: bool) -> bool:
    """Say whether moves of several parameters may be one: not those of a checkpoint region."""
    return (forward, backward) in SHARED and not (again and forward != "none")


SHARED = frozenset(
    [
        ("none", "all_reduce"),
        ("all_gather", "reduce_scatter"),
        ("all_gather", "slice"),
        ("all_gather", "none"),
    ]
)
"""Moves that may be made of several parameters at once, by their collectives forth and back."""
