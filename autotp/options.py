"""What a call of `parallelize` may choose besides the grid: one frozen value, checked at birth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from autotp.dynamic import DynamicInputs
from autotp.errors import AutotpError


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is captured, drawn and returned; the names are those of `parallelize`.

    Raises: AutotpError for a choice that there is not.
    """

    outputs: str = "full"
    strict: bool = False
    check_numerics: bool = False
    rng: str = "fast"
    dynamic: DynamicInputs | None = None

    def __post_init__(self) -> None:
        _one_of(
            "outputs are returned whole or in pieces", "outputs", self.outputs, ("full", "sharded")
        )
        _one_of("masks are drawn fast or exact", "rng", self.rng, ("fast", "exact"))

    @property
    def sharded(self) -> bool:
        """Whether outputs are returned in pieces."""
        return self.outputs == "sharded"

    def described(self) -> Mapping[str, str]:
        """Return every option as text by its name: ranks compare them."""
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}


def _one_of(fact: str, name: str, given: str, legal: tuple[str, str]) -> None:
    """Raise AutotpError unless `given` is one of two legal values."""
    if given not in legal:
        raise AutotpError(
            fact,
            at=[(name, f"{given!r} is neither")],
            remedy=" or ".join(f'{name}="{value}"' for value in legal),
        )
