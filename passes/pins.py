"""Pins: choices that the user fixes, by module-path pattern.

    {"transformer.h.*.mlp.c_fc": {"col": "o"}}              an op's factor on an axis, or I, R, P
    {"transformer.h.*.mlp.c_fc.weight": {"col": "S(1)"}}    a parameter's resting type on an axis:
                                                            I, S(d), or S for any dim

A pattern that matches nothing, an axis that the grid lacks and a choice that no matched op has are
refused together, with the legal values.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autotp.errors import PinError
from autotp.grid import Grid
from autotp.layouts import Layout, Shard, kind
from autotp.passes.choices import AxisChoice, Strategy
from autotp.passes.network import Network, Op
from autotp.passes.program import Program

Pins = Mapping[str, Mapping[str, str]]


@dataclass(slots=True)
class PinFilter:
    """Keep the choices that `pins` allow; note those that nothing fits."""

    pins: Pins
    grid: Grid
    names: Mapping[str, str]
    params: Mapping[str, str]
    misfits: list[tuple[str, str]] = field(default_factory=list)
    wild: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.wild = tuple(p for p in self.pins if is_wild(p))

    def op(self, op: Op, strategies: Sequence[Strategy]) -> Sequence[int]:
        """Return the numbers of the strategies that every pin on this op allows."""
        kept = list(range(len(strategies)))
        for axis, wanted in self._wanted(self.names[op.name]):
            fitting = [k for k in kept if fits(strategies[k].choices[axis], wanted)]
            if not fitting:
                legal = dict.fromkeys(strategies[k].choices[axis].name for k in kept)
                self._note(self.names[op.name], axis, wanted, list(legal))
            kept = fitting or kept
        return kept

    def rest(self, value: str, layouts: Sequence[Layout]) -> Sequence[int]:
        """Return the numbers of the layouts that every pin on this parameter allows."""
        kept = list(range(len(layouts)))
        for axis, wanted in self._wanted(self.params[value]):
            fitting = [k for k in kept if type_fits(layouts[k][axis], wanted)]
            if not fitting:
                legal = dict.fromkeys(str(layouts[k][axis]) for k in kept)
                self._note(self.params[value], axis, wanted, list(legal))
            kept = fitting or kept
        return kept

    def _wanted(self, name: str) -> Iterator[tuple[int, str]]:
        exact = [name] if name in self.pins else []
        for pattern in [*exact, *(p for p in self.wild if matches(p, name))]:
            for axis, wanted in self.pins[pattern].items():
                if self.grid.sizes[self.grid.axis(axis)] > 1:
                    yield self.grid.axis(axis), wanted

    def _note(self, name: str, axis: int, wanted: str, legal: list[str]) -> None:
        on = f"{self.grid.names[axis]!r} of {self.grid.sizes[axis]}"
        self.misfits.append((name, f"{wanted!r} on axis {on}: legal are {', '.join(legal)}"))


@functools.cache
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def is_wild(pattern: str) -> bool:
    """Say whether a pattern has wildcards, or names one path."""
    return any(c in pattern for c in "*?[")


def matches(pattern: str, name: str) -> bool:
    """Say whether a module-path pattern matches a name; `*` matches any run of characters."""
    return pattern == name or _pattern(pattern).match(name) is not None


def fits(choice: AxisChoice, wanted: str) -> bool:
    """Say whether a choice is the factor, or the kind of whole, that a pin names."""
    if choice.split:
        return wanted in (choice.name, choice.name.partition(".")[0], *choice.split)
    return wanted == choice.name or (wanted == "P" and choice.name.startswith("P"))


def type_fits(t: object, wanted: str) -> bool:
    """Say whether a resting type is what a pin names: `I`, `S`, or `S(d)` with whatever blocks."""
    if isinstance(t, Shard):
        return wanted in (str(t), f"S({t.dim})", "S")
    return wanted == str(t)


def check_pins(pins: Pins, grid: Grid, program: Program, network: Network) -> None:
    """Refuse patterns that match nothing and axes that the grid does not have, all at once."""
    names = [program.names[op.name] for op in network.ops] + list(program.params.values())
    known, problems = set(names), []
    for pattern, axes in pins.items():
        found = pattern in known or (is_wild(pattern) and any(matches(pattern, n) for n in names))
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            problems.append(
                (pattern, f"matches no op and no parameter; nearest: {', '.join(near)}")
            )
        for axis in axes:
            if axis not in grid.names:
                problems.append(
                    (pattern, f"no axis {axis!r}; the grid has {', '.join(grid.names)}")
                )
    if problems:
        raise PinError("pins that fit nothing", at=problems, remedy="correct the patterns or axes")


def refuse_misfits(pins: PinFilter) -> None:
    """Raise PinError if a pin asks an op or a parameter for what it cannot do."""
    if pins.misfits:
        problems = list(dict.fromkeys(pins.misfits))
        raise PinError(
            "pins that no strategy fits", at=problems[:12], remedy="pin one of the legal choices"
        )


__all__ = ["PinFilter", "Pins", "check_pins", "fits", "kind", "matches", "refuse_misfits"]
