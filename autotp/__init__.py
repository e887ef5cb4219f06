"""autotp: one line makes an unmodified PyTorch model a distributed program."""

from autotp import schemes
from autotp.api import check, grids, parallelize, plan
from autotp.comparison import Report
from autotp.cost_model.cluster import Cluster
from autotp.dryrun import dryrun
from autotp.dryrun_report import DryRun
from autotp.errors import AutotpError
from autotp.full_state import full_state_dict
from autotp.grid import Grid
from autotp.grid_table import Grids
from autotp.passes.custom import rule
from autotp.plan import Plan
from autotp.version import VERSION as __version__

__all__ = [
    "AutotpError",
    "Cluster",
    "DryRun",
    "Grid",
    "Grids",
    "Plan",
    "Report",
    "__version__",
    "check",
    "dryrun",
    "full_state_dict",
    "grids",
    "parallelize",
    "plan",
    "rule",
    "schemes",
]
