"""Products whose weight gradient is computed late: after what else goes back from them has left.

    late           a weight as it is; its gradient is computed when backward comes to this call
    linear_late, addmm_late, mm_late     the product of something with such a weight

Backward of a product makes the gradients of both of its operands. Where that of the activations is
summed over ranks next, the sum can be on its way while that of the weight is computed: the program
calls `late` after it has begun the activations' move and before it ends it, so that autograd, which
goes back from call to call, ends the move (and begins its dual), computes the weight's gradient,
and only then waits.

Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", whose linear layers send the gradient of their input while that of the weight is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[..., Tensor]


class Gradient:
    """What computes the gradient of a weight, once backward of its product has come by."""

    make: Callable[[], Tensor] | None = None


class Late:
    """A weight, as it was and as its product reads it, and its gradient.

    The graph holds the gradient only: what it holds must not hold what it makes, for both would
    stay in memory until Python looks for such rings.
    """

    def __init__(self, weight: Tensor) -> None:
        self.gradient = Gradient()
        self.original = weight
        self.weight: Tensor = _Late.apply(self.gradient, weight)  # type: ignore[no-untyped-call]


def late(weight: Tensor) -> Late | Tensor:
    """Return the weight as it is, for one product; its gradient is computed here."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return Late(weight)


def linear_late(x: Tensor, weight: Late | Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `linear(x, weight, bias)`: `"... i, o i, o -> ... o"`."""
    return _product(_linear, True, x, weight, bias)


def addmm_late(bias: Tensor, x: Tensor, weight: Late | Tensor) -> Tensor:
    """Return `addmm(bias, x, weight)`: `"o, t i, i o -> t o"`."""
    return _product(_addmm, False, x, weight, bias)


def mm_late(x: Tensor, weight: Late | Tensor) -> Tensor:
    """Return `mm(x, weight)`: `"t i, i o -> t o"`."""
    return _product(_mm, False, x, weight, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.aten.linear.default(x, weight, bias)
    return out


def _addmm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.aten.addmm.default(bias, x, weight)
    return out


def _mm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.aten.mm.default(x, weight)
    return out


def _product(
    product: Product, transposed: bool, x: Tensor, weight: Late | Tensor, bias: Tensor | None
) -> Tensor:
    if isinstance(weight, Tensor):
        return product(x, weight, bias)
    out: Tensor = _Product.apply(weight, product, transposed, x, weight.weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Late(torch.autograd.Function):
    """Hand a weight on; compute its gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, weight: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        make, ctx.gradient.make = ctx.gradient.make, None
        return None, make() if make else grad


class _Product(torch.autograd.Function):
    """Multiply; of the gradients leave that of the weight to `_Late`."""

    @staticmethod
    def forward(
        ctx: Any,
        holder: Late,
        product: Product,
        transposed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, holder.original)  # so that second derivatives go around `_Late`
        ctx.gradient, ctx.transposed = holder.gradient, transposed
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[3:]
        cast = weight.to(grad.dtype)  # under autocast the product ran in another dtype
        along = (grad @ (cast if ctx.transposed else cast.t())).to(x.dtype) if of_x else None
        made = _weight_gradient(grad, x, weight, ctx.transposed)
        deferred: Tensor | None = None
        ctx.gradient.make = None  # one of a backward that did not come to the weight
        if of_weight and (torch.is_grad_enabled() or torch.is_anomaly_enabled()):
            deferred = made()  # to be differentiated again, or looked at
        elif of_weight:
            ctx.gradient.make, deferred = made, weight.new_full((), torch.nan).expand_as(weight)
        summed = None
        if of_bias:
            shape, dtype = ctx.bias
            summed = grad.sum_to_size(shape).to(dtype)
        return None, None, None, along, deferred, summed


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, transposed: bool
) -> Callable[[], Tensor]:
    """Return what computes `"t o, t i -> o i"`, or its transpose."""

    def make() -> Tensor:
        rows = grad.reshape(-1, grad.shape[-1])
        given = x.reshape(-1, x.shape[-1]).to(grad.dtype)
        made = rows.t() @ given if transposed else given.t() @ rows
        return made.to(weight.dtype)

    return make
