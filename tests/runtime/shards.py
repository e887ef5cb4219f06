"""Split whole tensors into typed pieces, run a function of the pieces on simulated ranks, join.

The oracle is `layouts.take_shard` and `layouts.assemble`, with partials of random terms.
"""

from __future__ import annotations

import torch

from autotp.axis import run_ranks
from autotp.layouts import I, P, R, Shard, assemble, layout_text, take_shard

GRADIENT_TYPE = {R: P, I: I, P: R}


def gradient_layout(layout):
    return tuple(t if isinstance(t, Shard) else GRADIENT_TYPE[t] for t in layout)


def pieces_of(whole, layout, grid):
    """Return every rank's piece; the terms of a partial are random and sum to the whole."""
    partial = [a for a, t in enumerate(layout) if t is P]
    plain = tuple(I if t is P else t for t in layout)
    pieces = {c: take_shard(whole, plain, grid, c) for c in grid.all_coords()}
    for a in partial:
        terms = {}
        for coords, piece in pieces.items():
            others = [(*coords[:a], i, *coords[a + 1 :]) for i in range(grid.sizes[a])]
            if coords[a] == 0:
                noise = [torch.randn_like(piece) for _ in others[1:]]
                terms.update(zip(others[1:], noise, strict=True))
                terms[coords] = piece - sum(noise, torch.zeros_like(piece))
        pieces = terms
    return {c: pieces[_first_copy(c, layout)] for c in pieces}


def _first_copy(coords, layout):
    return tuple(0 if t in (R, I) else c for c, t in zip(coords, layout, strict=True))


def assert_pieces(pieces, whole, layout, grid, **tolerance):
    """Hold that the pieces are `whole` under `layout`: copies equal, shards and terms joined."""
    text = layout_text(layout)
    joined = assemble(pieces, whole.shape, layout, grid)
    torch.testing.assert_close(joined, whole, msg=lambda m: f"{text}: {m}", **tolerance)
    for coords, piece in pieces.items():
        torch.testing.assert_close(piece, pieces[_first_copy(coords, layout)], rtol=0, atol=0)


def run_pieces(fn, inputs, upstream, grid):
    """Run `fn(axes, *pieces)` forward and backward on every rank; return outputs and gradients.

    `inputs` are (whole, layout) pairs or plain values; `upstream` is the output's gradient with the
    layout of the output.
    """
    typed = [pieces_of(*i, grid) if isinstance(i, tuple) else i for i in inputs]
    grad_whole, out_layout = upstream
    grads = pieces_of(grad_whole, gradient_layout(out_layout), grid)

    def one_rank(rank, axes):
        coords = grid.coords(rank)
        mine = [p[coords].clone() if isinstance(p, dict) else p for p in typed]
        leaves = [p.requires_grad_() if _is_float(p) else p for p in mine]
        out = fn(axes, *leaves)
        out.backward(grads[coords])
        return out.detach(), [p.grad if _is_float(p) else None for p in leaves], axes

    results = dict(zip(grid.all_coords(), run_ranks(grid, one_rank), strict=True))
    outs = {c: r[0] for c, r in results.items()}
    back = [{c: r[1][i] for c, r in results.items()} for i in range(len(inputs))]
    return outs, back, results[(0,) * len(grid.sizes)][2]


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def check(fn, op, inputs, out_layout, grid, **tolerance):
    """Hold that `fn` on pieces is `op` on wholes: values, and gradients of every float input."""
    wholes = [i[0] if isinstance(i, tuple) else i for i in inputs]
    leaves = [w.clone().requires_grad_() if _is_float(w) else w for w in wholes]
    expected = op(*leaves)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    outs, grads, axes = run_pieces(fn, inputs, (upstream, out_layout), grid)
    assert_pieces(outs, expected.detach(), out_layout, grid, **tolerance)
    for given, leaf, pieces in zip(inputs, leaves, grads, strict=True):
        if _is_float(leaf) and leaf.grad is not None and isinstance(given, tuple):
            assert_pieces(pieces, leaf.grad, gradient_layout(given[1]), grid, **tolerance)
    return axes
