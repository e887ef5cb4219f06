"""autotp: one line makes an unmodified PyTorch model a distributed program."""

from autotp import schemes
from autotp.api import check, parallelize, plan
from autotp.comparison import Report
from autotp.cost_model.cluster import Cluster
from autotp.errors import AutotpError
from autotp.grid import Grid
from autotp.module import full_state_dict
from autotp.plan import Plan

__all__ = [
    "AutotpError",
    "Cluster",
    "Grid",
    "Plan",
    "Report",
    "check",
    "full_state_dict",
    "parallelize",
    "plan",
    "schemes",
]
