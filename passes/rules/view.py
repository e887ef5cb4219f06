"""Rules of ops that only move elements: views, copies, splits, joins and paddings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from autotp.layouts import Shape
from autotp.passes.rules.table import (
    Call,
    LinearIn,
    Text,
    letters,
    replace_arg,
    result_shape_at,
    rule,
)
from autotp.sizes import varies

aten = torch.ops.aten


def shape_of(call: Call) -> Shape:
    """Return the shape of the first operand."""
    assert call.operands[0] is not None
    return call.operands[0].shape


def dims_of(call: Call) -> list[str]:
    """Name the dims of the first operand."""
    return list(letters(len(shape_of(call))))


def sentence(left: Sequence[str], right: Sequence[str]) -> str:
    """Write a sentence of one operand and one result."""
    return " ".join(left) + " -> " + " ".join(right)


def reshape(call: Call) -> Text:
    """Find the factors that both shapes are products of, in order; what has none is whole."""
    before, after = shape_of(call), call.results[0].shape
    left: list[str] = []
    right: list[str] = []
    sizes: dict[str, int] = {}
    for number, (i, j) in enumerate(_groups(before, after)):
        cuts = _cuts(before[i.start : i.stop], after[j.start : j.stop])
        names = [f"{chr(97 + number)}{k}" for k in range(len(cuts) - 1)]
        sizes.update(zip(names, (b // a for a, b in itertools.pairwise(cuts)), strict=True))
        left += _write(before[i.start : i.stop], cuts, names, f"[u{number}_")
        right += _write(after[j.start : j.stop], cuts, names, f"[v{number}_")
    return sentence(left, right), sizes


def _groups(before: Shape, after: Shape) -> list[tuple[range, range]]:
    """Pair the shortest runs of dims, left to right, that hold as many elements."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        m, i = (before[i], i + 1) if i < len(before) else (1, i)
        n, j = (after[j], j + 1) if j < len(after) else (1, j)
        while m != n and (i < len(before) or j < len(after)):
            if j == len(after) or (m < n and i < len(before)):
                m, i = m * before[i], i + 1
            else:
                n, j = n * after[j], j + 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def _cuts(before: Shape, after: Shape) -> list[int]:
    """Return the radixes where either shape has a border, or one block if they don't nest."""
    cuts = {1, math.prod(before)}
    for shape in (before, after):
        cuts.update(itertools.accumulate(shape, lambda a, b: a * b))
    ordered = sorted(cuts)
    nested = all(b % a == 0 for a, b in itertools.pairwise(ordered))
    return ordered if nested else []


def _write(shape: Shape, cuts: list[int], names: list[str], whole: str) -> list[str]:
    if not cuts:
        return [f"{whole}{k}]" for k in range(len(shape))]
    out, low = [], 1
    for size in shape:
        inside = [n for n, a in zip(names, cuts, strict=False) if low <= a < low * size]
        low *= size
        out.append(
            "1" if not inside else inside[0] if len(inside) == 1 else f"({' '.join(inside)})"
        )
    return out


def permute(call: Call) -> str:
    """Reorder the dims."""
    dims = dims_of(call)
    return sentence(dims, [dims[d] for d in call.arg(1)])


def transpose(call: Call) -> str:
    """Exchange two dims."""
    dims = dims_of(call)
    out = list(dims)
    out[call.arg(1)], out[call.arg(2)] = dims[call.arg(2)], dims[call.arg(1)]
    return sentence(dims, out)


def swap_last(call: Call) -> str:
    """Exchange the last two dims."""
    *dims, a, b = dims_of(call)
    return sentence([*dims, a, b], [*dims, b, a])


def reverse(call: Call) -> str:
    """Exchange all dims."""
    dims = dims_of(call)
    return sentence(dims, dims[::-1])


def unsqueeze(call: Call) -> str:
    """Put in a dim of one element."""
    dims = dims_of(call)
    at = call.arg(1) % (len(dims) + 1)
    return sentence(dims, [*dims[:at], "1", *dims[at:]])


def squeeze(call: Call) -> str:
    """Leave out dims of one element, all or those listed; a listed longer one is whole."""
    shape, dims = shape_of(call), dims_of(call)
    listed = call.arg(1) if len(call.op._schema.arguments) > 1 else range(len(dims))
    listed = [listed] if isinstance(listed, int) else listed
    meant = {d % len(dims) for d in listed}
    left = ["1" if shape[d] == 1 else n for d, n in enumerate(bracket(dims, meant))]
    left = [dims[d] if d not in meant else n for d, n in enumerate(left)]
    return sentence(left, [n for n in left if n != "1"])


def expand(call: Call) -> str:
    """A dim of one element, or a new one, becomes a factor that only the result has."""
    shape, out = shape_of(call), call.results[0].shape
    right = list(letters(len(out)))
    left = right[len(out) - len(shape) :]
    wide = out[len(out) - len(shape) :]
    return sentence(
        ["1" if a == 1 and b != 1 else n for n, a, b in zip(left, shape, wide, strict=True)], right
    )


def cat(call: Call) -> str:
    """Blocks side by side, split together."""
    shapes = [t.shape for t in call.operands if t]
    at = call.arg(1, 0) % len(shapes[0])
    dims = list(letters(len(shapes[0])))
    rows = [[f"q{k}" if d == at else n for d, n in enumerate(dims)] for k in range(len(shapes))]
    joined = list(dims)
    joined[at] = "(" + "|".join(row[at] for row in rows) + ")"
    return ", ".join(" ".join(row) for row in rows) + " -> " + " ".join(joined)


def stack(call: Call) -> str:
    """A new dim, whole."""
    shapes = [t.shape for t in call.operands if t]
    dims = list(letters(len(shapes[0])))
    at = call.arg(1, 0) % (len(dims) + 1)
    left = ", ".join(" ".join(dims) for _ in shapes)
    return f"{left} -> {' '.join([*dims[:at], '[k]', *dims[at:]])}"


def split_at(call: Call, position: int) -> str:
    """One block per result, split together."""
    dims = dims_of(call)
    at = call.arg(position, 0) % len(dims)
    rows = [
        [f"q{k}" if d == at else n for d, n in enumerate(dims)] for k in range(len(call.results))
    ]
    joined = list(dims)
    joined[at] = "(" + "|".join(row[at] for row in rows) + ")"
    return " ".join(joined) + " -> " + ", ".join(" ".join(row) for row in rows)


def split(call: Call) -> str:
    """Split at argument 2."""
    return split_at(call, 2)


def split_size(_whole: Call, local: Call) -> tuple[Any, ...]:
    """Write the local size of the first block."""
    dim = local.arg(2, 0)
    return replace_arg(local, 1, local.results[0].shape[dim])


def split_sizes(_whole: Call, local: Call) -> tuple[Any, ...]:
    """Write the local size of every block."""
    dim = local.arg(2, 0)
    return replace_arg(local, 1, [r.shape[dim] for r in local.results])


def unbind(call: Call) -> str:
    """The dim is whole and every result lacks it."""
    dims = dims_of(call)
    at = call.arg(1, 0) % len(dims)
    rest = " ".join(n for d, n in enumerate(dims) if d != at)
    return " ".join(bracket(dims, {at})) + " -> " + ", ".join(rest for _ in call.results)


def select(call: Call) -> str:
    """The dim is whole and the result lacks it."""
    dims = dims_of(call)
    at = call.arg(1) % len(dims)
    return sentence(bracket(dims, {at}), [n for d, n in enumerate(dims) if d != at])


def bracket(dims: Sequence[str], whole: set[int]) -> list[str]:
    """Mark the dims that are needed whole."""
    return [f"[{n}]" if d in whole else n for d, n in enumerate(dims)]


def slice_bounds(call: Call) -> tuple[int, int, int, int]:
    """Return dim, start, stop and step of a slice, counted from the front."""
    shape = shape_of(call)
    dim = call.arg(1, 0) % len(shape)
    start, stop, step = slice(call.arg(2), call.arg(3), call.arg(4, 1)).indices(shape[dim])
    return dim, start, stop, step


def slice_(call: Call) -> str:
    """One block of several, if the blocks have a common size; else the dim is whole."""
    dims, shape = dims_of(call), shape_of(call)
    dim, start, stop, step = slice_bounds(call)
    if varies([shape[dim], call.results[0].shape[dim]]):
        return whole_at(call, {dim})
    if step == 1 and stop - start == shape[dim]:
        return sentence(dims, dims)
    blocks = [("before", start), ("kept", stop - start), ("after", shape[dim] - stop)]
    blocks = [(n, size) for n, size in blocks if size]
    if step != 1 or math.gcd(*(size for _, size in blocks)) == 1 or stop <= start:
        return whole_at(call, {dim})
    left, right = list(dims), list(dims)
    left[dim] = "(" + "|".join(n for n, _ in blocks) + ")"
    right[dim] = "kept"
    return sentence(left, right)


def slice_text(call: Call) -> Text:
    """Give the blocks of a slice their sizes."""
    dim, start, stop, _step = slice_bounds(call)
    after = shape_of(call)[dim] - stop
    return slice_(call), {k: v for k, v in {"before": start, "after": after}.items() if v}


def slice_local(whole: Call, local: Call) -> tuple[Any, ...]:
    """Scale the bounds by the share of the dim that is here: blocks are split evenly."""
    dim, start, stop, step = slice_bounds(whole)
    full, here = shape_of(whole)[dim], shape_of(local)[dim]
    if here == full:
        return local.args
    return (local.args[0], dim, start * here // full, stop * here // full, step)


def whole_at(call: Call, dims: set[int]) -> str:
    """Write a sentence in which `dims` are whole and may change their size."""
    names = dims_of(call)
    left = [f"[{n}]" if d in dims else n for d, n in enumerate(names)]
    right = [f"[{n}_]" if d in dims else n for d, n in enumerate(names)]
    return sentence(left, right)


def pad(call: Call) -> str:
    """Padded dims are whole."""
    amounts, rank = call.arg(1), len(shape_of(call))
    padded = {rank - 1 - k // 2 for k, n in enumerate(amounts) if n}
    return whole_at(call, padded)


def repeat(call: Call) -> Text:
    """A repeated dim keeps its factor, below the count of its copies."""
    times, shape = call.arg(1), shape_of(call)
    dims = dims_of(call)
    dims = ["1" if n == 1 else name for name, n in zip(dims, shape, strict=True)]
    new = len(times) - len(shape)
    right = [f"[r{k}]" if n > 1 else "1" for k, n in enumerate(times[:new])]
    for k, name in enumerate(dims):
        count = times[new + k]
        right.append(name if count == 1 else f"([r{new + k}] {name})".replace(" 1)", ")"))
    return sentence(dims, right), {f"r{k}": n for k, n in enumerate(times) if n > 1}


def repeat_interleave(call: Call) -> Text:
    """The copies are the minor factor; a dim whose new size is an argument is whole."""
    dims = dims_of(call)
    if call.arg(2) is None:
        return sentence(bracket(dims, set(range(len(dims)))), ["[r]"])
    at = call.arg(2) % len(dims)
    if call.kwargs.get("output_size") is not None:
        return whole_at(call, {at})
    right = list(dims)
    right[at] = f"({dims[at]} [r])"
    return sentence(dims, right), {"r": call.arg(1)}


def diff(call: Call) -> str:
    """The dim is whole, and what is put before or after it."""
    dim = call.arg(2, -1) % len(shape_of(call))
    left, right = whole_at(call, {dim}).split(" -> ")
    ends = [left.replace(f"[{dims_of(call)[dim]}]", f"[{end}]") for end in ("p", "q")]
    return ", ".join([left, *ends]) + f" -> {right}"


def triangle(call: Call) -> str:
    """The last two dims are whole."""
    rank = len(shape_of(call))
    names = bracket(dims_of(call), {rank - 2, rank - 1})
    return sentence(names, names)


def gated(call: Call) -> str:
    """One half gates the other: both are split together."""
    dims = dims_of(call)
    at = call.arg(1, -1) % len(dims)
    left = [f"({n}|{n})" if d == at else n for d, n in enumerate(dims)]
    return sentence(left, dims)


def flip(call: Call) -> str:
    """Flipped dims are whole."""
    dims = dims_of(call)
    names = bracket(dims, {d % len(dims) for d in call.arg(1)})
    return sentence(names, names)


def roll(call: Call) -> str:
    """Rolled dims are whole."""
    dims = dims_of(call)
    rolled = {d % len(dims) for d in call.arg(2, [])} or set(range(len(dims)))
    names = bracket(dims, rolled)
    return sentence(names, names)


def pads_zeros(call: Call) -> LinearIn:
    """A pad of zeros passes partials; another value would be added by every rank."""
    return "all" if call.arg(2, "constant") == "constant" and not call.arg(3, None) else None


def like_other(call: Call) -> str:
    """Of the second operand only the dtype counts: it is whole."""
    other = call.operands[1]
    assert other is not None
    return "..., " + " ".join(f"[y{k}]" for k in range(len(other.shape))) + " -> ..."


VIEW: dict[str, Any] = {"linear": "all", "saves": (), "free": True}
COPY: dict[str, Any] = {"linear": "all", "saves": ()}

rule(aten._to_copy.default, "... -> ...", **COPY)
rule(aten.alias.default, "... -> ...", **VIEW)
rule(aten.cat.default, cat, **COPY)
rule(aten.chunk.default, split, **VIEW)
rule(aten.clone.default, "... -> ...", **COPY)
rule(aten.contiguous.default, "... -> ...", **COPY)
rule(aten.detach.default, "... -> ...", **VIEW)
rule(aten.diff.default, diff, **COPY)
rule(aten.expand.default, expand, localize=result_shape_at(1), **VIEW)
rule(aten.flip.default, flip, **COPY)
rule(aten.glu.default, gated)
rule(aten.mT.default, swap_last, **VIEW)
rule(aten.numpy_T.default, reverse, **VIEW)
rule(aten.pad.default, pad, linear=pads_zeros, saves=())
rule(aten.permute.default, permute, **VIEW)
rule(aten.repeat.default, repeat, **COPY)
rule(aten.repeat_interleave.self_int, repeat_interleave, **COPY)
rule(aten.reshape.default, reshape, localize=result_shape_at(1), **VIEW)
rule(aten.roll.default, roll, **COPY)
rule(aten.select.int, select, **VIEW)
rule(aten.slice.Tensor, slice_text, localize=slice_local, **VIEW)
rule(aten.split.Tensor, split, localize=split_size, **VIEW)
rule(aten.split_with_sizes.default, split, localize=split_sizes, **VIEW)
rule(aten.squeeze.default, squeeze, **VIEW)
rule(aten.squeeze.dim, squeeze, **VIEW)
rule(aten.squeeze.dims, squeeze, **VIEW)
rule(aten.stack.default, stack, **COPY)
rule(aten.swapaxes.default, transpose, **VIEW)
rule(aten.t.default, reverse, **VIEW)
rule(aten.to.dtype, "... -> ...", **COPY)
rule(aten.transpose.int, transpose, **VIEW)
rule(aten.tril.default, triangle, **COPY)
rule(aten.triu.default, triangle, **COPY)
rule(aten.type_as.default, like_other, linear=(0,), saves=())
rule(aten.unbind.int, unbind, **VIEW)
rule(aten.unsqueeze.default, unsqueeze, **VIEW)
rule(aten.view.default, reshape, localize=result_shape_at(1), **VIEW)
