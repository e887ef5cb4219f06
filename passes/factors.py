"""Which dims are the same dim, and what they are made of.

In: a Network whose ops have signatures. Out: Factors, which answers in which ways each factor of
each op may be split. A union-find runs over the dims of all values and the factors of all ops; a
dim that one op reads as `(n d)` or `(q|k|v)` is made of those atoms for every other op that touches
it. So the output dim of a fused projection, viewed as `3 n d` or split in three further down, is
known to hold three blocks of heads, and `ways` splits the heads inside each block.

Wrong answers here cost speed, never correctness: a layout carries its blocks, and two ops that
disagree are joined by a move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autotp.passes.network import Network, Op
from autotp.passes.rules.sentence import Dim
from autotp.sizes import varies

Id = int

MAX_BLOCKS = 64
"""More blocks than this in one dim are not offered: every rank would hold confetti."""

Parts = tuple[int, ...]
"""The sizes of the blocks of a dim."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to split a factor: into chunks of an atom, inside each of `parts` blocks.

    unit_count is the atom's size, which an axis must divide unless the factor is an atom itself.
    """

    atom: Id
    parts: Parts
    unit_count: int
    is_atom: bool

    @property
    def is_offered(self) -> bool:
        """Say whether the blocks are few, and as many and as long whatever sizes vary."""
        return len(self.parts) == 1 or (len(self.parts) <= MAX_BLOCKS and not varies(self.parts))


def blocks_within(parts: Parts, before: int, after: int) -> Parts:
    """Return the blocks of a dim `(before x after)` where those of x are `parts`.

    Where their number varies, two that vary stand for them: no layout has such.
    """
    return (before, before) if varies([before]) else tuple(p * after for p in parts) * before


@dataclass(slots=True)
class Atoms:
    """A union-find over dims, each perhaps defined as a product or a row of blocks of others."""

    parent: list[Id] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    definition: dict[Id, tuple[str, tuple[Id, ...]]] = field(default_factory=dict)
    whole: set[Id] = field(default_factory=set)

    def new(self, size: int) -> Id:
        """Add a dim of `size`."""
        self.parent.append(len(self.parent))
        self.sizes.append(size)
        return len(self.parent) - 1

    def find(self, x: Id) -> Id:
        """Return the one that stands for all dims united with `x`."""
        while self.parent[x] != x:
            self.parent[x] = self.parent[self.parent[x]]
            x = self.parent[x]
        return x

    def unite(self, x: Id, y: Id) -> None:
        """Make two dims of equal size one, and their definitions too."""
        x, y = sorted((self.find(x), self.find(y)))
        if x == y or self.sizes[x] != self.sizes[y]:
            return
        self.parent[y] = x
        if y in self.whole:
            self.whole.add(x)
        made_of = self.definition.pop(y, None)
        if made_of:
            self.define(x, *made_of)

    def define(self, x: Id, kind: str, children: Sequence[Id]) -> None:
        """Say that a dim is a product, or a row of blocks, of others."""
        x = self.find(x)
        children = tuple(self.find(c) for c in children)
        if x in children or any(x in self.descendants(c) for c in children):
            return
        old = self.definition.setdefault(x, (kind, children))
        if old == (kind, children):
            return
        if kind == old[0] == "product":
            self._align(list(old[1]), list(children))
        elif kind == old[0]:
            self._align_rows(list(old[1]), list(children))
        else:
            self._align_blocks(x, (kind, children), old)

    def _sizes(self, ids: Sequence[Id]) -> list[int]:
        return [self.sizes[i] for i in ids]

    def _align(self, left: list[Id], right: list[Id]) -> None:
        """Refine two products of one dim until they have the same factors, major first."""
        while left and right:
            a, b = left.pop(0), right.pop(0)
            small, large, rest = (a, b, right) if self.sizes[a] <= self.sizes[b] else (b, a, left)
            if self.sizes[large] % self.sizes[small]:
                return
            remainder = self.sizes[large] // self.sizes[small]
            if remainder == 1:
                self.unite(a, b)
                continue
            minor = self._minor(large, small, remainder)
            if minor is None:
                return
            rest.insert(0, minor)

    def _align_rows(self, left: list[Id], right: list[Id]) -> None:
        """Refine two rows of blocks of one dim until they have the same borders."""
        while left and right:
            a, b = left.pop(0), right.pop(0)
            small, large, rest = (a, b, right) if self.sizes[a] <= self.sizes[b] else (b, a, left)
            if self.sizes[a] == self.sizes[b]:
                self.unite(a, b)
                continue
            remainder = self.new(self.sizes[large] - self.sizes[small])
            self.define(large, "row", (small, remainder))
            rest.insert(0, remainder)

    def _minor(self, large: Id, major: Id, size: int) -> Id | None:
        """Define `large` as (major minor) and return the minor factor."""
        old = self.definition.get(self.find(large))
        if old and old[0] == "product" and self.sizes[old[1][0]] == self.sizes[major]:
            self.unite(old[1][0], major)
            if len(old[1]) == 2:
                return old[1][1]
            return None
        if old:
            return None
        minor = self.new(size)
        self.define(large, "product", (major, minor))
        return minor

    def _align_blocks(
        self, x: Id, one: tuple[str, tuple[Id, ...]], two: tuple[str, tuple[Id, ...]]
    ) -> None:
        """Unite (3 n d) with (q|k|v): each block is the product of the minor factors."""
        product, row = (one[1], two[1]) if one[0] == "product" else (two[1], one[1])
        if self.sizes[product[0]] != len(row) or len(set(self._sizes(row))) != 1:
            return
        self.definition[x] = ("row", row)
        for block in row:
            if len(product) == 2:
                self.unite(block, product[1])
            else:
                self.define(block, "product", product[1:])

    def descendants(self, x: Id) -> set[Id]:
        """Return every dim that `x` is made of."""
        out, stack = set(), [self.find(x)]
        while stack:
            for c in self.definition.get(stack.pop(), ("", ()))[1]:
                c = self.find(c)
                if c not in out:
                    out.add(c)
                    stack.append(c)
        return out


@dataclass(frozen=True, slots=True)
class Factors:
    """The atoms of every op's factors and of every value's dims."""

    atoms: Atoms
    of_op: Mapping[tuple[str, str], Id]
    of_value: Mapping[tuple[str, int], Id]
    names: Mapping[Id, str]
    _cache: dict[Id, tuple[Way, ...]] = field(default_factory=dict)
    _alike: dict[str, int] = field(default_factory=dict)
    _kinds: dict[tuple[object, ...], int] = field(default_factory=dict)

    def kind_of(self, op: str, describe: Callable[[], Iterable[object]]) -> int:
        """Return the number of all ops that are described alike; each is described once.

        Ops are the same on every grid, and there are many grids.
        """
        if op not in self._alike:
            self._alike[op] = self._kinds.setdefault(tuple(describe()), len(self._kinds))
        return self._alike[op]

    def ways(self, op: str, factor: str) -> tuple[Way, ...]:
        """Return the ways in which this factor of this op may be split."""
        return self._ways(self.atoms.find(self.of_op[op, factor]))

    def dim_name(self, value: str, dim: int) -> str:
        """Write what a dim is made of, such as `(n d)`."""
        key = (value, dim)
        return self.name(self.of_value[key]) if key in self.of_value else "?"

    def name(self, x: Id) -> str:
        """Return the name of a dim, made of its atoms' names if it has no own."""
        return self.names.get(self.atoms.find(x), "?")

    def _ways(self, x: Id) -> tuple[Way, ...]:
        if x not in self._cache:
            kind, children = self.atoms.definition.get(x, ("atom", ()))
            size = self.atoms.sizes[x]
            if kind == "product":
                found = self._product_ways(size, children)
            elif kind == "row":
                found = self._row_ways(children)
            else:
                found = [Way(x, (size,), size, True)]
            self._cache[x] = tuple(w for w in found if w.is_offered)
        return self._cache[x]

    def _product_ways(self, size: int, children: Sequence[Id]) -> list[Way]:
        out, prefix = [], 1
        for child in map(self.atoms.find, children):
            suffix = size // prefix // self.atoms.sizes[child]
            if self._may_split_inside(child):
                for w in self._ways(child):
                    parts = blocks_within(w.parts, prefix, suffix)
                    out.append(Way(w.atom, parts, w.unit_count, False))
            prefix *= self.atoms.sizes[child]
        if out:
            return out
        return [Way(children[0], (size,), self.atoms.sizes[children[0]], False)]

    def _may_split_inside(self, x: Id) -> bool:
        """An atom that some op needs whole is not worth splitting inside a product."""
        return x not in self.atoms.whole

    def _row_ways(self, children: Sequence[Id]) -> list[Way]:
        blocks = [{w.atom: w for w in self._ways(self.atoms.find(c))} for c in children]
        shared = [a for a in blocks[0] if all(a in b for b in blocks)]
        out = [
            Way(a, sum((b[a].parts for b in blocks), ()), blocks[0][a].unit_count, False)
            for a in shared
        ]
        if out:
            return out
        sizes = tuple(self.atoms.sizes[self.atoms.find(c)] for c in children)
        return [Way(children[0], sizes, math.gcd(*sizes), False)]


def infer_factors(network: Network, inputs: Sequence[str] = ()) -> Factors:
    """Unify the dims of all values with the factors of all ops that read or make them."""
    atoms = Atoms()
    of_value = {
        (v.name, d): atoms.new(n) for v in network.values.values() for d, n in enumerate(v.shape)
    }
    of_op: dict[tuple[str, str], Id] = {}
    for op in network.ops:
        for factor in op.signature.factors():
            of_op[op.name, factor] = atoms.new(op.signature.sizes[factor])
    for op in network.ops:
        _unify_op(op, atoms, of_op, of_value)
    for op in network.ops:
        for factor in sorted(op.signature.whole - set(op.rule.own)):
            atoms.whole.add(atoms.find(of_op[op.name, factor]))
    atoms.whole = {atoms.find(x) for x in atoms.whole}
    return Factors(atoms, of_op, of_value, _name_atoms(network, atoms, of_op, of_value, inputs))


def _unify_op(
    op: Op,
    atoms: Atoms,
    of_op: Mapping[tuple[str, str], Id],
    of_value: Mapping[tuple[str, int], Id],
) -> None:
    sig = op.signature
    rows = [
        *zip(op.operands, sig.operands, strict=True),
        *zip(op.results, sig.results, strict=True),
    ]
    for value, dims in rows:
        for d, dim in enumerate(dims):
            _unify_dim(of_value[value, d], dim, op.name, atoms, of_op)


def _unify_dim(x: Id, dim: Dim, op: str, atoms: Atoms, of_op: Mapping[tuple[str, str], Id]) -> None:
    blocks = [_product([of_op[op, f] for f in product], atoms) for product in dim if product]
    if len(blocks) > 1:
        atoms.define(x, "row", blocks)
    elif blocks:
        atoms.unite(x, blocks[0])


def _product(factors: Sequence[Id], atoms: Atoms) -> Id:
    if len(factors) == 1:
        return factors[0]
    x = atoms.new(math.prod(atoms.sizes[f] for f in factors))
    atoms.define(x, "product", factors)
    return x


def _name_atoms(
    network: Network,
    atoms: Atoms,
    of_op: Mapping[tuple[str, str], Id],
    of_value: Mapping[tuple[str, int], Id],
    inputs: Sequence[str],
) -> dict[Id, str]:
    """Name atoms after the inputs' dims, then after the letters of the rules that use them."""
    names: dict[Id, str] = {}
    letters = {1: "b", 2: "bs", 3: "bsh", 4: "bcyx"}
    for value in inputs:
        shape = network.values[value].shape if value in network.values else ()
        for d, letter in zip(range(len(shape)), letters.get(len(shape), ""), strict=False):
            names.setdefault(atoms.find(of_value[value, d]), letter)
    for preferred in (True, False):
        for (_op, factor), x in of_op.items():
            root = atoms.find(x)
            if root not in atoms.definition and factor.isalpha() == preferred:
                names.setdefault(root, factor if factor.isalpha() else "x")
    for x in range(len(atoms.parent)):
        _compose_name(atoms.find(x), atoms, names)
    return names


def _compose_name(x: Id, atoms: Atoms, names: dict[Id, str]) -> str:
    if x not in names:
        kind, children = atoms.definition.get(x, ("atom", ()))
        parts = [_compose_name(atoms.find(c), atoms, names) for c in children]
        if kind == "row" and len(set(parts)) == 1:
            names[x] = f"({len(parts)} {parts[0].strip('()')})"
        elif kind == "row":
            names[x] = "(" + "|".join(parts) + ")"
        else:
            names[x] = (
                f"({' '.join(p.strip('()') for p in parts)})" if parts else str(atoms.sizes[x])
            )
    return names[x]
