"""Inputs that are not those planned for, and batches that differ between ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autotp
from tests.end_to_end.models import CLUSTER, Mlp
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import assert_says, fault


def batch(seed=0):
    torch.manual_seed(seed)
    return {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


def parallel(grid, inputs=None):
    torch.manual_seed(0)
    return autotp.parallelize(Mlp(), grid, inputs or batch(), cluster=CLUSTER)


@on_ranks((1, 2))
@fault(
    "A batch of another size, or of another dtype",
    """
    InputError: the inputs are not those that were planned for
      at      x        float32[7, 8], planned float32[8, 8]
      at      target   float64[8, 8], planned float32[8, 8]
      remedy  pass inputs like the example inputs, or plan again with these
      remedy  name the dims that vary: dynamic={"input_ids": {0: "batch", 1: "seq"}}
    """,
)
def test_shape_and_dtype(grid):
    model, inputs = parallel(grid), batch()
    model(x=inputs["x"][:7], target=inputs["target"].double())


@on_ranks((1, 2))
@fault(
    "An argument that was not planned, and one that is missing",
    """
    InputError: the inputs are not those that were planned for
      at      target      absent, planned float32[8, 8]
      at      target[0]   float32[8, 8], planned absent
      at      target[1]   float32[8, 8], planned absent
      remedy  pass inputs like the example inputs, or plan again with these
      remedy  name the dims that vary: dynamic={"input_ids": {0: "batch", 1: "seq"}}
    """,
)
def test_structure(grid):
    model, x = parallel(grid), batch()["x"]
    model(x, [x, x])


@on_ranks((1, 2))
@fault(
    "A call that the model does not take",
    """
    InputError: the model cannot be called so: got an unexpected keyword argument 'mask'
      remedy  forward(x, target=None)
    """,
)
def test_call(grid):
    model, x = parallel(grid), batch()["x"]
    model(x, mask=x)


@on_ranks((1, 2))
@fault(
    "An input that asks for a gradient which was not planned",
    """
    InputError: the inputs are not those that were planned for
      at      x   float32[8, 8] with requires_grad, planned float32[8, 8]
      remedy  pass inputs like the example inputs, or plan again with these
      remedy  name the dims that vary: dynamic={"input_ids": {0: "batch", 1: "seq"}}
    """,
)
def test_gradient(grid):
    model, inputs = parallel(grid), batch()
    model(x=inputs["x"].requires_grad_(), target=inputs["target"])


class Folded(nn.Module):
    """Its batch and sequence are one dim: batches are split in whole sequences."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x.flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[1])).mean()


@on_ranks((1, 2))
@fault(
    "A batch that may vary, and is not a multiple of the ranks that split it",
    """
    InputError: the plan cannot run these sizes
      at      batch   7, must be a multiple of 2: 6 or 8
      remedy  pad or drop the last batch, or plan again with these sizes
    """,
)
def test_multiple(grid):
    torch.manual_seed(0)
    x, pins = torch.randn(8, 4, 8), {"fc": {"col": "x"}}
    options = {"cluster": CLUSTER, "pins": pins, "dynamic": {"x": {0: "batch"}}}
    model = autotp.parallelize(Folded(), grid, (x,), **options)
    for rows in (6, 7):
        model(x[:rows])


@on_ranks((1, 2))
@fault(
    "Another shape on one rank alone",
    """
    InputError: the inputs are not those that were planned for
      at      x        float32[6, 8], planned float32[8, 8]
      at      target   float32[6, 8], planned float32[8, 8]
      remedy  pass inputs like the example inputs, or plan again with these
      remedy  name the dims that vary: dynamic={"input_ids": {0: "batch", 1: "seq"}}
    """,
)
def test_one_rank(grid):
    model, inputs = parallel(grid), batch()
    rows = 8 - 2 * dist.get_rank()
    model(**{name: x[:rows] for name, x in inputs.items()})


@on_ranks((1, 2))
@fault(
    "Another batch on a rank",
    """
    RuntimeStateError: the ranks have different inputs
      at      rank 1   x: ..., on rank 0 ...
      remedy  pass the same global batch on every rank: no DistributedSampler, one seed
    """,
)
def test_other_batch(grid):
    model = parallel(grid)
    model(**{**batch(), "x": batch(seed=dist.get_rank())["x"]})


@on_ranks((2, 2))
@fault(
    "Another batch on a rank, from its third step on",
    """
    RuntimeStateError: the ranks have different inputs
      at      rank 2   x: ..., on rank 0 ...
      at      rank 2   target: ..., on rank 0 ...
      remedy  pass the same global batch on every rank: no DistributedSampler, one seed
    """,
)
def test_other_batch_later(grid):
    model = parallel(grid)
    for step in range(3):
        model(**batch(seed=step + (dist.get_rank() == 2) * (step == 2)))


@on_ranks((1, 2))
def test_only_the_first_calls_of_a_mode_are_compared(grid):
    model, inputs = parallel(grid), batch()
    for _ in range(3):
        model(**inputs)
    counts = []
    real = dist.all_gather_object
    dist.all_gather_object = lambda *a, **k: counts.append(a) or real(*a, **k)
    try:
        model(**inputs)
        assert not counts
        model.eval()
        model(**inputs)
        assert counts
    finally:
        dist.all_gather_object = real


# What does not divide: another layout is chosen, and the plan says so ----------------------------


def llama(heads, key_heads):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16 * heads,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("heads", "key_heads", "rows", "grid", "notes"),
    [
        (
            6,
            6,
            4,
            (1, 4),
            ["heads 6 on axis 'col' of 4: not split, 6 % 4 != 0 (model.layers.0...)"],
        ),
        (
            6,
            2,
            6,
            (2, 3),
            ["KV heads 2 on axis 'col' of 3: not split, 2 % 3 != 0 (model.layers.0...)",
             "heads of a KV head 3 on axis 'row' of 2: not split, 3 % 2 != 0 (model.layers.0...)"],
        ),
        (4, 4, 7, (2, 2), ["batch 7 on axis 'row' of 2: not split, 7 % 2 != 0 (...)",
                           "batch 7 on axis 'col' of 2: not split, 7 % 2 != 0 (...)"]),
        (4, 2, 4, (2, 2), []),
    ],
)  # fmt: skip
def test_the_plan_notes_what_does_not_divide(heads, key_heads, rows, grid, notes):
    model = llama(heads, key_heads)
    ids = torch.zeros(rows, 8, dtype=torch.long)
    plan = autotp.plan(model, grid, dict(input_ids=ids, labels=ids), cluster=CLUSTER)
    assert len(plan.notes) == len(notes), plan.notes
    for said, wanted in zip(sorted(plan.notes), sorted(notes), strict=True):
        assert_says(said, wanted)
        assert f"  note     {said}" in str(plan)


def test_a_model_whose_heads_do_not_divide_is_right():
    model = llama(3, 3)
    ids = torch.randint(64, (2, 8))
    report = autotp.check(model, (1, 2), dict(input_ids=ids, labels=ids), cluster=CLUSTER)
    assert report.ok, report
