"""Find the first node of an emitted program that is off: run everything again, node by node.

Every rank records the value of each node, the captured graph those of its own. Forward: the first
node, in graph order, whose value put together from all ranks is not the original's. Backward: from
the outputs on, the first value whose gradient is not; a value's gradient has the dual layout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autotp.comparison import Difference, Divergence, Tolerance, distance, finite_largest
from autotp.grid import Grid
from autotp.layouts import AxisType, Layout, P, R, layout_text
from autotp.passes.network import is_getitem, value_name
from autotp.passes.program import Program
from autotp.reference import SEED, raise_gradient
from autotp.simulate import Execute, differences, run_backward

DUAL: dict[AxisType, AxisType] = {R: P, P: R}
"""The type of a gradient, where it is not that of the value."""

Values = dict[str, Tensor]


class Recorder(fx.Interpreter):
    """Run a graph and keep the value of every node, with its gradient where it carries one.

    With `eps` gradients are rounded anew on their way, see `reference.raise_gradient`.
    """

    def __init__(self, module: fx.GraphModule, values: Values, eps: float = 0.0) -> None:
        super().__init__(module)
        self.values, self.eps = values, eps

    def run_node(self, node: fx.Node) -> Any:
        """Run one node; a result that is an operand itself becomes a view with its own gradient."""
        out = super().run_node(node)
        if isinstance(out, Tensor):
            if any(out is self.env.get(operand) for operand in node.all_input_nodes):
                out = out.view_as(out)
            if out.requires_grad:
                out.retain_grad()
                raise_gradient(out, self.eps)
            self.values[node.name] = out
        return out


@dataclass(frozen=True, slots=True)
class _Runs:
    """What all ranks recorded, the original's values by name, and the graph they ran.

    `nudged` are the original's values when its data and gradients are rounded anew.
    """

    program: Program
    grid: Grid
    ranks: Mapping[int, Values]
    original: Values
    nudged: Values
    graph: fx.Graph
    tolerance: Tolerance


def first_divergence(
    program: Program,
    placeholders: Sequence[Tensor],
    nudged: Sequence[Tensor],
    backward: Sequence[Tensor | None],
    run_ranks: Callable[[Execute], object],
    grid: Grid,
    tolerance: Tolerance,
) -> Divergence | None:
    """Return where a difference begins, or None if it cannot be found node by node.

    `placeholders` are the captured graph's arguments, `nudged` they rounded anew; `run_ranks`
    takes a step on all ranks with the given way to execute a rank's program.
    """
    ranks: dict[int, Values] = {}
    modules: dict[int, fx.GraphModule] = {}

    def execute(rank: int, module: fx.GraphModule, values: Sequence[Tensor]) -> Sequence[Any]:
        ranks[rank], modules[rank] = {}, module
        outputs: Sequence[Any] = Recorder(module, ranks[rank]).run(*values)
        return outputs

    with contextlib.suppress(Exception):  # what was recorded before it tells where
        run_ranks(execute)
    if not modules:
        return None
    original = record_original(program, placeholders, backward)
    moved = record_original(program, nudged, backward, tolerance.eps)
    graph = modules[min(modules)].graph
    runs = _Runs(program, grid, ranks, original, moved, graph, tolerance)
    return forward_divergence(runs) or backward_divergence(runs)


def record_original(
    program: Program,
    placeholders: Sequence[Tensor],
    backward: Sequence[Tensor | None],
    eps: float = 0.0,
) -> Values:
    """Run the captured graph forward and backward; return its values by name."""
    values: Values = {}
    torch.manual_seed(SEED)
    outputs = Recorder(program.graph_module, values, eps).run(*placeholders)
    run_backward(outputs, backward)
    nodes = {n.name: n for n in program.graph.nodes}
    return {value_name(nodes[name]): t for name, t in values.items()}


def forward_divergence(runs: _Runs) -> Divergence | None:
    """Return the first node in graph order whose value is off, or that did not run everywhere."""
    for node in runs.graph.nodes:
        if node.meta.get("value") not in runs.original:  # a result that nothing reads
            continue
        pieces = [runs.ranks.get(r, {}).get(node.name) for r in range(runs.grid.world_size)]
        value = node.meta["value"]
        expected, moved = runs.original[value], runs.nudged[value]
        off = _off(pieces, node.meta["layout"], expected, moved, runs)
        if off > runs.tolerance.value:
            return _describe("value", node, off, runs)
    return None


def backward_divergence(runs: _Runs) -> Divergence | None:
    """Return the first value, from the outputs on, whose gradient is off.

    Only the node that makes a value sees the whole gradient; its moved copies see a share.
    """
    made: dict[str, fx.Node] = {}
    for node in runs.graph.nodes:
        if node.meta.get("value") in runs.original:
            made.setdefault(node.meta["value"], node)
    for value, node in reversed(made.items()):
        expected = runs.original[value]
        if not (expected.requires_grad and expected.is_floating_point()):
            continue
        pieces = [_gradient(runs.ranks[r][node.name]) for r in range(runs.grid.world_size)]
        dual = tuple(DUAL.get(t, t) for t in node.meta["layout"])
        off = _off(pieces, dual, _gradient(expected), _gradient(runs.nudged[value]), runs)
        if off > runs.tolerance.value:
            return _describe("gradient", node, off, runs)
    return None


def _gradient(t: Tensor) -> Tensor:
    return torch.zeros_like(t) if t.grad is None else t.grad


def _off(
    pieces: Sequence[Tensor | None], layout: Layout, expected: Tensor, moved: Tensor, runs: _Runs
) -> float:
    """Return the relative difference; infinite where a rank has nothing."""
    present = [p.detach() for p in pieces if p is not None]
    if len(present) < len(pieces):
        return math.inf
    try:
        pairs = list(differences(present, layout, expected.detach(), runs.grid))
    except RuntimeError:  # partial terms of different shapes
        return math.inf
    found = Difference(
        kind="value",
        name="",
        layout="",
        error=max(distance(a, b) for a, b in pairs),
        largest=finite_largest(expected),
        jitter=distance(moved.detach(), expected.detach()),
    )
    return found.relative(runs.tolerance)


def _describe(what: str, node: fx.Node, off: float, runs: _Runs) -> Divergence:
    value = node.meta["value"].partition(".")[0]
    name = runs.program.params.get(value) or runs.program.names.get(value, value)
    target = node.target
    made = node if not is_getitem(node) else node.args[0]
    readers = tuple(user.name for user in node.users if user.op != "output")
    return Divergence(
        what=what,
        node=node.name,
        op=getattr(made.target, "__name__", str(target)),  # type: ignore[union-attr]
        name=name,
        where=runs.program.where.get(value, ""),
        layout=layout_text(node.meta["layout"]),
        relative=off,
        readers=readers if what == "gradient" else (),
    )
