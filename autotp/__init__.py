"""autotp: one line makes an unmodified PyTorch model a distributed program."""

from autotp.api import parallelize, plan
from autotp.errors import AutotpError
from autotp.grid import Grid
from autotp.module import full_state_dict
from autotp.plan import Plan

__all__ = ["AutotpError", "Grid", "Plan", "full_state_dict", "parallelize", "plan"]
