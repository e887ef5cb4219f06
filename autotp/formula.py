"""The volume of a plan's own communication, in symbols.

    layer_formula    what a rank sends for one repeated layer, forward and backward
    total_formula    what it sends in one step
    symbol_sizes     the numbers that the symbols stand for

b and s are batch and sequence, h the width of what flows from layer to layer; other sizes are
multiples of h where they are in number, else named after their dims. An axis has its own name, or
p if it is the only one. Substituting the numbers gives the bytes of the plan's moves exactly; a
size that no product of symbols gives (uneven chunks) stands as a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from sympy import Expr, Integer, Rational, Symbol, factor_terms

from autotp.cost_model.closed_forms import sent_volume
from autotp.cost_model.collectives import FREE, ROUNDS, rounds, wire_bytes_by
from autotp.errors import PlanError
from autotp.layouts import Layout, Shard, splitters
from autotp.plan import Decision, Plan, PlannedMove
from autotp.repeats import Section, place_moves, sections

OWN = ("b", "s", "v")
"""Dims that keep their names even where their size is a multiple of h."""

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class _Value:
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str


@dataclass(slots=True)
class _Symbols:
    """The symbols of one plan.

    hidden   the size that h stands for
    plain    sizes of dims by name, of names with one size
    sizes    what the symbols used so far stand for
    """

    plan: Plan
    hidden: int
    values: Mapping[str, _Value]
    plain: Mapping[str, int]
    sizes: dict[Symbol, int] = field(default_factory=dict)

    def symbol(self, name: str, size: int) -> Symbol:
        found = Symbol(name, positive=True)
        self.sizes[found] = size
        return found

    def axis(self, name: str) -> Expr:
        """Return an axis's size: p if no other axis has more than one rank."""
        size = self.plan.grid.sizes[self.plan.grid.axis(name)]
        if size == 1:
            return Integer(1)
        alone = sum(n > 1 for n in self.plan.grid.sizes) == 1
        return self.symbol("p" if alone else f"{name}_ranks" if name in "bshv" else name, size)

    def dims(self, names: Iterable[str], shape: Iterable[int]) -> Expr:
        """Return the product of dims: by name if it is b or s, else as a multiple of h."""
        out: Expr = Integer(1)
        rest: list[tuple[str, int]] = []
        for name, size in zip(names, shape, strict=True):
            if name == "(b s)" and self._own_size("b") * self._own_size("s") == size:
                out *= self.symbol("b", self._own_size("b"))
                out *= self.symbol("s", self._own_size("s"))
            elif name in OWN:
                out *= self.named(name, size)
            elif multiple := self._of_hidden(size):
                out *= multiple
            else:
                rest.append((name, size))
        together = self._of_hidden(math.prod(size for _, size in rest))
        return out * (together or math.prod(self.named(*row) for row in rest))

    def named(self, name: str, size: int) -> Expr:
        """Return the symbol of a plain dim; with its size if the plan has others of that name."""
        if size == 1 or not name.isalpha():
            return Integer(size)
        unsure = self.plain.get(name) != size or (name == "h" and size != self.hidden)
        return self.symbol(f"{name}_{size}" if unsure else name, size)

    def _of_hidden(self, size: int) -> Expr | None:
        if self.hidden < 2 or size % self.hidden or not size:
            return None
        return size // self.hidden * self.symbol("h", self.hidden)

    def _own_size(self, name: str) -> int:
        """Return the size of a plain dim, 0 if the plan has several or none of that name."""
        return self.plain.get(name, 0)

    def value(self, expression: Expr) -> Fraction:
        number = Rational(expression.subs(self.sizes))
        return Fraction(int(number.p), int(number.q))


# What is counted ---------------------------------------------------------------------------------


def layer_formula(plan: Plan, unit: str = "elements") -> Expr:
    """Return what a rank sends for one layer of those that repeat most; all, if none repeats."""
    return _formula(plan, _layer_names(plan), unit)[0]


def total_formula(plan: Plan, unit: str = "elements") -> Expr:
    """Return what a rank sends in one step."""
    return _formula(plan, None, unit)[0]


def symbol_sizes(plan: Plan, layer_only: bool = False) -> dict[Symbol, int]:
    """Return the numbers that the symbols of a plan's formulas stand for: b, s and h first."""
    sizes = dict(_formula(plan, _layer_names(plan), "elements")[1])
    if not layer_only:
        sizes |= _formula(plan, None, "elements")[1]
    first = {name: k for k, name in enumerate("bsh")}
    return dict(sorted(sizes.items(), key=lambda kv: (first.get(kv[0].name, 3), kv[0].name)))


def repeated_layer(plan: Plan) -> Section | None:
    """Return the layers that make up most of the ops, None if nothing repeats."""
    found = [s for s in sections(plan, place_moves(plan)) if s.name]
    return max(found, key=lambda s: len(s.layers) * len(s.ops), default=None)


def _layer_names(plan: Plan) -> frozenset[str] | None:
    layer = repeated_layer(plan)
    return None if layer is None else frozenset(d.name for d in layer.ops)


def _formula(plan: Plan, names: frozenset[str] | None, unit: str) -> tuple[Expr, dict[Symbol, int]]:
    """Add up what stands with the ops of these names, or with all."""
    if unit not in ("elements", "bytes"):
        raise PlanError(f"no formula in {unit!r}", remedy='unit="elements" or unit="bytes"')
    symbols = _symbols(plan)
    placed = place_moves(plan)
    found = []
    for name, moves in placed.items():
        if names is None or name in names:
            found += [c for m in moves for c in _collectives(symbols, m, unit)]
    for name, axis, kind, sent in plan.internal:
        if names is None or name in names:
            found.append(_internal(symbols, plan[name], axis, kind, sent, unit))
    volume = factor_terms(sent_volume(found))
    return volume, {k: n for k, n in symbols.sizes.items() if k in volume.free_symbols}


def _collectives(symbols: _Symbols, m: PlannedMove, unit: str) -> list[tuple[str, Expr, Expr]]:
    made = [(m.forward, m.by)] * (1 + m.again) + [(m.backward, m.back_by)]
    ways = [way for way in made if way[0] not in FREE]
    if not ways or not m.sent:
        return []
    value = symbols.values.get(m.value)
    itemsize = Integer(ITEMSIZE[value.dtype] if value and value.dtype in ITEMSIZE else 1)
    size = _buffer(symbols, m, value) if value else None
    if size is None or symbols.value(size) * int(itemsize) != m.size_bytes:
        size = Rational(m.size_bytes, itemsize)
    ranks = symbols.plan.grid.sizes[symbols.plan.grid.axis(m.axis)]
    out = []
    for kind, by in ways:
        wire = wire_bytes_by(kind, by, m.size_bytes, ranks, int(itemsize))
        whole = size if wire == m.size_bytes else Rational(wire, itemsize)
        rings = Rational(rounds(kind, by), ROUNDS[kind]) * (itemsize if unit == "bytes" else 1)
        out.append((kind, whole * rings, symbols.axis(m.axis)))
    return out


def _buffer(symbols: _Symbols, m: PlannedMove, value: _Value) -> Expr:
    """Return the elements of a move's whole buffer: the tensor, less what other axes split."""
    out = symbols.dims(value.dims, value.shape)
    grid = symbols.plan.grid
    exchanged = m.forward == "all_to_all"
    for name, t in zip(grid.names, m.before, strict=True):
        if isinstance(t, Shard) and (name != m.axis or exchanged):
            out /= symbols.axis(name)
    return out


def _internal(
    symbols: _Symbols, d: Decision, axis: str, kind: str, sent: Fraction, unit: str
) -> tuple[str, Expr, Expr]:
    """Return what a local program sends: a multiple of the dims that its statistics keep.

    A ring's p - 1 permutes of a p-th are written as an all-to-all of the whole.
    """
    kind = "all_to_all" if kind == "permute" else kind
    itemsize = ITEMSIZE.get(d.dtype, 1)
    ranks = symbols.plan.grid.sizes[symbols.plan.grid.axis(axis)]
    elements = sent * ranks / (ranks - 1) / ROUNDS[kind] / itemsize
    kept = _kept_dims(symbols, d, d.results[0])
    times = elements / symbols.value(kept)
    size = Rational(times.numerator, times.denominator) * kept
    return kind, size * (itemsize if unit == "bytes" else 1), symbols.axis(axis)


def _kept_dims(symbols: _Symbols, d: Decision, layout: Layout) -> Expr:
    """Return the local elements of a result without its last dim, which is reduced."""
    names, shape = d.dims[0][:-1], d.shapes[0][:-1]
    out = symbols.dims(names, shape)
    for dim in range(len(shape)):
        for axis in splitters(layout, dim):
            out /= symbols.axis(symbols.plan.grid.names[axis])
    return out


# The symbols -------------------------------------------------------------------------------------


def _symbols(plan: Plan) -> _Symbols:
    values = {r.value: _Value(r.shape, r.dims, r.dtype) for r in plan.params.values()}
    values |= {
        v: _Value(shape, dims, d.dtype)
        for d in plan.decisions
        for v, shape, dims in zip(d.makes, d.shapes, d.dims, strict=True)
    }
    seen: dict[str, set[int]] = {}
    for v in values.values():
        for name, size in zip(v.dims, v.shape, strict=True):
            seen.setdefault(name, set()).update({size} - {1})
    plain = {name: min(found) for name, found in seen.items() if len(found) == 1}
    return _Symbols(plan, _hidden_size(plan, values), values, plain)


def _hidden_size(plan: Plan, values: Mapping[str, _Value]) -> int:
    """Return the last dim of what a layer hands to the next; of the results, if none repeats."""
    layer = repeated_layer(plan)
    if layer is not None:
        made = {v for d in layer.layers[0] for v in d.makes}
        read = [v for d in layer.layers[1] for v in d.reads if v in made and values[v].shape]
        if read:
            return values[read[0]].shape[-1]
    wide = [shape for d in plan.decisions for shape in d.shapes if len(shape) > 1]
    ends = [wide[-1], wide[0]] if wide and len(plan.decisions[-1].shapes[0]) > 1 else wide[:1]
    return ends[0][-1] if ends else 0


def formula_text(expression: Expr) -> str:
    """Write a formula in one line, with ^ for powers."""
    return re.sub(r"\*\*", "^", str(expression))
