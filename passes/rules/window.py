"""Rules of poolings, resizings and gatherings of windows: batch and channels may split.

Space is whole, but where blocks of it are only renamed (pixel shuffle) or looked up (grid sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from autotp.passes.rules.table import Call, Text, letters, replace_arg, rule

aten = torch.ops.aten


def last(count: int, operands: int = 1) -> Callable[[Call], str]:
    """Return the sentence in which the last `count` dims are whole and change their size."""
    before, after = (" ".join(f"[{n}]" for n in letters(count, c)) for c in "xy")

    def sentence(call: Call) -> str:
        left = ", ".join([f"... {before}"] * operands)
        return f"{left} -> {', '.join(f'... {after}' for _ in call.results)}"

    return sentence


def sampled(count: int) -> Callable[[Call], str]:
    """Return the sentence of a pooling whose windows are given as random numbers."""
    before, after = (" ".join(f"[{n}]" for n in letters(count, c)) for c in "xy")
    return lambda _call: f"... {before}, ... [k] -> ... {after}, ... {after}"


def rank_of(call: Call) -> int:
    """Return the number of dims of the first operand."""
    assert call.operands[0] is not None
    return len(call.operands[0].shape)


def shuffle(call: Call) -> Text:
    """Blocks of channels become blocks of space."""
    sizes = dict.fromkeys("pq", call.arg(1))
    return "... (c [p] [q]) y x -> ... c (y [p]) (x [q])", sizes


def unshuffle(call: Call) -> Text:
    """Blocks of space become blocks of channels."""
    sizes = dict.fromkeys("pq", call.arg(1))
    return "... c (y [p]) (x [q]) -> ... (c [p] [q]) y x", sizes


def channel_shuffle(call: Call) -> Text:
    """Groups of channels are interleaved; a group that is split would need its count changed."""
    space = " ".join(f"x{k}" for k in range(rank_of(call) - 2))
    return f"b [c] {space} -> b [c] {space}", {}


def columns(call: Call) -> Text:
    """The elements of a window stand beside each other below their channel."""
    kernel = math.prod(call.arg(1))
    b = "b" if rank_of(call) == 4 else ""
    return f"{b} c [y] [x] -> {b} (c [k]) [w]", {"k": kernel}


def from_columns(call: Call) -> Text:
    """The elements of a window are added up where they came from."""
    kernel = math.prod(call.arg(2))
    b = "b" if rank_of(call) == 3 else ""
    return f"{b} (c [k]) [w] -> {b} c [y] [x]", {"k": kernel}


def sample(call: Call) -> str:
    """The image is whole, the points at which it is looked up may split."""
    count = rank_of(call) - 2
    space, points = (" ".join(f"{c}{k}" for k in range(count)) for c in "xp")
    space = " ".join(f"[{n}]" for n in space.split())
    return f"b c {space}, b {points} [k] -> b c {points}"


def grid_sizes(_whole: Call, local: Call) -> tuple[Any, ...]:
    """Write the local batch among the sizes of the image."""
    return replace_arg(local, 1, [local.results[0].shape[0], *local.arg(1)[1:]])


LINEAR: dict[str, Any] = {"linear": "all", "saves": ()}

rule(aten.adaptive_avg_pool1d.default, last(1), **LINEAR)
rule(aten.adaptive_avg_pool2d.default, last(2), **LINEAR)
rule(aten.adaptive_avg_pool3d.default, last(3), **LINEAR)
rule(aten.adaptive_max_pool1d.default, last(1), saves=(0,))
rule(aten.adaptive_max_pool2d.default, last(2), saves=(0,))
rule(aten.adaptive_max_pool3d.default, last(3), saves=(0,))
rule(
    aten.affine_grid_generator.default,
    lambda call: f"b [i] [j] -> b {' '.join(f'[x{k}]' for k in range(len(call.arg(1)) - 2))} [k]",
    localize=grid_sizes,
    **LINEAR,
)
rule(aten.avg_pool1d.default, last(1), **LINEAR)
rule(aten.avg_pool2d.default, last(2), **LINEAR)
rule(aten.avg_pool3d.default, last(3), **LINEAR)
rule(aten.channel_shuffle.default, channel_shuffle, **LINEAR)
rule(aten.col2im.default, from_columns, **LINEAR)
rule(aten.fractional_max_pool2d.default, sampled(2), saves=(0,))
rule(aten.fractional_max_pool3d.default, sampled(3), saves=(0,))
rule(aten.grid_sampler.default, sample, linear=(0,))
rule(aten.grid_sampler_2d.default, sample, linear=(0,))
rule(aten.grid_sampler_3d.default, sample, linear=(0,))
rule(aten.im2col.default, columns, **LINEAR)
rule(aten.max_pool1d.default, last(1), saves=(0,))
rule(aten.max_pool1d_with_indices.default, last(1), saves=(0,))
rule(aten.max_pool2d.default, last(2), saves=(0,))
rule(aten.max_pool2d_with_indices.default, last(2), saves=(0,))
rule(aten.max_pool3d.default, last(3), saves=(0,))
rule(aten.max_pool3d_with_indices.default, last(3), saves=(0,))
rule(aten.max_unpool2d.default, last(2, operands=2), linear=(0,), saves=(1,))
rule(aten.max_unpool3d.default, last(3, operands=2), linear=(0,), saves=(1,))
rule(aten.pixel_shuffle.default, shuffle, **LINEAR)
rule(aten.pixel_unshuffle.default, unshuffle, **LINEAR)
rule(aten.upsample_bicubic2d.vec, last(2), **LINEAR)
rule(aten.upsample_bilinear2d.vec, last(2), **LINEAR)
rule(aten.upsample_linear1d.vec, last(1), **LINEAR)
rule(aten.upsample_nearest1d.vec, last(1), **LINEAR)
rule(aten.upsample_nearest2d.vec, last(2), **LINEAR)
rule(aten.upsample_nearest3d.vec, last(3), **LINEAR)
rule(aten.upsample_trilinear3d.vec, last(3), **LINEAR)
rule(aten._upsample_bicubic2d_aa.vec, last(2), **LINEAR)
rule(aten._upsample_bilinear2d_aa.vec, last(2), **LINEAR)
rule(aten._upsample_nearest_exact1d.vec, last(1), **LINEAR)
rule(aten._upsample_nearest_exact2d.vec, last(2), **LINEAR)
rule(aten._upsample_nearest_exact3d.vec, last(3), **LINEAR)
