"""Which moves may share a call, or run beside ops: by their collectives forward and backward."""

from __future__ import annotations


def may_hide(forward: str, backward: str, again: bool) -> bool:
    """Say whether a move that is begun early may run beside other ops."""
    return not again and (forward, backward) in HIDDEN


HIDDEN = frozenset([("none", "all_reduce"), ("all_gather", "reduce_scatter")])
"""Moves that autotp.together begins early, of parameters or of what products read."""


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
