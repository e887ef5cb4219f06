"""Memory: the bytes that one rank holds at the end of a forward pass of training.

    parameter_state_bytes   a parameter, its gradient and its optimizer states
    adamw_scratch_bytes     what AdamW takes for a moment
    rank_memory             the sums over all local tensors: Memory(...).total_bytes

Counts what lives through a step; not the allocator's slack nor the buffers of a running operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autotp.cost_model.cluster import Cluster
from autotp.cost_model.compute import tensor_bytes

ADAMW_STATES = 2
"""exp_avg and exp_avg_sq, each like its parameter.

Source: torch.optim.AdamW, which makes both with zeros_like(parameter).
"""


@dataclass(frozen=True, slots=True)
class Held:
    """Elements of one tensor that this rank holds."""

    elements: int
    dtype: str
    trained: bool = True

    @property
    def size_bytes(self) -> int:
        """Return the bytes of this tensor."""
        return tensor_bytes(self.elements, self.dtype)


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes of one rank by what they are for."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return what the rank holds in all."""
        state_bytes = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return state_bytes + self.activation_bytes

    def fits(self, cluster: Cluster) -> bool:
        """Say whether a rank of `cluster` can hold this."""
        return self.total_bytes <= cluster.memory_bytes


def parameter_state_bytes(held: Held, optimizer_states: int = ADAMW_STATES) -> int:
    """Return the bytes of a parameter with its gradient and optimizer states.

    Source: Rajbhandari et al. 2020, "ZeRO", section 3.1, all in the parameter's dtype.
    """
    return held.size_bytes * (2 + optimizer_states if held.trained else 1)


def adamw_scratch_bytes(trained: Sequence[int], cluster: Cluster) -> int:
    """Return what AdamW takes for a moment, given the bytes of each trained parameter.

    On a GPU it updates all at once, and its denominator is as large as all parameters; on a CPU
    `autotp.optimizers` chooses the fused kernel, which takes nothing.

    Source: torch.optim.adamw, _multi_tensor_adamw (_foreach_sqrt) and _fused_adamw.
    """
    return sum(trained) if cluster.backend == "nccl" else 0


def rank_memory(
    parameters: Iterable[Held], saved: Iterable[Held], optimizer_states: int = ADAMW_STATES
) -> Memory:
    """Sum the local `parameters` and the activations that are `saved` for the backward pass."""
    parameters = tuple(parameters)
    trained_bytes = sum(p.size_bytes for p in parameters if p.trained)
    return Memory(
        parameter_bytes=sum(p.size_bytes for p in parameters),
        gradient_bytes=trained_bytes,
        optimizer_bytes=optimizer_states * trained_bytes,
        activation_bytes=sum(t.size_bytes for t in saved),
    )
