"""The program of a plan, op by op: `fc1: f32[8,1024,3072/col] = linear(x, w)   # o/col  1.21 ms`.

Each op is a Row of columns, and so is each move; rows of a section share their columns' widths. A
value keeps its name when it moves. Ops in a row that choose alike, such as the parts of a GELU,
share a row; so do parameters that move alike for one op.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from autotp.layouts import AxisType, Shard, kind
from autotp.notation import (
    bytes_text,
    choice_text,
    dims_text,
    plain_sizes,
    seconds_text,
    type_text,
)
from autotp.plan import WHERE_MADE, Decision, Plan, PlannedMove
from autotp.repeats import Placed, Section, place_moves, sections

WIDEST = (30, 34, 48, 14, 8)
"""What is longer than this sticks out of its column."""

NICKNAMES = {"scaled_dot_product_attention": "sdpa"}
"""Names that would fill a line, where they stand as operands or verbs."""

FOLDED = 3
"""Ops in a row that are worth one row together."""

AGAIN = "again in backward"
"""The mark of what backward makes again, by itself or with its checkpoint region."""

BESIDE = " beside the weights' gradients"
"""The mark of a move whose collective in backward runs while products make these."""

LOCAL = frozenset({"none", "slice", "pad", "keep_one"})

CALLS = {
    "I->R": "invariant_to_replicate",
    "R->I": "replicate_to_invariant",
    "I->S": "slice_to_shard",
    "R->S": "slice_to_shard",
    "S->P": "pad_to_partial",
}
"""What a move is called in the emitted program, where not after its collective."""

Values = Mapping[str, tuple[Decision, int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a value's name and type, what makes it, how it is chosen, its price, a remark."""

    name: str
    type: str
    call: str
    choice: str
    price: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class _Page:
    """What the rows of a section are written from.

    made      who makes a value, as which result
    params    parameters' names by value
    sizes     of plain dims
    inputs    the values that each layer reads from the layer before
    unique    last words of names that say enough in this section
    early     the moves that begin early
    """

    plan: Plan
    placed: Placed
    made: Values
    params: Mapping[str, str]
    sizes: Mapping[str, int]
    section: Section
    inputs: frozenset[str]
    unique: frozenset[str]
    early: frozenset[PlannedMove] = frozenset()

    def short(self, name: str) -> str:
        return name.removeprefix(self.section.prefix)

    def seen(self, value: str) -> str:
        """Return what a value is seen as through views."""
        while value in self.made and is_view(self.made[value][0]):
            value = self.made[value][0].reads[0]
        return value

    def value_text(self, value: str) -> str:
        """Write an operand: a parameter's last word, or the name of what made it, through views."""
        if value in self.params:
            return self.params[value].rpartition(".")[2]
        if value in self.inputs:
            return "x"
        if value not in self.made:
            return value
        d, k = self.made[value]
        if is_view(d):
            return self.value_text(d.reads[0])
        last = d.name.rpartition(".")[2]
        name = _nickname(last if last in self.unique else self.short(d.name))
        return name + (f"[{k}]" if len(d.makes) > 1 else "")


def program_lines(plan: Plan) -> list[str]:
    """Return the lines of a plan's ops and moves, layers that are alike once."""
    placed = place_moves(plan)
    made = {v: (d, k) for d in plan.decisions for k, v in enumerate(d.makes)}
    params = {r.value: name for name, r in plan.params.items()}
    sizes = plain_sizes(plan.decisions)
    early = frozenset(plan.moves[n] for b in plan.buckets if b.begins for n in b.moves)
    out: list[str] = []
    for section in sections(plan, placed):
        inputs, unique = _inputs(section), _unique_words(section)
        page = _Page(plan, placed, made, params, sizes, section, inputs, unique, early)
        out += ["", *_section_head(page)]
        out += _aligned([row for run in _runs(page) for row in _rows(page, run)])
    left = placed.get("", ())
    page = replace(page, section=Section("", "", ((),)), unique=frozenset())
    rows = [_move_row(page, m) for m in left if m.sent]
    return out + (["", "inputs and results", *_aligned(rows)] if rows else [])


def _unique_words(section: Section) -> frozenset[str]:
    words = Counter(d.name.rpartition(".")[2] for d in section.ops if not is_view(d))
    return frozenset(word for word, n in words.items() if n == 1)


def _nickname(name: str) -> str:
    for long, short in NICKNAMES.items():
        name = name.replace(long, short)
    return name


def _inputs(section: Section) -> frozenset[str]:
    """Return what the first layer reads where the second reads from the first."""
    if not section.name:
        return frozenset()
    first, second = section.layers[:2]
    made = {v for d in first for v in d.makes}
    reads = [
        pair
        for one, two in zip(first, second, strict=True)
        for pair in zip(one.reads, two.reads, strict=True)
    ]
    return frozenset(one for one, two in reads if two in made and one not in made)


def _section_head(page: _Page) -> list[str]:
    """Name the layers, how many there are, and what each takes and sends."""
    if not page.section.name:
        return []
    ops = page.section.ops
    moves = [m for d in ops for m in page.placed.get(d.name, ())]
    seconds = sum(d.seconds for d in ops) + sum(m.seconds for m in moves)
    sent = sum((size for m in moves for _, size in m.sent), Fraction(0))
    names = {d.name for d in ops}
    sent += sum((row[3] for row in page.plan.internal if row[0] in names), Fraction(0))
    count = f"x {len(page.section.layers)}"
    each = f"{seconds_text(seconds)}, {bytes_text(float(sent))} sent"
    return [f"{page.section.name}   {count}, each {each}; x is what the layer before makes"]


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Write rows in columns as wide as their longest entry, within WIDEST."""
    columns = [
        [(r.name + ":", r.type, f"= {r.call}", f"# {r.choice}", r.price, r.remark)[k] for r in rows]
        for k in range(6)
    ]
    widths = [
        max([len(text) for text in column if len(text) <= widest], default=0)
        for column, widest in zip(columns, WIDEST, strict=False)
    ]
    return [
        "  " + "  ".join(f"{text:<{w}}" for text, w in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


# Ops ---------------------------------------------------------------------------------------------


def is_view(d: Decision) -> bool:
    """Say whether an op is left out: a view of one value."""
    return d.free and len(d.makes) == len(d.reads) == 1


def _runs(page: _Page) -> Iterator[tuple[Decision, ...]]:
    """Yield the ops of a section that share a row, views left out unless what they make moves."""
    shown = [d for d in page.section.ops if not is_view(d) or d.name in page.placed]
    for key, group in itertools.groupby(shown, lambda d: _likeness(page, d)):
        run = tuple(group)
        if key is None or len(run) < FOLDED:
            yield from ((d,) for d in run)
        else:
            yield run


def _likeness(page: _Page, d: Decision) -> tuple[object, ...] | None:
    """Return what ops that share a row have in common, None for an op that stands alone."""
    if d.name in page.placed or len(d.makes) > 1 or any(v in page.params for v in d.reads):
        return None
    ways = d.region, d.again
    return d.name.rpartition(".")[0], d.choices, d.results, d.shapes, d.dtype, ways


def _rows(page: _Page, run: tuple[Decision, ...]) -> Iterator[Row]:
    """Yield the moves that ops need first, the ops, and the moves of what they make."""
    last = run[-1]
    moves = page.placed.get(last.name, ())
    yield from _arrivals(page, last, [m for m in moves if m.value not in last.makes])
    if not is_view(last):
        yield _op_row(page, run)
    yield from (_move_row(page, m) for m in moves if m.value in last.makes)


def _op_row(page: _Page, run: tuple[Decision, ...]) -> Row:
    d = run[-1]
    inside = {v for op in run for v in op.makes}
    operands = dict.fromkeys(
        page.value_text(v) for op in run for v in op.reads if len(run) == 1 or v not in inside
    )
    if len(run) == 1:
        call = f"{_verb(d)}({', '.join(page.value_text(v) for v in d.reads)})"
    else:
        verbs = Counter(_verb(op) for op in run)
        listed = (verb if n == 1 else f"{n} {verb}" for verb, n in verbs.items())
        call = f"{', '.join(listed)} of {', '.join(operands)}"
    name = page.short(d.name)
    if len(run) > 1:
        path, _, end = name.rpartition(".")
        first = run[0].name.rpartition(".")[2]
        name = f"{path}{'.' if path else ''}{{{first}..{end}}}"
    price = "" if d.free else seconds_text(sum(op.seconds for op in run))
    type_ = type_text(d.shapes[0], d.results[0], d.dtype, page.plan.grid)
    type_ += f" x {len(d.makes)}" if len(d.makes) > 1 else ""
    choice, grid = choice_text(d, page.plan.grid), page.plan.grid
    dims = dims_text(d.dims[0], d.shapes[0], d.results[0], grid, page.sizes)
    return Row(
        name, type_, call, choice, price, f"{dims}  {AGAIN}" if d.region or d.again else dims
    )


def _verb(d: Decision) -> str:
    """Return an op's name without its overload."""
    return _nickname(d.op.partition(".")[0])


# Moves -------------------------------------------------------------------------------------------


def _arrivals(page: _Page, reader: Decision, moves: Sequence[PlannedMove]) -> Iterator[Row]:
    """Yield the moves of what an op reads: parameters that move alike share a row."""
    own = [m for m in moves if m.value in page.params]
    yield from (_move_row(page, m) for m in moves if m.value in page.made)
    chains: dict[tuple[object, ...], list[str]] = {}
    of_value = {v: [m for m in own if m.value == v] for v in dict.fromkeys(m.value for m in own)}
    for value, chain in of_value.items():
        if any(m.sent for m in chain):
            ways = [(m.axis, m.before, m.after, m.forward, m.backward, m.again) for m in chain]
            like = tuple(ways)
            chains.setdefault(like, []).append(value)
    for values in chains.values():
        yield _parameters_row(page, [of_value[v] for v in values])


def _parameters_row(page: _Page, chains: Sequence[Sequence[PlannedMove]]) -> Row:
    """Write the moves of parameters that move alike: every axis in turn, prices added up."""
    names = [page.short(page.params[chain[0].value]) for chain in chains]
    path, _, _ = names[0].rpartition(".")
    last = ",".join(name.rpartition(".")[2] for name in names)
    name = f"{path}{'.' if path else ''}{f'{{{last}}}' if len(names) > 1 else last}"
    moves = [m for chain in chains for m in chain]
    axes: dict[str, list[str]] = {}
    for m in chains[0]:
        axes.setdefault(_call(m), []).append(f'"{m.axis}"')
    call = ", ".join(f"{verb}({', '.join(over)})" for verb, over in axes.items())
    changes = dict.fromkeys(_change(m) for m in chains[0])
    resting = page.plan.params[page.params[chains[0][0].value]]
    type_ = type_text(resting.shape, chains[0][-1].after, resting.dtype, page.plan.grid)
    return Row(
        name,
        type_ if len(names) == 1 else "",
        call,
        ", ".join(changes),
        seconds_text(sum(m.seconds for m in moves)),
        _remark(moves),
    )


def _move_row(page: _Page, m: PlannedMove) -> Row:
    """Write the move of what an op made, or of an input."""
    name = page.value_text(m.value)
    dims = [str(t.dim) for t in _ends(m) if isinstance(t, Shard)]
    arguments = ", ".join([name, f'"{m.axis}"', *([f"dim={'->'.join(dims)}"] if dims else [])])
    type_, label = "", name
    if m.value in page.made:
        origin = page.seen(m.value)
        label = page.short(page.made[origin][0].name) if origin in page.made else name
        d, k = page.made[m.value]
        type_ = type_text(d.shapes[k], m.after, d.dtype, page.plan.grid)
    return Row(
        label,
        type_,
        f"{_call(m)}({arguments})",
        _change(m),
        seconds_text(m.seconds),
        _remark([m]) + (BESIDE if m in page.early else ""),
    )


def bucket_lines(plan: Plan) -> list[str]:
    """Return a line for each call of parameters that several share, or that begins early."""
    names = {r.value: name for name, r in plan.params.items()}
    rows = []
    for bucket in plan.buckets:
        moves = [plan.moves[n] for n in bucket.moves]
        if moves[0].value not in names:
            continue
        first, last = names[moves[0].value], names[moves[-1].value]
        label = f"{first} .. {last}" if len(moves) > 1 else first
        count = f"{len(moves)} parameter{'s' * (len(moves) > 1)}"
        said = [f"{bucket.forward}{_by(bucket.by)}"] if bucket.by else []
        if bucket.backward not in LOCAL:
            said.append(f"backward {bucket.backward}{_by(bucket.back_by)}")
        early = f"begins before {bucket.begins}"
        if bucket.begins == WHERE_MADE:
            early = "awaited when backward ends"
        said += [early] if bucket.begins else []
        said += [f"{seconds_text(bucket.hidden_s)} hidden"] if bucket.hidden_s else []
        call = f'{_call(moves[0])}("{bucket.axis}")'
        size, price = bytes_text(bucket.size_bytes), seconds_text(bucket.seconds)
        rows.append(Row(label, f"{count}, {size}", call, _change(moves[0]), price, ", ".join(said)))
    return _aligned(rows)


def _ends(m: PlannedMove) -> tuple[AxisType, AxisType]:
    """Return the types before and after of the axis that changes."""
    (ends,) = [pair for pair in zip(m.before, m.after, strict=True) if pair[0] != pair[1]]
    return ends


def _change(m: PlannedMove) -> str:
    return "->".join(kind(t) for t in _ends(m))


def _call(m: PlannedMove) -> str:
    """Return the name of a move in the emitted program."""
    return CALLS.get(_change(m), m.forward)


def _remark(moves: Sequence[PlannedMove]) -> str:
    """Say what moves send, and what their gradients need."""
    sent = sum((size for m in moves for _, size in m.sent), Fraction(0))
    backward = dict.fromkeys(
        f"{m.backward}{_by(m.back_by)}" for m in moves if m.backward not in LOCAL
    )
    said = [f"{bytes_text(float(sent))} sent"] if sent else []
    said += dict.fromkeys(f"{m.forward}{_by(m.by)}" for m in moves if m.by)
    said += [AGAIN] if any(m.again for m in moves) else []
    said += dict.fromkeys(_within(m) for m in moves if m.schedule)
    return ", ".join(said + ([f"backward {', '.join(backward)}"] if backward else []))


def _within(m: PlannedMove) -> str:
    """Say how the product beside a move makes it, and what it would take apart."""
    return f"within the product{_by(m.schedule)}, apart {seconds_text(m.apart_s)}"


def _by(algorithm: str) -> str:
    return f" by {algorithm}" if algorithm else ""
