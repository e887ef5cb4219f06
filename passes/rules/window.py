"""Rules of poolings and resizings: batch and channels may split, space is whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from autotp.passes.rules.table import Call, letters, rule

aten = torch.ops.aten


def last(count: int) -> Callable[[Call], str]:
    """Return the sentence in which the last `count` dims are whole and change their size."""
    before, after = (" ".join(f"[{n}]" for n in letters(count, c)) for c in "xy")

    def sentence(call: Call) -> str:
        result = f"... {after}"
        return f"... {before} -> {', '.join(result for _ in call.results)}"

    return sentence


rule(aten.adaptive_avg_pool1d.default, last(1), linear="all", saves=())
rule(aten.adaptive_avg_pool2d.default, last(2), linear="all", saves=())
rule(aten.avg_pool1d.default, last(1), linear="all", saves=())
rule(aten.avg_pool2d.default, last(2), linear="all", saves=())
rule(aten.max_pool1d.default, last(1), saves=(0,))
rule(aten.max_pool2d.default, last(2), saves=(0,))
rule(aten.upsample_bilinear2d.vec, last(2), linear="all", saves=())
rule(aten.upsample_nearest2d.vec, last(2), linear="all", saves=())
