"""Every move, forward and backward, on simulated ranks and on real gloo ranks."""

import operator
import tempfile
import threading
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import fx
from torch.distributed.device_mesh import init_device_mesh

from autotp.axis import run_ranks
from autotp.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    invariant_to_replicate,
    keep_one,
    pad_to_partial,
    reduce_scatter,
    replicate_to_invariant,
    slice_to_shard,
)
from autotp.cost_model.collectives import OTHERS, sent_bytes
from autotp.dist_axis import dist_axes
from autotp.errors import RuntimeStateError
from autotp.grid import Grid
from autotp.layouts import MOVES, I, P, R, Shard, is_valid, kind, move_of
from autotp.routing import exchange
from tests.runtime.shards import check, run_pieces

LINE, SQUARE = Grid(("col",), (3,)), Grid(("row", "col"), (2, 2))
PARTS = (6, 3, 3)  # blocks of a dim of 12 on three ranks


def apply_move(x, axis, before, after, sizes):
    """Emit the one collective of a move; `sizes` are those of the dims with this axis gathered."""
    pair = kind(before), kind(after)
    if pair == ("S", "S"):
        size = sizes[before.dim]
        return all_to_all(x, axis, after.dim, before.dim, after.parts, before.parts, size)
    if pair[0] == "S" and pair[1] in "RI":
        return all_gather(x, axis, before.dim, before.parts, sizes[before.dim], to=pair[1])
    if pair == ("S", "P"):
        return pad_to_partial(x, axis, before.dim, before.parts, sizes[before.dim])
    if pair == ("P", "S"):
        return reduce_scatter(x, axis, after.dim, after.parts)
    if pair[1] == "S":
        return slice_to_shard(x, axis, after.dim, after.parts, source=pair[0])
    if pair[0] == "P":
        return all_reduce(x, axis, to=pair[1])
    if pair[1] == "P":
        return keep_one(x, axis, source=pair[0])
    return (invariant_to_replicate if pair == ("I", "R") else replicate_to_invariant)(x, axis)


def types_of(shape, grid):
    shards = [Shard(d, parts) for d in range(len(shape)) for parts in ((), PARTS, (4, 4, 4))]
    return [R, I, P, *(s for s in shards if is_valid(shape, (s,), grid))]


@pytest.mark.parametrize("shape", [(6, 12), (12, 6, 3), (7, 5), (3, 7, 4), (4, 5)], ids=str)
def test_every_move_keeps_the_value_and_the_gradient(shape):
    grid, seen = Grid(("col",), (3 if shape[-1] != 5 or shape[0] == 7 else 2,)), set()
    whole = torch.randn(shape, dtype=torch.float64)
    for before in types_of(shape, grid):
        for after in types_of(shape, grid):
            move = move_of(before, after)
            if move is None:
                continue
            seen.add((kind(before), kind(after)))
            axes = check(
                lambda axes, x, b=before, a=after: apply_move(x, axes["col"], b, a, shape),
                lambda x: x * 1,
                [(whole, (before,))],
                (after,),
                grid,
            )
            called = sorted(_calls(axes["col"]))
            sending = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
            assert called == sorted(k for k in (move.forward, move.backward) if k in sending)
    assert seen == set(MOVES)


def test_what_is_not_kept_is_zero_whatever_it_was():
    def kept(rank, axes):
        x = torch.tensor([torch.inf, torch.nan, 1.0], requires_grad=True)
        out = keep_one(x, axes["col"])
        out.backward(torch.ones(3))
        return out.detach(), x.grad

    (kept_by_first, _), *others = results = run_ranks(LINE, kept)
    assert kept_by_first.isinf()[0] and not any(out.any() for out, _ in others)
    assert all(torch.equal(gradient, torch.ones(3)) for _, gradient in results)


def _calls(axis):
    return [k for k, times in axis.calls.items() for _ in range(times)]


@pytest.mark.parametrize("grid", [SQUARE, Grid(("row", "col"), (2, 3))], ids=str)
@pytest.mark.parametrize("size", [12, 11], ids=["even", "uneven"])
def test_inner_axis_moves_below_an_outer_shard_of_the_dim(grid, size):
    whole, outer = torch.randn(size, 6, dtype=torch.float64), Shard(0)
    lengths = {0: -(-size // 2), 1: size // 2}
    for before, after in [
        (outer, R), (outer, I), (outer, P), (outer, Shard(1)), (P, outer), (I, outer), (R, outer),
        (Shard(1), outer),
    ]:  # fmt: skip

        def move(axes, x, before=before, after=after):
            return apply_move(x, axes["col"], before, after, (lengths[axes["row"].index], 6))

        check(move, lambda x: x * 1, [(whole, (outer, before))], (outer, after), grid)


def test_blocks_below_an_outer_axis_are_the_outer_axis_own():
    whole, three = torch.randn(12, 2, dtype=torch.float64), Shard(0, (4, 4, 4))
    for before, after in [(three, R), (P, three), (R, three), (three, I)]:

        def move(axes, x, b=before, a=after):
            local = (2, 2, 2)
            b, a = (Shard(0, local) if t == three else t for t in (b, a))
            return apply_move(x, axes["col"], b, a, (6, 2))

        check(move, lambda x: x * 1, [(whole, (three, before))], (three, after), SQUARE)


def test_the_dual_of_a_gradient_is_the_move_itself():
    whole = torch.randn(6, 4, dtype=torch.float64)

    def cubed_gradient(axes, x):
        y = all_gather(x, axes["col"], 0)
        (slope,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return slope

    check(cubed_gradient, lambda x: 3 * 3 * x**2, [(whole, (Shard(0),))], (Shard(0),), LINE)


def test_sent_bytes_are_those_of_the_formula():
    whole = torch.randn(7, 5)  # 7 rows are padded to 9 on the wire
    _, _, axes = run_pieces(
        lambda axes, x: all_gather(x, axes["col"], 0, size=7),
        [(whole, (Shard(0),))],
        (torch.randn(7, 5), (R,)),
        LINE,
    )
    full = Fraction(2, 3) * 9 * 5 * 4
    assert axes["col"].sent == {"all_gather": full, "reduce_scatter": full}
    axes["col"].reset_sent()
    assert axes["col"].sent == {} and sent_bytes("all_gather", 180, 3) == full


@pytest.mark.parametrize("by", [1, 2, -1])
def test_permute_sends_round_the_ring(by):
    def one(rank, axes):
        return axes["col"].permute(torch.full((2, 3), float(rank)), by), axes["col"].sent

    for rank, (got, sent) in enumerate(run_ranks(LINE, one)):
        assert torch.equal(got, torch.full((2, 3), float((rank - by) % 3)))
        assert sent == {"permute": 24}


def test_an_axis_of_one_rank_does_nothing():
    x = torch.randn(4, requires_grad=True)
    (out,) = run_ranks(Grid(("col",), (1,)), lambda r, axes: all_gather(x, axes["col"], 0))
    assert out is x


def test_non_contiguous_values_and_gradients():
    whole = torch.randn(4, 6, dtype=torch.float64)
    layout = (I, Shard(1))
    check(
        lambda axes, x: all_gather(x.t(), axes["col"], 0).t(),
        lambda x: x * 1,
        [(whole, layout)],
        (I, R),
        SQUARE,
    )


def test_a_failing_rank_stops_the_others():
    def one(rank, axes):
        if rank == 2:
            raise ValueError("rank two")
        return all_reduce(torch.ones(2), axes["col"])

    with pytest.raises(ValueError, match="rank two") as caught:
        run_ranks(Grid(("row", "col"), (2, 2)), one)
    assert caught.value.__notes__ == ["raised on simulated rank 2"]
    assert not [t for t in threading.enumerate() if "(work)" in t.name]


def test_ranks_that_part_ways_are_told():
    def different(rank, axes):
        x = torch.ones(6)
        return all_reduce(x, axes["col"]) if rank else all_gather(x, axes["col"], 0)

    with pytest.raises(RuntimeStateError, match="different collectives"):
        run_ranks(LINE, different)
    with pytest.raises(RuntimeStateError, match="finished without taking part"):
        run_ranks(LINE, lambda rank, axes: rank and all_reduce(torch.ones(2), axes["col"]))


def test_collectives_are_graph_code():
    graph = fx.Graph()
    x, col = graph.placeholder("x"), graph.get_attr("col")
    out = graph.call_function(all_gather, (x, col), {"dim": 0})
    graph.output(graph.call_function(operator.mul, (out, 2)))

    def one(rank, axes):
        root = torch.nn.Module()
        root.col = axes["col"]
        return fx.GraphModule(root, graph)(torch.full((1,), float(rank)))

    assert [r.tolist() for r in run_ranks(LINE, one)] == [[0.0, 2.0, 4.0]] * 3


# Real ranks ------------------------------------------------------------------------------------

REAL_CASES = [
    ((8, 12), "col", Shard(0), R),
    ((7, 12), "row", Shard(0), I),
    ((6, 12), "col", Shard(1, (4, 4, 4)), R),
    ((6, 12), "col", Shard(1, (8, 2, 2)), Shard(1)),
    ((5, 7), "row", Shard(0), Shard(1)),
    ((5, 7), "col", P, Shard(1)),
    ((5, 7), "col", P, R),
    ((5, 7), "row", I, R),
    ((5, 7), "row", I, Shard(0)),
]


def run_cases(axes):
    """Run a program of every kind of collective on the ranks of a 2x2 grid."""
    out = []
    here = (axes["row"].index, axes["col"].index)
    cases = [(torch.float64, *case) for case in REAL_CASES]
    cases += [(torch.complex64, *case) for case in REAL_CASES[3:7]]
    for i, (dtype, shape, name, before, after) in enumerate(cases):
        torch_generator = torch.Generator().manual_seed(100 * i + 10 * here[0] + here[1])
        split = {before.dim: before} if isinstance(before, Shard) else {}
        x = torch.randn(shape, dtype=dtype, generator=torch_generator)
        for dim, t in split.items():
            x = slice_to_shard(x, axes[name], dim, t.parts)
        x = x.clone().requires_grad_()
        y = apply_move(x, axes[name], before, after, shape)
        (y * torch.arange(y.numel()).reshape(y.shape)).abs().sum().backward()
        out += [y.detach(), x.grad]
    for axis in axes.values():
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(here[0] + 2 * here[1]))
        for what, algorithms in OTHERS.items():
            wire = x[:4].reshape(2, 6) if what == "reduce_scatter" else x
            out += [getattr(axis, what)(wire, by=by) for by in algorithms]
    out.append(axes["row"].permute(torch.arange(5.0) + here[0]))
    source, target = torch.tensor([0, 3, 3, 1, 0, 2, 0]), torch.tensor([1, 3, 1, 0, 1, 0, 1])
    rows = torch.arange(14.0).reshape(7, 2)[source == 2 * here[0] + here[1]].requires_grad_()
    got = exchange(rows, source, target, (axes["row"], axes["col"]), 3)
    got.square().sum().backward()
    out += [got.detach(), rows.grad]
    return out, {n: (a.sent, a.calls) for n, a in axes.items()}


def real_rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "col"))
    out = run_cases(dist_axes(mesh))
    compiled = compiled_step(dist_axes(mesh)["col"])
    torch.save((out, compiled), f"{results}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def compiled_step(axis):
    """Say whether torch.compile traces collectives whole and agrees with eager."""

    def step(x):
        return all_reduce(torch.sin(all_gather(x, axis, 0)), axis, to="I").square().sum()

    grads = []
    for fn in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = torch.arange(6.0).reshape(2, 3).requires_grad_()
        fn(x).backward()
        grads.append(x.grad)
    return torch.equal(*grads)


def test_real_gloo_ranks_give_what_simulated_ranks_give(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    simulated = run_ranks(SQUARE, lambda rank, axes: run_cases(axes))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(real_rank, (f"{folder}/store", f"{folder}/out"), nprocs=4)
        for rank, (values, sent) in enumerate(simulated):
            (real, real_sent), compiled = torch.load(f"{folder}/out.{rank}", weights_only=False)
            torch.testing.assert_close(real, values)
            assert real_sent == sent and compiled
