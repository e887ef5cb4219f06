"""Calls of every op in other sizes: what hypothesis proves the rules on.

`varied(op)` draws one of the op's fixed calls and changes it: factors that may be split take other
sizes, one included; operands broadcast, gain leading dims, are left out or need no gradient; dims
are counted from the back. A row that has a fixed call so has a generator. `MADE` adds calls whose
literals no such change reaches: bounds, shapes and lists of dims; an entry is a function of `draw`.
"""

import math
from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from autotp.grid import Grid
from autotp.passes.check_rule import example_of
from tests.rules.cases import FAMILIES, calls, ints, mask, x

aten = torch.ops.aten

FIXED = {}
for _family in FAMILIES:
    for _op, _args, _kwargs in calls(_family):
        FIXED.setdefault(_op, []).append((_args, _kwargs))

GRIDS = [
    Grid(("col",), (2,)), Grid(("col",), (3,)), Grid(("col",), (4,)),
    Grid(("row", "col"), (2, 2)), Grid(("row", "col"), (2, 3)), Grid(("row", "col"), (3, 2)),
    Grid(("row", "col", "depth"), (2, 2, 2)),
]  # fmt: skip
SIZES = st.sampled_from((4, 6, 5, 3, 2, 7, 8, 1))
RARELY = st.integers(0, 5).map(lambda n: n == 5)
DIMS = {"dim", "dims", "dim0", "dim1", "axis0", "axis1", "shifts"}
UNBROADCAST = {
    aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default,
    aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default,
    aten.huber_loss.default, aten.kl_div.default, aten.mse_loss.default,
    aten.smooth_l1_loss.default,
}  # fmt: skip
"""torch's own gradient fails or is wrong where these broadcast; its functions expand first."""


def grids():
    """Draw a grid of one to three axes."""
    return st.sampled_from(GRIDS)


@st.composite
def varied(draw, op):
    """Draw a call of `op`: its arguments and keywords."""
    torch.manual_seed(draw(st.integers(0, 99)))
    made = MADE.get(op, [])
    if made and draw(st.booleans()):
        call = draw(st.sampled_from(made))(draw)
        args, kwargs = call[:-1] if isinstance(call[-1], dict) else call, {}
        kwargs = call[-1] if isinstance(call[-1], dict) else {}
    else:
        fixed = draw(st.sampled_from(FIXED[op]))
        args, kwargs = resized(draw, op, *fixed)
    args = counted_from_back(draw, op, left_out(draw, op, args))
    args, kwargs = pytree.tree_map(lambda v: quietened(draw, v), (tuple(args), kwargs))
    assume(runs(op, args, kwargs))
    return args, kwargs


def runs(op, args, kwargs):
    """Say whether the op takes this call, and makes what is neither empty nor undefined."""
    try:
        made = op(*pytree.tree_map(lambda v: v.detach() if is_tensor(v) else v, args), **kwargs)
    except (RuntimeError, IndexError, ValueError):
        return False
    leaves = [t for t in pytree.tree_leaves(made) if is_tensor(t)]
    return all(t.numel() or t.shape == (0,) for t in leaves)


# Sizes -------------------------------------------------------------------------------------------


def resized(draw, op, args, kwargs):
    """Give the factors of a call other sizes, and its literals what follows from them."""
    bound = example_of(op, args, kwargs).op
    sig, rule = bound.signature, bound.rule
    free = [f for f in sig.factors() if f not in sig.whole or draw(RARELY)]
    sizes = {**sig.sizes, **{f: draw(SIZES) for f in free}}
    shapes = [shape_of(row, sizes) for row in sig.operands]
    if "..." in bound_text(rule, bound.call) and not rule.localize and op not in UNBROADCAST:
        shapes = broadcast(draw, sig, shapes)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if is_tensor(t)]
    highest = {f: sizes[f] for f in rule.split if f in sizes}
    made = iter([like(t, s, highest.get("v")) for t, s in zip(tensors, shapes, strict=True)])
    new, kwargs = pytree.tree_map(lambda v: next(made) if is_tensor(v) else v, (args, kwargs))
    if rule.localize:
        local = replace(
            bound.call,
            args=new,
            operands=with_shapes(bound.call.operands, shapes),
            results=tuple(
                replace(r, shape=shape_of(row, sizes))
                for r, row in zip(bound.call.results, sig.results, strict=True)
            ),
        )
        new = rule.localize(replace(bound.call, args=new), local)
    return with_literals(op, new), kwargs


def bound_text(rule, call):
    text = rule.sentence if isinstance(rule.sentence, str) else rule.sentence(call)
    return text if isinstance(text, str) else text[0]


def shape_of(dims, sizes):
    return tuple(sum(math.prod(sizes[f] for f in product) for product in dim) for dim in dims)


def with_shapes(operands, shapes):
    rest = iter(shapes)
    return tuple(t and replace(t, shape=next(rest)) for t in operands)


def with_literals(op, args):
    """Write the sizes that an op repeats as an argument."""
    names = [a.name for a in op._schema.arguments]
    if "normalized_shape" in names:
        at = names.index("normalized_shape")
        count = len(args[at])
        return (*args[:at], list(args[0].shape[-count:]), *args[at + 1 :])
    return args


def broadcast(draw, sig, shapes):
    """Let operands have one element along a dim that others have, or more dims in front."""
    lead = (draw(SIZES),) if draw(RARELY) else ()
    out = []
    for k, (dims, shape) in enumerate(zip(sig.operands, shapes, strict=True)):
        others = {d for j, row in enumerate(sig.operands) if j != k for d in row}
        shape = tuple(
            1 if dim in others and dim[0][:1] and dim[0][0][0] == "." and draw(RARELY) else n
            for dim, n in zip(dims, shape, strict=True)
        )
        leads = dims and dims[0][0][:1] == (".0",)
        out.append((*lead, *shape) if leads and lead else shape)
    return out


def like(old, shape, high=None):
    """Return a tensor of another shape with values as in `old`; ints stay below `high`."""
    new = old.detach().reshape((1,) * (len(shape) - old.ndim) + tuple(old.shape))
    for d, n in enumerate(shape):
        new = new.index_select(d, torch.arange(n) % new.shape[d])
    if new.is_floating_point() and old.numel() and 0 <= old.min() and old.max() <= 1:  # noqa: SIM300
        return new.clone().requires_grad_(old.requires_grad)  # chances
    if new.is_floating_point():
        return (new * (1 + 0.2 * torch.rand_like(new))).requires_grad_(old.requires_grad)
    if new.dtype is torch.long and high:
        return torch.where(new < 0, new, new % high)
    return new


# Arguments ---------------------------------------------------------------------------------------


def left_out(draw, op, args):
    """Leave out operands that are optional."""
    kinds = [str(a.type) for a in op._schema.arguments]
    return tuple(
        None if is_tensor(v) and kinds[k] == "Optional[Tensor]" and draw(RARELY) else v
        for k, v in enumerate(args)
    )


def counted_from_back(draw, op, args):
    """Count dims from the other end."""
    if not args or not is_tensor(args[0]):
        return args
    rank, out = args[0].ndim, []
    names = [a.name for a in op._schema.arguments]
    for name, value in zip(names, args, strict=False):
        is_dim = name in DIMS and isinstance(value, int) and not isinstance(value, bool)
        change = is_dim and name != "shifts" and draw(RARELY) and 0 <= value < rank
        shift = rank + (op in (aten.unsqueeze.default, aten.stack.default))
        out.append(value - shift if change else value)
    return tuple(out)


def quietened(draw, value):
    """Let some operands need no gradient."""
    return value.detach() if is_tensor(value) and value.requires_grad and draw(RARELY) else value


def is_tensor(value):
    return isinstance(value, torch.Tensor)


# Made --------------------------------------------------------------------------------------------


def shape(draw, low=1, high=3):
    return draw(st.lists(SIZES, min_size=low, max_size=high))


def cut(draw, count):
    """Draw a shape of `count` elements."""
    out = []
    while draw(st.booleans()) and len(out) < 3:
        out.append(draw(st.sampled_from([k for k in range(1, count + 1) if count % k == 0])))
        count //= out[-1]
    return [*out, count]


def reshape(draw):
    a = shape(draw)
    return (x(*a), cut(draw, math.prod(a)))


def slice_(draw):
    a = shape(draw)
    d = draw(st.integers(0, len(a) - 1))
    start = draw(st.integers(0, a[d] - 1))
    stop = draw(st.integers(start + 1, a[d]))
    return (x(*a), d, start, stop, draw(st.sampled_from((1, 1, 2))))


def one_dim(*more):
    """Return a generator of a tensor and one of its dims, with further arguments."""

    def call(draw):
        a = shape(draw)
        return (x(*a), draw(st.integers(-len(a), len(a) - 1)), *more)

    return call


def some_dims(*more, least=0):
    """Return a generator of a tensor and a list of its dims, with further arguments."""

    def call(draw):
        a = shape(draw)
        dims = st.lists(st.integers(0, len(a) - 1), unique=True, min_size=least, max_size=len(a))
        dims = draw(dims)
        return (x(*a), dims, *more)

    return call


def two_dims(draw):
    a = shape(draw)
    dims = st.integers(-len(a), len(a) - 1)
    return (x(*a), draw(dims), draw(dims))


def permute(draw):
    a = shape(draw)
    return (x(*a), draw(st.permutations(range(len(a)))))


def cat(draw):
    a = shape(draw)
    d = draw(st.integers(0, len(a) - 1))
    widths = draw(st.lists(SIZES, min_size=1, max_size=3))
    return ([x(*a[:d], n, *a[d + 1 :]) for n in widths], d)


def split_with_sizes(draw):
    parts = draw(st.lists(SIZES, min_size=1, max_size=4))
    a = shape(draw, 0, 2)
    d = draw(st.integers(0, len(a)))
    return (x(*a[:d], sum(parts), *a[d:]), parts, d)


def split(draw):
    a = shape(draw)
    d = draw(st.integers(0, len(a) - 1))
    return (x(*a), draw(st.integers(1, a[d])), d)


def expand(draw):
    a = [draw(st.sampled_from((1, n))) for n in shape(draw)]
    wide = [draw(SIZES) if n == 1 else draw(st.sampled_from((n, -1))) for n in a]
    return (x(*a), [draw(SIZES)] * draw(st.integers(0, 1)) + wide)


def repeat(draw):
    a = shape(draw)
    new = [draw(st.integers(1, 3))] * draw(st.integers(0, 1))
    return (x(*a), new + [draw(st.integers(1, 3)) for _ in a])


def attention(draw):
    b, m, s, t, d, e = (draw(SIZES) for _ in range(6))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    n = m * groups
    options = {"enable_gqa": True} if groups > 1 else {}
    q, k, v = x(b, n, s, d), x(b, m, t, d), x(b, m, t, e)
    form = draw(st.sampled_from(("plain", "causal", "mask", "bias")))
    if form == "causal":
        return (q, k, v, None, 0.0, True, options)
    if form == "plain":
        return (q, k, v, options)
    sizes = [draw(st.sampled_from((1, n_))) for n_ in (b, n, s)]
    sizes = [*sizes, t][draw(st.integers(0, 2)) :]
    return (q, k, v, mask(*sizes) if form == "mask" else x(*sizes), options)


def einsum(draw):
    size = {c: draw(SIZES) for c in "abcde"}
    left = draw(st.lists(st.sampled_from("abcde"), unique=True, min_size=1, max_size=3))
    right = draw(st.lists(st.sampled_from("abcde"), unique=True, min_size=1, max_size=3))
    both = sorted({*left, *right})
    out = draw(st.lists(st.sampled_from(both), unique=True, max_size=3))
    text = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    return (text, [x(*(size[c] for c in row)) for row in (left, right)])


def indexed(draw):
    a = shape(draw, 2, 3)
    found = shape(draw, 1, 2)
    at = draw(st.lists(st.sampled_from(range(len(a))), unique=True, min_size=1, max_size=2))
    return (x(*a), [ints(n, *found) if d in at else None for d, n in enumerate(a)])


def gather(draw):
    a = shape(draw, 1, 3)
    d = draw(st.integers(0, len(a) - 1))
    wanted = [draw(SIZES) if k == d else draw(st.integers(1, n)) for k, n in enumerate(a)]
    return (x(*a), d, ints(a[d], *wanted))


MADE = {
    aten.amax.default: [some_dims(), some_dims(True)],
    aten.cat.default: [cat],
    aten.chunk.default: [lambda draw: (x(*shape(draw, 2, 2)), draw(st.integers(1, 4)), 1)],
    aten.cumsum.default: [one_dim()],
    aten.einsum.default: [einsum],
    aten.expand.default: [expand],
    aten.flip.default: [some_dims()],
    aten.gather.default: [gather],
    aten.index.Tensor: [indexed],
    aten.logsumexp.default: [some_dims(), some_dims(True)],
    aten.max.dim: [one_dim(), one_dim(True)],
    aten.mean.dim: [some_dims(), some_dims(True), one_dim()],
    aten.permute.default: [permute],
    aten.repeat.default: [repeat],
    aten.reshape.default: [reshape],
    aten.scaled_dot_product_attention.default: [attention],
    aten.select.int: [one_dim(0), one_dim(-1)],
    aten.slice.Tensor: [slice_],
    aten.softmax.int: [one_dim()],
    aten.split.Tensor: [split],
    aten.split_with_sizes.default: [split_with_sizes],
    aten.squeeze.dims: [some_dims()],
    aten.sum.dim_IntList: [some_dims(), some_dims(True)],
    aten.transpose.int: [two_dims],
    aten.unbind.int: [one_dim()],
    aten.unsqueeze.default: [one_dim()],
    aten.var.correction: [some_dims(least=1)],
}
