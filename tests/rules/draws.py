"""What ranks draw apart, joined, is what one device could have drawn.

Elements of ones are tied where every draw of the op makes them equal: channels that drop together,
columns that share a mask. Joined pieces must have the ties of the whole, no fewer and no more, and
copies must be equal.
"""

import torch

from autotp.axis import run_ranks
from autotp.grid import Grid
from autotp.layouts import P, assemble, take_shard
from autotp.passes.check_rule import _plan, _strategies, example_of
from autotp.passes.emit.codegen import emit
from autotp.passes.pieces import pieces_of

aten = torch.ops.aten
GRIDS = (Grid(("col",), (2,)), Grid(("row", "col"), (2, 2)))
DRAWS = 24
"""Two elements that are not tied are equal in all of them once in 2**24 times."""


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def twice(batch, heads, size):
    """Return values that show every weight of attention in two columns."""
    return torch.eye(size).double().repeat(1, 2).expand(batch, heads, size, 2 * size)


ATTENTION = aten.scaled_dot_product_attention.default
CALLS = [
    (aten.alpha_dropout.default, (ones(4, 6), 0.5, True), {}),
    (aten.bernoulli.default, (ones(4, 6) / 2,), {}),
    (aten.dropout.default, (ones(4, 6), 0.5, True), {}),
    (aten.feature_alpha_dropout.default, (ones(4, 2, 6), 0.5, True), {}),
    (aten.feature_dropout.default, (ones(4, 2, 6), 0.5, True), {}),
    (aten.native_dropout.default, (ones(4, 6), 0.5, True), {}),
    (ATTENTION, (zeros(2, 4, 2, 3), zeros(2, 4, 4, 3), twice(2, 4, 4), None, 0.5), {}),
    (
        ATTENTION,
        (zeros(2, 4, 2, 3), zeros(2, 2, 4, 3), twice(2, 2, 4), None, 0.5),
        {"enable_gqa": True},
    ),
]


def assert_drawn_like_one(op, args, kwargs, rule=None):
    """Hold that every strategy of a call on ones draws as the op itself does."""
    example = example_of(op, args, kwargs, rule)
    draws = [whole(op, args, kwargs, seed) for seed in range(DRAWS)]
    alone = [ties(made) for made in zip(*draws, strict=True)]
    for grid in GRIDS:
        for strategy in _strategies(example, grid):
            if not any(P in layout for layout in strategy.operands):
                made = joined(example, strategy, grid)
                assert all(map(torch.equal, alone, map(ties, made))), (strategy.choices, grid)


def whole(op, args, kwargs, seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = op(*args, **kwargs)
    return made if isinstance(made, tuple) else (made,)


def ties(draws):
    """Return of every element the first that was equal to it in all draws."""
    seen = torch.stack([d.reshape(-1).double().mul(1e6).round() for d in draws], 1)
    groups = seen.unique(dim=0, return_inverse=True)[1]
    return (groups[:, None] == groups).int().argmax(1)


def joined(example, strategy, grid):
    """Return every result's draws, put together from the ranks' pieces."""
    layouts = dict(zip(example.op.operands, strategy.operands, strict=True))
    plan = _plan(example, strategy, layouts, grid)
    cut = {n: pieces_of(x, layouts[n], grid) for n, x in example.operands.items()}

    def draw(rank, axes):
        coords = grid.coords(rank)
        module = emit(example.program, example.network, plan, coords, axes)
        out = []
        for seed in range(DRAWS):
            module.meta["rng"].step_seed = seed
            out.append(module(*(p[coords] for p in cut.values())))
        return out

    runs = dict(zip(grid.all_coords(), run_ranks(grid, draw), strict=True))
    wholes = example.results.values()
    return [
        [
            put({c: made[k][r] for c, made in runs.items()}, t.shape, layout, grid)
            for k in range(DRAWS)
        ]
        for r, (t, layout) in enumerate(zip(wholes, strategy.results, strict=True))
    ]


def put(pieces, shape, layout, grid):
    """Join pieces whose copies must be equal."""
    made = assemble(pieces, shape, layout, grid)
    for coords, piece in pieces.items():
        assert torch.equal(piece, take_shard(made, layout, grid, coords)), (layout, coords)
    return made
