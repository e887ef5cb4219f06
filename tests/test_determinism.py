"""The same model, grid and cluster give the same plan, byte for byte."""

import os
import subprocess
import sys

import torch

from autotp.api import plan
from autotp.cost_model.cluster import bandwidth_bound
from tests.models import gpt2

SCRIPT = """
import json
from tests.test_determinism import make_plan
from autotp.plan_file import to_json
print(json.dumps(to_json(make_plan())))
"""


def make_plan():
    torch.manual_seed(0)
    model, inputs = gpt2()
    return plan(model.train(), (2, 2), inputs, cluster=bandwidth_bound(1e9, flops_per_s=1e9))


def written_under(seed):
    env = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, check=True)
    return done.stdout


def test_same_plan_in_every_process():
    assert written_under(1) == written_under(2) != b""
