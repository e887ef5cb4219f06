"""Products whose exchange is part of them: gathered or scattered block by block, on the way.

    gather_matmul    S -> R of the input or of the weight, then the product
    matmul_scatter   the product, then P -> S of its result

    ring      n blocks go round by permutes while the product of the block before is computed; what
              was gathered is kept for backward
    panels    a few panels are gathered or scattered one after the other, each with its product:
              what is moved is never whole anywhere, and backward gathers it again

The product is `x @ weight + bias`; `transposed` says that the weight is [o, i], as a linear's.
A factor is gathered or scattered in blocks that all ranks have alike: dims divide evenly. Backward
runs the dual in the same way: the gradient of what was gathered is scattered, that of what was
scattered is gathered. A ring sums in another order on every rank: a sum that ranks must have alike
is not made on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from autotp.algorithms import ring_gather, ring_scatter
from autotp.axis import Axis
from autotp.collectives import Place, all_gather
from autotp.liveness import caller

Schedule = Literal["ring", "panels"]
SCHEDULES: tuple[Schedule, ...] = ("ring", "panels")
Which = Literal["x", "weight"]

PANELS = 4
"""The most panels of one product: more save little memory and cost a call each."""


def panels_of(length: int) -> int:
    """Return into how many panels a rank's chunk is cut: the most up to PANELS that divide it."""
    return max(k for k in range(1, PANELS + 1) if length % k == 0)


# The calls of emitted programs -------------------------------------------------------------------


def gather_matmul(
    x: Tensor,
    weight: Tensor,
    axis: Axis,
    dim: int,
    by: Schedule,
    bias: Tensor | None = None,
    moved: Which = "x",
    transposed: bool = False,
) -> Tensor:
    """Gather `dim` of what is `moved` over an axis and multiply; backward scatters its gradient."""
    x, weight, bias = _as_autocast(x, weight, bias)
    if axis.size == 1:
        return _product(x, weight, bias, transposed)
    p = _Product(x.ndim, moved, dim, transposed)
    place = None if torch.compiler.is_compiling() else caller(1)
    out: Tensor = _GatherMatmul.apply(x, weight, axis, p, by, place)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


def matmul_scatter(
    x: Tensor,
    weight: Tensor,
    axis: Axis,
    dim: int,
    by: Schedule,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Multiply and scatter the sum over an axis by `dim`; backward gathers the gradient.

    A bias is a term of the sum too: on one rank the bias, zero on the others.
    """
    x, weight, bias = _as_autocast(x, weight, bias)
    if axis.size == 1:
        return _product(x, weight, bias, transposed)
    p = _Product(x.ndim, "result", dim, transposed)
    place = None if torch.compiler.is_compiling() else caller(1)
    out: Tensor = _MatmulScatter.apply(x, weight, bias, axis, p, by, place)  # type: ignore[no-untyped-call]
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    out = x @ (weight.mT if transposed else weight)
    return out if bias is None else out + bias


def _as_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands in the dtype in which autocast multiplies, where it is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does, which leaves doubles as they are."""
    is_cast = x.is_floating_point() and x.dtype is not torch.float64
    return x.to(dtype) if is_cast else x


# The product and its dims ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Product:
    """The dims of x, weight and result that the moved factor has; none where it has no such dim.

    ndim    of x and of the result
    moved   "x", "weight" or "result", whose `dim` it is
    """

    ndim: int
    moved: str
    dim: int
    transposed: bool

    @property
    def _factor(self) -> str:
        """Return "i" or "o", or "t" for a leading dim of x and of the result."""
        last = self.ndim - 1
        if self.moved == "weight":
            return "oi"[self.dim] if self.transposed else "io"[self.dim]
        return ("i" if self.moved == "x" else "o") if self.dim == last else "t"

    @property
    def x_dim(self) -> int | None:
        f = self._factor
        return self.dim if f == "t" else self.ndim - 1 if f == "i" else None

    @property
    def w_dim(self) -> int | None:
        f = self._factor
        return None if f == "t" else ("oi" if self.transposed else "io").index(f)

    @property
    def y_dim(self) -> int | None:
        f = self._factor
        return self.dim if f == "t" else self.ndim - 1 if f == "o" else None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ (weight.mT if self.transposed else weight)

    def grad_x(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ (weight if self.transposed else weight.mT)

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return grads.mT @ rows if self.transposed else rows.mT @ grads


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A gathered dim in `count` blocks: those of the ranks, or panels with a part of each rank."""

    ranks: int
    panels: int

    def take(self, x: Tensor, dim: int | None, k: int) -> Tensor:
        """Return block k of a dim; all of a tensor that lacks the dim."""
        if dim is None:
            return x
        if self.panels == 0:
            length = x.shape[dim] // self.ranks
            return x.narrow(dim, k * length, length)
        return self._parts(x, dim).select(dim + 1, k).flatten(dim, dim + 1)

    def put(self, out: Tensor, dim: int, k: int, value: Tensor) -> None:
        """Write block k of a dim."""
        if self.panels == 0:
            length = out.shape[dim] // self.ranks
            out.narrow(dim, k * length, length).copy_(value)
            return
        place = self._parts(out, dim).select(dim + 1, k)
        place.copy_(value.reshape(place.shape))

    def _parts(self, x: Tensor, dim: int) -> Tensor:
        length = x.shape[dim] // (self.ranks * self.panels)
        return _cut(x, dim, (self.ranks, self.panels, length))


@dataclass(slots=True)
class _Sum:
    """A result that is made block by block: blocks of a dim, or terms of a sum where it is none.

    alike   says that all ranks must have the same bits of a sum: it is made in one order
    """

    blocks: _Blocks
    dim: int | None
    count: int
    alike: bool = False
    out: Tensor | None = None
    terms: dict[int, Tensor] = field(default_factory=dict)

    def add(self, k: int, value: Tensor) -> None:
        """Take block, or term, k."""
        if self.dim is None and self.alike:
            self.terms[k] = value
            return
        if self.dim is None:
            self.out = value if self.out is None else self.out.add_(value)
            return
        if self.out is None:
            shape = list(value.shape)
            shape[self.dim] *= self.count
            self.out = value.new_empty(shape)
        self.blocks.put(self.out, self.dim, k, value)

    def result(self) -> Tensor:
        """Return it whole."""
        if self.terms:
            return torch.stack([self.terms[k] for k in range(self.count)]).sum(0)
        assert self.out is not None
        return self.out


def _cut(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """Return a view in which a dim is cut into several."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


# What goes round, and panels ---------------------------------------------------------------------


def _gathered(x: Tensor, axis: Axis, dim: int, by: Schedule) -> Iterator[tuple[int, Tensor]]:
    """Yield the blocks of a gathered dim and their numbers; the next comes in meanwhile."""
    if by == "ring":
        yield from ring_gather(axis, x.contiguous())
        return
    panels = panels_of(x.shape[dim])
    for k, part in enumerate(x.chunk(panels, dim)):
        wire = axis.all_gather(part.contiguous())
        yield k, wire.movedim(0, dim).flatten(dim, dim + 1)


def _scattered(
    make: Callable[[int], Tensor], axis: Axis, dim: int, panels: int, by: Schedule
) -> Tensor:
    """Return this rank's block of the sum over ranks of what `make` makes of every block."""
    if by == "ring":
        return ring_scatter(axis, make)
    parts = []
    for k in range(panels):
        value = make(k)
        length = value.shape[dim] // axis.size
        wire = _cut(value, dim, (axis.size, length)).movedim(dim, 0)
        parts.append(axis.reduce_scatter(wire))
    return torch.cat(parts, dim)


def _blocks(axis: Axis, length: int, by: Schedule) -> _Blocks:
    """Return the blocks of a dim of which each rank holds `length`."""
    return _Blocks(axis.size, 0 if by == "ring" else panels_of(length))


class _GatherMatmul(torch.autograd.Function):
    """y = all_gather(m) o, where m and o are x and the weight or the weight and x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, axis: Axis, p: _Product, by: Schedule, place: Place
    ) -> Tensor:
        ctx.axis, ctx.p, ctx.by, ctx.place = axis, p, by, place
        moved, other = (x, weight) if p.moved == "x" else (weight, x)
        dims = p.x_dim, p.w_dim
        other_dim = dims[1] if p.moved == "x" else dims[0]
        blocks = _blocks(axis, moved.shape[p.dim], by)
        count = blocks.panels or axis.size
        out = _Sum(blocks, p.y_dim, count)
        keeps = by == "ring" and ctx.needs_input_grad[1 if p.moved == "x" else 0]
        kept = _Sum(blocks, p.dim, count) if keeps else None
        for k, block in _gathered(moved, axis, p.dim, by):
            mine = blocks.take(other, other_dim, k)
            out.add(k, p.product(block, mine) if p.moved == "x" else p.product(mine, block))
            if kept:
                kept.add(k, block)
        ctx.save_for_backward(x, weight, kept.result() if kept else None)
        return out.result()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, whole = ctx.saved_tensors
        p: _Product = ctx.p
        axis, by = ctx.axis, ctx.by
        if torch.is_grad_enabled():  # to be differentiated again: by the plain move
            pair = [all_gather(x, axis, p.dim), weight]
            if p.moved == "weight":
                pair = [x, all_gather(weight, axis, p.dim)]
            found = _twice(p.product(*pair), (x, weight), ctx.needs_input_grad, grad)
            return *found, None, None, None, None
        of_x = p.moved == "x"
        moved, other = (x, weight) if of_x else (weight, x)
        other_dim = p.w_dim if of_x else p.x_dim
        needs_moved, needs_other = ctx.needs_input_grad[:2][:: 1 if of_x else -1]
        blocks = _blocks(axis, moved.shape[p.dim], by)
        sums = _Sum(blocks, other_dim, blocks.panels or axis.size)

        def moved_grad(k: int) -> Tensor:
            g, o = blocks.take(grad, p.y_dim, k), blocks.take(other, other_dim, k)
            return p.grad_x(g, o) if of_x else p.grad_weight(g, o)

        def other_grad(k: int, block: Tensor) -> None:
            g = blocks.take(grad, p.y_dim, k)
            sums.add(k, p.grad_weight(g, block) if of_x else p.grad_x(g, block))

        back = None
        if needs_moved:
            back = _scattered(moved_grad, axis, p.dim, blocks.panels, by)
        if needs_other and whole is not None:
            other_back = p.grad_weight(grad, whole) if of_x else p.grad_x(grad, whole)
        elif needs_other:
            for k, block in _gathered(moved, axis, p.dim, by):
                other_grad(k, block)
            other_back = sums.result()
        else:
            other_back = None
        pair_back = (back, other_back) if of_x else (other_back, back)
        return *pair_back, None, None, None, None


class _MatmulScatter(torch.autograd.Function):
    """y = reduce_scatter(x weight + bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        p: _Product,
        by: Schedule,
        place: Place,
    ) -> Tensor:
        ctx.axis, ctx.p, ctx.by, ctx.place = axis, p, by, place
        ctx.save_for_backward(x, weight)
        length = (x.shape[p.dim] if p.x_dim is not None else _made(weight, p)) // axis.size
        blocks = _blocks(axis, length, by)
        bias_dim = 0 if p.w_dim is not None else None

        def make(k: int) -> Tensor:
            out = p.product(blocks.take(x, p.x_dim, k), blocks.take(weight, p.w_dim, k))
            return out if bias is None else out + blocks.take(bias, bias_dim, k)

        return _scattered(make, axis, p.dim, blocks.panels, by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        axis, p, by = ctx.axis, ctx.p, ctx.by
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # to be differentiated again: by the plain move
            whole = all_gather(grad, axis, p.dim)
            flat = whole.reshape(-1, whole.shape[-1])
            every = (p.grad_x(whole, weight), p.grad_weight(whole, x), flat.sum(0))
            found = (g if need else None for g, need in zip(every, needs, strict=True))
            return *found, None, None, None, None
        blocks = _blocks(axis, grad.shape[p.dim], by)
        count = blocks.panels or axis.size
        dims = p.x_dim, p.w_dim, None if p.w_dim is None else 0
        sums = [
            _Sum(blocks, dim, count, alike=n == 2) if need else None
            for n, (dim, need) in enumerate(zip(dims, needs, strict=True))
        ]
        for k, g in _gathered(grad, axis, p.dim, by):
            for_x, for_weight, for_bias = sums
            if for_x:
                for_x.add(k, p.grad_x(g, blocks.take(weight, p.w_dim, k)))
            if for_weight:
                for_weight.add(k, p.grad_weight(g, blocks.take(x, p.x_dim, k)))
            if for_bias:
                for_bias.add(k, g.reshape(-1, g.shape[-1]).sum(0))
        return *(t and t.result() for t in sums), None, None, None, None


def _made(weight: Tensor, p: _Product) -> int:
    """Return the local length of the dim that a weight makes."""
    return weight.shape[0 if p.transposed else 1]


def _twice(
    out: Tensor, inputs: tuple[Tensor, Tensor], needs: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of `inputs` as functions that may be differentiated again."""
    wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if need else None for _, need in zip(inputs, needs, strict=False)]
