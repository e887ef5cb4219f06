"""Random sites of an emitted program: what a call that draws becomes on one rank.

fast    the rule's program, or the op under a seed of this site; unread draws are left out
exact   the rule's exact program, or the op itself on whole operands: torch's default generator
        moves on as it does in the original, draw by draw in the order of the graph
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autotp.errors import PlanError
from autotp.grid import Coords, Grid
from autotp.layouts import Layout, local_ranges, splitters
from autotp.passes.capture.draws import dense_strides, draws
from autotp.passes.capture.normalise import user_line
from autotp.passes.network import read_call, tensor_slots
from autotp.passes.rules import Rule, find
from autotp.random_programs import Part, Whole, exact_part, exact_sdpa
from autotp.randomness import drawn_call, seeded_call
from autotp.sizes import varies

CALLERS = (drawn_call, exact_part, seeded_call)
"""Functions that take the op that they run before its arguments."""


@dataclass(slots=True)
class Sites:
    """The random sites of one rank's program, numbered in the order of the graph."""

    exact: bool
    grid: Grid
    coords: Coords
    count: int = 0

    def whole(self, node: fx.Node, rng: fx.Node) -> tuple[Any, dict[str, Any]]:
        """Return what runs a draw on whole operands, and the arguments that it takes besides."""
        if not self.exact:
            return seeded_call, self._site(rng)
        layout: Layout = ()
        operands = sum(isinstance(v, fx.Node) for _, v in tensor_slots(node))
        rule = find(node.target)
        results = len(read_call(node)[0].results)
        return self._exact(node, rule, (layout,) * operands, (layout,) * results, rng)

    def split(
        self,
        node: fx.Node,
        rule: Rule,
        layouts: tuple[Sequence[Layout], Sequence[Layout]],
        axes: tuple[fx.Node, ...],
        rng: fx.Node,
    ) -> tuple[Any, dict[str, Any]]:
        """Return the same where `axes` split operands and results that have these `layouts`."""
        if self.exact:
            return self._exact(node, rule, *layouts, rng)
        if rule.random is None:
            return seeded_call, self._site(rng)
        return rule.draw or seeded_call, {**self._site(rng), "split": axes}

    def _site(self, rng: fx.Node) -> dict[str, Any]:
        self.count += 1
        return {"rng": rng, "site": self.count}

    def _exact(
        self,
        node: fx.Node,
        rule: Rule | None,
        operands: Sequence[Layout],
        results: Sequence[Layout],
        rng: fx.Node,
    ) -> tuple[Any, dict[str, Any]]:
        if rule is None or rule.random is None:
            return drawn_call, {"rng": rng}
        _refuse_varying(node)
        program = rule.exact or exact_part
        if program is exact_sdpa:
            _refuse_fused(node)
        call, _ = read_call(node)
        values = [v.meta["val"] for _, v in tensor_slots(node) if isinstance(v, fx.Node)]
        wholes = tuple(self._of(v, c) for v, c in zip(values, operands, strict=True))
        parts = tuple(self._part(t.shape, c) for t, c in zip(call.results, results, strict=True))
        return program, {"rng": rng, "wholes": wholes, "results": parts}

    def _of(self, value: torch.Tensor, layout: Layout) -> Whole:
        """Return shape, order in memory and part of a value."""
        return tuple(value.shape), dense_strides(value), self._part(value.shape, layout)

    def _part(self, shape: Sequence[int], layout: Layout) -> Part:
        return tuple(
            (d, tuple(local_ranges(n, layout, d, self.grid, self.coords)))
            for d, n in enumerate(shape)
            if splitters(layout, d)
        )


def _refuse_fused(node: fx.Node) -> None:
    """Refuse attention whose mask a fused kernel draws where no other op can follow it."""
    device = node.meta["val"].device
    if device.type != "cpu":
        raise PlanError(
            f'rng="exact" cannot draw what fused attention drops on {device.type}',
            at=[(user_line(node) or node.name, "scaled_dot_product_attention with dropout")],
            remedy='attn_implementation="eager", attention dropout 0, or rng="fast"',
        )


def _refuse_varying(node: fx.Node) -> None:
    """Refuse to draw a part of the original's numbers for a tensor whose sizes vary."""
    if any(varies(t.shape) for t in read_call(node)[0].results):
        raise PlanError(
            'rng="exact" cannot draw for sizes that vary',
            at=[(user_line(node) or node.name, str(node.target))],
            remedy='plan without dynamic=, or rng="fast"',
        )


def unread(graph: fx.Graph) -> set[str]:
    """Return the names of the draws that nobody reads, and of what only they read."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        idle = node.op == "call_function" and all(user.name in found for user in node.users)
        dead_end = draws(node) or bool(node.users) or node.target is operator.getitem
        if idle and dead_end:
            found.add(node.name)
    return found
