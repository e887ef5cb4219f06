"""What a dry run found: the prediction beside the measurement, as data and as a person reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from autotp.notation import amount_text, bytes_text, memory_text, seconds_text
from autotp.plan import Memory, Plan

NOTE = "nothing was sent and weights are random: times and sizes are real, values mean nothing"


@dataclass(frozen=True, slots=True)
class Sent:
    """What a rank sends in a step by one kind of collective along one axis."""

    kind: str
    axis: str
    seconds: float
    size_bytes: Fraction


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a plan says that a step of one rank takes."""

    compute_s: float
    sent: tuple[Sent, ...]
    memory: Memory

    @property
    def sent_s(self) -> float:
        """The seconds of all that is sent."""
        return sum(s.seconds for s in self.sent)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step of one rank took on `device`, nothing sent.

    phases          median seconds of forward, backward and optimizer
    peak_bytes      the most that was held at once; `at_rest_bytes` between steps
    flops           of the products, as torch counts them
    """

    device: str
    phases: Mapping[str, float]
    peak_bytes: int
    at_rest_bytes: int
    flops: int

    @property
    def compute_s(self) -> float:
        """The seconds of a whole step."""
        return sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class DryRun:
    """One rank's step, predicted and run; print it.

    memory_bytes   what a rank of the plan's cluster has
    """

    model: str
    rank: int
    plan: Plan
    memory_bytes: float
    predicted: Predicted
    measured: Measured

    @property
    def step_s(self) -> float:
        """What a step will take: compute as measured, what is sent as predicted."""
        return self.measured.compute_s + self.predicted.sent_s

    @property
    def fits(self) -> bool:
        """Whether what was measured fits the memory of a rank."""
        return self.measured.peak_bytes <= self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Return all figures in seconds and bytes, as JSON holds them."""
        sent = [{**asdict(s), "size_bytes": float(s.size_bytes)} for s in self.predicted.sent]
        return {
            "model": self.model,
            "grid": dict(zip(self.plan.grid.names, self.plan.grid.sizes, strict=True)),
            "rank": self.rank,
            "cluster": self.plan.cluster,
            "train": self.plan.train,
            "predicted": {
                "step_s": self.plan.step_time_s,
                "compute_s": self.predicted.compute_s,
                "sent_s": self.predicted.sent_s,
                "sent": sent,
                "memory": {**asdict(self.predicted.memory), "total": self.predicted.memory.total},
            },
            "measured": {
                **asdict(self.measured),
                "phases": dict(self.measured.phases),
                "compute_s": self.measured.compute_s,
            },
            "step_s": self.step_s,
            "memory_bytes": self.memory_bytes if math.isfinite(self.memory_bytes) else None,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        p, m, plan = self.predicted, self.measured, self.plan
        rows = [
            ("", "predicted", "measured", ""),
            ("compute", seconds_text(p.compute_s), seconds_text(m.compute_s), _compute_text(m)),
            ("sent", seconds_text(p.sent_s), "", "" if p.sent else "nothing"),
            *((f"  {s.kind} {s.axis}", seconds_text(s.seconds), "", _sent_text(s)) for s in p.sent),
            ("step", seconds_text(plan.step_time_s), seconds_text(self.step_s), STEP),
            ("memory", bytes_text(p.memory.at_once), bytes_text(m.peak_bytes), _memory_text(self)),
        ]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        lines = [
            f"  {name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {text}".rstrip()
            for name, a, b, text in rows
        ]
        return "\n".join([self._head(), *lines, f"  {self._fit_text()}", f"  {NOTE}"])

    def _head(self) -> str:
        mode = "training step" if self.plan.train else "forward pass"
        where = f"grid {self.plan.grid} of {self.plan.cluster}"
        ran = f"run alone on {self.measured.device}"
        return f"dry run of {self.model}: one {mode} of rank {self.rank} of {where}, {ran}"

    def _fit_text(self) -> str:
        if not math.isfinite(self.memory_bytes):
            return "the memory of a rank is not limited"
        verb = "fits" if self.fits else "does not fit"
        return f"{verb} the {bytes_text(self.memory_bytes)} of a rank"


STEP = "compute as measured, sent as predicted"


def _compute_text(m: Measured) -> str:
    parts = [f"{phase} {seconds_text(s)}" for phase, s in m.phases.items()]
    rate = m.flops / m.compute_s if m.compute_s > 0 else 0.0
    return ", ".join([*parts, f"{amount_text(rate / 1e9)} GFLOP/s"])


def _sent_text(s: Sent) -> str:
    return bytes_text(float(s.size_bytes))


def _memory_text(run: DryRun) -> str:
    by_kind = memory_text(run.predicted.memory).partition(": ")[2]
    return f"{by_kind}; measured {bytes_text(run.measured.at_rest_bytes)} between steps"
