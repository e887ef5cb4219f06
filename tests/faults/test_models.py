"""Models that something else has wrapped, sharded, compiled or quantised, or that are empty."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import autotp
from tests.end_to_end.models import CLUSTER
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import fault

X = torch.randn(4, 8)


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def plan(model):
    autotp.plan(model, (1, 2), (X,), cluster=CLUSTER)


@pytest.fixture
def alone():
    """A process group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@fault(
    "Wrapped in DDP",
    """
    WrappedModelError: autotp takes a plain model, and this DistributedDataParallel is not one
      at      the model   is wrapped in DDP, which would average the gradients again
      remedy  pass the model inside: wrapper.module; data parallelism is a choice of the plan
    """,
)
def test_ddp():
    plan(DistributedDataParallel(mlp()))


@fault(
    "Wrapped in DataParallel",
    """
    WrappedModelError: autotp takes a plain model, and this DataParallel is not one
      at      the model   is wrapped in DataParallel, which copies the model
      remedy  pass the model inside: wrapper.module; data parallelism is a choice of the plan
    """,
)
def test_data_parallel():
    plan(nn.DataParallel(mlp()))


@pytest.mark.usefixtures("alone")
@fault(
    "Wrapped in FSDP",
    """
    WrappedModelError: autotp takes a plain model, and this FullyShardedDataParallel is not one
      at      the model   is wrapped in FSDP, which has flattened the parameters
      remedy  pass the model inside: wrapper.module; data parallelism is a choice of the plan
    """,
)
def test_fsdp():
    plan(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")))


@pytest.mark.usefixtures("alone")
@fault(
    "Sharded by fully_shard (FSDP2)",
    """
    WrappedModelError: autotp takes a plain model, and this FSDPSequential is not one
      at      the model   is sharded by fully_shard, which gathers by itself
      at      2           is sharded by fully_shard, which gathers by itself
      remedy  leave out FSDP: pins=autotp.schemes.fsdp(model, grid, inputs) plans the same
    """,
)
def test_fully_shard():
    model = mlp()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    plan(model)


@pytest.mark.usefixtures("alone")
@fault(
    "Parameters that are DTensors already",
    """
    WrappedModelError: autotp takes a plain model, and this Sequential is not one
      at      0.weight   is a DTensor already: S(0)
      at      2.weight   is a DTensor already: S(0)
      remedy  pass whole parameters: autotp distributes them itself
    """,
)
def test_dtensor_parameters():
    model, mesh = mlp(), init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]))
    plan(model)


@fault(
    "Compiled by torch.compile",
    """
    WrappedModelError: autotp takes a plain model, and this OptimizedModule is not one
      at      the model   is compiled by torch.compile, which hides the module
      remedy  call autotp.parallelize first, then torch.compile what it returns
    """,
)
def test_compiled():
    plan(torch.compile(mlp()))


@fault(
    "Compiled by module.compile()",
    """
    WrappedModelError: autotp takes a plain model, and this Sequential is not one
      at      0   is compiled by module.compile(), which hides the module
      remedy  call autotp.parallelize first, then torch.compile what it returns
    """,
)
def test_compiled_in_place():
    model = mlp()
    model[0].compile()
    plan(model)


@fault(
    "A TorchScript module",
    """
    WrappedModelError: autotp takes a plain model, and this RecursiveScriptModule is not one
      at      the model   is a TorchScript module, which cannot be captured
      at      0           is a TorchScript module, which cannot be captured
      at      1           is a TorchScript module, which cannot be captured
      at      2           is a TorchScript module, which cannot be captured
      remedy  pass the Python module
    """,
)
def test_scripted():
    with warnings.catch_warnings(action="ignore"):
        plan(torch.jit.script(mlp()))


@fault(
    "Quantised modules",
    """
    WrappedModelError: autotp takes a plain model, and this Sequential is not one
      at      0                  is quantised: its weights are packed
      at      0._packed_params   is quantised: its weights are packed
      at      2                  is quantised: its weights are packed
      at      2._packed_params   is quantised: its weights are packed
      remedy  load the weights in floating point: float32, bfloat16 or float16
    """,
)
def test_quantised():
    with warnings.catch_warnings(action="ignore"):
        plan(torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}))


@fault(
    "Weights of eight bits",
    """
    WrappedModelError: autotp takes a plain model, and this Sequential is not one
      at      0.weight   is quantised: int8
      at      2.weight   is quantised: int8
      remedy  load the weights in floating point: float32, bfloat16 or float16
    """,
)
def test_quantised_weights():
    model = mlp()
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    plan(model)


@fault(
    "Lazy modules that were never called",
    """
    WrappedModelError: autotp takes a plain model, and this Sequential is not one
      at      0.weight   is not initialised yet
      at      0.bias     is not initialised yet
      remedy  call the model once, to give it shapes
    """,
)
def test_lazy():
    plan(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)))


@fault(
    "Several of these at once",
    """
    WrappedModelError: autotp takes a plain model, and this Sequential is not one
      at      0          is compiled by module.compile(), which hides the module
      at      1.weight   is quantised: int8
      at      2.weight   is quantised: int8
      at      3.weight   is quantised: int8
      at      4.weight   is quantised: int8
      at      and more   2 others: is quantised: int8
      remedy  call autotp.parallelize first, then torch.compile what it returns
      remedy  load the weights in floating point: float32, bfloat16 or float16
    """,
)
def test_all_problems_in_one_error():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(7)])
    model[0].compile()
    for layer in list(model)[1:]:
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    plan(model)


@fault(
    "A model on the meta device, never given values",
    """
    AutotpError: 7 tensors of Sequential are on the meta device
      at      0.weight   has no values
      at      0.bias     has no values
      at      1.weight   has no values
      at      1.bias     has no values
      at      and more   3 others: has no values
      remedy  model.to_empty(device="cpu") and load weights; autotp.plan needs none
    """,
)
def test_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    autotp.check(model, (1, 2), (X,))


def test_a_plan_needs_no_values():
    with torch.device("meta"):
        autotp.plan(mlp(), (1, 2), (torch.randn(4, 8),), cluster=CLUSTER)


@on_ranks((1, 2))
@fault(
    "A model that is parallel already",
    """
    AutotpError: ParallelSequential is parallel already
      at      the model   runs on grid 1x2
      remedy  call autotp.parallelize once, on the original model
    """,
)
def test_parallel_already(grid):
    model = autotp.parallelize(mlp(), grid, (X,), cluster=CLUSTER)
    autotp.parallelize(model, grid, (X,), cluster=CLUSTER)
