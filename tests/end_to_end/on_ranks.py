"""Tests whose body runs on every rank of real process groups.

`@on_ranks((1, 2), (2, 2))` makes one test per grid. All bodies for as many ranks share one launch,
made by the first test that needs it; each body then fails or passes by itself. A rank that waits
for a lost one gives up after a minute.
"""

import functools
import importlib
import math
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from autotp.launch import launch

BODIES = {}


def on_ranks(*grids):
    def register(body):
        for grid in grids:
            BODIES.setdefault(math.prod(grid), {})[key(body, grid)] = (body, grid)

        @pytest.mark.parametrize("grid", grids, ids=str)
        @functools.wraps(body)
        def test(grid):
            failures = outcomes(math.prod(grid))[key(body, grid)]
            if failures:
                pytest.fail("\n".join(failures), pytrace=False)

        return test

    return register


def key(body, grid):
    return f"{body.__module__}.{body.__name__}{grid}"


@functools.cache
def outcomes(ranks):
    """Return, by body and grid, the tracebacks of the ranks on which it failed."""
    modules = sorted({body.__module__ for body, _ in BODIES[ranks].values()})
    by_rank = launch(run_bodies, ranks, modules)
    return {
        name: [f"rank {n}: {found[name]}" for n, found in enumerate(by_rank) if found[name]]
        for name in by_rank[0]
    }


def run_bodies(modules):
    for name in modules:
        importlib.import_module(name)
    ranks = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return {name: failure(body, grid) for name, (body, grid) in BODIES[ranks].items()}


def failure(body, grid):
    torch.manual_seed(0)
    try:
        body(grid)
    except Exception:
        return traceback.format_exc()
    return ""
