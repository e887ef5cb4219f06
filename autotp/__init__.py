"""autotp: one line makes an unmodified PyTorch model a distributed program."""

from autotp.api import check, parallelize, plan
from autotp.comparison import Report
from autotp.errors import AutotpError
from autotp.grid import Grid
from autotp.module import full_state_dict
from autotp.plan import Plan

__all__ = [
    "AutotpError",
    "Grid",
    "Plan",
    "Report",
    "check",
    "full_state_dict",
    "parallelize",
    "plan",
]
