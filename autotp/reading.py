"""What a call gives, as planning wants it: inputs taken apart, the cluster, the model captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autotp.calibrate import cached_cluster
from autotp.cost_model.cluster import Cluster, by_name
from autotp.options import Options
from autotp.passes.capture.model import capture
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.network import Network, read_network, refuse_unruled
from autotp.passes.program import Program
from autotp.progress import stage


def read(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    train: bool,
    options: Options,
) -> tuple[Program, Network]:
    """Return a model as program and network; with `strict`, only if every op has a rule."""
    program = capture(model, args, kwargs, train=train, dynamic=options.dynamic)
    network = read_network(program)
    if options.strict:
        refuse_unruled(program, network)
    return program, network


def inferred(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> tuple[Program, Network, Factors]:
    """Return a model as program, network and factors."""
    with stage("capture"):
        program, network = read(model, args, kwargs, model.training, options)
    with stage("infer factors"):
        return program, network, infer_factors(network, program.inputs)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of example inputs: a tuple, a dict, or (tuple, dict)."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    items = tuple(example_inputs)
    if len(items) == 2 and isinstance(items[0], tuple) and isinstance(items[1], Mapping):
        return items[0], dict(items[1])
    return items, {}


MEASURE = "measure"
"""The name of a cluster that stands for this machine."""


def as_cluster(cluster: Cluster | str | None, device: torch.device, ranks: int) -> Cluster:
    """Return a cluster: as given, by name, measured before, or the default of the device."""
    if isinstance(cluster, Cluster):
        return cluster
    if cluster == MEASURE:
        return cached_cluster(ranks, device)
    return by_name(cluster or ("dgx_h100" if device.type == "cuda" else "gloo_loopback"))
