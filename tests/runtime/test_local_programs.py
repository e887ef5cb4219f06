"""Every local program against the whole op: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from autotp.axis import run_ranks
from autotp.errors import LayoutError, RuntimeStateError
from autotp.grid import Grid
from autotp.layouts import I, P, R, Shard, assemble
from autotp.local_programs import (
    cross_entropy,
    layer_norm,
    log_softmax,
    rms_norm,
    softmax,
    vocab_embedding,
)
from tests.runtime.shards import check, pieces_of

LINE, SQUARE = Grid(("col",), (3,)), Grid(("row", "col"), (2, 2))
BOTH = ("row", "col")
SPLITS = [(LINE, ("col",)), (SQUARE, ("col",)), (SQUARE, BOTH)]
CLOSE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)
splits = pytest.mark.parametrize(("grid", "names"), SPLITS, ids=["3", "inner", "both"])


def take(axes, names):
    return tuple(axes[n] for n in names)


def over(grid, names, split, other):
    """Return the layout that is `split` on the axes of `names` and `other` elsewhere."""
    return tuple(split if n in names else other for n in grid.names)


# Embedding -------------------------------------------------------------------------------------


@splits
@pytest.mark.parametrize("vocab", [12, 11], ids=["even", "uneven"])
@pytest.mark.parametrize(("padding", "by_freq"), [(-1, False), (0, False), (7, True), (10, True)])
def test_vocab_embedding(grid, names, vocab, padding, by_freq):
    weight = torch.randn(vocab, 4, dtype=torch.float64)
    indices = torch.randint(vocab, (3, 5))
    indices[0, 0] = max(padding, 0)

    def split(axes, w):
        return vocab_embedding(
            w, indices, padding, by_freq, split_v=take(axes, names), size_v=vocab
        )

    check(
        split,
        lambda w: torch.embedding(w, indices, padding, by_freq, False),
        [(weight, over(grid, names, Shard(0), I))],
        over(grid, names, P, I),
        grid,
    )


def test_an_index_outside_the_vocabulary_is_refused():
    def one(rank, axes):
        indices = torch.tensor([1, 9])
        return vocab_embedding(torch.ones(3, 2), indices, split_v=(axes["col"],), size_v=9)

    with pytest.raises(RuntimeError, match="outside a split dim of size 9"):
        run_ranks(LINE, one)


# Cross-entropy ---------------------------------------------------------------------------------

T_AND_V = [
    (LINE, ("col",), ()),
    (LINE, (), ("col",)),
    (SQUARE, BOTH, ()),
    (SQUARE, (), BOTH),
    (SQUARE, ("row",), ("col",)),
    (SQUARE, ("col",), ()),
]
LOSS_TYPE = {0: Shard(0), 1: P, 2: P}


def check_cross_entropy(grid, t, v, *, classes=11, dtype=torch.float64, weighted=False, **options):
    reduction = options.get("reduction", 1)
    tokens, ignored = 12, options.get("ignore_index", -100)
    target = torch.randint(classes, (tokens,))
    target[[0, 5, 7, 8]] = ignored
    weight = torch.rand(classes, dtype=dtype) if weighted else None
    shards = {**dict.fromkeys(t, Shard(0)), **dict.fromkeys(v, Shard(1))}
    logits_layout = tuple(shards.get(n, I) for n in grid.names)
    only = {n: Shard(0) for n in t}
    target_layout = tuple(only.get(n, I) for n in grid.names)
    out_layout = tuple(LOSS_TYPE[reduction] if n in t else I for n in grid.names)
    weight_layout = tuple(Shard(0) if n in v else I for n in grid.names)

    def split(axes, logits, tgt, w):
        keys = {"split_t": take(axes, t), "split_v": take(axes, v), "size_v": classes}
        return cross_entropy(logits, tgt, w if weighted else None, **options, **keys)

    def whole(logits, tgt, w):
        return torch.ops.aten.cross_entropy_loss(
            logits, tgt, w.detach() if weighted else None, *_positional(options)
        )

    inputs = [
        (torch.randn(tokens, classes, dtype=dtype) * 3, logits_layout),
        (target, target_layout),
        (weight, weight_layout) if weighted else None,
    ]
    check(split, whole, inputs, out_layout, grid, **CLOSE[dtype])


def _positional(options):
    defaults = {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    return tuple((defaults | options).values())


@pytest.mark.parametrize(("grid", "t", "v"), T_AND_V, ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2], ids=["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["sharp", "smooth"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_cross_entropy(grid, t, v, reduction, smoothing, weighted):
    check_cross_entropy(
        grid, t, v, reduction=reduction, label_smoothing=smoothing, weighted=weighted
    )


@pytest.mark.parametrize(("grid", "t", "v"), T_AND_V, ids=str)
@pytest.mark.parametrize("ignored", [3, 255], ids=["a class", "past the classes"])
def test_cross_entropy_ignores_any_index(grid, t, v, ignored):
    check_cross_entropy(grid, t, v, classes=12, ignore_index=ignored, weighted=True)


@DTYPES
def test_cross_entropy_in_every_precision(dtype):
    check_cross_entropy(SQUARE, ("row",), ("col",), dtype=dtype, label_smoothing=0.1)


def test_cross_entropy_of_further_dims_is_refused():
    with pytest.raises(LayoutError, match="class numbers"):
        cross_entropy(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.int64))


# Norms and softmax -----------------------------------------------------------------------------


@DTYPES
@splits
@pytest.mark.parametrize("size", [12, 11], ids=["even", "uneven"])
@pytest.mark.parametrize("affine", ["", "w", "wb"])
def test_layer_norm(dtype, grid, names, size, affine):
    x = torch.randn(2, 3, size, dtype=dtype) * 2 + 3
    params = [torch.randn(size, dtype=dtype) if a in affine else None for a in "wb"]

    def split(axes, x, w, b):
        keys = {"split_d": take(axes, names), "size_d": size}
        return layer_norm(x, [size], w, b, 1e-3, **keys)

    layouts = [over(grid, names, Shard(d), I) for d in (2, 0, 0)]
    inputs = [p if p is None else (p, s) for p, s in zip([x, *params], layouts, strict=True)]
    whole = lambda x, w, b: F.layer_norm(x, [size], w, b, 1e-3)  # noqa: E731
    check(split, whole, inputs, layouts[0], grid, **CLOSE[dtype])


@DTYPES
@splits
@pytest.mark.parametrize("affine", [False, True])
def test_rms_norm(dtype, grid, names, affine):
    x = torch.randn(2, 3, 11, dtype=dtype)
    layouts = [over(grid, names, Shard(d), I) for d in (2, 0)]
    weight = (torch.randn(11, dtype=dtype), layouts[1]) if affine else None

    def split(axes, x, w):
        return rms_norm(x, [11], w, 1e-3, split_d=take(axes, names), size_d=11)

    whole = lambda x, w: F.rms_norm(x, [11], w, 1e-3)  # noqa: E731
    check(split, whole, [(x, layouts[0]), weight], layouts[0], grid, **CLOSE[dtype])


@DTYPES
def test_rms_norm_without_eps_takes_the_one_of_the_op(dtype):
    x = torch.full((1, 4), torch.finfo(dtype).eps, dtype=dtype)
    keys = {"split_d": (), "size_d": 4}
    torch.testing.assert_close(rms_norm(x, [4], **keys), F.rms_norm(x, [4]))


def test_norms_of_several_dims():
    x, w = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    layouts = [(I, Shard(2)), (I, Shard(1))]

    def split(axes, x, w):
        y = layer_norm(x, (5, 12), w, None, 1e-5, split_d=(axes["col"],), size_d=12)
        return rms_norm(y, (5, 6), w, 1e-5, split_d=(axes["col"],), size_d=12)

    def whole(x, w):
        return F.rms_norm(F.layer_norm(x, (5, 12), w, None), (5, 12), w, 1e-5)

    check(split, whole, list(zip([x, w], layouts, strict=True)), layouts[0], SQUARE)


@DTYPES
@splits
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize(("split_op", "op"), [(softmax, F.softmax), (log_softmax, F.log_softmax)])
def test_softmax(dtype, grid, names, dim, split_op, op):
    x = torch.randn(4, 11, 7, dtype=dtype) * 4
    x[0, :2] = -80.0
    layout = over(grid, names, Shard(dim % 3), I)
    split = lambda axes, x: split_op(x, dim, split_d=take(axes, names), size_d=0)  # noqa: E731
    check(split, lambda x: op(x, dim), [(x, layout)], layout, grid, **CLOSE[dtype])


def test_softmax_into_another_dtype():
    x, layout = torch.randn(4, 8, dtype=torch.bfloat16), (Shard(1),)
    split = lambda axes, x: softmax(x, 1, torch.float32, split_d=(axes["col"],))  # noqa: E731
    whole = lambda x: F.softmax(x, 1, dtype=torch.float32)  # noqa: E731
    check(split, whole, [(x, layout)], layout, LINE)


def test_partial_gradients_of_another_axis_pass_through():
    x, w = torch.randn(4, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)

    def split(axes, x, w):
        return layer_norm(x, [12], w, None, split_d=(axes["col"],), size_d=12)

    inputs = [(x, (R, Shard(1))), (w, (R, Shard(0)))]
    check(split, lambda x, w: F.layer_norm(x, [12], w), inputs, (R, Shard(1)), SQUARE)


def test_the_helper_joins_random_terms():
    whole = torch.randn(4, 6, dtype=torch.float64)
    layout = (P, Shard(0))
    torch.testing.assert_close(
        assemble(pieces_of(whole, layout, SQUARE), whole.shape, layout, SQUARE), whole
    )


SECOND = {
    "softmax": lambda x, axes: softmax(x, -1, split_d=axes, size_d=6),
    "log_softmax": lambda x, axes: log_softmax(x, -1, split_d=axes, size_d=6),
    "layer_norm": lambda x, axes: layer_norm(x, [x.shape[-1]], split_d=axes, size_d=6),
}


@pytest.mark.parametrize("op", SECOND)
def test_a_second_derivative_is_refused_and_not_dropped(op):
    """`autograd.grad` of named inputs would leave out what goes through the op, in silence."""

    def work(rank, axes):
        x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
        loss = SECOND[op](x * x, (axes["col"],)).square().sum()
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, x, create_graph=True)

    with pytest.raises(RuntimeStateError, match="second derivative"):
        run_ranks(LINE, work)
