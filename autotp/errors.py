"""Errors that a user can cause. Each names the place, the fact and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any


class AutotpError(Exception):
    """A refusal: one line that says what is wrong, the places, and what to do.

    >>> print(GridError("grid (3,) needs 3 ranks", at=[("world size", "4")], remedy="grid=(4,)"))
    GridError: grid (3,) needs 3 ranks
      at      world size   4
      remedy  grid=(4,)
    """

    def __init__(
        self, what: str, *, at: Iterable[tuple[str, str]] = (), remedy: str | None = None
    ) -> None:
        self.what, self.at, self.remedy = what, tuple(at), remedy
        super().__init__(self._text())

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), at=self.at, remedy=self.remedy), (self.what,)

    def _text(self) -> str:
        width = max((len(place) for place, _ in self.at), default=0)
        lines = [f"{type(self).__name__}: {self.what}"]
        lines += [f"  at      {place:<{width}}   {fact}".rstrip() for place, fact in self.at]
        lines += [f"  remedy  {self.remedy}"] if self.remedy else []
        return "\n".join(lines)


class GridError(AutotpError):
    """The grid does not fit the ranks or the model."""


class CaptureError(AutotpError):
    """The model cannot be captured as one graph."""


class InputError(AutotpError):
    """The inputs are not those that the model was planned for."""


class LayoutError(AutotpError):
    """A layout that no tensor of this shape can have."""


class RuleError(AutotpError):
    """A rule that is not a sentence, or that arithmetic refutes."""


class PinError(AutotpError):
    """Pins that match nothing, or that contradict each other."""


class PlanError(AutotpError):
    """A plan that does not belong to this model, grid or shape, or cannot be read."""


class BudgetError(AutotpError):
    """No plan fits the memory of a rank."""


class RuntimeStateError(AutotpError):
    """The ranks, the process group or the optimizer are not in the state that is needed."""
