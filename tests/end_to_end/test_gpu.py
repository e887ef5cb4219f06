"""On a GPU: training, masks, a compiled program, and a dry run. Skipped where there is none.

Ranks that share the one GPU talk over gloo, which takes its tensors.
"""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.cost_model.cluster import bandwidth_bound
from autotp.launch import launch
from tests.end_to_end.models import CLUSTER, assert_near, gpt2, llama, tokens, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

BOUND = 1e-4
"""Of each tensor's largest element: kernels sum in another order than on one rank."""


def on_gpu(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


def both(build, grid, backend, compiled=False, **options):
    """Train a model on one device and its copy on a grid, and hold that they are alike."""
    torch.cuda.set_device(0)
    if not dist.is_initialized():
        dist.init_process_group(backend)
    torch.manual_seed(0)
    model, inputs = build().train().cuda(), on_gpu(tokens())
    one = copy.deepcopy(model)
    ours = autotp.parallelize(model, grid, inputs, cluster=CLUSTER, **options)
    assert {p.device.type for p in ours.parameters()} == {"cuda"}
    assert bool(ours.plan.collectives()) == (math.prod(grid) > 1)
    torch.manual_seed(3)
    expected = train(one, inputs)
    torch.manual_seed(3)
    call = torch.compile(ours) if compiled else ours
    assert_near(train(ours, inputs, call), expected, BOUND)
    assert_near(autotp.full_state_dict(ours), one.state_dict(), BOUND)


def all_grids(build, grids):
    for grid in grids:
        both(build, grid, "gloo")


@pytest.mark.parametrize("build", (gpt2, llama))
def test_ranks_that_share_a_gpu_train_as_one_device(build):
    launch(all_grids, 4, build, ((1, 4), (4, 1), (2, 2)))


def dropped():
    return gpt2(dropout=0.2)


def test_exact_masks_are_those_of_one_device():
    launch(exact_masks, 2)


def exact_masks():
    both(dropped, (1, 2), "gloo", rng="exact")


@pytest.mark.parametrize("compiled", (False, True))
def test_a_grid_of_one_over_nccl(compiled):
    launch(both, 1, llama, (1, 1), "nccl", compiled)


def test_a_dry_run_measures_the_gpu():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).bfloat16()
        x = torch.ones(4096, 2048, dtype=torch.bfloat16)
    found = autotp.dryrun(model, (2, 2), (x,), rank=3, cluster="dgx_h100", steps=3)
    measured, memory = found.measured, found.predicted.memory
    assert measured.device == torch.cuda.get_device_name(0)
    assert memory.peak == pytest.approx(measured.peak_bytes, rel=0.15)
    assert measured.compute_s > 0 and measured.flops > 0


def test_a_rank_that_the_gpu_cannot_hold_is_refused():
    with torch.device("meta"):
        model, x = nn.Linear(2**20, 2**20), torch.ones(1, 2**20)
    with pytest.raises(autotp.AutotpError) as error:
        autotp.dryrun(model, (1, 1), (x,), cluster=bandwidth_bound())
    assert error.value.what == "one rank of grid 1x1 does not fit this device"
