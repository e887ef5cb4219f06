"""Pins: choices that the user fixes, by module-path pattern.

    {"transformer.h.*.mlp.c_fc": {"col": "o"}}              an op's factor on an axis, or I, R, P
    {"transformer.h.*.mlp.c_fc.weight": {"col": "S(1)"}}    a parameter's resting type on an axis:
                                                            I, S(d), or S for any dim

    {"transformer.h.*.mlp.act": {"backward": "again"}}      what backward makes again, or does not:
                                                            "keep" (passes.again)

A pattern with wildcards pins ops where it wants a factor, R or P, parameters where it wants a type
S, and both where it wants I. A pattern that matches nothing of its kind, an axis that the grid
lacks and a choice that a matched op does not have are refused together, with the legal values.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autotp.errors import PinError
from autotp.grid import Grid
from autotp.layouts import Layout, Shard
from autotp.passes.choices import AxisChoice, Strategy
from autotp.passes.network import Network, Op
from autotp.passes.program import Program

Pins = Mapping[str, Mapping[str, str]]


BACKWARD, BACKWARD_WORDS = "backward", ("again", "keep")
"""What stands in an axis's place in pins of what backward finds, and what they may say."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One choice on one axis, for what matches a pattern."""

    pattern: str
    axis: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.wanted!r} on axis {self.axis!r}"

    def is_for(self, parameter: bool) -> bool:
        """Say whether what is wanted is a resting type, or else a choice of an op."""
        is_type = self.wanted == "S" or self.wanted.startswith("S(")
        return self.wanted == "I" or is_type == parameter


@dataclass(slots=True)
class PinFilter:
    """Keep the choices that `pins` allow; note the pins that nothing fits, alone or together."""

    pins: Pins
    grid: Grid
    names: Mapping[str, str]
    params: Mapping[str, str]
    misfits: list[tuple[str, str]] = field(default_factory=list)
    contradictions: list[tuple[str, tuple[Pin, ...]]] = field(default_factory=list)
    wild: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.wild = tuple(p for p in self.pins if is_wild(p))

    def op(self, op: Op, strategies: Sequence[Strategy]) -> Sequence[int]:
        """Return the numbers of the strategies that every pin on this op allows."""
        name = self.names[op.name]
        if not (pins := self._on(name, parameter=False)):
            return range(len(strategies))
        allowed = [self._strategies(pin, strategies) for pin in pins]
        legal = [self._legal(pin, [s.choices for s in strategies]) for pin in pins]
        return self._common(name, pins, allowed, legal) or range(len(strategies))

    def rest(self, value: str, layouts: Sequence[Layout]) -> Sequence[int]:
        """Return the numbers of the layouts that every pin on this parameter allows."""
        name = self.params[value]
        if not (pins := self._on(name, parameter=True)):
            return range(len(layouts))
        allowed = [self._layouts(pin, layouts) for pin in pins]
        legal = [self._legal(pin, layouts) for pin in pins]
        return self._common(name, pins, allowed, legal) or range(len(layouts))

    def _on(self, name: str, parameter: bool) -> list[Pin]:
        exact = [name] if name in self.pins else []
        found = [
            Pin(pattern, axis, wanted)
            for pattern in [*exact, *(p for p in self.wild if matches(p, name))]
            for axis, wanted in self.pins[pattern].items()
            if self.grid.sizes[self.grid.axis(axis)] > 1
        ]
        return [pin for pin in found if pin.pattern == name or pin.is_for(parameter)]

    def _strategies(self, pin: Pin, strategies: Sequence[Strategy]) -> set[int]:
        axis = self.grid.axis(pin.axis)
        return {k for k, s in enumerate(strategies) if fits(s.choices[axis], pin.wanted)}

    def _layouts(self, pin: Pin, layouts: Sequence[Layout]) -> set[int]:
        axis = self.grid.axis(pin.axis)
        return {k for k, c in enumerate(layouts) if type_fits(c[axis], pin.wanted)}

    def _legal(self, pin: Pin, choices: Sequence[Sequence[object]]) -> str:
        axis = self.grid.axis(pin.axis)
        found = (c[axis] for c in choices)
        return ", ".join(
            dict.fromkeys(c.name if isinstance(c, AxisChoice) else str(c) for c in found)
        )

    def _common(
        self, name: str, pins: Sequence[Pin], allowed: Sequence[set[int]], legal: Sequence[str]
    ) -> list[int]:
        """Return what all pins allow; if that is nothing, note the fewest pins to blame."""
        common = set.intersection(*allowed)
        if not common:
            alone = [k for k in range(len(pins)) if not allowed[k]]
            self.misfits += [(name, self._misfit(pins[k], legal[k])) for k in alone]
            if not alone:
                self.contradictions.append((name, _fewest(pins, allowed)))
        return sorted(common)

    def _misfit(self, pin: Pin, legal: str) -> str:
        size = self.grid.sizes[self.grid.axis(pin.axis)]
        return f"{pin} of {size}: legal are {legal}"


def _fewest(pins: Sequence[Pin], allowed: Sequence[set[int]]) -> tuple[Pin, ...]:
    """Return the fewest pins that allow nothing together."""
    sets = (c for n in range(1, len(pins) + 1) for c in itertools.combinations(range(len(pins)), n))
    found = next(c for c in sets if not set.intersection(*(allowed[k] for k in c)))
    return tuple(pins[k] for k in found)


def layout_pins(pins: Pins, grid: Grid) -> Pins:
    """Return the pins of layouts; an axis of that name takes the word from backward."""
    if BACKWARD in grid.names:
        return pins
    return {p: {axis: w for axis, w in on.items() if axis != BACKWARD} for p, on in pins.items()}


def backward_pins(pins: Pins, grid: Grid) -> dict[str, str]:
    """Return the pins of what backward finds, by pattern. Raises PinError for other words."""
    if BACKWARD in grid.names:
        return {}
    found = {p: on[BACKWARD] for p, on in pins.items() if BACKWARD in on}
    at = [(p, f"backward: {w!r}") for p, w in found.items() if w not in BACKWARD_WORDS]
    if at:
        legal = " or ".join(map(repr, BACKWARD_WORDS))
        raise PinError("backward cannot do what is pinned", at=at, remedy=f"pin {legal}")
    return found


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
    ops, params = [program.names[op.name] for op in network.ops], list(program.params.values())
    known, problems = {*ops, *params}, []
    for pattern, axes in pins.items():
        kinds = {
            parameter
            for parameter, names in ((False, ops), (True, params))
            if is_wild(pattern) and any(matches(pattern, n) for n in names)
        }
        if pattern not in known and not kinds:
            near = difflib.get_close_matches(pattern, [*ops, *params], n=3, cutoff=0.0)
            problems.append(
                (pattern, f"matches no op and no parameter; nearest: {', '.join(near)}")
            )
        for axis, wanted in axes.items():
            if kinds and not any(Pin(pattern, axis, wanted).is_for(kind) for kind in kinds):
                what = "ops" if False in kinds else "parameters"
                problems.append((pattern, f"matches {what} only, and {wanted!r} is not for them"))
            if axis not in grid.names:
                problems.append(
                    (pattern, f"no axis {axis!r}; the grid has {', '.join(grid.names)}")
                )
    if problems:
        raise PinError("pins that fit nothing", at=problems, remedy="correct the patterns or axes")


def refuse_misfits(pins: PinFilter) -> None:
    """Raise PinError if pins ask an op or a parameter for what it cannot do, alone or together."""
    if pins.misfits:
        problems = list(dict.fromkeys(pins.misfits))
        raise PinError(
            "pins that no strategy fits", at=problems[:12], remedy="pin one of the legal choices"
        )
    if pins.contradictions:
        name, fewest = min(pins.contradictions, key=lambda c: len(c[1]))
        raise contradiction(fewest, f"no choice of {name} has all of these")


def contradiction(pins: Sequence[Pin], why: str) -> PinError:
    """Return the error that names pins of which at least one must go."""
    return PinError(
        f"pins that contradict each other: {why}",
        at=[(pin.pattern, str(pin)) for pin in pins],
        remedy="remove or change one of them",
    )


def irreducible(pins: Pins, is_possible: Callable[[Pins], bool]) -> list[Pin]:
    """Return impossible pins of which none can be left out: each is tried without in turn.

    Source: Chinneck and Dravnieks 1991, "Locating minimal infeasible constraint sets".
    """
    kept = [
        Pin(pattern, axis, wanted) for pattern, on in pins.items() for axis, wanted in on.items()
    ]
    for pin in list(kept):
        fewer = [p for p in kept if p != pin]
        if not is_possible(as_pins(fewer)):
            kept = fewer
    return kept


def as_pins(pins: Sequence[Pin]) -> dict[str, dict[str, str]]:
    """Return pins as the user writes them."""
    out: dict[str, dict[str, str]] = {}
    for pin in pins:
        out.setdefault(pin.pattern, {})[pin.axis] = pin.wanted
    return out


__all__ = [
    "BACKWARD",
    "Pin",
    "PinFilter",
    "Pins",
    "backward_pins",
    "check_pins",
    "contradiction",
    "fits",
    "irreducible",
    "layout_pins",
    "matches",
    "refuse_misfits",
]
