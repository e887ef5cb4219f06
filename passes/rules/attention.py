"""Rules of attention: batch and heads may split, queries too unless the mask is causal by flag."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, rule

aten = torch.ops.aten


def attention(call: Call) -> str:
    """Name batch, heads, queries and keys; grouped queries are (m g) beside m key heads."""
    query, key, *_rest = (t.shape for t in call.operands if t)
    rows = "[s]" if call.arg(5, False) else "s"
    many = call.arg(7, False) and query[-3] != key[-3]
    batch = "..." if len(query) < 4 else "b"
    if len(query) < 4:
        heads = keys = ""
    else:
        heads, keys = ("(m g)", "m") if many else ("n", "n")
    left = [f"{batch} {heads} {rows} [d]", f"{batch} {keys} [t] [d]", f"{batch} {keys} [t] [e]"]
    return ", ".join([*left, *mask(call, heads, rows)]) + f" -> {batch} {heads} {rows} [e]"


def mask(call: Call, heads: str, rows: str) -> list[str]:
    """Name the mask's dims, which broadcast; grouped heads are split only where it has one row."""
    given = call.operands[3] if len(call.operands) > 3 else None
    if given is None:
        return []
    names = ["b", "1" if heads == "(m g)" and given.shape[-3:][0] == 1 else heads, rows, "[t]"]
    return [" ".join(names[-len(given.shape) :])]


def draws(call: Call) -> bool:
    """Say whether attention weights are dropped."""
    return bool(call.arg(4, 0.0))


rule(
    aten.scaled_dot_product_attention.default,
    attention,
    flops="b n s t d + b n s t e",
    saves=(0, 1, 2, -1),
    program=local_programs.sdpa_dropout,
    random=draws,
)
