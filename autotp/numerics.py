"""Find the first value that is not finite: `parallelize(..., check_numerics=True)`.

    run_checked    run an emitted program node by node; name the first node, its line and its rank

A node is to blame if its result has NaN and no operand has, or if its result has infinities, no
operand has, and none is written in its arguments (as masks have). All ranks run to the end and tell
each other what they found before any raises, so that none is left waiting. Gradients are watched
by hooks: the first that is not finite, in the order of backward, is named when backward ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx
from torch.autograd import Variable
from torch.utils import _pytree as pytree

from autotp.errors import NumericsError
from autotp.grid import Grid
from autotp.layouts import layout_text
from autotp.passes.program import Program
from autotp.ranks import gathered
from autotp.together import begin_gather, begin_replicate


class Runnable(Protocol):
    """A program, and what it was emitted as for this rank."""

    @property
    def program(self) -> Program:
        """The captured program."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rank found first: the number of the node in its order, the node, and the fact."""

    order: int
    node: str
    where: str
    fact: str


def run_checked(compiled: Runnable, arguments: Sequence[Tensor], grid: Grid) -> Any:
    """Run a program on this rank's arguments and return its flat outputs.

    Raises NumericsError, on all ranks, if any made a value that is not finite. Backward will.
    """
    watcher = _Watcher(compiled, grid)
    values = watcher.run(*arguments)
    _raise_first(watcher.forward, "forward")
    return values


class _Watcher(fx.Interpreter):
    """Run a graph; note the first node to blame, and watch the gradients of all that have one."""

    def __init__(self, compiled: Runnable, grid: Grid) -> None:
        super().__init__(compiled.graph_module)
        self.program, self.grid = compiled.program, grid
        self.forward: Finding | None = None
        self.backward: Finding | None = None
        self.order = {node: k for k, node in enumerate(compiled.graph_module.graph.nodes)}
        self.queued = False

    def run_node(self, node: fx.Node) -> Any:
        """Run one node and look at what it makes."""
        out = super().run_node(node)
        if node.target in (
            begin_gather,
            begin_replicate,
        ):  # what comes to it may still be on its way
            return out
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor) and value.is_floating_point():
                if self.forward is None and (fact := self._blame(node, value)):
                    self.forward = self._finding(node, fact)
                if value.requires_grad and node.op != "get_attr":
                    hook = self._watch_gradient(node)
                    value.register_hook(hook)  # type: ignore[no-untyped-call]
        return out

    def _blame(self, node: fx.Node, value: Tensor) -> str:
        """Say what a node made that it was not given, if anything."""
        if bool(value.isfinite().all()):
            return ""
        read = [v for n in node.all_input_nodes for v in pytree.tree_leaves(self.env.get(n))]
        floats = [v for v in read if isinstance(v, Tensor) and v.is_floating_point()]
        bad = [v for v in floats if not bool(v.isfinite().all())]
        if bool(value.isnan().any()) and not any(bool(v.isnan().any()) for v in bad):
            return _count(value.isnan(), "NaN")
        if bool(value.isinf().any()) and not bad and not _writes_infinity(node):
            return _count(value.isinf(), "infinite")
        return ""

    def _watch_gradient(self, node: fx.Node) -> Callable[[Tensor], None]:
        def watch(gradient: Tensor) -> None:
            if not self.queued:  # in every rank's backward, whatever it finds
                self.queued = True
                engine: Any = Variable._execution_engine
                engine.queue_callback(self._end_of_backward)
            if self.backward is None and not bool(gradient.isfinite().all()):
                fact = _count(~gradient.isfinite(), "NaN or infinite")
                self.backward = self._finding(node, f"gradient: {fact}", -self.order[node])

        return watch

    def _end_of_backward(self) -> None:
        found, self.backward, self.queued = self.backward, None, False
        _raise_first(found, "backward")

    def _finding(self, node: fx.Node, fact: str, order: int | None = None) -> Finding:
        layout = node.meta.get("layout")
        held = f", held as {layout_text(layout)}" if layout is not None else ""
        value = str(node.meta.get("value", "")).partition(".")[0]
        label = self.program.names.get(value, node.name)
        where = self.program.where.get(value, "")
        what = "" if node.op == "placeholder" or node.name == label else f" ({node.name})"
        given = ", before any op" if node.op == "placeholder" else ""
        place = self.order[node] if order is None else order
        return Finding(place, label + what, where, f"{fact}{given}{held}")


def _writes_infinity(node: fx.Node) -> bool:
    """Say whether an infinity is an argument of the node, as in a mask."""
    leaves = pytree.tree_leaves((list(node.args), dict(node.kwargs)))
    return any(isinstance(a, float) and math.isinf(a) for a in leaves)


def _count(bad: Tensor, what: str) -> str:
    return f"{int(bad.sum())} of {bad.numel()} elements are {what}"


def _raise_first(mine: Finding | None, direction: str) -> None:
    """Raise NumericsError on all ranks, if any found something, with what came first."""
    found: Mapping[int, Finding] = {r: f for r, f in enumerate(gathered(mine)) if f is not None}
    if not found:
        return
    first = min(f.order for f in found.values())
    at = [(f"rank {r}", f.fact) for r, f in found.items() if f.order == first]
    one = next(f for f in found.values() if f.order == first)
    raise NumericsError(
        f"the first value that is not finite in {direction} is that of {one.node}",
        at=[*([("your code", one.where)] if one.where else []), *at],
        remedy=(
            "autotp.check(model, grid, inputs) says whether the unsharded model makes it too",
            "torch.autograd.set_detect_anomaly(True) on the original model, if it does",
        ),
    )
