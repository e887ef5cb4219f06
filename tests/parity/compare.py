"""Layouts of one call that DTensor and autotp compute without a move, side by side."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autotp.layouts import I, P, Shard, shard
from autotp.passes.check_rule import example_of
from autotp.passes.choices import Typing, strategies_of
from autotp.passes.factors import infer_factors
from tests.parity import dtensor

MOST = 450
"""Combinations of placements that are tried of one call: those with more are left out."""


@dataclass(frozen=True, order=True)
class Found:
    """A layout of a call: the types of its operands and of its results."""

    operands: tuple[str, ...]
    results: tuple[str, ...]

    def __str__(self):
        return f"{'; '.join(self.operands)} -> {'; '.join(self.results)}"


@dataclass(frozen=True)
class Compared:
    """What both allow for one call; `theirs` says of each layout if arithmetic confirms it."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    ours: frozenset[Found]
    blocks: int
    theirs: dict[Found, bool]


def compare(mesh, op, args, kwargs):
    """Compare the layouts of a call, or return None where DTensor cannot run it or is too slow."""
    tensors = dtensor.tensors_of((args, kwargs))
    options = [_options(x) for x in tensors]
    if not tensors or math.prod(map(len, options)) > MOST:
        return None
    theirs = _theirs(mesh, op, args, kwargs, options)
    if theirs is None:
        return None
    ours, blocks = _ours(op, args, kwargs)
    return Compared(
        op=op.name().removeprefix("aten::"),
        shapes=tuple(tuple(x.shape) for x in tensors),
        dtypes=tuple(x.dtype for x in tensors),
        ours=ours,
        blocks=blocks,
        theirs=theirs,
    )


def _options(x):
    """Return the types that a tensor may have on an axis of two ranks."""
    terms = [] if x.dtype is torch.bool else [P]
    return [I, *terms, *(shard(d) for d, size in enumerate(x.shape) if size > 1)]


def _theirs(mesh, op, args, kwargs, options):
    """Return DTensor's layouts, and if each is right, or None if it does not have the op."""
    whole = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    wanted = dtensor.tensors_of(op(*whole[0], **whole[1]))
    leaves = dtensor.tensors_of(whole)
    pieces = [{t: dtensor.cut(x, t) for t in o} for x, o in zip(leaves, options, strict=True)]
    ranks = []
    tried = list(itertools.product(*options))
    for rank in range(2):
        with dtensor.as_rank(mesh, rank):
            held = [(ts, [p[t][rank] for p, t in zip(pieces, ts, strict=True)]) for ts in tried]
            made = {ts: dtensor.run(mesh, op, *whole, ts, p) for ts, p in held}
        ranks.append(made)
        if made[(I,) * len(options)] is None:
            return None
        tried = [ts for ts in tried if made[ts] is not None]
    found = {ts: (ranks[0][ts], ranks[1][ts]) for ts in tried}
    layouts = {ts: Found(tuple(map(_text, ts)), _results(both)) for ts, both in found.items()}
    return {
        layout: dtensor.is_right(found[ts], wanted)
        for ts, layout in layouts.items()
        if not _is_whole(layout)
    }


def _results(ranks):
    return tuple(map(dtensor.text, ranks[0]))


def _ours(op, args, kwargs):
    """Return our layouts, and the number of those that read an operand in blocks."""
    with torch.enable_grad():
        example = example_of(op, args, kwargs)
    one, values = example.op, example.network.values
    typing = Typing.of([values[v] for v in one.operands], [values[v] for v in one.results])
    found, blocks = set(), 0
    for s in strategies_of(one, typing, infer_factors(example.network), dtensor.PAIR):
        if any(isinstance(t, Shard) and t.parts for (t,) in s.operands):
            blocks += 1
            continue
        placed = dict(zip(one.operands, (t for (t,) in s.operands), strict=True))
        operands = [placed[f"x{k}"] for k in range(len(placed))]
        layout = Found(tuple(map(_text, operands)), tuple(_text(t) for (t,) in s.results))
        if not _is_whole(layout):
            found.add(layout)
    return frozenset(found), blocks


def _text(kind):
    return str(kind) if kind is P or isinstance(kind, Shard) else "R"


def _is_whole(layout):
    return {*layout.operands, *layout.results} <= {"R", "local"}
