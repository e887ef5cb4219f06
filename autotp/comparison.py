"""The report of a check: every tensor's difference, the tolerance and its origin, where it began.

Difference   how far one tensor of all ranks is from the original's
Tolerance    what rounding may explain: 8 eps sqrt(n), n terms in the longest sum
Divergence   the first node of the emitted program whose value or gradient is off
Report       all of them; `str` writes a table with the worst tensors first
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAFETY = 8
"""Roundings of a sum add up like sqrt(n) eps; 8 covers the sums that follow one another."""

SHOWN = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor: the largest absolute difference on any rank, and the original's largest value.

    kind    "output", "loss", "gradient", "parameter", "buffer", or "captured ..." for the graph
            beside the original
    jitter  how far the original's own tensor moves when its data, and the gradients that are
            summed into it, are rounded anew
    """

    kind: str
    name: str
    layout: str
    error: float
    largest: float
    jitter: float = 0.0

    def relative(self, tolerance: Tolerance) -> float:
        """Return the error as a share of the tensor's scale.

        That is its largest value, or, for one that is all rounding (the gradient of an attention
        key's bias is zero in exact arithmetic), the value of which its jitter is a rounding.
        """
        jitter = self.jitter if math.isfinite(self.jitter) else 0.0  # an integer has moved
        return self.error / (max(self.largest, SAFETY * jitter / tolerance.value) or 1.0)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinite where shapes or types differ, or for NaN."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return math.inf
    if not a.numel():
        return 0.0
    equal = (a == b) | ((a != a) & (b != b))  # NaN beside NaN
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if bool(equal.all()) else math.inf
    off = torch.where(equal, 0.0, (a - b).abs().double())
    return float(off.nan_to_num(nan=math.inf).max())


def finite_largest(t: Tensor) -> float:
    """Return the largest finite absolute value."""
    if not t.numel():
        return 0.0
    values = t.detach().to(torch.cdouble if t.is_complex() else torch.double).abs()
    return float(values.nan_to_num(nan=0.0, posinf=0.0).max())


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The relative difference that rounding may make.

    eps     of the coarsest float type on the way, `dtype`, first met at `coarse`
    terms   how many terms the longest sum has, that of `longest` or of its gradients
    """

    dtype: str
    eps: float
    coarse: str
    terms: int
    longest: str

    @property
    def value(self) -> float:
        """The difference allowed, as a share of a tensor's scale."""
        return SAFETY * self.eps * math.sqrt(self.terms)

    def __str__(self) -> str:
        return (
            f"{self.value:.1e} of a tensor's largest value = {SAFETY} eps sqrt(n): eps"
            f" {self.eps:.1e} ({self.dtype}: {self.coarse}), n {self.terms} ({self.longest})"
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first node that is off: forward in graph order, else backward from the outputs.

    node   its name in the emitted graph; `op` what it calls; `name` the op of the plan it is or
           whose value it moves; `readers` who reads it, where its gradient is off
    """

    what: str
    node: str
    op: str
    name: str
    where: str
    layout: str
    relative: float
    readers: tuple[str, ...] = ()

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        read = f", read by {', '.join(self.readers)}" if self.readers else ""
        return (
            f"{self.what} of {self.node} = {self.op} ({self.name}{at}), {self.layout}{read}:"
            f" off by {self.relative:.1e}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a check. `ok` holds when every tensor is within the tolerance.

    problems   what is wrong beside differences: a rank that raised, an ill-typed program
    notes      what a reader must know: dropout turned off, ops without a rule
    first      where the difference began, looked for only when there is one
    """

    model: str
    grid: str
    mode: str
    differences: tuple[Difference, ...]
    tolerance: Tolerance
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    first: Divergence | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong beyond rounding."""
        return not self.problems and self.largest <= self.tolerance.value

    @property
    def largest(self) -> float:
        """The largest relative difference of all tensors."""
        return max((d.relative(self.tolerance) for d in self.differences), default=0.0)

    def worst(self, count: int = SHOWN) -> list[Difference]:
        """Return the tensors that are furthest off, in falling order."""
        return sorted(
            self.differences, key=lambda d: (-d.relative(self.tolerance), d.kind, d.name)
        )[:count]

    def __str__(self) -> str:
        lines = [f"check  {self.model} on {self.grid}, {self.mode}: {self._verdict()}", ""]
        lines += table(self.worst(), self.tolerance)
        rest = len(self.differences) - SHOWN
        lines += [f"  ... {rest} more, none further off"] if rest > 0 else []
        lines += ["", f"tolerance  {self.tolerance}"]
        lines += [f"first      {self.first}"] if self.first else []
        lines += [f"problem    {text}" for text in self.problems]
        lines += [f"note       {text}" for text in self.notes]
        return "\n".join(lines)

    def _verdict(self) -> str:
        off = sum(d.relative(self.tolerance) > self.tolerance.value for d in self.differences)
        if self.ok:
            return f"ok, {len(self.differences)} tensors equal up to rounding"
        return f"FAILED, {off} of {len(self.differences)} tensors differ"


def table(rows: Sequence[Difference], tolerance: Tolerance) -> list[str]:
    """Write differences as aligned lines under a heading."""
    cells = [("tensor", "kind", "layout", "largest", "error", "relative", "")]
    for d in rows:
        relative = d.relative(tolerance)
        mark = "" if relative <= tolerance.value else "  <-- differs"
        numbers = (f"{d.largest:.3g}", f"{d.error:.1e}", f"{relative:.1e}")
        cells.append((d.name, d.kind, d.layout, *numbers, mark))
    widths = [max(len(row[k]) for row in cells) for k in range(6)]
    left = ("<", "<", "<", ">", ">", ">")
    return [
        "  " + "  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, left, widths, strict=False)) + row[6]
        for row in cells
    ]
