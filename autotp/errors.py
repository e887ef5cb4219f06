"""Errors that a user can cause. Each names the place, the fact, the reason and the remedy."""

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
        self,
        what: str,
        *,
        at: Iterable[tuple[str, str]] = (),
        remedy: str | tuple[str, ...] | None = None,
    ) -> None:
        """Take the one line, the places with their facts, and a remedy or several to choose of."""
        self.what, self.at, self.remedy = what, tuple(at), remedy
        super().__init__(self._text())

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), at=self.at, remedy=self.remedy), (self.what,)

    @property
    def remedies(self) -> tuple[str, ...]:
        """What to do: any one of these."""
        given = self.remedy
        return (given,) if isinstance(given, str) else given or ()

    def _text(self) -> str:
        width = max((len(place) for place, _ in self.at), default=0)
        lines = [f"{type(self).__name__}: {self.what}"]
        lines += [f"  at      {place:<{width}}   {fact}".rstrip() for place, fact in self.at]
        lines += [f"  remedy  {one}" for one in self.remedies]
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


class CalibrationError(AutotpError):
    """This machine cannot be measured, or a file of what was measured cannot be used."""


class BudgetError(AutotpError):
    """No plan fits the memory of a rank; `needed_bytes` is what the smallest one takes."""

    needed_bytes: int = 0


class WrappedModelError(AutotpError):
    """A model that something else has wrapped, split, compiled or quantised already."""


class NumericsError(AutotpError):
    """A value that is not finite appears, with `check_numerics=True`."""


class LostRankError(AutotpError):
    """A collective failed: a rank is gone, or the ranks wait for each other."""


class RuntimeStateError(AutotpError):
    """The ranks, the process group or the optimizer are not in the state that is needed."""
