"""The benchmarks run, and compare what trains alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VARIANTS = ("torch TP+SP", "torch FSDP2", "autotp")


def run(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    quiet = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet)
    assert found.returncode == 0, found.stderr[-2000:]  # other losses are an error of the script's
    return found.stdout


def test_a_step_is_timed_in_every_way(tmp_path):
    out = run(
        "step_time.py",
        *("--shapes", "tiny", "--rounds", "1", "--no-link", "--seconds", "0.2"),
        *("--variants", *VARIANTS, "--out", tmp_path / "out.json"),
    )
    assert (tmp_path / "out.json").exists()
    rows = {line[:26].strip() for line in out.splitlines() if "refused" not in line}
    assert rows >= set(VARIANTS)


@pytest.mark.slow
def test_two_hosts_on_one_machine():
    out = run("two_hosts.py", "--shape", "tiny", "--rounds", "1", "--seconds", "0.5")
    assert "skipped" in out or "what autotp picks" in out
