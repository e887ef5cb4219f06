"""Products that make a move themselves, on real ranks: gradients, bytes, a step."""

import torch

from autotp import schemes
from autotp.passes.products import products_that_move
from autotp.products import SCHEDULES
from tests.end_to_end.on_ranks import on_ranks
from tests.end_to_end.test_together import assert_same, both, loss_of, whole


@on_ranks((2, 2), (1, 2))
def test_a_step_is_that_of_one_device(grid):
    for how in SCHEDULES:
        scheme = schemes.summa if grid == (2, 2) else schemes.megatron_sp

        def forced(model, grid, inputs, how=how, scheme=scheme):
            return {**scheme(model, grid, inputs), "*": {"col": f"by {how}"}}

        model, parallel, inputs = both(grid, scheme=forced)
        assert {row[1:] for row in products_that_move(parallel.plan)} == {("col", how)}
        axes = parallel._autotp.axes
        for axis in axes.values():
            axis.reset_sent()
        loss_of(model, inputs).backward()
        loss_of(parallel, inputs).backward()
        sent = {(kind, a.name): n for a in axes.values() for kind, n in a.sent.items() if n}
        assert sent == {k: n for k, n in parallel.plan.sent().items() if n}
        assert_same(model, parallel)
        for m in (model, parallel):
            torch.optim.AdamW(m.parameters(), lr=1e-2).step()
        theirs = dict(parallel.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(whole(theirs[name]), p, rtol=1e-7, atol=1e-10, msg=name)
