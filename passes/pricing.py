"""What the choices of one variable are and cost: a Table of layouts, seconds and bytes.

An op's seconds are its roofline, forward and backward, and what its program sends; its bytes are
what backward keeps. A parameter's seconds are the optimizer's traffic, its bytes its state.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autotp.cost_model.compute import op_s
from autotp.cost_model.memory import ADAMW_STATES
from autotp.grid import Grid
from autotp.passes.choices import Strategy, Typing
from autotp.passes.moves import Column, Moves
from autotp.passes.network import Network, Op, Value
from autotp.passes.roofline import is_function, narrowest
from autotp.passes.traffic import internal_traffic

PASSES = 3
"""Forward once, and backward twice as much: the gradients of both operands of a product."""

STATE_COPIES = 2 + ADAMW_STATES
"""A trained parameter, its gradient and the optimizer's states."""

UPDATE_TRAFFIC = 2 * ADAMW_STATES + 3
"""Passes over a parameter's bytes in one AdamW step: reads p, g and states, writes p and states."""

RESULT = -1
"""Stands for an op's first result among the positions of what backward keeps."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The choices of one variable: the layouts of each operand and result, seconds and bytes.

    saved   the bytes of each operand (or RESULT) that backward needs, per choice
    memory  those that are charged to this variable
    """

    strategies: tuple[Strategy, ...]
    operands: tuple[Column, ...]
    results: tuple[Column, ...]
    seconds: np.ndarray
    memory: np.ndarray
    saved: Mapping[int, np.ndarray] = field(default_factory=dict)

    def keep(self, kept: Sequence[int], moves: Moves) -> Table:
        """Return the table of some of the choices."""
        index = list(kept)
        return Table(
            strategies=tuple(self.strategies[k] for k in index),
            operands=tuple(moves.column(c[k] for k in index) for c in self.operands),
            results=tuple(moves.column(c[k] for k in index) for c in self.results),
            seconds=self.seconds[index],
            memory=self.memory[index],
            saved={slot: held[index] for slot, held in self.saved.items()},
        )

    def charge(self, slots: Collection[int]) -> Table:
        """Return the table with the bytes of these slots as its memory."""
        memory = sum((self.saved[slot] for slot in sorted(slots)), np.zeros(len(self.seconds)))
        return replace(self, memory=memory)


def is_recomputed(network: Network, op: Op) -> bool:
    """Say whether backward computes `op` again, and with it the moves right before it."""
    return bool(op.region) and any(network.values[v].grad for v in op.results)


def typing_of(network: Network, op: Op) -> Typing:
    """Return which operands and results of an op carry gradient."""
    return Typing.of(
        [network.values[v] for v in op.operands], [network.values[v] for v in op.results]
    )


def price_op(op: Op, strategies: Sequence[Strategy], typing: Typing, moves: Moves) -> Table:
    """Return the table of an op; nothing that it saves is charged yet."""
    slots = list(dict.fromkeys([*saved_positions(op, typing), RESULT]))
    costs = [_op_cost(op, s, typing, moves) for s in strategies]
    operands = zip(*(s.operands for s in strategies), strict=True)
    results = zip(*(s.results for s in strategies), strict=True)
    return Table(
        strategies=tuple(strategies),
        operands=tuple(map(moves.column, operands)),
        results=tuple(map(moves.column, results)),
        seconds=np.array([seconds for seconds, _ in costs]),
        memory=np.zeros(len(strategies)),
        saved={s: np.array([held[s] for _, held in costs], dtype=float) for s in slots},
    )


def _op_cost(op: Op, s: Strategy, typing: Typing, moves: Moves) -> tuple[float, dict[int, int]]:
    """Return seconds, forward and backward, and the bytes of each operand and of the result."""
    tensors = [*(t for t in op.call.operands if t), *op.call.results]
    held = [
        moves.local_bytes(t.shape, t.dtype, layout)
        for t, layout in zip(tensors, [*s.operands, *s.results], strict=True)
    ]
    by_slot = {**dict(enumerate(held[: len(s.operands)])), RESULT: held[len(s.operands)]}
    if op.rule.free:
        return 0.0, by_slot
    training = any(typing.results)
    dtype = op.call.results[0].dtype
    sizes = local_sizes(op, s, moves.grid)
    flops = _flops(op, sizes)
    seconds = op_s(
        flops,
        sum(held),
        dtype,
        moves.cluster,
        narrowest=narrowest(op, sizes) if flops and moves.cluster.narrow_flops_per_s else None,
        function=is_function(op),
    )
    split = [c.split for c in s.choices]
    inside = internal_traffic(op, split, s.operands, s.results, moves.grid, training)
    sending = sum(n * moves.kind_s(kind, size, axis) for axis, kind, size, n in inside)
    passes = PASSES + bool(op.region) if training else 1
    return float(seconds) * passes + sending, by_slot


def saved_positions(op: Op, typing: Typing) -> list[int]:
    """Return the operands (and RESULT) that are kept for backward.

    In a checkpoint region these are what enters it: the rest is computed again.
    """
    return list(op.enters) if op.region else needed_positions(op, typing)


def needed_positions(op: Op, typing: Typing) -> list[int]:
    """Return the operands (and RESULT) that backward needs.

    A product keeps an operand for the gradients of the others; a linear map of one keeps nothing.
    """
    count = len(typing.operands)
    if not any(typing.results):
        return []
    if op.rule.saves is not None:
        return [k for k in op.rule.saves if k < count]
    linear = op.rule.linear_in(op.call)
    if count == 1:
        return [] if linear else [0]
    factors = [k for k in range(count) if k not in op.signature.added]
    if linear != "each":
        return factors
    return [k for k in factors if any(typing.operands[j] for j in factors if j != k)]


def local_flops(op: Op, s: Strategy, grid: Grid) -> int:
    """Return the forward flops of one rank: two per element of each contracted product."""
    return _flops(op, local_sizes(op, s, grid))


def local_sizes(op: Op, s: Strategy, grid: Grid) -> dict[str, int]:
    """Return the size of each factor on one rank.

    Of factors that split together only the first divides the work: a rank meets all of the others.
    """
    met = {f for group in op.rule.groups(op.call) for f in group[1:]}
    return {
        f: -(-int(n) // math.prod(grid.sizes[a] for a in s.split_axes(f, alone=f in met)))
        for f, n in op.signature.sizes.items()
    }


def whole_flops(op: Op) -> int:
    """Return the forward flops of an op on whole tensors."""
    return _flops(op, {f: int(n) for f, n in op.signature.sizes.items()})


def _flops(op: Op, sizes: Mapping[str, int]) -> int:
    return 2 * sum(math.prod(sizes.get(f, 1) for f in term) for term in products(op))


def products(op: Op) -> list[list[str]]:
    """Return the products of factors that an op multiplies out, by its rule or its contraction."""
    flops = op.rule.flops(op.call) if callable(op.rule.flops) else op.rule.flops
    if flops:
        return [term.split() for term in flops.split("+")]
    sig = op.signature
    counts = [
        sum(any(f in p for dim in dims for p in dim) for dims in sig.operands)
        for f in sig.factors()
        if sig.summed(f)
    ]
    return [sig.factors()] if any(n > 1 for n in counts) and not op.rule.split else []


def price_rest(value: Value, layouts: Column, is_saved: bool, moves: Moves) -> Table:
    """Return the table of a parameter at rest.

    Where backward needs it, its own bytes are charged there: at rest they count only once more.
    """
    held = np.array([moves.local_bytes(value.shape, value.dtype, c) for c in layouts], dtype=float)
    traffic = UPDATE_TRAFFIC * held if value.grad else 0 * held
    seconds = [float(op_s(0, int(t), value.dtype, moves.cluster)) for t in traffic]
    states = (STATE_COPIES if value.grad else 1) - is_saved
    return Table((), (), (layouts,), np.array(seconds), states * held)


def price_copy(value: Value, layouts: Column, is_saved: bool, moves: Moves) -> Table:
    """Return the table of the layout that a value's readers share: it costs what they all keep."""
    zero = np.zeros(len(layouts))
    if not is_saved:
        return Table((), (), (layouts,), zero, zero)
    held = [moves.local_bytes(value.shape, value.dtype, c) for c in layouts]
    return Table((), (), (layouts,), zero, np.array(held, dtype=float))
