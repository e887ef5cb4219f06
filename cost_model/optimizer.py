"""The optimizer: the seconds in which AdamW updates one parameter.

update_s    as measured: so much a parameter, and for each of its bytes; else memory's traffic
"""

from __future__ import annotations

from autotp.cost_model.cluster import Cluster
from autotp.cost_model.collectives import Amount
from autotp.cost_model.compute import op_s
from autotp.cost_model.memory import ADAMW_STATES

UPDATE_TRAFFIC = 2 * ADAMW_STATES + 3
"""Passes over a parameter's bytes in one AdamW step: reads p, g and states, writes p and states."""


def update_s(size_bytes: Amount, dtype: object, cluster: Cluster) -> Amount:
    """Return the seconds in which AdamW updates a parameter of which a rank holds `size_bytes`.

    What was measured holds all that torch's optimizer does: about ten operators on each parameter,
    each dispatched for a DTensor and each passing over all of it.
    """
    if not cluster.update_bytes_per_s:
        return op_s(size_bytes * 0.0, size_bytes * UPDATE_TRAFFIC, dtype, cluster)
    return size_bytes / cluster.update_bytes_per_s + cluster.update_s
