"""Rules of attention: batch, heads and queries may split; queries and keys together on a ring."""

from __future__ import annotations

import math

import torch

from autotp import random_programs
from autotp.passes.rules.table import Call, Message, Ranks, rule, wide_bytes
from autotp.split_attention import split_attention, tour, way_home

aten = torch.ops.aten


def attention(call: Call) -> str:
    """Name batch, heads, queries and keys; grouped queries are (m g) beside m key heads.

    The program that drops weights knows no offset of its rows: it takes all under a causal flag.
    """
    query, key, *_rest = (t.shape for t in call.operands if t)
    rows = "[s]" if call.arg(5, False) and draws(call) else "s"
    many = call.arg(7, False) and query[-3] != key[-3]
    batch = "b" if len(query) == 4 else "..."
    heads, keys = ("(m g)", "m") if many else ("n", "n") if len(query) > 2 else ("", "")
    left = [f"{batch} {heads} {rows} [d]", f"{batch} {keys} [t] [d]", f"{batch} {keys} [t] [e]"]
    return ", ".join([*left, *mask(call, batch, heads, rows)]) + f" -> {batch} {heads} {rows} [e]"


def mask(call: Call, batch: str, heads: str, rows: str) -> list[str]:
    """Name the mask's dims, which broadcast; grouped heads are split only where it has one row.

    Its columns have a name of their own: they are whole also where the keys are split.
    """
    given = call.operands[3] if len(call.operands) > 3 else None
    if given is None:
        return []
    count = len(given.shape)
    one_head = count > 2 and given.shape[-3] == 1
    names = ["1" if heads == "(m g)" and one_head else heads, rows, "[u]"]
    return [" ".join([batch if batch == "..." or count == 4 else "", *names[-count:]])]


def draws(call: Call) -> bool:
    """Say whether attention weights are dropped."""
    return bool(call.arg(4, 0.0))


def ring_traffic(call: Call, ranks: Ranks) -> list[Message]:
    """Keys and values go round forward and backward, and their gradients as far and home."""
    if "t" not in ranks:
        return []
    _query, *block = (t for t in call.operands[:3] if t)
    sizes = ranks["t"]
    elements = sum(math.prod(t.shape) for t in block)
    size, wide = (elements * n for n in (block[0].dtype.itemsize, wide_bytes(block[0].dtype)))
    out = []
    for level in range(len(sizes)):
        steps, home = tour(sizes).count(level), int(level in way_home(sizes))
        out += [
            Message("t", size, kind="permute", times=steps, level=level),
            Message("t", size, True, "permute", steps, level),
            Message("t", wide, True, "permute", steps + home, level),
        ]
    return out


rule(
    aten.scaled_dot_product_attention.default,
    attention,
    flops="b .0 .1 n m g s t d + b .0 .1 n m g s t e",
    saves=(0, 1, 2, -1),
    split={"s": "S", "s t": "S"},
    program=split_attention,
    traffic=ring_traffic,
    random=draws,
    draw=random_programs.sdpa_dropout,
    exact=random_programs.exact_sdpa,
)
