"""Rules of grouped products: rows in consecutive groups, each multiplied by its expert's matrix."""

from __future__ import annotations

import math
from typing import Any

import torch

from autotp import routing
from autotp.passes.rules.index import whole
from autotp.passes.rules.table import Call, Message, Ranks, rule

aten = torch.ops.aten


def grouped(call: Call) -> str:
    """Rows t, experts e and both dims of their matrices may split; offsets are whole."""
    dims = [len(t.shape) if t else 0 for t in call.operands]
    if dims == [2, 3, 1] and call.kwargs.get("out_dtype") is None:
        return "t i, e i o, [g] -> t o"
    return "z s [k], z [k] [n] -> z s [n]" if dims == [3, 3] else whole(call)


def routed_traffic(call: Call, ranks: Ranks) -> list[Message]:
    """Rows go to their experts and products come back; so do the gradients."""
    x, made = call.operands[0], call.results[0]
    assert x is not None
    sizes = [math.prod(t.shape) * t.dtype.itemsize for t in (x, made)]
    return [
        Message("t e", size, backward, "all_to_all") for backward in (False, True) for size in sizes
    ]


GROUPED: dict[str, Any] = {
    "linear": (0,),
    "flops": "t i o + z s k n",
    "saves": (0, 1),
    "traffic": routed_traffic,
}

rule(
    aten._grouped_mm.default,
    grouped,
    split={"t": "S", "e": "P", "t e": "S", "i": "P", "o": "S"},
    blocks=("i", "o"),
    program=routing.grouped_mm,
    **GROUPED,
)
rule(
    "transformers::grouped_mm_fallback",
    grouped,
    split={"t": "S", "e": "P", "t e": "S"},
    program=routing.grouped_mm_fallback,
    **GROUPED,
)
