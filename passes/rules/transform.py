"""Rules of Fourier transforms and of matrices: what is transformed is whole, its batch splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autotp.passes.rules.table import Call, letters, rule

aten = torch.ops.aten


def transformed(call: Call) -> str:
    """The dims that are transformed are whole and may change their size."""
    return whole_dims(call, call.arg(1))


def whole_dims(call: Call, dims: Sequence[int]) -> str:
    """Write a sentence of one operand in which `dims` are whole."""
    assert call.operands[0] is not None
    names = letters(len(call.operands[0].shape))
    whole = {d % len(names) for d in dims}
    left = " ".join(f"[{n}]" if d in whole else n for d, n in enumerate(names))
    right = " ".join(f"[{n}_]" if d in whole else n for d, n in enumerate(names))
    return f"{left} -> {right}"


def framed(call: Call) -> str:
    """Of a signal in time, frames and frequencies."""
    assert call.operands[0] is not None
    b = "b" if len(call.operands[0].shape) > 1 else ""
    windows = "".join(", [w]" for _ in call.operands[1:])
    made = " ".join(f"[{n}]" for n in letters(len(call.results[0].shape) - len(b)))
    return f"{b} [t]{windows} -> {b} {made}"


def matrices(call: Call) -> str:
    """The last two dims of every operand are whole; a result has what it has beside the batch."""
    assert call.operands[0] is not None
    batch = len(call.operands[0].shape) - 2
    left = ", ".join(f"... [i{k}] [j{k}]" for k, _ in enumerate(call.operands))
    right = (
        " ".join(["...", *(f"[r{k}_{d}]" for d in range(len(t.shape) - batch))])
        for k, t in enumerate(call.results)
    )
    return f"{left} -> {', '.join(right)}"


LINEAR: dict[str, Any] = {"linear": "all", "saves": ()}

rule(aten._fft_c2c.default, transformed, **LINEAR)
rule(aten._fft_c2r.default, transformed, **LINEAR)
rule(aten._fft_r2c.default, transformed, **LINEAR)
rule(aten.linalg_cholesky.default, matrices)
rule(aten.linalg_det.default, matrices)
rule(aten.linalg_eigh.default, matrices)
rule(aten.linalg_eigvalsh.default, matrices)
rule(aten.linalg_inv.default, matrices)
rule(aten.linalg_qr.default, matrices)
rule(aten.linalg_slogdet.default, matrices)
rule(aten.linalg_svd.default, matrices)
rule(aten.linalg_svdvals.default, matrices)
rule(aten.logdet.default, matrices)
rule(aten.matrix_exp.default, matrices)
rule(aten.stft.default, framed)
rule(aten.stft.center, framed)
rule(aten.view_as_complex.default, "... [k] -> ...", **LINEAR)
rule(aten.view_as_real.default, "... -> ... [k]", **LINEAR)
