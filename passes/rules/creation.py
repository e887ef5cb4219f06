"""Rules of ops that make a tensor like another: of what they read only the shape counts."""

from __future__ import annotations

import torch

from autotp.passes.rules.table import Call, result_shape_at, rule

aten = torch.ops.aten


def new(call: Call) -> str:
    """A dim of the operand's size is split with it; other dims of the operand are whole."""
    assert call.operands[0] is not None
    before, after = call.operands[0].shape, call.results[0].shape
    shared = {d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a == b}
    left = " ".join(f"a{d}" if d in shared else f"[b{d}]" for d in range(len(before)))
    right = " ".join(f"a{d}" for d in range(len(after)))
    return f"{left} -> {right}"


rule(aten.full_like.default, "... -> ...", saves=())
rule(aten.new_full.default, new, localize=result_shape_at(1), saves=())
rule(aten.new_ones.default, new, localize=result_shape_at(1), saves=())
rule(aten.new_zeros.default, new, localize=result_shape_at(1), saves=())
rule(aten.ones_like.default, "... -> ...", saves=())
rule(aten.zeros_like.default, "... -> ...", saves=())
