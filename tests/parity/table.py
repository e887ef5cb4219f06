"""Parity with DTensor as a page: `python -m tests.parity.table` writes docs/PARITY.md.

Every layout that DTensor allows and autotp does not has the first of `REASONS` that fits.
"""

import inspect
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from autotp.passes.rules import find
from tests.parity import dtensor
from tests.parity.compare import compare
from tests.rules.cases import FAMILIES, calls

TITLES = "| op | calls | both | autotp alone | DTensor alone | of these not confirmed |"
PAGE = Path(__file__).parents[2] / "docs" / "PARITY.md"


@dataclass(frozen=True, order=True)
class Missing:
    """A layout that DTensor alone allows, and why we do not."""

    layout: str
    reason: str


def by_layout(*patterns):
    """Fit ops and layouts by `op: operands -> results`, as regular expressions."""
    return lambda call, found: any(
        re.fullmatch(p, f"{call.op.partition('.')[0]}: {found}") for p in patterns
    )


def is_refuted(call, found):
    return not call.theirs[found]


def is_split_otherwise(call, found):
    return any(ours.operands == found.operands for ours in call.ours)


def is_odd(call, found):
    """Say whether a dim is cut that two ranks do not divide."""
    return any(
        t.startswith("S") and shape[int(t[2:-1])] % 2
        for t, shape in zip(found.operands, call.shapes, strict=True)
    )


REASONS = {
    "edges": (
        "its program exchanges the edges of the split rows between ranks (nothing is sent between "
        "ranks that are faked, so it is not judged here); there is no such program here yet",
        by_layout(r"conv\w*: S\([234]\); .*"),
    ),
    "gathers": (
        "its program gathers every rank's winner inside the op (not judged here, as nothing is "
        "sent); here the operand is gathered before",
        by_layout(r"arg(max|min): .*"),
    ),
    "refuted": (
        "arithmetic refutes it: on random operands, cut as it says, what two ranks hold is not "
        "what the op computes",
        is_refuted,
    ),
    "otherwise": (
        "the same operands are split here, and the results have other types: a mean, divided "
        "before it is summed, is `P` and not `P(avg)`; new constants are split; results without an "
        "element are `P`",
        is_split_otherwise,
    ),
    "no sum": (
        "a partial is a sum here, with one dual for its gradient: there is no type for terms that "
        "a maximum, a minimum, a product or a norm joins, so the dim is gathered",
        by_layout(r".*-> .*P\(.*"),
    ),
    "bool": (
        "a bool is no term of a sum: what a sum of bools means is left to who reads it",
        by_layout(r"(any|all): .*"),
    ),
    "unread": (
        "only the shape of the operand is read: to hand it over whole costs speed only, and the "
        "planner computes such constants whole",
        by_layout(r"(\w+_like|new_\w+|fill): .* -> [RS].*", r"(type_as): .*"),
    ),
    "each": (
        "every result depends on one operand alone, so each may lie as it likes; here they lie "
        "alike, which costs speed only",
        by_layout(r"broadcast_tensors: .*"),
    ),
    "draws": (
        "every rank must draw one mask: what is drawn is tied to a split that keeps each element "
        "on one rank; costs speed only",
        by_layout(r".*dropout: .*"),
    ),
    "values": (
        "fused kernels want values as wide as keys, and every rank would repeat all scores: the "
        "width of the values is whole, and partial values are summed before; costs speed only",
        by_layout(r"scaled_dot_product_attention: R; R; (P|S).*"),
    ),
    "frequencies": (
        "this call scales its gradient by how often an index occurs in the whole batch: the values "
        "would be right and the gradient wrong",
        by_layout(r"embedding: .*"),
    ),
    "no program": (
        "needed whole: places among a part of the boundaries would add up, but there is no program "
        "for it; costs speed only",
        by_layout(r"bucketize: .*"),
    ),
    "odd": (
        "uneven: a dim that a view regroups is split where the ranks divide it, so that every "
        "rank's piece has the shape that it is given",
        is_odd,
    ),
    "squeezed": (
        "a squeeze takes listed dims of more than one element whole: a chunk of one element would "
        "be squeezed away with them",
        by_layout(r"squeeze: .*"),
    ),
    "targets": (
        "partial targets of a loss: targets carry no sum in any model; costs speed only",
        by_layout(r"cross_entropy_loss: .*P.*"),
    ),
    "moved": (
        "a dim that the op turns, flattens or regroups to sizes without a common factor is whole "
        "here; costs speed only",
        by_layout(r"rot90: .*", r"repeat_interleave: .*", r"reshape: .*", r"view: .*"),
    ),
    "partial": (
        "weights or written values that are a sum, in which the op is linear: they are summed "
        "before, which costs speed only",
        by_layout(r".*: .*P.* -> P.*"),
    ),
}


def reason_of(call, found):
    """Return the key of the first reason that fits, or None."""
    return next((key for key, (_, fits) in REASONS.items() if fits(call, found)), None)


def compared(cases):
    """Compare calls; leave out ops without a rule here, and calls that DTensor cannot run."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), dtensor.fake_ranks() as mesh:
        warnings.simplefilter("ignore")
        found = [compare(mesh, *case) for case in cases if find(case[0])]
    return [call for call in found if call]


def missing(call):
    """Return what DTensor alone allows for a call."""
    return [Missing(str(f), reason_of(call, f)) for f in call.theirs if f not in call.ours]


def render():
    """Return the page of all ops that both have."""
    found = compared([case for family in FAMILIES for case in calls(family)])
    lines = [HEAD, TITLES, "|---|---|---|---|---|---|"]
    ops = sorted({call.op for call in found})
    listed = []
    for op in ops:
        group = [call for call in found if call.op == op]
        lines.append(_row(op, group))
        listed += _list(op, group)
    reasons = [f"- **{key}**: {text}." for key, (text, _) in REASONS.items()]
    lines += ["", "## Reasons", "", *reasons, "", "## What DTensor alone allows", "", *listed]
    return "\n".join(lines) + "\n"


def _row(op, group):
    both = sum(len(c.ours & set(c.theirs)) for c in group)
    ours = sum(len(c.ours - set(c.theirs)) + c.blocks for c in group)
    theirs = sum(len(missing(c)) for c in group)
    wrong = sum(not right for c in group for f, right in c.theirs.items() if f not in c.ours)
    return f"| {op} | {len(group)} | {both} | {ours} | {theirs} | {wrong} |"


def _list(op, group):
    """List an op's missing layouts by reason, each once."""
    found = {m for c in group for m in missing(c)}
    lines = [f"**{op}**", ""] if found else []
    for key in [k for k in REASONS if any(m.reason == k for m in found)]:
        layouts = ", ".join(f"`{m.layout}`" for m in sorted(found) if m.reason == key)
        lines.append(f"- {key}: {layouts}")
    return [*lines, ""] if lines else []


HEAD = (
    inspect.cleandoc(
        """
    # Parity with DTensor

    What DTensor (torch 2.13) and autotp compute on one axis of two ranks without moving an operand:
    every call of `tests/rules/cases.py` that both can run, under every combination of placements
    of its operands (calls of more than 450 combinations are left out; operands are not tried in
    blocks). DTensor's answers are asked of DTensor: the call runs on each of two faked ranks, and a
    redistribution is refused. Each answer is judged by arithmetic: what the ranks hold is joined
    and compared with the call on whole operands. Layouts that leave all whole are not counted.
    `R` stands for replicate (autotp's `R` and `I`), `P` for a term of a sum, `S(d)` for a shard of
    dim d, `S(d:2*4)` for a chunk of each of two blocks of 4.

    Every layout that DTensor alone allows is listed with its reason: a test holds this page, made
    by `python -m tests.parity.table`.
    """
    )
    + "\n"
)


if __name__ == "__main__":
    PAGE.write_text(render())
    sys.stdout.write(f"{PAGE}\n")
