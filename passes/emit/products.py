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
from autotp.passes.emit.emitter import Emitter, Key
from autotp.passes.emit.moving import fetch, needed
from autotp.passes.network import Op
from autotp.passes.overlap import late_roles
from autotp.passes.products import roles
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
    found = late_roles(op, e.network, e.program.params, e.plan.moves)
    end = _early_end(e, op, reads[found.x]) if found else None
    if found is None or end is None or not _may_stand_before(e, reads[found.weight], end):
        return [fetch(e, v, layout) for v, layout in reads], None
    with e.graph.inserting_before(end):
        weight = fetch(e, *reads[found.weight])
        name = f"late_{weight.name}"
        made = e.graph.create_node("call_function", late, (weight,), name=name)
    operands = [fetch(e, v, layout) for v, layout in reads]
    made.meta.update(layout=reads[found.weight][1], value=reads[found.weight][0])
    operands[found.weight] = made
    return operands, LATE[op.call.op]


def _early_end(e: Emitter, op: Op, x: Key) -> fx.Node | None:
    """Return the call that ends the early move of a product's activations, if there is one."""
    bucket = e.buckets.get(x)
    if bucket is None or not bucket.begins or x[0] in e.program.params or op.region:
        return None
    end = fetch(e, *x).args[0]
    assert isinstance(end, fx.Node)
    return end


def _may_stand_before(e: Emitter, weight: Key, end: fx.Node) -> bool:
    """Say whether all that a weight is made of stands before a node: its gather may begin later."""
    found = {*needed(e, *weight)}
    first = next(n for n in reversed(e.graph.nodes) if n is end or n in found)
    return first is end


def weight_of(node: fx.Node) -> fx.Node:
    """Return the weight of a product."""
    found = roles(node.meta["op"])
    assert found is not None
    weight = node.args[found.weight]
    assert isinstance(weight, fx.Node)
    return weight
