"""What the user would expect to be split and is not: dims that an axis of the grid does not divide.

Heads and a batch that is folded with other dims are cut in whole pieces only, so that an axis which
does not divide their number cannot split them. Another layout is chosen, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autotp.grid import Grid
from autotp.passes.factors import Factors, Id
from autotp.passes.network import Network, Op
from autotp.passes.program import Program

SCORES = ("scaled_dot_product_attention", "softmax")
"""Ops whose operands of four dims have their heads third from the end."""
HEADS_DIM, SCORE_DIMS = -3, 4

Words = Mapping[Id, str]


def notes_of(program: Program, network: Network, factors: Factors, grid: Grid) -> tuple[str, ...]:
    """Return a line for each dim and axis where the number of pieces is not a multiple."""
    words = {**_head_words(network, factors), **_input_words(program, network, factors)}
    places: dict[tuple[str, int], list[str]] = {}
    for op in network.ops:
        for word, pieces in _pieces(op, factors, words):
            found = places.setdefault((word, pieces), [])
            if program.names[op.name] not in found:
                found.append(program.names[op.name])
    return tuple(
        f"{word} {pieces} on axis {axis!r} of {size}: not split, {pieces} % {size} != 0"
        f" ({_listed(found)})"
        for axis, size in zip(grid.names, grid.sizes, strict=True)
        for (word, pieces), found in places.items()
        if pieces % size
    )


def _pieces(op: Op, factors: Factors, words: Words) -> Iterator[tuple[str, int]]:
    """Yield the named atoms that an op may cut only into whole pieces, and how many there are."""
    for factor in op.signature.factors():
        for way in factors.ways(op.name, factor):
            word = words.get(factors.atoms.find(way.atom))
            if word and not way.is_atom:
                yield word, way.unit_count


def _head_words(network: Network, factors: Factors) -> Words:
    out: dict[Id, str] = {}
    for op in network.ops:
        short = str(op.call.op).split(".")[1]
        for value in op.operands if short in SCORES else ():
            dims = len(network.values[value].shape)
            if dims == SCORE_DIMS:
                root = factors.atoms.find(factors.of_value[value, dims + HEADS_DIM])
                kind, children = factors.atoms.definition.get(root, ("atom", ()))
                named = ("KV heads", "heads of a KV head") if kind == "product" else ("heads",)
                for atom, word in zip(children or (root,), named, strict=False):
                    out.setdefault(factors.atoms.find(atom), word)
    return out


def _input_words(program: Program, network: Network, factors: Factors) -> Words:
    read = [v for v in program.inputs if v in network.values and network.values[v].shape]
    return {factors.atoms.find(factors.of_value[v, 0]): "batch" for v in read}


def _listed(places: list[str]) -> str:
    return places[0] + (f" and {len(places) - 1} more" if places[1:] else "")
