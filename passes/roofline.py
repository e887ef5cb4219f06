"""What an op's arithmetic looks like, beyond its flops and bytes: for machines that were measured.

A product with a narrow dim reaches less of a machine's rate, attention less than its two products
alone, and a pointwise op that takes an exponential of every element less of its memory's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autotp.passes.network import Op

FUNCTIONS = frozenset(
    f"aten::{name}"
    for name in [
        "_log_softmax",
        "_softmax",
        "acos",
        "asin",
        "atan",
        "atan2",
        "cos",
        "cosh",
        "cross_entropy_loss",
        "digamma",
        "elu",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "gelu",
        "lgamma",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_sigmoid",
        "log_softmax",
        "logsumexp",
        "mish",
        "pow.Scalar",
        "selu",
        "sigmoid",
        "silu",
        "sin",
        "sinh",
        "softmax",
        "softplus",
        "tan",
        "tanh",
    ]
)
"""Ops that evaluate a transcendental function of every element."""


def is_function(op: Op) -> bool:
    """Say whether an op evaluates a transcendental function of every element."""
    name, overload = op.call.op._schema.name, op.call.op._overloadname
    return name in FUNCTIONS or f"{name}.{overload}" in FUNCTIONS


def is_attention(op: Op) -> bool:
    """Say whether an op is attention in one kernel: products, and the exponentials between them."""
    name: str = op.call.op._schema.name
    return name == "aten::scaled_dot_product_attention"


def narrowest(op: Op, sizes: Mapping[str, Any]) -> Any:
    """Return the smallest of the three dims of an op that is one product; None for any other.

    Factors that lie in the same operands and results are one dim; those in all are its batch. The
    sizes are numbers, or arrays of them.
    """
    sig = op.signature
    if op.rule.flops:
        return None
    factors = [k for k in range(len(sig.operands)) if k not in sig.added]
    places = [{f for dim in sig.operands[k] for p in dim for f in p} for k in factors]
    made = {f for dims in sig.results for dim in dims for p in dim for f in p}
    dims: dict[tuple[bool, ...], list[Any]] = {}
    for f in sig.factors():
        place = (*(f in operand for operand in places), f in made)
        if any(place[:-1]) and not all(place):
            dims.setdefault(place, []).append(sizes.get(f, 1))
    return functools.reduce(np.minimum, map(math.prod, dims.values())) if dims else None
