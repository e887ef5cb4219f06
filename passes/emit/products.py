"""Products of what an early move brings: their weight's gradient is computed while it goes back.

row_begun = begin_replicate([ln_1], row)
late_weight = late(weight)                                       # computes the gradient
row_gradients = invariant_to_replicate_together(row_begun, row)  # backward: begins its sum
fc1 = linear_late(getitem, late_weight, bias)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autotp.late import addmm_late, late, linear_late, mm_late
from autotp.passes.emit.emitter import Emitter
from autotp.passes.emit.moving import fetch
from autotp.passes.network import Op
from autotp.passes.overlap import PRODUCTS
from autotp.plan import Decision

aten = torch.ops.aten

LATE: Mapping[Any, Any] = {
    aten.linear.default: linear_late,
    aten.addmm.default: addmm_late,
    aten.mm.default: mm_late,
}
"""What stands for a product whose weight's gradient is late."""


def fetch_operands(e: Emitter, op: Op, decision: Decision) -> tuple[list[fx.Node], Any]:
    """Return an op's operands as it reads them, and what stands for it if its weight is late."""
    reads = list(zip(op.operands, decision.operands, strict=True))
    at = PRODUCTS.get(op.call.op)
    end = _early_end(e, op, decision, at[0]) if at else None
    if at is None or end is None:
        return [fetch(e, v, layout) for v, layout in reads], None
    with e.graph.inserting_before(end):
        weight = fetch(e, *reads[at[1]])
    operands = [fetch(e, v, layout) for v, layout in reads]
    if not _stands_before(e, weight, end):
        return operands, None
    with e.graph.inserting_before(end):
        name = f"late_{weight.name}"
        operands[at[1]] = e.graph.create_node("call_function", late, (weight,), name=name)
    operands[at[1]].meta.update(layout=reads[at[1]][1], value=reads[at[1]][0])
    return operands, LATE[op.call.op]


def _early_end(e: Emitter, op: Op, decision: Decision, x: int) -> fx.Node | None:
    """Return the call that ends the early move of a product's activations, if there is one."""
    key, weight = (op.operands[x], decision.operands[x]), op.operands[PRODUCTS[op.call.op][1]]
    bucket = e.buckets.get(key)
    if bucket is None or not bucket.begins or key[0] in e.program.params or op.region:
        return None
    if weight not in e.program.params or not e.network.values[weight].grad or op.call.kwargs:
        return None
    item = fetch(e, *key)
    end = item.args[0]
    assert isinstance(end, fx.Node)
    return end


def _stands_before(e: Emitter, node: fx.Node, other: fx.Node) -> bool:
    return next(n for n in e.graph.nodes if n is node or n is other) is node


def weight_of(node: fx.Node) -> fx.Node:
    """Return the weight of a product."""
    op = next(op for op, target in LATE.items() if target is node.target)
    found = node.args[PRODUCTS[op][1]]
    assert isinstance(found, fx.Node)
    return found
