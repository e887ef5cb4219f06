"""The plan: a strategy for every op, a resting layout for every parameter, and the moves between.

A Plan is data: the search makes it, the schedule and the code generation follow it, the reports
print it. It is keyed by module path, compares and hashes by value, and knows no fx and no pass.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from autotp.cost_model.levels import between_share, members_of
from autotp.dynamic import Dynamic
from autotp.errors import PlanError
from autotp.grid import Grid
from autotp.layouts import Layout, Shape

if TYPE_CHECKING:
    from sympy import Expr, Symbol

    from autotp.coverage import Coverage
    from autotp.report import Explanation


ROUNDING = 1e-12
"""Share of a time below which sums in another order may differ."""


def gap_of(bound_s: float, time_s: float) -> float:
    """Return how far a time is from its bound, as a share of the time."""
    share = 1 - bound_s / time_s if time_s else 0.0
    return share if share > ROUNDING else 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one op.

    name      its module path
    choices   per axis: a factor, I or R (whole) or P (partial passed through)
    split     per axis: the rule's factors that the axis splits, none if whole
    operands  the layout in which each operand is read, `results` in which each result is made
    reads     the values it reads, `makes` those that it makes, by graph name
    shapes    the whole shapes of its results; `dims` their dims by name; `dtype` of the first
    free      says that it only renames what it reads, as views do
    flops     of its products on whole tensors, forward
    region    the region under torch.utils.checkpoint in which backward computes it again, if any
    again     says that backward makes its result again, by itself, instead of keeping it
    seconds   forward and backward; `backward_s` those of backward
    """

    name: str
    op: str
    choices: tuple[str, ...]
    split: tuple[tuple[str, ...], ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dims: tuple[tuple[str, ...], ...]
    dtype: str
    seconds: float
    memory_bytes: int
    axes: tuple[str, ...]
    where: str = ""
    free: bool = False
    flops: int = 0
    region: str = ""
    again: bool = False
    backward_s: float = 0.0

    @property
    def factors(self) -> dict[str, str]:
        """Return the factor that each axis splits."""
        return {
            axis: choice
            for axis, choice, split in zip(self.axes, self.choices, self.split, strict=True)
            if split
        }


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """One change of a value's type on one axis.

    size_bytes   the whole buffer of the collective, on the largest rank
    seconds      its own, or its part of those of the call that it shares with others
    sent         bytes sent per rank, by collective, forward and backward together
    again        says that it is made once more in backward: what it makes is not kept
    by, back_by  the algorithms forward and backward, where not the backend's plain ones
    schedule     "ring" or "panels" where the product beside it makes the move block by block
    apart_s      what it would take apart from that product, less what would hide it
    """

    value: str
    of: str
    axis: str
    before: Layout
    after: Layout
    forward: str
    backward: str
    size_bytes: int
    seconds: float
    sent: tuple[tuple[str, Fraction], ...]
    again: bool = False
    by: str = ""
    back_by: str = ""
    schedule: str = ""
    apart_s: float = 0.0

    @property
    def kinds(self) -> list[str]:
        """The collectives that it makes: forward, once more if `again`, and backward."""
        return [self.forward] * (1 + self.again) + [self.backward]


AT_ONCE, WHERE_MADE = "", "*"
"""Where a bucket begins that begins before no op."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Moves that one call makes, by one collective each way over one buffer.

    Those of several tensors are of parameters.

    moves        their numbers in the plan
    size_bytes   of the whole buffer
    begins       the op before which it begins, AT_ONCE where it also ends, or WHERE_MADE: where its
                   tensors are made, parameters before all ops. Gradients are awaited there.
    hidden_s     the part of its seconds in which the ops from there to its end run
    by, back_by  the algorithms forward and backward, where not the backend's plain ones
    """

    axis: str
    forward: str
    backward: str
    moves: tuple[int, ...]
    size_bytes: int
    seconds: float
    begins: str
    by: str = ""
    back_by: str = ""
    hidden_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Resting:
    """How a parameter rests: its layout, whole shape and dtype, and the bytes it takes here.

    value, dims   its name in the graph, and its dims by name
    """

    layout: Layout
    shape: Shape
    dtype: str
    local_bytes: int
    trained: bool
    value: str = ""
    dims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank by what they are for, and the most at once.

    activations   all that backward keeps
    peak          the most at once, what only lives for a moment included: gradients come as
                  activations go; 0 where it was not worked out
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int = 0

    @property
    def total(self) -> int:
        """All of it, as though it lived together: what budgets are held against."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    @property
    def at_once(self) -> int:
        """The most at once, or all of it where that was not worked out."""
        return self.peak or self.total


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a whole plan takes in which one op chooses `choice`, such as `o/col`."""

    choice: str
    step_time_s: float
    comm_bytes: Fraction
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Priced:
    """What a product that may make a move itself takes for it, in seconds, by each way.

    name     the op's, and `value` what is moved over the axis
    chosen   "once", apart from the product, or how the product makes it
    """

    name: str
    axis: str
    value: str
    chosen: str
    seconds: tuple[tuple[str, float], ...]


Alternatives = Callable[[str], Sequence[Alternative]]
"""The best plans in which the op of this name chooses otherwise, best first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete plan; see the fields' types.

    model      what the plan belongs to: inputs, parameters and their shapes
    internal   bytes that local programs send themselves: (op name, axis, collective, bytes)
    notes      dims that one would expect to be split and that an axis does not divide
    outputs    the layout in which each output is returned before it is handed to the user
    dynamic    the dims that may vary, and what sizes of them the plan can split
    buckets    the moves that share their collectives, or begin early
    priced     what products that may make moves themselves take; a loaded plan has none
    alternatives   plans again with one op made to choose otherwise; a loaded plan has none
    """

    grid: Grid
    cluster: str
    train: bool
    model: Mapping[str, str]
    decisions: tuple[Decision, ...]
    params: Mapping[str, Resting]
    copies: Mapping[str, Layout]
    outputs: tuple[Layout | None, ...]
    moves: tuple[PlannedMove, ...]
    internal: tuple[tuple[str, str, str, Fraction], ...]
    memory: Memory
    step_time_s: float
    lower_bound_s: float
    search_s: float = field(compare=False)
    method: str = ""
    unruled: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    dynamic: Dynamic = field(default_factory=Dynamic)
    buckets: tuple[Bucket, ...] = ()
    priced: tuple[Priced, ...] = field(default=(), compare=False, repr=False)
    alternatives: Alternatives | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, name: str) -> Decision:
        """Return the decision of the op called `name`. Raises PlanError with the nearest names."""
        for decision in self.decisions:
            if decision.name == name:
                return decision
        near = difflib.get_close_matches(name, [d.name for d in self.decisions], n=3, cutoff=0.3)
        raise PlanError(f"the plan has no op {name!r}", remedy=f"nearest names: {', '.join(near)}")

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def collectives(self) -> list[str]:
        """Return the collectives of the forward program, in order; a shared call is one."""
        sends = {"all_gather", "all_reduce", "all_to_all", "reduce_scatter"}
        later = {n for bucket in self.buckets for n in bucket.moves[1:]}
        moves = [m for n, m in enumerate(self.moves) if n not in later]
        return [m.forward for m in moves if m.forward in sends]

    def sent(self) -> dict[tuple[str, str], Fraction]:
        """Return the bytes that a rank sends in one step, by collective and axis."""
        out: dict[tuple[str, str], Fraction] = {}
        for move in self.moves:
            for kind, size in move.sent:
                out[kind, move.axis] = out.get((kind, move.axis), Fraction(0)) + size
        for _name, axis, kind, size in self.internal:
            out[kind, axis] = out.get((kind, axis), Fraction(0)) + size
        return out

    def sent_between(self) -> dict[tuple[str, str], Fraction]:
        """Return the part of `sent` that collectives of two levels send between nodes."""
        out: dict[tuple[str, str], Fraction] = {}
        for m in self.moves:
            ways = {m.forward: m.by, m.backward: m.back_by}
            ranks = self.grid.sizes[self.grid.axis(m.axis)]
            for kind, size in m.sent:
                if members := members_of(ways[kind]):
                    part = size * between_share(ranks, members)
                    out[kind, m.axis] = out.get((kind, m.axis), Fraction(0)) + part
        return out

    def levels(self) -> list[tuple[str, int]]:
        """Return the axes whose collectives have two levels, and the ranks in each node there."""
        called: list[PlannedMove | Bucket] = [*self.moves, *self.buckets]
        ways = [(c.axis, members_of(by)) for c in called for by in (c.by, c.back_by)]
        found = {(axis, members) for axis, members in ways if members}
        return sorted(found, key=lambda level: (self.grid.axis(level[0]), level[1]))

    @property
    def comm_bytes(self) -> Fraction:
        """Bytes that a rank sends in one step, forward and backward, exactly."""
        return sum(self.sent().values(), Fraction(0))

    @property
    def memory_bytes(self) -> int:
        """Peak bytes of one rank."""
        return self.memory.total

    @property
    def gap(self) -> float:
        """How far the plan may be from the best, as a share of its own time; rounding is none."""
        return gap_of(self.lower_bound_s, self.step_time_s)

    def __str__(self) -> str:
        from autotp.report import plan_text

        return plan_text(self)

    def explain(self, name: str) -> Explanation:
        """Set the choice of the op called `name` against its three best runners-up.

        Raises PlanError for a plan that was loaded: it holds choices, not the search.
        """
        from autotp.report import explain

        return explain(self, name)

    def coverage(self) -> Coverage:
        """Return how much of the compute and of the parameters is split, and what runs whole."""
        from autotp.coverage import coverage

        return coverage(self)

    def formula(self, unit: str = "elements") -> Expr:
        """Return what a rank sends for one repeated layer, forward and backward, in symbols.

        In "elements", or in "bytes": exactly those of the layer's moves under `formula_sizes`.
        """
        from autotp.formula import layer_formula

        return layer_formula(self, unit)

    def formula_total(self, unit: str = "elements") -> Expr:
        """Return what a rank sends in one whole step, as `formula` does for a layer."""
        from autotp.formula import total_formula

        return total_formula(self, unit)

    def formula_sizes(self) -> dict[Symbol, int]:
        """Return the numbers that the symbols of the formulas stand for."""
        from autotp.formula import symbol_sizes

        return symbol_sizes(self)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file as versioned JSON."""
        from autotp.plan_file import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file. Raises PlanError when it is damaged or of another version."""
        from autotp.plan_file import load

        return load(path)

    @property
    def hash(self) -> str:
        """A digest of all decisions, equal on all ranks that run the same plan."""
        from autotp.plan_file import to_json

        text = json.dumps(to_json(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
