"""Pins of schedules: how a product takes the move that one axis makes beside it.

{"transformer.h.*.mlp.c_fc": {"row": "by ring"}}        ring, panels, or once: apart
{"transformer.h.*.mlp.c_fc": {"row": "t by panels"}}    beside the factor that the axis splits
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autotp.errors import PinError
from autotp.grid import Grid
from autotp.passes.pins import Pins, matches
from autotp.passes.products import products_that_move
from autotp.plan import Plan
from autotp.products import SCHEDULES

ONCE = "once"
"""What is asked for to keep a move and its product apart."""

LEGAL = (*SCHEDULES, ONCE)

Wanted = Callable[[str, str, tuple[str, ...]], str | None]
"""From an op's name, an axis and the legal schedules the one that is asked for, None if none is."""


@dataclass(frozen=True, slots=True)
class SchedulePins:
    """What is asked for: patterns of names, axes and schedules. Calls answer as `Wanted` does."""

    asked: tuple[tuple[str, str, str], ...]

    def __bool__(self) -> bool:
        """Say whether anything is asked for."""
        return bool(self.asked)

    def __call__(self, name: str, axis: str, legal: tuple[str, ...]) -> str | None:
        """Return the schedule that is asked for, if the product may have it."""
        for pattern, on, how in self.asked:
            if on == axis and matches(pattern, name) and how in (*legal, ONCE):
                return how
        return None

    def refuse_unmet(self, plan: Plan) -> None:
        """Raise PinError, with every pin of a schedule that no product of the plan has."""
        found = products_that_move(plan)
        unmet = [
            (pattern, f"'by {how}' on axis {axis!r}: no product there may move anything so")
            for pattern, axis, how in self.asked
            if how != ONCE
            and not any((axis, how) == row[1:] and matches(pattern, row[0]) for row in found)
        ]
        if unmet:
            raise PinError(
                "pins of schedules that no product has",
                at=unmet,
                remedy="pin the layouts too: an operand that one product gathers evenly over the "
                "axis, or a sum that it scatters",
            )


def split_schedules(pins: Pins, grid: Grid) -> tuple[dict[str, Mapping[str, str]], SchedulePins]:
    """Return the pins of choices and types, and those of schedules.

    Raises PinError for a schedule or an axis that there is not.
    """
    kept: dict[str, dict[str, str]] = {}
    asked, problems = [], []
    for pattern, on in pins.items():
        kept[pattern] = {}
        for axis, wanted in on.items():
            found = re.fullmatch(r"(?:(.*\S)\s+)?by (\w+)", wanted)
            if found is None:
                kept[pattern][axis] = wanted
                continue
            choice, how = found.groups()
            if choice:
                kept[pattern][axis] = choice
            if how not in LEGAL:
                problems.append((pattern, f"no schedule {how!r}: legal are {', '.join(LEGAL)}"))
            if axis not in grid.names:
                problems.append(
                    (pattern, f"no axis {axis!r}; the grid has {', '.join(grid.names)}")
                )
            asked.append((pattern, axis, how))
    if problems:
        raise PinError("pins that fit nothing", at=problems, remedy="correct the patterns or axes")
    return dict(kept), SchedulePins(tuple(asked))
