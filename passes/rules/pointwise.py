"""Rules of pointwise ops that are linear or keep little; all others have one by torch's own tag."""

from __future__ import annotations

import torch

from autotp.passes.rules.table import Call, LinearIn, pointwise_sentence, rule

aten = torch.ops.aten


def sum_in(call: Call) -> LinearIn:
    """A sum passes partials where every term is a tensor; a scalar would be added by every rank."""
    return "all" if len([t for t in call.operands if t]) == 2 else None


def pointwise(op: object, **facts: object) -> None:
    """Enter an op that broadcasts its operands."""
    rule(op, pointwise_sentence, **facts)


OUT = (-1,)

pointwise(aten._prelu_kernel.default)
pointwise(aten.__and__.Tensor, saves=())
pointwise(aten.__or__.Tensor, saves=())
pointwise(aten.add.Tensor, linear=sum_in, saves=())
pointwise(aten.broadcast_tensors.default, linear="all", saves=(), free=True)
pointwise(aten.complex.default, linear="all", saves=())
pointwise(aten.conj_physical.default, linear="all", saves=())
pointwise(aten.div.Scalar, linear="all", saves=())
pointwise(aten.div.Tensor, linear=(0,))
pointwise(aten.exp.default, saves=OUT)
pointwise(aten.fill.Scalar, saves=())
pointwise(aten.fill.Tensor, saves=())
pointwise(aten.floor_divide.Scalar, saves=())
pointwise(aten.floor_divide.default, saves=())
pointwise(aten.hardswish.default)
pointwise(aten.log_sigmoid.default)
pointwise(aten.masked_fill.Tensor, linear=(0, 2), saves=(1,))
pointwise(aten.mul.Scalar, linear="all", saves=())
pointwise(aten.mul.Tensor, linear="each")
pointwise(aten.neg.default, linear="all", saves=())
pointwise(aten.polar.default)
pointwise(aten.relu.default, saves=OUT)
pointwise(aten.rsqrt.default, saves=OUT)
pointwise(aten.rsub.Tensor, linear=sum_in, saves=())
pointwise(aten.sigmoid.default, saves=OUT)
pointwise(aten.sqrt.default, saves=OUT)
pointwise(aten.sub.Tensor, linear=sum_in, saves=())
pointwise(aten.tanh.default, saves=OUT)
pointwise(aten.where.ScalarOther, saves=(0,))
pointwise(aten.where.ScalarSelf, saves=(0,))
pointwise(aten.where.self, linear=(1, 2), saves=(0,))
