"""Dims that vary: one program and one plan compute what the model computes at every legal size."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.dynamic import Dynamic, DynamicDim, DynamicSplit
from autotp.errors import CaptureError, InputError
from autotp.grid import as_grid
from autotp.passes.emit.codegen import emit
from autotp.passes.planning import search_plan
from autotp.plan import Plan
from tests.models import build
from tests.random_plans import random_plan

CHIPS = bandwidth_bound(1e9, flops_per_s=1e9)  # splitting pays even for models this small
GRIDS = ((2, 2), (1, 4), (2, 3), (4, 1))
SIZES = ((2, 6), (8, 12), (3, 7))
TOKENS = {0: "batch", 1: "seq"}


def dims_of(name, inputs):
    """Name the dims of a model of `tests.models` that vary."""
    by_rank = {1: {0: "batch"}, 2: TOKENS, 3: TOKENS, 4: {0: "batch"}}
    if name == "mlp":
        return {key: {0: "batch"} for key in inputs}
    if name == "encoder, sequence first":
        return {"x": {0: "seq", 1: "batch"}}
    return {key: by_rank[x.ndim] for key, x in inputs.items()}


def resized(inputs, dynamic, sizes):
    """Return inputs of other sizes, repeated or cut."""
    out = dict(inputs)
    for key, dims in dynamic.items():
        for dim, name in dims.items():
            out[key] = torch.cat([out[key]] * 3, dim).narrow(dim, 0, sizes[name]).contiguous()
    return out


@functools.lru_cache(maxsize=1)  # a model's tests follow one another
def subjects(name, train=True):
    """Return a model prepared at the sizes of its example, and at others with the same program."""
    model, inputs = build(name, double=True)
    dynamic = dims_of(name, inputs)
    first = prepare(model.train(train), (), inputs, dynamic=dynamic)
    others = (dict(zip(("batch", "seq"), sizes, strict=True)) for sizes in SIZES)
    return first, [
        first,
        *(prepare(model, (), resized(inputs, dynamic, s), like=first) for s in others),
    ]


def run_all_sizes(subjects, plan):
    """Hold every legal size against the original; return how many there are."""
    legal = [s for s in subjects if plan.dynamic.allows(s.program.sizes_of(s.inputs))]
    for subject in legal:
        report = compare(subject, plan)
        assert report.ok, report
    return len(legal)


def best_plan(subject, grid):
    parts = subject.program, subject.network, subject.factors
    return search_plan(*parts, as_grid(grid), CHIPS).plan


NAMES = ("mlp", "gpt2", "llama", "bert", "encoder, sequence first")


@pytest.mark.parametrize("name", NAMES)
def test_one_plan_computes_what_the_model_computes_at_every_size(name):
    first, sized = subjects(name)
    assert run_all_sizes(sized, best_plan(first, (2, 2))) > 1
    assert run_all_sizes(sized, random_plan(first, as_grid((2, 3)), 1)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize(
    "name", (*NAMES, "nanogpt", "encoder, batch first", "gpt2 eager", "bert eager", "vit")
)
def test_more_models_and_random_plans(name, train):
    first, sized = subjects(name, train)
    for grid in GRIDS:
        assert run_all_sizes(sized, best_plan(first, grid)) > 1
        for seed in range(4):
            run_all_sizes(sized, random_plan(first, as_grid(grid), seed))


# One graph ----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Reads its input's shape in every way: views, a mask, a shift, an average."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.register_buffer("causal", torch.ones(16, 16).tril().bool())

    def forward(self, ids):
        b, s = ids.shape
        x = self.table(ids) * s**-0.5 + torch.arange(s).view(1, s, 1)
        x = x.masked_fill(~self.causal[:s, :s].any(0)[None, :, None], 0.0)
        heads = x.view(b, s, 2, -1).transpose(1, 2).reshape(b * 2, s, -1)
        x = heads.view(b, 2, s, -1).transpose(1, 2).flatten(2)
        logits = self.out(F.pad(x, (0, 0, 0, 1)))[:, :-1]
        shifted = logits[:, :-1].reshape(-1, 13)
        return F.cross_entropy(shifted, ids[:, 1:].reshape(-1)) + logits.new_ones(b, s).mean()


def tokens(batch=4, seq=6):
    torch.manual_seed(0)
    return {"ids": torch.randint(13, (batch, seq))}


def plan_of(grid=(2, 2), dynamic=None, **options):
    dynamic = dynamic or {"ids": TOKENS}
    return autotp.plan(Tokens(), grid, tokens(), cluster=CHIPS, dynamic=dynamic, **options)


def test_sizes_are_read_from_the_inputs_and_no_number_of_the_example_is_left():
    first = prepare(Tokens(), (), tokens(14, 15), dynamic={"ids": TOKENS})
    plan = best_plan(first, (2, 3))
    axes = dict.fromkeys(plan.grid.names)
    module = emit(first.program, first.network, plan, (1, 1), axes)
    code = module.code
    assert "batch = ids.size(0)" in code and "seq = ids.size(1)" in code
    assert "14" not in code and "15" not in code
    names = [n.name for n in module.graph.nodes]
    assert names.count("batch") == names.count("seq") == 1


@pytest.mark.parametrize("grid", ((2, 2), (1, 3)), ids=str)
def test_every_way_to_read_a_shape(grid):
    model = Tokens().double()
    first = prepare(model, (), tokens(), dynamic={"ids": TOKENS})
    sized = [first, *(prepare(model, (), tokens(*s), like=first) for s in ((2, 5), (6, 9), (3, 3)))]
    assert run_all_sizes(sized, best_plan(first, grid)) > 1
    for seed in range(3):
        run_all_sizes(sized, random_plan(first, as_grid(grid), seed))


def test_check_takes_dims_that_vary():
    report = autotp.check(Tokens(), (2, 2), tokens(), cluster=CHIPS, dynamic={"ids": TOKENS})
    assert report.ok


# The plan -----------------------------------------------------------------------------------------


def test_a_plan_says_what_may_vary(tmp_path):
    plan = plan_of()
    assert [d.name for d in plan.dynamic.dims] == ["batch", "seq"]
    assert f"  dynamic  {plan.dynamic.text()}" in str(plan)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.hash == plan.hash
    other = plan_of(dynamic={"ids": {0: "rows", 1: "seq"}})
    assert other.hash != plan.hash


def test_the_same_plan_serves_models_of_other_example_sizes():
    plan = autotp.plan(Tokens(), (2, 1), tokens(8, 6), cluster=CHIPS, dynamic={"ids": TOKENS})
    inputs = tokens(4, 5)
    assert autotp.check(Tokens(), (2, 1), inputs, plan=plan, dynamic={"ids": TOKENS}).ok


# Guards -------------------------------------------------------------------------------------------

HALVES = Dynamic(
    (DynamicDim("batch", 2), DynamicDim("seq", 2, 16)),
    (DynamicSplit("batch", (2, 2), True), DynamicSplit("seq", (4,), False)),
)


@pytest.mark.parametrize(
    ("sizes", "said"),
    (
        ((6, 8), "batch   6, must be a multiple of 4: 4 or 8"),
        ((4, 6), "seq   6, must be enough for 4 ranks: 4 or 7"),
        ((4, 17), "seq   17, at most 16"),
        ((1, 8), "batch   1, at least 2"),
    ),
)
def test_a_size_that_cannot_be_split_is_refused_with_the_nearest_legal(sizes, said):
    assert HALVES.allows({"batch": 8, "seq": 7})
    with pytest.raises(InputError) as error:
        HALVES.refuse(dict(zip(("batch", "seq"), sizes, strict=True)))
    assert f"  at      {said}\n" in str(error.value)
    assert str(error.value).startswith("InputError: the plan cannot run these sizes\n")


def test_a_size_made_of_another_is_named():
    shifted = Dynamic((DynamicDim("seq", 2),), (DynamicSplit("seq - 1", (2,), True),))
    assert shifted.text() == "seq with seq - 1 a multiple of 2"
    assert shifted.allows({"seq": 7})
    with pytest.raises(InputError, match="8, seq - 1 must be a multiple of 2: 7 or 9"):
        shifted.refuse({"seq": 8})


def test_text_of_what_may_vary():
    assert HALVES.text() == "batch a multiple of 4, seq enough for 4 ranks and at most 16"
    assert Dynamic((DynamicDim("n", 2),)).text() == "n from 2"


def test_other_inputs_are_refused_with_the_names():
    program = prepare(Tokens(), (), tokens(), dynamic={"ids": TOKENS}).program
    with pytest.raises(InputError) as error:
        program.flatten_inputs((), {"ids": tokens()["ids"].float()})
    assert "  at      ids   float32[4, 6], planned int64[batch, seq]\n" in str(error.value)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, y):
        return F.mse_loss(self.fc(x), y)


def test_dims_of_one_name_are_one_size():
    names = {"x": {0: "batch"}, "y": {0: "batch"}}
    x, y = torch.randn(4, 6), torch.randn(3, 6)
    with pytest.raises(InputError, match="batch   4 is dim 0 of x, 3 is dim 0 of y"):
        autotp.plan(Pair(), (1, 2), (x, y), dynamic=names)
    program = prepare(Pair(), (x, x), {}, dynamic=names).program
    with pytest.raises(InputError, match="batch   4 is dim 0 of x, 3 is dim 0 of y"):
        program.flatten_inputs((x, y), {})


@pytest.mark.parametrize(
    ("dynamic", "said"),
    (
        ({"z": {0: "batch"}}, "z   is no tensor of the example inputs: x, y"),
        ({"x": {2: "batch"}}, r"x   has no dim 2 in \[1, 6\]"),
        ({"x": {0: "batch"}}, "x   dim 0, batch, is 1"),
        ({"x": {1: "2b"}}, "x   '2b' is no name for dim 1"),
    ),
)
def test_what_cannot_be_declared(dynamic, said):
    with pytest.raises(InputError, match=said):
        autotp.plan(Pair(), (1, 2), (torch.randn(1, 6), torch.randn(1, 6)), dynamic=dynamic)


HELD = {
    "a view": (lambda m, x: m.fc(x).view(4, -1).sum(), r"a constant \(4\)"),
    "len": (lambda m, x: m.fc(x).view(len(x), -1).sum(), r"specialized it to be a constant \(4\)"),
    "a parameter": (lambda m, x: (m.fc(x) + m.fc.weight[:4]).sum(), "constant"),
    "an if": (lambda m, x: m.fc(x).sum() if x.shape[0] % 4 else x.sum(), "satisfy the generated"),
}


@pytest.mark.parametrize("name", HELD)
def test_a_dim_that_the_model_holds_to_a_size_is_refused_by_name(name):
    class Held(Pair):
        def forward(self, x):
            return HELD[name][0](self, x)

    with pytest.raises(CaptureError, match="the model holds dims to a size") as error:
        autotp.plan(Held(), (1, 2), (torch.randn(4, 6),), dynamic={"x": {0: "batch"}})
    error.match(f"at      batch   torch.export: .*{HELD[name][1]}")


def test_a_size_that_several_dims_hold_is_refused_by_name():
    class Held(Pair):
        def forward(self, x):
            rows = self.fc(x).flatten(0, 1)
            return (rows * torch.zeros(len(rows), 1)).sum()

    with pytest.raises(CaptureError, match=r"at      b, s   torch.export: Eq\(b\*s, 20\)"):
        autotp.plan(Held(), (1, 2), (torch.randn(4, 5, 6),), dynamic={"x": {0: "b", 1: "s"}})


def test_a_region_that_is_recomputed_takes_every_size():
    class Recomputed(Tokens):
        def forward(self, ids):
            return checkpoint(super().forward, ids, use_reentrant=False)

    model = Recomputed().double()
    first = prepare(model, (), tokens(), dynamic={"ids": TOKENS})
    sized = [first, prepare(model, (), tokens(8, 5), like=first)]
    assert run_all_sizes(sized, best_plan(first, (2, 2))) > 1


def test_a_model_finds_the_sizes_that_it_can_take():
    plan = plan_of()
    assert plan.dynamic.dims[1] == DynamicDim("seq", 3, 15)  # at 2 nothing is shifted, at 16 cut
    alone = dataclasses.replace(plan.dynamic, splits=())
    assert alone.text() == "batch from 2, seq from 3 and at most 15"
