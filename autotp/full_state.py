"""The original model's state dict from all ranks together."""

from __future__ import annotations

from torch import Tensor, nn

from autotp.liveness import roll_call
from autotp.placements import whole

REMEDY = (
    "call autotp.full_state_dict(model) on every rank, and save what it returns on rank 0",
    "model.state_dict() is this rank's own part, and may be called on one rank alone",
)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the original model's state dict, every tensor whole. All ranks must call it.

    Raises LostRankError, with the ranks that have not come, after the process group's timeout.
    """
    roll_call("autotp.full_state_dict", REMEDY)
    return {name: whole(value) for name, value in model.state_dict().items()}
