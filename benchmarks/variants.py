"""The ways to train one model on all ranks: autotp's plan, its schemes, torch's own, one process.

    VARIANTS     name -> a function from a model with its inputs to its training step, on this rank
    REFERENCE    what the others are compared with

A variant that does not fit a model raises Refused. Where each rank trains on its part of the
batch, the loss that a step returns is the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from gauges import Step
from shapes import GPT, Built, Inputs, WideMlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import autotp
from autotp.cost_model.cluster import Cluster
from autotp.schemes import SCHEMES, scheme_pins

SQUARE_GRID = (2, 2)

Variant = Callable[[Built, Cluster], tuple[Step, autotp.Plan | None]]
Styles = dict[str, ParallelStyle]


class Refused(Exception):
    """A variant does not fit the model; the text says why."""


def training_step(
    model: nn.Module,
    inputs: Inputs,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """Return a function that makes one step of AdamW and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        with around():
            out = model(**inputs)
            loss = out if isinstance(out, torch.Tensor) else out.loss
            loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def sets_of(names: Sequence[str], first: str, size: int) -> list[list[str]]:
    """Return the names that are held at once: `first` in each set of `size`, or of two."""
    others = [name for name in names if name != first]
    beside = max(1, size - 1)
    starts = range(0, max(1, len(others)), beside)
    return [[first, *others[start : start + beside]] for start in starts]


# autotp ------------------------------------------------------------------------------------------


def planned(built: Built, cluster: Cluster) -> tuple[Step, autotp.Plan]:
    """Leave everything to the planner, the grid too."""
    return _parallel(built, dist.get_world_size(), cluster, None)


def planned_in(share: float, built: Built, cluster: Cluster) -> tuple[Step, autotp.Plan]:
    """Leave all but the grid to the planner, in a share of the memory that it would take."""
    free = autotp.plan(built[0], SQUARE_GRID, built[1], cluster=cluster)
    less = replace(cluster, memory_bytes=share * free.memory.total)
    return _parallel(built, SQUARE_GRID, less, None)


def scheme(name: str, grid: tuple[int, int], built: Built, cluster: Cluster) -> Any:
    """Pin a published scheme on a grid."""
    try:
        pins = scheme_pins(name, built[0], grid, built[1])
        return _parallel(built, grid, cluster, pins)
    except autotp.AutotpError as error:
        raise Refused(error.what) from error


def _parallel(built: Built, grid: Any, cluster: Cluster, pins: Any) -> tuple[Step, autotp.Plan]:
    model = autotp.parallelize(built[0], grid, built[1], cluster=cluster, pins=pins)
    return training_step(model, built[1]), model.plan


# torch -------------------------------------------------------------------------------------------


def torch_tensor_parallel(sequence: bool, built: Built, cluster: Cluster) -> tuple[Step, None]:
    """Split columns, rows and the vocabulary by parallelize_module; with `sequence`, the stream."""
    model, inputs = built
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, styles(model, sequence))
    if isinstance(model, GPT) and model.tied:
        model.head.weight = model.wte.weight  # each module got a parameter of its own
    around = nullcontext if isinstance(model, WideMlp) else loss_parallel
    return training_step(model, inputs, around), None


def styles(model: nn.Module, sequence: bool) -> Styles:
    """Return torch's styles for each module: q, k and v share one gather, and one reduction."""
    found = STYLES.get(type(model).__name__)
    if found is None:
        raise Refused(f"no hand-written plan for {type(model).__name__}")
    return found(len(_blocks(model)), sequence)


def _mlp_styles(count: int, sequence: bool) -> Styles:
    """Linears two by two; with `sequence`, the rows are split between the pairs."""
    between = Shard(0) if sequence else Replicate()
    out: Styles = {}
    for i in range(0, count, 2):
        first, last = i == 0, i == count - 2
        out[f"layers.{i}"] = ColwiseParallel(input_layouts=Replicate() if first else between)
        out[f"layers.{i + 1}"] = RowwiseParallel(output_layouts=Replicate() if last else between)
    return out


def _gpt_styles(layers: int, sequence: bool) -> Styles:
    stream = Shard(1) if sequence else Replicate()
    out: Styles = {
        "wte": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=stream, use_local_output=not sequence
        ),
        "head": ColwiseParallel(
            input_layouts=stream, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    for i in range(layers):
        at = f"blocks.{i}"
        out[f"{at}.attn"] = out[f"{at}.mlp"] = PrepareModuleInput(
            input_layouts=(stream,), desired_input_layouts=(Replicate(),)
        )
        out |= {f"{at}.{name}": ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v")}
        out[f"{at}.mlp.fc1"] = ColwiseParallel()
        for name in ("attn.o", "mlp.fc2"):
            out[f"{at}.{name}"] = RowwiseParallel(
                output_layouts=stream, use_local_output=not sequence
            )
        if sequence:
            out |= {f"{at}.{norm}": SequenceParallel() for norm in ("ln_1", "ln_2")}
    if sequence:
        out["ln_f"] = SequenceParallel()
        out["wpe"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(0), use_local_output=False
        )
    return out


def _llama_styles(layers: int, sequence: bool) -> Styles:
    stream = Shard(1) if sequence else Replicate()
    local = not sequence
    out: Styles = {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=stream, use_local_output=local
        ),
        "lm_head": ColwiseParallel(
            input_layouts=stream, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        out[f"{at}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": stream},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
        out[f"{at}.mlp"] = PrepareModuleInput(
            input_layouts=(stream,), desired_input_layouts=(Replicate(),)
        )
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            out[f"{at}.{name}_proj"] = ColwiseParallel()
        for name in ("self_attn.o", "mlp.down"):
            out[f"{at}.{name}_proj"] = RowwiseParallel(
                output_layouts=stream, use_local_output=local
            )
        if sequence:
            out[f"{at}.input_layernorm"] = SequenceParallel()
            out[f"{at}.post_attention_layernorm"] = SequenceParallel()
    if sequence:
        out["model.norm"] = SequenceParallel()
    return out


STYLES: dict[str, Callable[[int, bool], Styles]] = {
    "GPT": _gpt_styles,
    "LlamaForCausalLM": _llama_styles,
    "WideMlp": _mlp_styles,
}


def torch_ddp(built: Built, cluster: Cluster) -> tuple[Step, None]:
    """Repeat the model and split the batch; gradients are all-reduced as they come."""
    model, inputs = built
    return _mean(training_step(DistributedDataParallel(model), _part(inputs))), None


def torch_fsdp(built: Built, cluster: Cluster) -> tuple[Step, None]:
    """Shard every block's parameters, gather them where they are used, and split the batch."""
    model, inputs = built
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _mean(training_step(model, _part(inputs))), None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated modules of a model: the longest list in it."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def _part(inputs: Inputs) -> Inputs:
    """Return this rank's part of the batch. Raises Refused where it does not divide."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if any(x.shape[0] % ranks for x in inputs.values()):
        raise Refused(f"the batch does not divide by {ranks}")
    return {name: x.chunk(ranks)[rank].contiguous() for name, x in inputs.items()}


def _mean(step: Step) -> Step:
    """Return a step whose loss is the mean over ranks."""

    def mean() -> float:
        loss = torch.tensor([step()], dtype=torch.float64)
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()

    return mean


def one_process(built: Built, cluster: Cluster) -> tuple[Step, None]:
    """Train the unmodified model on rank 0 while the others wait."""
    step = training_step(*built) if dist.get_rank() == 0 else lambda: 0.0
    return step, None


# The table ---------------------------------------------------------------------------------------

SQUARE = ("batch_x_tensor", "ring_attention", "summa", "summa_abt", "weight_stationary")
"""The schemes whose axes have different roles; the others take all ranks as one axis."""

GRIDS = {name: SQUARE_GRID if name in SQUARE else (1, 4) for name in SCHEMES}
"""The grid of four ranks that each scheme is run on."""

REFERENCE = "torch TP"
PLANNED = "autotp"
SHARE = 0.9
"""Of the memory of the free plan: what is made again costs little at first."""
LESS = f"autotp in {SHARE:.0%}"


def _schemes() -> dict[str, Variant]:
    return {f"autotp {name}": partial(scheme, name, grid) for name, grid in GRIDS.items()}


VARIANTS: dict[str, Variant] = {
    REFERENCE: partial(torch_tensor_parallel, False),
    PLANNED: planned,
    LESS: partial(planned_in, SHARE),
    **_schemes(),
    "torch TP+SP": partial(torch_tensor_parallel, True),
    "torch DDP": torch_ddp,
    "torch FSDP2": torch_fsdp,
    "one process": one_process,
}
