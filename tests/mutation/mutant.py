"""One damage, what notices it, and how the source of a function is damaged."""

import contextlib
import inspect
import io
import textwrap
from dataclasses import dataclass
from unittest import mock

from torch import fx

from autotp.grid import Grid
from autotp.passes.check_rule import check_rule

GRIDS = (Grid(("col",), (2,)), Grid(("row", "col"), (2, 3)))


@dataclass(frozen=True, slots=True)
class Mutant:
    """One damage: `plant` returns a context in which it is there; `notice` asks the proofs."""

    kind: str
    name: str
    plant: object
    notice: object


def raises(proof, *args, **kwargs):
    """Say whether a proof fails."""
    with mock.patch.object(fx.graph_module.sys, "stderr", io.StringIO()):  # its own tracebacks
        try:
            proof(*args, **kwargs)
        except Exception:
            return True
    return False


def refuted(op, calls, rule=None):
    """Say whether a rule fails on one of its calls."""
    return any(raises(check_rule, op, *call, rule=rule, grids=GRIDS) for call in calls)


@contextlib.contextmanager
def edited(function, old, new):
    """Run with `new` in the source of a function where it has `old`."""
    bare = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(bare))
    assert source.count(old) == 1, (bare.__qualname__, old)
    code, bare.__code__ = bare.__code__, code_of(bare, source.replace(old, new))
    try:
        yield
    finally:
        bare.__code__ = code


def code_of(function, source):
    """Return the code of another source of a function, without its decorators."""
    scope = dict(function.__globals__)
    future = "from __future__ import annotations\n"
    exec(future + source[source.index("def ") :], scope)
    return scope[function.__name__].__code__
