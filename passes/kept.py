"""What backward needs, and whose memory it lies in: read off the decisions and moves of a plan.

A *copy* is a value in a layout. What lies in the memory of another copy, as views do, is held or
let go with it: that is its root. A root can be made again by

    a gather, or exchange  from the copy that it was moved from
    a cheap op             a pointwise op, a norm, a softmax, a cast, a draw: see `why_not`

`passes.again` chooses which are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from autotp.layouts import Layout
from autotp.passes.moves import Moves
from autotp.passes.network import Network, Op
from autotp.passes.pricing import RESULT, needed_positions, products, typing_of
from autotp.plan import Decision, PlannedMove

Copy = tuple[str, Layout]
"""A value in one layout."""

ALIASES = frozenset({"none", "slice"})
"""Forward kinds of moves whose result lies in the memory of what they move."""

GATHERS = frozenset({"all_gather", "all_to_all"})
"""Forward kinds of moves that are worth repeating: of a sum the terms would have to be kept."""

REPEATED = frozenset(
    f"aten::{name}"
    for name in [
        "_softmax",
        "_to_copy",
        "dropout",
        "group_norm",
        "layer_norm",
        "log_softmax",
        "rms_norm",
        "softmax",
        "to",
    ]
)
"""Ops that are worth repeating beside those that torch calls pointwise."""

CASTS = frozenset({"aten::_to_copy", "aten::to"})


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes a root again: an op or a move, by number, from the roots that it reads.

    keeps   the bytes that backward keeps even so: what a dropout drew
    """

    reads: tuple[Copy, ...]
    op: int | None = None
    move: int | None = None
    keeps: int = 0


@dataclass(slots=True)
class Copies:
    """The copies of a plan, in the order in which they are made.

    roots    of every copy, the one in whose memory it lies; `makers` those that can be made again
    sources  roots that are there anyway: parameters as they rest, inputs
    saved    what backward keeps of each root, and `savers` the ops, by number, that need it
    inner    the same of each checkpoint region, when backward recomputes it
    fixed    roots that are kept if they are saved: a region reads them, or the program returns them
    why      of every root that an op makes, why it cannot be made again, if it cannot
    """

    network: Network
    decisions: Sequence[Decision]
    moves: Sequence[PlannedMove]
    planned: Moves
    roots: dict[Copy, Copy] = field(default_factory=dict)
    makers: dict[Copy, Maker] = field(default_factory=dict)
    sources: set[Copy] = field(default_factory=set)
    saved: dict[Copy, set[Copy]] = field(default_factory=dict)
    savers: dict[Copy, list[int]] = field(default_factory=dict)
    inner: dict[str, set[Copy]] = field(default_factory=dict)
    fixed: set[Copy] = field(default_factory=set)
    why: dict[Copy, str] = field(default_factory=dict)

    def bytes_of(self, copies: Iterable[Copy]) -> int:
        """Return what a rank holds of these copies."""
        values = [(self.network.values[v], c) for v, c in copies]
        return sum(self.planned.local_bytes(v.shape, v.dtype, c) for v, c in values)


def read_copies(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    sources: Mapping[str, Layout],
    rest: Mapping[str, Layout],
    returned: Mapping[str, Layout],
    planned: Moves,
) -> Copies:
    """Return the copies of a plan whose parameters rest as `rest` says."""
    c = Copies(network, decisions, moves, planned)
    by_value: dict[str, list[int]] = {}
    for n, m in enumerate(moves):
        by_value.setdefault(m.value, []).append(n)
    for copy in sources.items():
        c.roots[copy] = copy
        c.sources.add(copy)
        _add_moved(c, by_value.get(copy[0], ()))
    for n, (op, d) in enumerate(zip(network.ops, decisions, strict=True)):
        _add_made(c, n, op, d)
        for value in d.makes:
            _add_moved(c, by_value.get(value, ()))
    _add_saved(c, dict(c.roots), rest)
    c.fixed.update(c.roots[copy] for copy in returned.items())
    return c


def _add_moved(c: Copies, numbers: Iterable[int]) -> None:
    """Add what a value is moved to."""
    for n in numbers:
        m = c.moves[n]
        after, root = (m.value, m.after), c.roots[m.value, m.before]
        c.roots[after] = root if m.forward in ALIASES else after
        dtype = c.network.values[m.value].dtype
        if m.forward in GATHERS and not m.again and not dtype.is_complex:
            c.makers[after] = Maker((root,), move=n)


def renames(op: Op) -> bool:
    """Say whether an op returns a view of what it reads, or that itself: an idle dropout does."""
    if op.call.op is not torch.ops.aten.dropout.default:
        return bool(op.rule.free)
    _, p, train = op.call.args
    return not train or p == 0


def _add_made(c: Copies, n: int, op: Op, d: Decision) -> None:
    """Add what an op makes."""
    read = [c.roots[copy] for copy in zip(op.operands, d.operands, strict=True)]
    made = list(zip(op.results, d.results, strict=True))
    if renames(op) and read:
        c.roots.update(dict.fromkeys(made, read[0]))
        return
    c.roots.update({copy: copy for copy in made})
    why = why_not(op, d, c.network)
    c.why.update(dict.fromkeys(made, why))
    if not why:
        random = op.rule.random is not None and op.rule.random(op.call)
        values = [(c.network.values[v], layout) for v, layout in made]
        mask = sum(c.planned.local_bytes(v.shape, torch.bool, layout) for v, layout in values)
        reads = tuple(dict.fromkeys(read))
        c.makers[made[0]] = Maker(reads, op=n, keeps=mask if random else 0)


def why_not(op: Op, d: Decision, network: Network) -> str:
    """Say why backward should not, or cannot, repeat an op; nothing if it may."""
    tags, dtype = getattr(op.call.op, "tags", ()), op.call.results[0].dtype
    same = op.call.operands and op.call.operands[0] and op.call.operands[0].dtype == dtype
    if op.region:
        return "a checkpoint region computes it again already"
    if str(op.call.op) in network.unruled:
        return "an op without a rule may do more than compute"
    if len(op.results) != 1 or op.results[0] != op.name:
        return "it makes several tensors"
    if op.rule.traffic is not None and op.rule.runs(d.split):
        return "it sends while it computes"
    name = op.call.op._schema.name
    if products(op) or not (torch.Tag.pointwise in tags or name in REPEATED):
        return "it is no cheap op"
    if dtype.is_complex:
        return "complex numbers are kept"
    still = op.rule.random is not None and not op.rule.random(op.call)
    if still or (name in CASTS and same):
        return "it returns what it reads"
    return ""


def needed_copies(network: Network, op: Op, d: Decision) -> list[Copy]:
    """Return what the backward of an op needs."""
    return [
        (op.results[0], d.results[0]) if slot == RESULT else (op.operands[slot], d.operands[slot])
        for slot in needed_positions(op, typing_of(network, op))
    ]


def _add_saved(c: Copies, known: Collection[Copy], rest: Mapping[str, Layout]) -> None:
    """Add what backward needs: of each value once per layout, not of what rests so.

    Of a checkpoint region what enters it is kept as it was made.
    """
    first = {v: layout for v, layout in reversed(list(known))}
    for n, (op, d) in enumerate(zip(c.network.ops, c.decisions, strict=True)):
        reads = list(zip(op.operands, d.operands, strict=True))
        needed = needed_copies(c.network, op, d)
        if op.region:
            c.inner.setdefault(op.region, set()).update(needed)
            c.fixed.update(c.roots[copy] for copy in reads)
            needed = [(op.operands[k], first[op.operands[k]]) for k in op.enters]
        for copy in dict.fromkeys(needed):
            if rest.get(copy[0]) != copy[1]:
                root = c.roots[copy]
                c.saved.setdefault(root, set()).add(copy)
                c.savers.setdefault(root, []).append(n)
    for copies in c.inner.values():
        copies -= {copy for copy in copies if rest.get(copy[0]) == copy[1]}
        copies -= {copy for kept in c.saved.values() for copy in kept}


def kept_by_rings(c: Copies, moves: Iterable[PlannedMove]) -> int:
    """Return the bytes of shards that products keep which gather them in a ring.

    They keep what they gathered too, as products do that gather nothing.
    """
    rings = [m for m in moves if m.schedule == "ring" and m.forward == "all_gather"]
    shards = {c.roots[m.value, m.before] for m in rings if c.network.values[m.value].grad}
    return c.bytes_of(sorted(shards - c.saved.keys() - c.sources, key=str))
