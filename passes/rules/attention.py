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
    batch = "b" if len(query) == 4 else "..."
    heads, keys = ("(m g)", "m") if many else ("n", "n") if len(query) > 2 else ("", "")
    left = [f"{batch} {heads} {rows} [d]", f"{batch} {keys} [t] [d]", f"{batch} {keys} [t] [e]"]
    return ", ".join([*left, *mask(call, batch, heads, rows)]) + f" -> {batch} {heads} {rows} [e]"


def mask(call: Call, batch: str, heads: str, rows: str) -> list[str]:
    """Name the mask's dims, which broadcast; grouped heads are split only where it has one row."""
    given = call.operands[3] if len(call.operands) > 3 else None
    if given is None:
        return []
    count = len(given.shape)
    one_head = count > 2 and given.shape[-3] == 1
    names = ["1" if heads == "(m g)" and one_head else heads, rows, "[t]"]
    return [" ".join([batch if batch == "..." or count == 4 else "", *names[-count:]])]


def draws(call: Call) -> bool:
    """Say whether attention weights are dropped."""
    return bool(call.arg(4, 0.0))


rule(
    aten.scaled_dot_product_attention.default,
    attention,
    flops="b .0 .1 n m g s t d + b .0 .1 n m g s t e",
    saves=(0, 1, 2, -1),
    program=local_programs.sdpa_dropout,
    random=draws,
)
