"""What backward takes of an op: products for its operands' gradients, and the bytes they move.

    gradient_s     seconds of making the gradients of all operands that carry one
    gather_s       seconds of adding up the gradients of a value that several ops read

By what rules say of ops, not by their names. The gradients of

    a product          are products, one for each factor
    a view             are views; of a part, are copied into zeros; of a repeat, are summed
    a sum              are that of its result, summed over what was broadcast
    a pointwise term   are products with the other terms, summed over what was broadcast
    any other map      take as long as two forward passes; a linear one of one operand one

Source: torch 2.13, tools/autograd/derivatives.yaml; torch/csrc/autograd/FunctionsManual.cpp, and
input_buffer.cpp for what several readers give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from autotp.cost_model.compute import op_s
from autotp.passes.choices import Typing
from autotp.passes.moves import Moves
from autotp.passes.network import Op
from autotp.passes.rules.table import Tensor

OTHER = 2
"""Forward passes that the gradients of an op take of which no more is known."""

ADDS = 3
"""Passes over a gradient in adding it to another: both are read, one is written."""

Held = Sequence[np.ndarray]
"""The bytes that a rank holds of each operand, then of each result, by strategy."""


def gradient_s(
    op: Op, forward_s: np.ndarray, held: Held, typing: Typing, multiplies: bool, moves: Moves
) -> np.ndarray:
    """Return the seconds of backward, by strategy, of an op whose results carry gradient.

    An op that `multiplies` has products, but is one only if it is linear in each of its factors.
    """
    wanted = [k for k, grad in enumerate(typing.operands) if grad]
    if multiplies and op.rule.linear_in(op.call) == "each":
        return forward_s * len([k for k in wanted if k not in op.signature.added])
    moved = _view(op, held) if op.rule.free else _moved(op, held, wanted)
    if moved is None:
        return forward_s * OTHER
    seconds = np.asarray(op_s(0 * moved, moved, op.call.results[0].dtype, moves.cluster))
    return np.where(moved > 0, seconds, 0.0) if op.rule.free else seconds


def gather_s(held: np.ndarray, readers: int, dtype: torch.dtype, moves: Moves) -> np.ndarray:
    """Return the seconds in which the gradients of so many readers become one.

    `held` are the bytes that a rank holds of one of them, by layout.
    """
    added_s = np.asarray(op_s(0 * held, ADDS * held, dtype, moves.cluster))
    return added_s * max(0, readers - 1)


def _view(op: Op, held: Held) -> np.ndarray:
    """Return the bytes of a view's gradient."""
    count = len(held) - len(op.call.results)
    whole, made = held[0], held[count:]
    if len(made) > 1:
        return 2.0 * whole  # results are put side by side
    before, after = (_elements(t) for t in (op.call.operands[0], op.call.results[0]))
    if after == before:
        return 0.0 * whole
    return whole + made[0] * (2.0 if after < before else 1.0)


def _moved(op: Op, held: Held, wanted: Sequence[int]) -> np.ndarray | None:
    """Return the bytes of the gradients of a map that is linear in each operand; None else."""
    count = len(held) - len(op.call.results)
    out = sum(held[count:], np.zeros(1))
    linear, is_pointwise = op.rule.linear_in(op.call), torch.Tag.pointwise in op.call.op.tags
    if linear == "all" and count == 1:
        return out + held[0]
    if linear == "all" and not is_pointwise:
        return 0.0 * out  # what was put side by side comes apart in views
    if linear not in ("all", "each") or not is_pointwise:
        return None
    whole, moved = _elements(op.call.results[0]), 0.0 * out
    for k in wanted:
        is_repeated = _elements(op.call.operands[k]) < whole
        if linear == "each":
            others = sum((h for j, h in enumerate(held[:count]) if j != k), np.zeros(1))
            moved = moved + out + others + (out if is_repeated else held[k])
        if is_repeated:
            moved = moved + out + held[k]
    return moved


def _elements(tensor: Tensor | None) -> int:
    return math.prod(int(n) for n in tensor.shape) if tensor else 1
