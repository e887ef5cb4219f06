"""What may vary after planning, and how far: the named dims of a plan and the sizes it can split.

A plan that splits a dim asks something of its size: that it be a multiple of the ranks, where the
dim is merged with others or its blocks are even, else only that no rank be left with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autotp.errors import InputError
from autotp.layouts import is_valid_size
from autotp.sizes import evaluate, names_in

Sizes = Mapping[str, int]
"""The sizes of a call, by the dims' names."""

DynamicInputs = Mapping[str, Mapping[int, str]]
"""What a user declares: of each input, by name, the name of every dim that may vary."""


@dataclass(frozen=True, slots=True)
class DynamicDim:
    """One named dim: the sizes that the captured program itself can take."""

    name: str
    least: int
    most: int | None = None


@dataclass(frozen=True, slots=True)
class DynamicSplit:
    """A varying size that axes split.

    size   an expression over the dims' names, such as `batch` or `seq - 1`
    ranks  those of each axis that splits it, outermost first
    even   whether they must divide it; else every rank must hold something
    """

    size: str
    ranks: tuple[int, ...]
    even: bool

    def allows(self, sizes: Sizes) -> bool:
        """Say whether the size can be split."""
        n = evaluate(self.size, sizes)
        return n > 0 and (
            n % math.prod(self.ranks) == 0 if self.even else is_valid_size(n, self.ranks)
        )


@dataclass(frozen=True, slots=True)
class Dynamic:
    """The named dims of a plan and every split of a size that depends on them."""

    dims: tuple[DynamicDim, ...] = ()
    splits: tuple[DynamicSplit, ...] = ()

    def multiple(self, name: str) -> int:
        """Return the number of which the dim must be a multiple."""
        even = [math.prod(s.ranks) for s in self.splits if s.even and s.size == name]
        return math.lcm(*even)

    def allows(self, sizes: Sizes) -> bool:
        """Say whether the plan can run these sizes."""
        return not any(self.problems(sizes))

    def refuse(self, sizes: Sizes) -> None:
        """Raise InputError, with every size that the plan cannot run and the nearest it can."""
        problems = list(dict.fromkeys(self.problems(sizes)))
        if problems:
            raise InputError(
                "the plan cannot run these sizes",
                at=problems,
                remedy="pad or drop the last batch, or plan again with these sizes",
            )

    def problems(self, sizes: Sizes) -> Iterator[tuple[str, str]]:
        """Yield the dims whose size is refused, and why."""
        for dim in self.dims:
            n = sizes[dim.name]
            if n < dim.least:
                yield dim.name, f"{n}, at least {dim.least}"
            elif dim.most is not None and n > dim.most:
                yield dim.name, f"{n}, at most {dim.most}"
        for split in self.splits:
            if not split.allows(sizes):
                yield from ((name, self._why(split, name, sizes)) for name in names_in(split.size))

    def _why(self, split: DynamicSplit, name: str, sizes: Sizes) -> str:
        own = split.size == name
        ranks = self.multiple(name) if own and split.even else math.prod(split.ranks)
        need = f"a multiple of {ranks}" if split.even else f"enough for {ranks} ranks"
        near = " or ".join(map(str, self._nearest(name, sizes)))
        what = "must be" if own else f"{split.size} must be"
        return f"{sizes[name]}, {what} {need}" + (f": {near}" if near else "")

    def _nearest(self, name: str, sizes: Sizes) -> list[int]:
        """Return the nearest size below and above that the plan can run, the others as they are."""
        n, reach = sizes[name], 4 * math.prod(math.prod(s.ranks) for s in self.splits)
        below = next(
            (k for k in range(n - 1, max(n - reach, 0), -1) if self._fits(name, k, sizes)), 0
        )
        above = next((k for k in range(n + 1, n + reach) if self._fits(name, k, sizes)), 0)
        return [k for k in (below, above) if k]

    def _fits(self, name: str, n: int, sizes: Sizes) -> bool:
        """Say whether a size of one dim breaks nothing that depends on it alone."""
        given = {**sizes, name: n}
        dim = next(d for d in self.dims if d.name == name)
        inside = dim.least <= n <= (n if dim.most is None else dim.most)
        return inside and all(s.allows(given) for s in self.splits if name in names_in(s.size))

    def text(self) -> str:
        """Write what each dim may be: `batch a multiple of 2, seq from 2`."""
        return ", ".join(f"{dim.name} {self._rule(dim)}" for dim in self.dims)

    def _rule(self, dim: DynamicDim) -> str:
        multiple = self.multiple(dim.name)
        mine = [s for s in self.splits if dim.name in names_in(s.size)]
        most = max((math.prod(s.ranks) for s in mine if not s.even), default=1)
        rules = [f"a multiple of {multiple}"] if multiple > 1 else []
        rules += [
            f"with {s.size} a multiple of {math.prod(s.ranks)}"
            for s in mine
            if s.even and s.size != dim.name
        ]
        rules += [f"enough for {most} ranks"] if most > 1 else []
        rules += [] if rules else [f"from {dim.least}"]
        rules += [] if dim.most is None else [f"at most {dim.most}"]
        return " and ".join(rules)
