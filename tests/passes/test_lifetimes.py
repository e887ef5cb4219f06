"""The peak that a plan states is what lives at once in the program of a rank, run alone."""

import math
from dataclasses import replace

import pytest
import torch

from autotp.cost_model.cluster import gloo_loopback
from autotp.grid import as_grid
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.plan import AT_ONCE, WHERE_MADE
from autotp.rank_program import alone, peak
from autotp.reading import inferred
from autotp.schemes import SCHEMES, pins_of
from autotp.silent_axis import CopyClock, silent_axes
from tests.models import VOCAB, NanoGPT

CPU = torch.device("cpu")
PARAMETERS, ACTIVATIONS = 4, 64
"""The batch: what is held most of."""


@pytest.mark.parametrize(
    ("scheme", "grid", "batch", "error", "overlap"),
    [
        ("data_parallel", (4, 1), PARAMETERS, 0.02, 0.0),
        ("batch_x_tensor", (2, 2), PARAMETERS, 0.02, 0.0),
        ("fsdp", (4, 1), PARAMETERS, 0.02, 0.0),
        ("megatron", (1, 4), PARAMETERS, 0.02, 0.0),
        ("data_parallel", (4, 1), ACTIVATIONS, 0.05, 0.0),
        ("megatron", (1, 4), ACTIVATIONS, 0.05, 0.0),
        ("fsdp_again", (4, 1), ACTIVATIONS, 0.08, 0.0),
        ("fsdp", (4, 1), ACTIVATIONS, 0.08, 0.9),
    ],
)
def test_the_peak_is_what_lives_at_once(scheme, grid, batch, error, overlap):
    model, grid = NanoGPT(width=512 if overlap else 128, heads=4), as_grid(grid)
    ids = torch.randint(VOCAB, (batch, 16))
    inputs = {"idx": ids, "targets": ids}
    found = inferred(model, (), inputs, Options())
    cluster = replace(gloo_loopback(), memory_bytes=math.inf, overlap=overlap)
    plan = search_plan(*found, grid, cluster, pins_of(SCHEMES[scheme], *found, grid)).plan
    assert any(b.begins not in (AT_ONCE, WHERE_MADE) for b in plan.buckets) == bool(overlap)
    values = found[0].flatten_inputs((), inputs)
    axes = silent_axes(grid, (0, 0), CopyClock(CPU))
    rank = alone(found, plan, (0, 0), axes, dict(model.named_buffers()), values, CPU)
    rank.step()
    held = peak(rank)[0] - sum(x.nbytes for x in values)
    assert plan.memory.at_once == pytest.approx(held, rel=error)
