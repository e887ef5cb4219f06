"""The sharding theory, written once: how one mesh axis may meet one op.

On one axis an op may split one factor `f` (operands with `f` are S, operands without it R, results
without it P); run whole on I operands; run whole on R operands; or pass P through where it is
linear. `axis_choices` lists these for one op and one axis size; `strategies_of` combines them over
the axes of a grid. Values without gradient are I where others would be R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from autotp.grid import Grid
from autotp.layouts import AxisType, I, Layout, P, R, Shard, shard
from autotp.passes.factors import Factors, Way, blocks_within
from autotp.passes.network import Op, Value
from autotp.passes.rules.sentence import Dim, Signature
from autotp.passes.spaces import legal
from autotp.sizes import varies


@dataclass(frozen=True, slots=True)
class AxisChoice:
    """One way in which one axis meets one op: its name, and a type per operand and result.

    name    the factor that is split, or I, R (whole) or P0, P1, P (partial passed through)
    split   the factors that are split: one, or the blocks of a row together; none if whole
    unit    what the number of ranks that split it must divide, or 0 if uneven chunks are fine
    """

    name: str
    operands: tuple[AxisType, ...]
    results: tuple[AxisType, ...]
    split: tuple[str, ...] = ()
    unit: int = 0


@dataclass(frozen=True, slots=True)
class Strategy:
    """One choice per axis of the grid, with the layouts that follow."""

    choices: tuple[AxisChoice, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Typing:
    """Which operands and results of an op carry gradient."""

    operands: tuple[bool, ...]
    results: tuple[bool, ...]

    @classmethod
    def of(cls, operands: Sequence[Value], results: Sequence[Value]) -> Typing:
        """Return the typing of a call from its values."""
        return cls(tuple(v.grad for v in operands), tuple(v.grad for v in results))


@dataclass(frozen=True, slots=True, eq=False)
class Strategies(Sequence[Strategy]):
    """The legal strategies of one op, in a fixed order, as numbers; each is spelled out when read.

    choices   how one axis may meet the op
    picks     [strategy, axis], the number of a choice
    """

    choices: tuple[AxisChoice, ...]
    picks: np.ndarray

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, number: int) -> Strategy: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Strategy]: ...

    def __getitem__(self, number: int | slice) -> Strategy | Sequence[Strategy]:
        if isinstance(number, slice):
            return Strategies(self.choices, self.picks[number])
        return _combine(tuple(self.choices[k] for k in self.picks[number].tolist()))

    def keep(self, kept: Sequence[int] | np.ndarray) -> Strategies:
        """Return some of the strategies."""
        return Strategies(self.choices, self.picks[kept])

    def axes_where(self, holds: Sequence[bool]) -> np.ndarray:
        """Return per strategy, as bits, the axes whose choice (by number) is one that holds."""
        bits = 1 << np.arange(self.picks.shape[1])
        return np.asarray(np.asarray(holds, dtype=bool)[self.picks] @ bits)

    def layouts(self, types: Sequence[AxisType]) -> tuple[tuple[Layout, ...], np.ndarray]:
        """Return the distinct layouts of a tensor that choice k gives type k, and which is whose.

        They stand in the order of the first strategy that has them.
        """
        distinct = tuple(dict.fromkeys(types))
        number = {t: k for k, t in enumerate(distinct)}
        by_choice = np.array([number[t] for t in types])
        radix = len(distinct) ** np.arange(self.picks.shape[1])
        codes = by_choice[self.picks] @ radix
        _, first, which = np.unique(codes, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        picks = self.picks[first[order]].tolist()
        return tuple(tuple(types[k] for k in row) for row in picks), rank[which]


def strategies_of(op: Op, typing: Typing, factors: Factors, grid: Grid) -> Strategies:
    """Return every legal strategy of `op` on `grid`, in a fixed order."""
    return legal_strategies(op, axis_choices(op, typing, factors), grid)


def legal_strategies(op: Op, choices: Sequence[AxisChoice], grid: Grid) -> Strategies:
    """Return every combination of an op's choices over the axes of a grid that is legal.

    Blocks must divide, and every operand and result must be able to have its layout.
    """
    able = [k for k, c in enumerate(choices) if _program_can(c, op)]
    alone = [k for k, c in enumerate(choices) if c.name == "I"]
    per_axis = [able if size > 1 else alone for size in grid.sizes]
    combined = np.stack(np.meshgrid(*per_axis, indexing="ij"), axis=-1)
    found = Strategies(tuple(choices), combined.reshape(-1, len(grid.sizes)).astype(np.intp))
    for name, unit in {c.name: int(c.unit) for c in choices if c.unit}.items():
        sharing = found.axes_where([c.name == name for c in choices])
        divides = [unit % ranks == 0 for ranks in ranks_by_axes(grid)]
        found = found.keep(np.array(divides)[sharing])
    tensors = [*(t for t in op.call.operands if t), *op.call.results]
    typed = zip(*((*c.operands, *c.results) for c in choices), strict=True)
    for t, types in zip(tensors, typed, strict=True):
        found = found.keep(legal(t.shape, types, found.picks, grid))
    return found


def ranks_by_axes(grid: Grid) -> list[int]:
    """Return the ranks of every set of axes, a set written as bits."""
    axes = range(len(grid.sizes))
    return [
        math.prod(grid.sizes[a] for a in axes if chosen >> a & 1)
        for chosen in range(1 << len(axes))
    ]


def _combine(combo: tuple[AxisChoice, ...]) -> Strategy:
    return Strategy(
        choices=combo,
        operands=tuple(zip(*(c.operands for c in combo), strict=True)) if combo[0].operands else (),
        results=tuple(zip(*(c.results for c in combo), strict=True)),
    )


def _program_can(choice: AxisChoice, op: Op) -> bool:
    """A program that needs ranges of a factor takes plain chunks of it, on one or several axes."""
    own = set(choice.split) & set(op.rule.own) - set(op.rule.blocks)
    return not own or all(not (isinstance(t, Shard) and t.parts) for t in choice.operands)


def axis_choices(op: Op, typing: Typing, factors: Factors) -> list[AxisChoice]:
    """Return how one axis may meet `op`: whole on I, whole on R, partial through, each split."""
    whole_i = AxisChoice("I", (I,) * len(typing.operands), (I,) * len(typing.results))
    found = [whole_i]
    if any(typing.operands):
        found.append(_typed("R", R, R, typing))
    found += [c for c in _partial_choices(op, typing) if _keeps_terms(c, op)]
    found += _split_choices(op, typing, factors)
    return found


def _typed(name: str, operand: AxisType, result: AxisType, typing: Typing) -> AxisChoice:
    return AxisChoice(
        name,
        tuple(operand if g else _no_grad(operand) for g in typing.operands),
        tuple(result if g else _no_grad(result) for g in typing.results),
    )


def _no_grad(t: AxisType) -> AxisType:
    """Without a gradient R and I are one type: I."""
    return I if t is R else t


def _partial_choices(op: Op, typing: Typing) -> Iterator[AxisChoice]:
    linear = op.rule.linear_in(op.call)
    count = len(typing.operands)
    base = [R if g else I for g in typing.operands]
    if linear == "each":
        for k in range(count):
            if k in op.signature.added:
                continue
            types = [P if i == k or i in op.signature.added else base[i] for i in range(count)]
            yield AxisChoice(f"P{k}", tuple(types), (P,) * len(typing.results))
    elif linear:
        together = range(count) if linear == "all" else linear
        types = [P if i in together else base[i] for i in range(count)]
        yield AxisChoice("P", tuple(types), (P,) * len(typing.results))


def _keeps_terms(choice: AxisChoice, op: Op) -> bool:
    """A bool is no term of a sum, and a term that is rounded to an integer no longer adds up."""
    tensors = [t for t in op.call.operands if t]
    summed = [t.dtype for t, a in zip(tensors, choice.operands, strict=True) if a is P]
    made = [t.dtype for t in op.call.results]
    real = any(d.is_floating_point for d in summed)
    rounded = real and not all(d.is_floating_point or d.is_complex for d in made)
    return not rounded and torch.bool not in (*summed, *made)


def _split_choices(op: Op, typing: Typing, factors: Factors) -> Iterator[AxisChoice]:
    for name, ways in split_ways(op, factors).items():
        choice = _split(op, typing, ways, name)
        if choice:
            yield choice


def split_ways(op: Op, factors: Factors) -> dict[str, dict[str, Way]]:
    """Return the ways in which one axis may split factors of `op`, by names that differ."""
    out: dict[str, dict[str, Way]] = {}
    seen: dict[str, int] = {}
    for name, ways in _named_ways(op, factors):
        seen[name] = seen.get(name, 0) + 1
        out[name if seen[name] == 1 else f"{name}{seen[name]}"] = ways
    return out


def _named_ways(op: Op, factors: Factors) -> Iterator[tuple[str, dict[str, Way]]]:
    rows = op.signature.blocks()
    in_rows = {f for row in rows for f in row}
    for factor in op.signature.factors():
        if factor not in op.signature.whole and factor not in in_rows:
            ways = factors.ways(op.name, factor)
            for way in ways:
                yield _way_name(factor, way, ways, factors), {factor: way}
    for row in rows:
        yield from _row_ways(op, row, factors)
    for group in op.rule.groups(op.call):
        if all(f in op.signature.sizes for f in group):
            yield "+".join(group), {f: _chunks(op, f, factors) for f in group}


def _chunks(op: Op, factor: str, factors: Factors) -> Way:
    """Return the way that splits a factor as it is, whatever it is made of."""
    size = op.signature.sizes[factor]
    return Way(factors.atoms.find(factors.of_op[op.name, factor]), (size,), size, True)


def _way_name(factor: str, way: Way, ways: Sequence[Way], factors: Factors) -> str:
    """Name a way after its factor, or `factor.atom` where there are several."""
    plain = factor if factor.isalpha() else factors.name(way.atom)
    return plain if len(ways) == 1 else f"{plain}.{factors.name(way.atom)}"


def _row_ways(
    op: Op, row: tuple[str, ...], factors: Factors
) -> Iterator[tuple[str, dict[str, Way]]]:
    """Split all blocks of a row by an atom that they share, or each by its own chunks."""
    ways = [{w.atom: w for w in factors.ways(op.name, f)} for f in row]
    shared = [a for a in ways[0] if all(a in w for w in ways)]
    for atom in shared:
        yield factors.name(atom), {f: w[atom] for f, w in zip(row, ways, strict=True)}
    if not shared:
        sizes = op.signature.sizes
        yield "|".join(row), {f: Way(-1, (sizes[f],), sizes[f], False) for f in row}


def _split(op: Op, typing: Typing, ways: dict[str, Way], name: str) -> AxisChoice | None:
    sig = op.signature
    held = [_shards(dims, ways, sig) for dims in (*sig.operands, *sig.results)]
    if any(len(shards) > 1 for shards in held):
        return None  # the factor stands twice in one tensor
    if any(varies(s.parts) for shards in held for s in shards):
        return None  # a layout's blocks are as long for every input
    types = [shards[0] if shards else None for shards in held]
    operands, results = types[: len(sig.operands)], types[len(sig.operands) :]
    plain = all(w.is_atom for w in ways.values())
    summed = all(sig.summed(f) for f in ways)
    programs = {op.rule.split[f] for f in ways if f in op.rule.split}
    if summed and "S" in programs:
        return None  # the program's result has the factor: it cannot be summed away
    missing = I if "I" in programs else P
    return AxisChoice(
        name=name,
        operands=tuple(
            t or (P if summed and i in sig.added else R if g else I)
            for i, (t, g) in enumerate(zip(operands, typing.operands, strict=True))
        ),
        results=tuple(t or missing for t in results),
        split=tuple(ways),
        unit=0 if plain and _stands_alone(ways, sig) else min(w.unit_count for w in ways.values()),
    )


def _shards(dims: Sequence[Dim], ways: dict[str, Way], sig: Signature) -> list[Shard]:
    """Return the shard of every dim of a tensor that holds the factors."""
    found = [(d, _dim_parts(dim, ways, sig)) for d, dim in enumerate(dims)]
    return [shard(d, parts) for d, parts in found if parts]


def _dim_parts(dim: Dim, ways: dict[str, Way], sig: Signature) -> tuple[int, ...]:
    parts: tuple[int, ...] = ()
    held = [any(f in ways for f in product) for product in dim]
    if not any(held):
        return ()
    for product in dim:
        parts += _product_parts(product, ways, sig)
    return parts


def _product_parts(product: Sequence[str], ways: dict[str, Way], sig: Signature) -> tuple[int, ...]:
    prefix = 1
    for k, f in enumerate(product):
        if f in ways:
            suffix = math.prod(sig.sizes[g] for g in product[k + 1 :])
            return blocks_within(ways[f].parts, prefix, suffix)
        prefix *= sig.sizes[f]
    return (math.prod(sig.sizes[f] for f in product),)


def _stands_alone(ways: dict[str, Way], sig: Signature) -> bool:
    """Say whether the factor is a dim of its own wherever it stands: then chunks may be uneven."""
    return all(
        len(product) == 1 and len(dim) == 1
        for dims in (*sig.operands, *sig.results)
        for dim in dims
        for product in dim
        if any(f in ways for f in product)
    )
