"""The table of rules: one sentence per ATen op, and the few facts that a sentence cannot say.

`rule` enters a row, `find` looks one up (any op that torch tags as pointwise has one by that tag),
`Rule.signature` binds its sentence to one call. The families' files fill the table when imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from autotp.errors import RuleError
from autotp.layouts import Shape
from autotp.passes.rules.sentence import Signature, parse

Op = Any
"""An ATen overload, such as torch.ops.aten.linear.default; in a row also the name of another
library's, such as "transformers::grouped_mm_fallback": it is there only once that is imported."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a rule may know of an operand or result: its shape and dtype."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op: arguments by position with tensors as `Tensor`, and its results."""

    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...]

    def arg(self, position: int, default: Any = None) -> Any:
        """Return the argument at `position`, by position or by its name in the schema."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(self.op._schema.arguments[position].name, default)


Sizes = Mapping[str, int]
Text = str | tuple[str, Sizes]
LinearIn = str | tuple[int, ...] | None
Test = Callable[["Call"], bool]
Localize = Callable[[Call, Call], tuple[Any, ...]]
"""From the whole call and the local one (local shapes, whole literals), the local arguments."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a local program sends over the axes that split a factor, `times` on each of them.

    factor  one, or several that are split together, as in `Rule.split`
    level   the one axis meant, counted from the outermost; all of them where it is None
    """

    factor: str
    size_bytes: int
    backward: bool = False
    kind: str = "all_reduce"
    times: int = 1
    level: int | None = None


Ranks = Mapping[str, tuple[int, ...]]
"""Per factor, or several split together, how many ranks each axis has that splits it, in order."""

Traffic = Callable[[Call, Ranks], list[Message]]
"""From the local call and what splits it, all that its program sends."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row.

    sentence  what may be split, as text or as a function of the call
    linear    how a partial sum passes: "all" operands together, "each" one alone, or those listed
    split     what a local program splits, with its result's type there, "S", "P" or "I": a factor,
              or several that only split together, such as "s t"; the first shares out the work
    program   the local program; it takes the op's arguments and `split_f`, `size_f` per such factor
    blocks    those of its factors that may split inside blocks too: it needs no ranges of them
    traffic   what the program sends inside, over the axes that split each factor
    random    whether this call draws random numbers
    draw      the program that draws them; it takes the op's arguments and `rng`, `split`, `site`
    exact     the one that draws the single device's numbers (autotp.random_programs)
    localize  rewrites literal arguments from whole to local sizes
    average   whether a summed factor is averaged over: the partial is scaled by its share
    flops     products of factors, such as "b n s t d + b n s t e"; twice their sum is counted
    saves     what backward keeps: operand positions, -1 for the result
    free      no kernel runs: a view
    """

    op: Op
    sentence: str | Callable[[Call], Text]
    linear: LinearIn | Callable[[Call], LinearIn] = None
    split: Mapping[str, str] = field(default_factory=dict)
    program: Callable[..., Any] | None = None
    blocks: tuple[str, ...] = ()
    traffic: Traffic | None = None
    random: Test | None = None
    draw: Callable[..., Any] | None = None
    exact: Callable[..., Any] | None = None
    localize: Localize | None = None
    average: Test | None = None
    flops: str | Callable[[Call], str] | None = None
    saves: tuple[int, ...] | None = None
    free: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """The factors that the local program splits, alone or together with others."""
        return tuple(dict.fromkeys(f for names in self.split for f in names.split()))

    def runs(self, split: Sequence[tuple[str, ...]]) -> bool:
        """Say whether the program runs, given the factors that each axis splits."""
        return any(names in self.split for on in split for names in (*on, " ".join(on)))

    def groups(self, call: Call) -> list[tuple[str, ...]]:
        """Return the factors that the local program splits together; none where it draws."""
        drawing = self.random and self.random(call)
        found = [tuple(names.split()) for names in self.split]
        return [] if drawing else [group for group in found if len(group) > 1]

    def linear_in(self, call: Call) -> LinearIn:
        """Return how a partial sum passes through this call."""
        return self.linear(call) if callable(self.linear) else self.linear

    def signature(self, call: Call) -> Signature:
        """Bind the sentence to one call."""
        text = self.sentence if isinstance(self.sentence, str) else self.sentence(call)
        text, sizes = (text, None) if isinstance(text, str) else text
        shapes = [t.shape if t else None for t in call.operands]
        return parse(text).bind(shapes, [r.shape for r in call.results], sizes)


_TABLE: dict[Op, Rule] = {}


def rule(op: Op, sentence: str | Callable[[Call], Text], **facts: Any) -> Rule:
    """Enter one row and return it. Raises RuleError when the op has one already."""
    return enter(Rule(op, sentence, **facts))


def enter(row: Rule) -> Rule:
    """Enter a row and return it. Raises RuleError when the op has one already."""
    if row.op in _TABLE:
        raise RuleError(f"{row.op} has a rule already", remedy="give each op one rule")
    _TABLE[row.op] = row
    return row


def forget(op: Op) -> Rule | None:
    """Take the row of an op out and return it, if it has one."""
    return _TABLE.pop(op, None)


def find(op: Op) -> Rule | None:
    """Return the rule of `op`: its row, or the pointwise rule if torch tags it so."""
    named: Op = op.name() if isinstance(op, OpOverload) else op  # type: ignore[no-untyped-call]
    return _TABLE.get(op) or _TABLE.get(named) or _pointwise(op)


@functools.cache
def _pointwise(op: Op) -> Rule | None:
    if torch.Tag.pointwise not in getattr(op, "tags", ()) or draws(op) or op._schema.is_mutable:
        return None
    return Rule(op, pointwise_sentence)


def draws(op: Op) -> bool:
    """Say whether an op may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def pointwise_sentence(call: Call) -> str:
    """Every operand broadcasts against the result."""
    return ", ".join("..." for _ in call.operands) + " -> " + ", ".join("..." for _ in call.results)


def rows() -> Iterator[Rule]:
    """Yield every row in the order of entry."""
    yield from _TABLE.values()


def replace_arg(call: Call, position: int, value: Any) -> tuple[Any, ...]:
    """Return the arguments with the one at `position` replaced, filling defaults before it."""
    args: list[Any] = list(call.args)
    for i in range(len(args), position + 1):
        args.append(call.arg(i, call.op._schema.arguments[i].default_value))
    args[position] = value
    return tuple(args)


def result_shape_at(position: int) -> Localize:
    """Return a localizer that writes the result's local shape as argument `position`."""

    def localize(_whole: Call, local: Call) -> tuple[Any, ...]:
        return replace_arg(local, position, list(local.results[0].shape))

    return localize


def wide_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of an element in the type that statistics are kept in: float32 at least."""
    return max(dtype.itemsize, torch.float32.itemsize)


def letters(count: int, start: str = "a") -> Sequence[str]:
    """Return `count` names for the dims of a sentence that a function writes: a0, a1, ..."""
    return [f"{start}{i}" for i in range(count)]
