"""Running statistics of torch.nn's normalisations, written in ops that a capture can follow.

torch.export cannot follow the cumulative average of a BatchNorm without momentum, which reads a
number from a buffer, nor sees torch's functionalisation what instance_norm writes to its buffers.
Within `followed` both are plain ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

normalise_batch = _BatchNorm.forward
normalise_instances = _InstanceNorm._apply_instance_norm


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Let the normalisations of torch.nn keep their running statistics in plain ops."""
    with (
        mock.patch.object(_BatchNorm, "forward", batch_norm),
        mock.patch.object(_InstanceNorm, "_apply_instance_norm", instance_norm),
    ):
        yield


def batch_norm(norm: Any, x: Tensor) -> Tensor:
    """Return what BatchNorm does; without momentum its buffers average over all batches so far."""
    tracked = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    if not tracked or norm.momentum is not None:
        return normalise_batch(norm, x)
    norm._check_input_dim(x)
    norm.num_batches_tracked.add_(1)
    mean, var = torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)
    out = F.batch_norm(x, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
    keep(norm, mean, var, 1 / norm.num_batches_tracked)
    return out


def instance_norm(norm: Any, x: Tensor) -> Tensor:
    """Return what InstanceNorm does; its buffers take the mean of the instances' statistics."""
    if not (norm.training and norm.track_running_stats):
        out: Tensor = normalise_instances(norm, x)  # type: ignore[no-untyped-call]
        return out
    var, mean = torch.var_mean(x.detach(), tuple(range(2, x.ndim)))
    keep(norm, mean.mean(0), var.mean(0), norm.momentum or 0.0)
    return F.instance_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


def keep(norm: Any, mean: Tensor, var: Tensor, share: Tensor | float) -> None:
    """Move the running statistics by a share of the way to the new ones."""
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        running.copy_(running + share * (new.to(running.dtype) - running))
