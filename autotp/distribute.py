"""From whole parameters to DTensors that rest as planned, in the user's own modules.

Names, ties, attributes and hooks of parameters stay; optimizers are told of each successor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp.grid import Coords, Grid
from autotp.layouts import Layout, take_shard
from autotp.optimizers import note_replacement
from autotp.placements import as_parameter
from autotp.plan import Resting
from autotp.ranks import checksum, refuse_disagreement, together


class whole_parameters:
    """Put parameters of the whole shape in place of sharded ones; capture never reads them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        whole: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, p in module._parameters.items():
                if isinstance(p, DTensor):
                    self.kept.append((module, name, p))
                    if id(p) not in whole:
                        blank = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                        whole[id(p)] = nn.Parameter(blank, requires_grad=p.requires_grad)
                    module._parameters[name] = whole[id(p)]

    def __exit__(self, *_error: object) -> None:
        for module, name, p in self.kept:
            module._parameters[name] = p


def owners_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and the attribute of every parameter and buffer, tied names included."""
    return {
        (f"{path}.{name}" if path else name): (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }


def compare_weights(model: nn.Module) -> None:
    """Raise RuntimeStateError unless all ranks hold the same parameters and buffers."""
    refuse_disagreement(
        "weights",
        {name: checksum(value) for name, value in model.state_dict().items()},
        "call torch.manual_seed before the model is built, or load one checkpoint",
    )


def distribute(
    model: nn.Module, params: Mapping[str, Resting], grid: Grid, coords: Coords, mesh: DeviceMesh
) -> dict[str, Layout]:
    """Replace every parameter by the DTensor that rests as planned, keeping ties and attributes.

    Return how each rests, tied names included.
    """
    owners = owners_of(model)
    if grid.world_size > 1:
        compare_weights(model)
    # Kept whole while they are replaced: ties are known by identity, a module by several paths.
    originals = {fqn: module._parameters.get(name) for fqn, (module, name) in owners.items()}
    resting = {id(originals[fqn]): r.layout for fqn, r in params.items()}
    layouts = {fqn: resting[id(old)] for fqn, old in originals.items() if old is not None}

    def replace() -> None:
        made: dict[int, nn.Parameter] = {}
        for fqn, (module, name) in owners.items():
            old = originals[fqn]
            if old is None:
                continue
            if id(old) not in made:
                local = take_shard(old.detach(), layouts[fqn], grid, coords).clone()
                new = as_parameter(local, layouts[fqn], old.shape, mesh, old.requires_grad)
                new.__dict__.update(old.__dict__)
                carry_hooks(old, new)
                made[id(old)] = new
                note_replacement(old, new)
            module._parameters[name] = made[id(old)]

    together(replace)
    return layouts


def carry_hooks(old: nn.Parameter, new: nn.Parameter) -> None:
    """Register the hooks of a parameter on its successor: they see the gradient as a DTensor."""
    for hook in (old._backward_hooks or {}).values():
        new.register_hook(hook)  # type: ignore[no-untyped-call]
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        new.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
