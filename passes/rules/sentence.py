"""Read a rule's sentence and bind it to shapes.

A sentence such as `"... i, o i, +o -> ... o"` names the factors of every operand and result. A name
on both sides may be split; a name missing on the right leaves the result partial; `[x]` is needed
whole; `(a b)` is one dim made of two factors, the major first; `(q|k|v)` is one dim made of blocks
side by side; `+` marks an operand that is added once; `1` is a dim of one element; `...` stands for
any dims, aligned at the right, where a dim of one element broadcasts.
`parse` reads the text, `Sentence.bind` gives every factor its size: a `Signature`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autotp.errors import RuleError
from autotp.layouts import Shape

Product = tuple[str, ...]
"""Factors of one block, major first; none for a dim of one element."""

Dim = tuple[Product, ...]
"""The blocks of one dim, nearly always one."""

ELLIPSIS: Dim = (("...",),)
ONE: Dim = ((),)

_TOKEN = re.compile(r"\([^)]*\)|\[[^\]]*\]|[^\s]+")


@dataclass(frozen=True, slots=True)
class Signature:
    """A sentence with sizes: what every dim of every operand and result is made of."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    added: frozenset[int] = frozenset()

    def factors(self) -> list[str]:
        """Return the factors in order of appearance, blocks of a concatenation included."""
        seen: dict[str, None] = {}
        for dims in (*self.operands, *self.results):
            for dim in dims:
                for product in dim:
                    seen.update(dict.fromkeys(product))
        return list(seen)

    def blocks(self) -> list[tuple[str, ...]]:
        """Return the groups of factors that lie side by side and can only be split together."""
        groups: dict[tuple[str, ...], None] = {}
        for dims in (*self.operands, *self.results):
            for dim in dims:
                if len(dim) > 1:
                    groups[tuple(product[0] for product in dim)] = None
        return list(groups)

    def summed(self, factor: str) -> bool:
        """Say whether `factor` is missing from every result."""
        return all(factor not in p for dims in self.results for dim in dims for p in dim)


@dataclass(frozen=True, slots=True)
class Sentence:
    """The dims of operands and results by name, before any size is known."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    whole: frozenset[str]
    added: frozenset[int]
    text: str = field(compare=False)

    def bind(
        self,
        operands: Sequence[Shape | None],
        results: Sequence[Shape],
        sizes: Mapping[str, int] | None = None,
    ) -> Signature:
        """Return the signature for these shapes; an operand that is None was not given.

        Raises RuleError when a shape does not fit the sentence.
        """
        if len(operands) > len(self.operands) or len(results) != len(self.results):
            raise RuleError(f"{self.text!r} does not fit {len(operands)} operands")
        given = [i for i, shape in enumerate(operands) if shape is not None]
        shapes = [tuple(operands[i] or ()) for i in given] + [tuple(r) for r in results]
        named = [self.operands[i] for i in given] + list(self.results)
        width = max(
            (len(s) - len(d) + 1 for s, d in zip(shapes, named, strict=True) if ELLIPSIS in d),
            default=0,
        )
        dims = [_expand(d, s, width, self.text) for d, s in zip(named, shapes, strict=True)]
        dims = _drop_broadcast(dims, shapes)
        solved = _solve(dims, shapes, dict(sizes or {}), self.text)
        return Signature(
            operands=tuple(dims[: len(given)]),
            results=tuple(dims[len(given) :]),
            sizes=solved,
            whole=self.whole & named_factors(dims),
            added=frozenset(given.index(i) for i in self.added if i in given),
        )


@functools.cache
def parse(text: str) -> Sentence:
    """Read a sentence.

    >>> parse("... i, o i, +o -> ... o").added
    frozenset({2})
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"{text!r} has no '->'", remedy='write "operands -> results"')
    whole: set[str] = set()
    operands, results = _terms(left), _terms(right)
    added = frozenset(i for i, term in enumerate(operands) if term.startswith("+"))
    return Sentence(
        operands=tuple(_dims(t.removeprefix("+"), whole) for t in operands),
        results=tuple(_dims(t, whole) for t in results),
        whole=frozenset(whole),
        added=added,
        text=text,
    )


def _terms(side: str) -> list[str]:
    return [term.strip() for term in side.split(",")]


def _dims(term: str, whole: set[str]) -> tuple[Dim, ...]:
    return tuple(_dim(token, whole) for token in _TOKEN.findall(term))


def _dim(token: str, whole: set[str]) -> Dim:
    if token == "1":
        return ONE
    if token.startswith("["):
        names = tuple(token[1:-1].split())
        whole.update(names)
        return (names,)
    if token.startswith("("):
        whole.update(re.findall(r"\[(\w+)\]", token))
        blocks = token[1:-1].replace("[", "").replace("]", "").split("|")
        return tuple(tuple(block.split()) for block in blocks)
    return ((token,),)


def _expand(dims: tuple[Dim, ...], shape: Shape, width: int, text: str) -> tuple[Dim, ...]:
    """Replace the ellipsis by numbered factors, aligned at the right."""
    if ELLIPSIS not in dims:
        if len(dims) != len(shape):
            raise RuleError(f"{text!r} does not fit a tensor of shape {list(shape)}")
        return dims
    at = dims.index(ELLIPSIS)
    count = len(shape) - len(dims) + 1
    if count < 0:
        raise RuleError(f"{text!r} does not fit a tensor of shape {list(shape)}")
    names = [((f".{i}",),) for i in range(width - count, width)]
    return (*dims[:at], *names, *dims[at + 1 :])


def _drop_broadcast(dims: list[tuple[Dim, ...]], shapes: Sequence[Shape]) -> list[tuple[Dim, ...]]:
    """Make a dim of one element a `1` where the same ellipsis factor is larger elsewhere."""
    largest: dict[str, int] = {}
    for name, size in _plain(dims, shapes):
        largest[name] = max(size, largest.get(name, 0))
    return [
        tuple(
            ONE if _is_broadcast(dim, n, largest) else dim
            for dim, n in zip(row, shape, strict=True)
        )
        for row, shape in zip(dims, shapes, strict=True)
    ]


def _is_broadcast(dim: Dim, size: int, largest: Mapping[str, int]) -> bool:
    return size == 1 and len(dim) == 1 and len(dim[0]) == 1 and largest[dim[0][0]] > 1


def named_factors(dims: Sequence[tuple[Dim, ...]]) -> frozenset[str]:
    """Return every factor that stands in these dims."""
    return frozenset(f for row in dims for dim in row for product in dim for f in product)


def _plain(dims: Sequence[tuple[Dim, ...]], shapes: Sequence[Shape]) -> Iterator[tuple[str, int]]:
    for row, shape in zip(dims, shapes, strict=True):
        for dim, n in zip(row, shape, strict=True):
            if len(dim) == 1 and len(dim[0]) == 1:
                yield dim[0][0], n


def _solve(
    dims: Sequence[tuple[Dim, ...]], shapes: Sequence[Shape], sizes: dict[str, int], text: str
) -> Mapping[str, int]:
    """Find every factor's size: single factors first, then products with one unknown."""
    for name, n in _plain(dims, shapes):
        if sizes.setdefault(name, n) != n:
            raise RuleError(f"{text!r}: factor {name} is both {sizes[name]} and {n}")
    pending = [
        (dim, n)
        for row, shape in zip(dims, shapes, strict=True)
        for dim, n in zip(row, shape, strict=True)
    ]
    for _ in range(3):
        for dim, n in pending:
            _solve_dim(dim, n, sizes)
    for dim, n in pending:
        if sum(math.prod(sizes.get(f, 0) for f in product) for product in dim) != n:
            raise RuleError(f"{text!r}: {dim} does not have {n} elements under {sizes}")
    return sizes


def _solve_dim(dim: Dim, size: int, sizes: dict[str, int]) -> None:
    unknown = [f for product in dim for f in product if f not in sizes]
    if len(unknown) != 1:
        return
    rest = 0
    for product in dim:
        known = math.prod(sizes.get(f, 1) for f in product)
        if unknown[0] in product:
            scale = known
        else:
            rest += known
    sizes[unknown[0]] = (size - rest) // max(scale, 1)
