"""On real ranks: one program for batches and sequences of several sizes, the last batch short."""

import pytest
import torch

from autotp.errors import InputError
from tests.end_to_end.models import VOCAB, Mlp, assert_near, gpt2
from tests.end_to_end.on_ranks import on_ranks
from tests.end_to_end.test_module import backward, pair

TOKENS = {0: "batch", 1: "seq"}


def ids(batch, seq):
    tokens = torch.randint(VOCAB, (batch, seq))
    return {"input_ids": tokens, "labels": tokens.clone()}


@on_ranks((1, 2), (2, 2))
def test_batches_of_several_sizes(grid):
    dynamic = {"input_ids": TOKENS, "labels": TOKENS}
    one, ours = pair(gpt2, grid, ids(4, 8), dynamic=dynamic, pins={"*.c_fc": {"col": "o"}})
    programs = {ours.graph_module}
    for batch, seq in ((4, 8), (8, 16), (4, 5)):
        inputs = ids(batch, seq)
        assert_near(backward(ours, inputs), backward(one, inputs))
        programs.add(ours.graph_module)
    assert len(programs) == 1
    one.eval()
    ours.eval()
    with torch.no_grad():  # without labels: another program, whose dims vary as well
        for batch, seq in ((4, 8), (8, 3)):
            tokens = ids(batch, seq)["input_ids"]
            assert_near({"y": ours(tokens).logits}, {"y": one(tokens).logits})


@on_ranks((1, 2))
def test_a_short_batch_works_or_names_what_it_must_be(grid):
    dynamic = {"x": {0: "batch"}, "target": {0: "batch"}}
    rows = {"fc1": {"col": ".0"}, "fc2": {"col": ".0"}}
    batches = [{"x": torch.randn(n, 8), "target": torch.randn(n, 8)} for n in (8, 5, 1)]
    one, ours = pair(Mlp, grid, batches[0], dynamic=dynamic, pins=rows)
    for inputs in batches[:2]:
        assert_near(backward(ours, inputs), backward(one, inputs))
    with pytest.raises(InputError, match="batch   1, at least 2"):
        ours(**batches[2])
    compiled = torch.compile(ours, backend="eager", dynamic=True)
    for inputs in batches[:2]:
        assert_near(backward(ours, inputs, compiled), backward(one, inputs))


@on_ranks((1, 2))
def test_sharded_outputs_have_the_size_of_the_call(grid):
    pins = {"fc1": {"col": ".0"}, "fc2": {"col": ".0"}}
    options = {"dynamic": {"x": {0: "batch"}}, "outputs": "sharded", "pins": pins}
    one, ours = pair(Mlp, grid, {"x": torch.randn(8, 8)}, **options)
    for n in (8, 6, 3):
        x = torch.randn(n, 8)
        y = ours(x)
        assert y.shape == (n, 8) and y.to_local().shape[0] < n
        assert_near({"y": y.full_tensor().detach()}, {"y": one(x).detach()})
