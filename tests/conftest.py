"""What every test shares: one thread, no network, fixed seeds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("autotp", deadline=None, derandomize=True)
settings.load_profile("autotp")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
