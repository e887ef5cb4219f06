"""Rules of lookups, writes and sorts: the dim that is looked up, written or sorted is whole.

That of a lookup may be split: local programs mask, or fetch the rows from their owners.
"""

from __future__ import annotations

import math
import re

import torch

from autotp import local_lookups, local_programs, routing
from autotp.passes.rules.table import Call, Message, Ranks, Tensor, letters, rule

aten = torch.ops.aten

MAXIMUM = 2
"""ATen's number for bags that keep their largest rows."""


def lookup(call: Call) -> str:
    """Indices may split, unless a row's gradient is divided by how often it occurs in all."""
    indices = call.operands[1]
    assert indices is not None
    if not call.arg(3, False):
        return "v d, ... -> ... d"
    dims = " ".join(f"[{n}]" for n in letters(len(indices.shape)))
    return f"v d, {dims} -> {dims} d"


def gather(call: Call) -> str:
    """The looked up dim is whole; of the others, those of equal size may split."""
    left, index = alike(call, 2, "k")
    return f"{left}, {index} -> {index}"


def scatter(call: Call) -> str:
    """The written dim is whole; of the others, those of equal size may split."""
    left, *rest = alike(call, len(call.operands), "[k]")
    return f"{', '.join([left, *rest])} -> {left}"


def scatter_add(call: Call) -> str:
    """As a scatter, but what is added may be split: it adds up."""
    left, *rest = alike(call, 3, "k")
    return f"+{', '.join([left, *rest])} -> {left}"


def alike(call: Call, count: int, name: str) -> list[str]:
    """Name the dims of `count` operands: equal ones alike, others whole, `name` the indices'."""
    shapes = [t.shape for t in call.operands[:count] if t]
    rows = [[f"[{letter}{d}]" for d in range(len(shapes[0]))] for letter in "xyz"[:count]]
    for d in range(len(shapes[0])):
        looked_up = d == call.arg(1) % len(shapes[0])
        for row in rows[looked_up:]:
            if len({shape[d] for shape in shapes[looked_up:]}) == 1:
                row[d] = name if looked_up else f"a{d}"
    return [" ".join(row) for row in rows]


def select(call: Call) -> str:
    """The looked up dim and its indices may split."""
    return f"{named(call, 'v')}, k -> {named(call, 'k')}"


def add(call: Call) -> str:
    """The written dim may split; so may what is added: it adds up."""
    return f"+{named(call, 'v')}, k, {named(call, 'k')} -> {named(call, 'v')}"


def named(call: Call, name: str) -> str:
    """Name the dims of the first operand, `name` the one at argument 1."""
    assert call.operands[0] is not None
    names = list(letters(len(call.operands[0].shape)))
    names[call.arg(1)] = name
    return " ".join(names)


def index(call: Call) -> str:
    """Indexed dims are whole, but for v, that of a lone integer index; all others may split."""
    left, indices, right = indexed(call, "{}")
    given = [t for t in call.arg(1) if t]
    if len(given) == 1 and not is_mask(given[0]):
        left = re.sub(r"\[\w+\]", "v", left)
    return f"{', '.join([left, *indices])} -> {' '.join(right)}"


def put(call: Call) -> str:
    """Indices are whole, the other dims may split, v too, that of a lone one; values broadcast."""
    left, indices, right = indexed(call, "[{}]")
    given = [t for t in call.arg(1) if t]
    if len(given) == 1 and not is_mask(given[0]):
        left = re.sub(r"\[\w+\]", "v", left)
    values = call.operands[-1]
    assert values is not None
    new = " ".join(right[len(right) - len(values.shape) :])
    return f"{', '.join([left, *indices, new])} -> {left}"


def indexed(call: Call, form: str) -> tuple[str, list[str], list[str]]:
    """Name the dims of what is indexed, of every index and of what is found; masks are whole."""
    assert call.operands[0] is not None
    given, names = call.arg(1), letters(len(call.operands[0].shape))
    looked_up: list[int] = []
    taken = 0
    for t in given:
        count = len(t.shape) if is_mask(t) else 1
        looked_up += range(taken, taken + count) if t else ()
        taken += count
    form = "[{}]" if any(map(is_mask, given)) else form
    new = [form.format(f"i{k}") for k in range(max(index_rank(t) for t in given if t))]
    rest = [n for d, n in enumerate(names) if d not in looked_up]
    together = looked_up[-1] - looked_up[0] < len(looked_up)
    at = looked_up[0] if together else 0
    indices = [
        " ".join(f"[m{k}_{d}]" for d in range(len(t.shape)))
        if is_mask(t)
        else " ".join(new[len(new) - len(t.shape) :] if t else ())
        for k, t in enumerate(given)
    ]
    left = " ".join(f"[{n}]" if d in looked_up else n for d, n in enumerate(names))
    return left, indices, [*rest[:at], *new, *rest[at:]]


def is_mask(index: Tensor | None) -> bool:
    """Say whether an index is a mask, which stands for as many indices as it has dims."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def index_rank(index: Tensor) -> int:
    """Return the number of dims that an index adds: a mask finds a list."""
    return 1 if is_mask(index) else len(index.shape)


def bags(call: Call) -> str:
    """Columns may split; what is made beside knows none, but for where each one's maximum is."""
    made = [
        " ".join(f"[z{k}_{d}]" for d in range(len(t.shape))) for k, t in enumerate(call.results)
    ]
    last = call.results[-1]
    if call.arg(4, 0) == MAXIMUM and len(last.shape) == 2:
        made[-1] = "[b] d"
    left = ["[v] d", "[k]", "[o]", *("[k]" for _ in call.operands[3:])]
    return f"{', '.join(left)} -> {', '.join(['[b] d', *made[1:]])}"


def whole(call: Call) -> str:
    """Every dim is whole."""
    rows = [
        " ".join(f"[x{k}_{d}]" for d in range(len(t.shape))) if t else ""
        for k, t in enumerate((*call.operands, *call.results))
    ]
    count = len(call.operands)
    return f"{', '.join(rows[:count])} -> {', '.join(rows[count:])}"


def copied(call: Call) -> str:
    """The written dim is whole, and so are its indices and what is written there, if anything."""
    written = [f"[k{d}]" for d in range(len(call.operands[1].shape))] if call.operands[1] else []
    values = [named(call, " ".join(written)) if t and t.shape else "" for t in call.operands[2:]]
    return f"{', '.join([named(call, '[v]'), ' '.join(written), *values])} -> {named(call, '[v]')}"


def placed(call: Call) -> str:
    """Which interval each number lies in; many sequences are one per row of the numbers."""
    at = 0 if call.op is aten.searchsorted.Tensor else 1
    borders = call.operands[at]
    assert borders is not None
    many = len(borders.shape) > 1
    numbers, row = ("... m", "... [k]") if many else ("...", "[k]")
    left = [row, numbers] if at == 0 else [numbers, row]
    return f"{', '.join([*left, *(row for _ in call.operands[2:])])} -> {numbers}"


def ordered(call: Call) -> str:
    """The sorted dim is whole; what is kept of it may be shorter."""
    arguments = [argument.name for argument in call.op._schema.arguments]
    dim = call.arg(arguments.index("dim"), -1)
    assert call.operands[0] is not None
    names = list(letters(len(call.operands[0].shape)))
    left, right = list(names), list(names)
    if names:
        left[dim], right[dim] = "[v]", "[k]"
    return f"{' '.join(left)} -> {', '.join(' '.join(right) for _ in call.results)}"


def moved_traffic(call: Call, ranks: Ranks) -> list[Message]:
    """Indices are gathered, rows go from or to their owners, and their gradients back."""
    both = next((names for names in ("v i0", "v k") if names in ranks), None)
    if both is None:
        return []
    _table, *given = (t for t in call.operands if t)
    rows = given[1] if len(given) > 1 else call.results[0]
    asked, moved = (math.prod(t.shape) * t.dtype.itemsize for t in (given[0], rows))
    sizes = ranks[both]
    return [
        *(
            Message(both, asked * math.prod(sizes[k:]), kind="all_gather", level=k)
            for k in range(len(sizes))
        ),
        Message(both, moved, kind="all_to_all"),
        Message(both, moved, backward=True, kind="all_to_all"),
    ]


def taken(call: Call) -> str:
    """Take single elements, wherever they lie: the indices may be split."""
    assert call.operands[0] is not None
    whole = " ".join(f"[p{d}]" for d in range(len(call.operands[0].shape)))
    return f"{whole}, ... -> ..."


rule(
    aten.embedding.default,
    lookup,
    saves=(1,),
    split={"v": "P"},
    program=local_programs.vocab_embedding,
)
rule(
    aten.embedding_bag.padding_idx,
    bags,
    split={"d": "I"},
    blocks=("d",),
    program=local_lookups.embedding_bag,
)
rule(aten.argsort.default, ordered, saves=())
rule(aten.argsort.stable, ordered, saves=())
rule(aten.bucketize.Tensor, placed)
rule(aten.gather.default, gather, linear=(0,), saves=(1,))
rule(aten.histc.default, whole)
rule(
    aten.index.Tensor,
    index,
    linear=(0,),
    saves=(1,),
    split={"v": "P", "v i0": "S"},
    program=routing.split_index,
    traffic=moved_traffic,
)
rule(
    aten.index_add.default,
    add,
    linear=(0, 2),
    saves=(1,),
    split={"v": "S", "v k": "S"},
    program=routing.split_index_add,
    traffic=moved_traffic,
)
rule(aten.index_copy.default, copied, linear=(0, 2), saves=(1,))
rule(aten.index_fill.int_Scalar, copied, saves=(1,))
rule(aten.index_fill.int_Tensor, copied, linear=(0, 2), saves=(1,))
rule(aten.index_put.default, put, split={"v": "S"}, program=local_lookups.split_index_put)
rule(aten.index_reduce.default, copied)
rule(
    aten.index_select.default,
    select,
    linear=(0,),
    saves=(1,),
    split={"v": "P", "v k": "S"},
    program=routing.split_index_select,
    traffic=moved_traffic,
)
rule(aten.masked_scatter.default, whole)
rule(aten.scatter.src, scatter, linear=(0, 2), saves=(1,))
rule(aten.scatter.value, scatter, saves=(1,))
rule(aten.scatter_add.default, scatter_add, linear=(0, 2), saves=(1,))
rule(aten.scatter_reduce.two, scatter)
rule(aten.searchsorted.Tensor, placed)
rule(aten.sort.default, ordered, saves=(-1,))
rule(aten.sort.stable, ordered, saves=(-1,))
rule(aten.take.default, taken, linear=(0,), saves=(1,))
rule(aten.topk.default, ordered, saves=(-1,))
