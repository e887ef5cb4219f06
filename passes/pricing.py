"""What the choices of one variable are and cost: a Table of layouts, seconds and bytes.

An op's seconds are its roofline, what its gradients take (`passes.backward`), and what its program
sends; its bytes are what backward keeps. A parameter's seconds are the optimizer's traffic, its
bytes its state; those of a layout that several ops read, to add up what they give it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autotp.cost_model.compute import op_s
from autotp.cost_model.memory import ADAMW_STATES
from autotp.cost_model.optimizer import update_s
from autotp.grid import Grid
from autotp.passes.backward import gather_s, gradient_s
from autotp.passes.choices import Strategies, Typing, ranks_by_axes
from autotp.passes.move_table import Column
from autotp.passes.moves import Moves
from autotp.passes.network import Network, Op, Value
from autotp.passes.roofline import is_attention, is_function, narrowest
from autotp.passes.spaces import elements
from autotp.passes.traffic import internal_traffic

STATE_COPIES = 2 + ADAMW_STATES
"""A trained parameter, its gradient and the optimizer's states."""

RESULT = -1
"""Stands for an op's first result among the positions of what backward keeps."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The choices of one variable: the layouts of each operand and result, seconds and bytes.

    backward_s  the part of the seconds that is backward's
    saved       the bytes of each operand (or RESULT) that backward needs, per choice
    memory      those that are charged to this variable
    flops       of an op's products on whole tensors
    """

    strategies: Strategies | tuple[()]
    operands: tuple[Column, ...]
    results: tuple[Column, ...]
    seconds: np.ndarray
    backward_s: np.ndarray
    memory: np.ndarray
    saved: Mapping[int, np.ndarray] = field(default_factory=dict)
    flops: int = 0

    def keep(self, kept: Sequence[int], moves: Moves) -> Table:
        """Return the table of some of the choices."""
        index = list(kept)
        return replace(
            self,
            strategies=self.strategies.keep(index) if self.strategies else (),
            operands=tuple(moves.column(c[k] for k in index) for c in self.operands),
            results=tuple(moves.column(c[k] for k in index) for c in self.results),
            seconds=self.seconds[index],
            backward_s=self.backward_s[index],
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


def price_op(op: Op, strategies: Strategies, typing: Typing, moves: Moves) -> Table:
    """Return the table of an op; nothing that it saves is charged yet."""
    slots = list(dict.fromkeys([*saved_positions(op, typing), RESULT]))
    count = len(typing.operands)
    tensors = [*(t for t in op.call.operands if t), *op.call.results]
    typed = list(zip(*((*c.operands, *c.results) for c in strategies.choices), strict=True))
    columns = [moves.column_of(*strategies.layouts(types)) for types in typed]
    held = [
        elements(t.shape, types, strategies.picks, moves.grid) * t.dtype.itemsize
        for t, types in zip(tensors, typed, strict=True)
    ]
    by_slot = {**dict(enumerate(held[:count])), RESULT: held[count]}
    forward_s, backward_s = _seconds(op, strategies, held, typing, moves)
    return Table(
        strategies=strategies,
        operands=tuple(columns[:count]),
        results=tuple(columns[count:]),
        seconds=forward_s + backward_s + _sending(op, strategies, any(typing.results), moves),
        backward_s=backward_s,
        memory=np.zeros(len(strategies)),
        saved={s: by_slot[s].astype(float) for s in slots},
        flops=whole_flops(op),
    )


def _seconds(
    op: Op, strategies: Strategies, held: Sequence[np.ndarray], typing: Typing, moves: Moves
) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of each strategy, that holds so many bytes: of forward and of backward."""
    forward_s = np.zeros(len(strategies))
    if not op.rule.free:
        forward_s = _arithmetic(op, strategies, sum(held, np.zeros(1)), moves)
    if not any(typing.results):
        return forward_s, 0 * forward_s
    gradients_s = gradient_s(op, forward_s, held, typing, bool(products(op)), moves)
    return forward_s, gradients_s + forward_s * bool(op.region)


def _arithmetic(op: Op, strategies: Strategies, moved: np.ndarray, moves: Moves) -> np.ndarray:
    """Return the seconds of each strategy's operator, once: its roofline."""
    sizes, cluster = local_sizes(op, strategies, moves.grid), moves.cluster
    flops = np.zeros(len(strategies)) + _flops(op, sizes)
    dtype, function = op.call.results[0].dtype, is_function(op)
    narrow = narrowest(op, sizes) if products(op) and cluster.narrow_flops_per_s else None
    if narrow is None:
        kind = {"function": function, "attention": is_attention(op)}
        return np.asarray(op_s(flops, moved, dtype, cluster, **kind))
    seconds, narrow = np.empty(len(flops)), np.broadcast_to(narrow, flops.shape)
    for n in np.unique(narrow):
        at = narrow == n
        given = flops[at], moved[at], dtype, cluster
        seconds[at] = op_s(*given, narrowest=int(n), function=function)
    return seconds


def repeat_s(op: Op, table: Table, pick: int, moves: Moves) -> float:
    """Return the seconds of running an op forward once more, as its choice says."""
    layouts = [column[pick] for column in (*table.operands, *table.results)]
    tensors = [*(t for t in op.call.operands if t), *op.call.results]
    moved = sum(
        moves.local_bytes(t.shape, t.dtype, c) for t, c in zip(tensors, layouts, strict=True)
    )
    one = table.strategies.keep([pick]) if table.strategies else None
    assert one is not None
    return float(_arithmetic(op, one, np.array([float(moved)]), moves)[0])


def _sending(op: Op, strategies: Strategies, training: bool, moves: Moves) -> np.ndarray:
    """Return the seconds of what the program of an op sends itself, by strategy."""
    out = np.zeros(len(strategies))
    if op.rule.traffic is None:
        return out
    splits = [c.split for c in strategies.choices]
    for n, picks in enumerate(strategies.picks.tolist()):
        split = [splits[k] for k in picks]
        if op.rule.runs(split):
            s = strategies[n]
            inside = internal_traffic(op, split, s.operands, s.results, moves.grid, training)
            out[n] = sum(
                times * moves.plain_s(kind, size, axis) for axis, kind, size, times in inside
            )
    return out


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


def local_sizes(op: Op, strategies: Strategies, grid: Grid) -> dict[str, np.ndarray]:
    """Return the size of each factor on one rank, by strategy.

    Of factors that split together only the first divides the work: a rank meets all of the others.
    """
    met = {f for group in op.rule.groups(op.call) for f in group[1:]}
    ranks = ranks_by_axes(grid)
    sizes = {}
    for f, size in op.signature.sizes.items():
        holds = [f in c.split and (len(c.split) == 1 or f not in met) for c in strategies.choices]
        by_axes = np.array([float(-(-int(size) // n)) for n in ranks])
        sizes[f] = by_axes[strategies.axes_where(holds)]
    return sizes


def whole_flops(op: Op) -> int:
    """Return the forward flops of an op on whole tensors."""
    return int(_flops(op, {f: int(n) for f, n in op.signature.sizes.items()}))


def _flops(op: Op, sizes: Mapping[str, Any]) -> Any:
    """Return the flops of an op whose factors have these sizes: numbers, or arrays of them."""
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
    seconds = update_s(held, value.dtype, moves.cluster) if value.grad else 0 * held
    states = (STATE_COPIES if value.grad else 1) - is_saved
    return Table((), (), (layouts,), seconds, 0 * held, states * held)


def price_copy(value: Value, layouts: Column, readers: int, is_saved: bool, moves: Moves) -> Table:
    """Return the table of the layout that a value's readers share: it costs what they all keep.

    So many `readers` give it a gradient, and these are added up.
    """
    every = [moves.local_bytes(value.shape, value.dtype, c) for c in layouts]
    held = np.array(every, dtype=float)
    seconds = gather_s(held, readers, value.dtype, moves)
    return Table((), (), (layouts,), seconds, seconds, held if is_saved else 0 * held)
