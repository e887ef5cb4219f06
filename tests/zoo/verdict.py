"""What autotp does with one model of the zoo: verified or refused, what is split, what runs whole.

Plans are made for links that are nearly free and slow chips, so that the best plan splits whatever
may be split: the shares say what the compiler is able to split, not what pays on some machine.
"""

import warnings
from dataclasses import dataclass, replace

from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import AutotpError
from autotp.grid import as_grid
from autotp.passes.planning import search_plan
from tests.zoo.models import build

GRIDS = ((2, 2), (1, 4), (4, 1), (2, 3))
SQUARE = GRIDS[0]
CLUSTER = replace(
    bandwidth_bound(1e15, flops_per_s=1e9), memory_bandwidth_bytes_per_s=4e9, name="free links"
)


@dataclass(frozen=True)
class Verdict:
    """One row of docs/MODELS.md.

    refused   why the model was refused; empty if it was verified
    wrong     what differed from the single device; empty if nothing did
    unruled   ops on the differentiable path that have no rule, with their calls
    """

    name: str
    refused: str = ""
    wrong: str = ""
    unruled: tuple[tuple[str, int], ...] = ()
    flops: float = 0.0
    parameters: float = 0.0
    whole: tuple[tuple[str, float], ...] = ()

    @property
    def status(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        return f"WRONG: {self.wrong}" if self.wrong else "verified"

    def row(self) -> str:
        """Return the row of the table."""
        return "| " + " | ".join((self.name, self.status, *self.cells())) + " |"

    def cells(self) -> tuple[str, ...]:
        if self.refused:
            return ("-",) * 4
        unruled = ", ".join(f"{op} x {n}" for op, n in self.unruled) or "-"
        whole = ", ".join(f"{op} {share:.1%}" for op, share in self.whole) or "-"
        return f"{self.flops:.1%}", f"{self.parameters:.1%}", unruled, whole


def examine(name: str, grids=GRIDS, modes=(True, False)) -> Verdict:
    """Check a model on every grid, train and eval; return what was found."""
    found = Verdict(name)
    for train in modes:
        try:
            subject = subject_of(name, train)
            for grid in grids:
                plan = best_plan(subject, as_grid(grid))
                report = compare(subject, plan)
                if not report.ok:
                    mode = "train" if train else "eval"
                    return replace(found, wrong=f"{mode} on {grid}")
                if train and grid == SQUARE:
                    found = covered(found, plan)
        except AutotpError as error:
            return replace(found, refused=str(error).splitlines()[0])
    return found


def subject_of(name, train, double=False):
    model, inputs = build(name, double=double)
    with warnings.catch_warnings(action="ignore"):
        return prepare(model.train(train), (), inputs)


def best_plan(subject, grid):
    program, network, factors = subject.program, subject.network, subject.factors
    return search_plan(program, network, factors, grid, CLUSTER).plan


def covered(verdict, plan):
    found = plan.coverage()
    return replace(
        verdict,
        unruled=plan.unruled,
        flops=found.flops,
        parameters=found.parameters,
        whole=found.notable(),
    )
