"""How plans are written: types `f32[8,1024,3072/col]`, dims `b s (n/col d)`, choices `o/col`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from autotp.grid import Grid
from autotp.layouts import I, Layout, Shard, dim_parts, parts_text, splitters
from autotp.plan import Decision, Memory

SHORT = (("float", "f"), ("bfloat", "bf"), ("uint", "u"), ("int", "i"), ("complex", "c"))


def dtype_text(dtype: str) -> str:
    """Shorten a dtype's name.

    >>> dtype_text("float32"), dtype_text("bfloat16"), dtype_text("int64"), dtype_text("bool")
    ('f32', 'bf16', 'i64', 'bool')
    """
    for long, short in SHORT:
        if re.fullmatch(rf"{long}\d+", dtype):
            return dtype.replace(long, short)
    return dtype


def type_text(shape: Sequence[int], layout: Layout, dtype: str, grid: Grid) -> str:
    """Write a tensor's type: whole sizes, the axes that split them, and R and P after it.

    Blocks are written as their number times their size. Axes of one rank split nothing.

    >>> from autotp.layouts import P, Shard
    >>> grid = Grid(("row", "col"), (2, 2))
    >>> type_text((8, 768), (Shard(1, (256, 256, 256)), P), "float32", grid)
    'f32[8,3*256/row]{P:col}'
    >>> type_text((64,), (Shard(0), Shard(0, (16,) * 4)), "float32", grid)
    'f32[4/row*16/col]'
    """
    sizes = []
    for dim, size in enumerate(shape):
        parts = dim_parts(size, layout, dim)
        outer, inner = _axes(layout, dim, grid)
        if len(parts) == 1 or not inner:
            sizes.append(f"{size}{outer}{inner}")
        elif outer:
            sizes.append(f"{len(parts)}{outer}*{parts[0]}{inner}")
        else:
            text = parts_text(parts)
            sizes.append((f"({text})" if "|" in text else text) + inner)
    return f"{dtype_text(dtype)}[{','.join(sizes)}]{_whole_text(layout, grid)}"


def _axes(layout: Layout, dim: int, grid: Grid) -> tuple[str, str]:
    """Return the axes that hold whole blocks of a dim, and those that split inside them."""
    axes = [a for a in splitters(layout, dim) if grid.sizes[a] > 1]
    last = layout[axes[-1]] if axes else I
    outer, inner = (
        "".join(f"/{grid.names[a]}" for a in axes if (layout[a] == last) == same)
        for same in (False, True)
    )
    return outer, inner


def _whole_text(layout: Layout, grid: Grid) -> str:
    marked = [
        f"{t}:{name}"
        for t, name, size in zip(layout, grid.names, grid.sizes, strict=True)
        if size > 1 and t is not I and not isinstance(t, Shard)
    ]
    return f"{{{','.join(marked)}}}" if marked else ""


def dims_text(
    dims: Sequence[str],
    shape: Sequence[int],
    layout: Layout,
    grid: Grid,
    sizes: Mapping[str, int],
) -> str:
    """Write named dims with the axes that split them, inside their products and blocks.

    `sizes` are those of plain dims by name, to find which factor of a product is split.

    >>> from autotp.layouts import Shard
    >>> grid = Grid(("col",), (2,))
    >>> dims_text(("b", "(3 n d)"), (8, 768), (Shard(1, (256, 256, 256)),), grid, {})
    'b (3 n/col d)'
    """
    out = []
    for dim, (name, size) in enumerate(zip(dims, shape, strict=True)):
        outer, inner = _axes(layout, dim, grid)
        name = _divided(name, inner, dim_parts(size, layout, dim), sizes) if inner else name
        out.append(_divided(name, outer, (size,), sizes) if outer else name)
    return " ".join(out)


def _divided(name: str, axes: str, parts: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """Put axes behind the factor that they split, inside every block."""
    if not name.startswith("("):
        return name + axes
    blocks = name[1:-1].split("|")
    if len(blocks) > 1:
        return f"({'|'.join(_divided(b, axes, (0,), sizes) for b in blocks)})"
    words = name[1:-1].split()
    for k, word in enumerate(words):
        outer = [int(w) if w.isdigit() else sizes.get(w, 0) for w in words[:k]]
        if math.prod(outer) == len(parts):
            return f"({' '.join([*words[:k], word + axes, *words[k + 1 :]])})"
    return name + axes


def plain_sizes(decisions: Sequence[Decision]) -> dict[str, int]:
    """Return the sizes of plain dims by name, those of one size only."""
    seen: dict[str, set[int]] = {}
    for d in decisions:
        for dims, shape in zip(d.dims, d.shapes, strict=True):
            for name, size in zip(dims, shape, strict=True):
                if name.isalpha():
                    seen.setdefault(name, set()).add(size)
    return {name: min(found) for name, found in seen.items() if len(found) == 1}


def choice_text(decision: Decision, grid: Grid) -> str:
    """Write an op's strategy, a choice per axis that has ranks: `v/row d/col`, `b/row/col`, `I`."""
    names: dict[str, list[str]] = {}
    for choice, axis, size in zip(decision.choices, grid.names, grid.sizes, strict=True):
        if size > 1:
            names.setdefault(choice, []).append(axis)
    if not names or set(names) == {"I"}:
        return "I"
    return " ".join(f"{choice}/{'/'.join(axes)}" for choice, axes in names.items())


def seconds_text(seconds: float) -> str:
    """Write a time with three digits.

    >>> seconds_text(0.00121), seconds_text(4.5e-8), seconds_text(12.5), seconds_text(0.0)
    ('1.21 ms', '0.045 us', '12.5 s', '0 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{amount_text(seconds / size)} {unit}"
    return f"{amount_text(seconds * 1e6)} us" if seconds else "0 s"


def bytes_text(size_bytes: float) -> str:
    """Write an amount of bytes with three digits, in decimal units.

    >>> bytes_text(379608576), bytes_text(3072), bytes_text(12)
    ('380 MB', '3.07 kB', '12 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= size:
            return f"{amount_text(size_bytes / size)} {unit}"
    return f"{amount_text(size_bytes)} B"


def amount_text(number: float) -> str:
    """Write a number with three digits, never with an exponent."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:.3g}"


def memory_text(m: Memory) -> str:
    """Write the bytes of one rank, all and by what they hold."""
    parts = (
        ("parameters", m.parameters),
        ("gradients", m.gradients),
        ("optimizer", m.optimizer),
        ("activations", m.activations),
    )
    return f"{bytes_text(m.total)}: {', '.join(f'{name} {bytes_text(n)}' for name, n in parts)}"
