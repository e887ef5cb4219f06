"""How much of a model a plan splits: of the compute, of the parameters, and what is left whole.

flops        share of the flops of products whose op is split on some axis of the grid
parameters   share of the parameters' elements that rest in shards on some axis
whole        ops that no axis splits, by kind, with their share of the step's seconds
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from autotp.layouts import Shard
from autotp.plan import Decision, Plan

NOTABLE = 0.01
"""A share of the step from which an op that runs whole is named."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares between 0 and 1; `whole` is sorted, the largest share first."""

    flops: float
    parameters: float
    whole: tuple[tuple[str, float], ...]

    def notable(self) -> tuple[tuple[str, float], ...]:
        """Return the kinds of ops whose whole runs take a notable share of the step."""
        return tuple((op, share) for op, share in self.whole if share >= NOTABLE)

    def __str__(self) -> str:
        whole = ", ".join(f"{op} {share:.1%} of the step" for op, share in self.notable())
        text = f"{self.flops:.1%} of the products' flops, {self.parameters:.1%} of the parameters"
        return text + (f"; whole: {whole}" if whole else "")


def coverage(plan: Plan) -> Coverage:
    """Return what `plan` splits. On a grid of one rank nothing is."""
    return Coverage(
        flops=_share((d.flops, is_split(d)) for d in plan.decisions),
        parameters=_share(
            (math.prod(r.shape), any(isinstance(t, Shard) for t in r.layout))
            for r in plan.params.values()
        ),
        whole=_whole(plan),
    )


def is_split(decision: Decision) -> bool:
    """Say whether an axis splits the op."""
    return any(decision.split)


def _share(parts: Iterable[tuple[int, bool]]) -> float:
    """Return the share of the amounts that are marked; all of nothing."""
    pairs = list(parts)
    total = sum(amount for amount, _ in pairs)
    return sum(amount for amount, marked in pairs if marked) / total if total else 1.0


def _whole(plan: Plan) -> tuple[tuple[str, float], ...]:
    seconds: dict[str, float] = {}
    for d in plan.decisions:
        if not is_split(d) and d.seconds:
            seconds[d.op] = seconds.get(d.op, 0.0) + d.seconds
    shares = {op: s / plan.step_time_s for op, s in seconds.items()} if plan.step_time_s else {}
    return tuple(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0])))
