import os
import signal

import pytest
import torch
import torch.distributed as dist

from autotp.launch import launch


def sum_of_ranks(start):
    dist.init_process_group("gloo")
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return int(os.environ["RANK"]), int(total)


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 fails")
    dist.init_process_group("gloo")


def end_by_a_signal():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.init_process_group("gloo")


def test_every_rank_joins_and_returns_in_order():
    assert launch(sum_of_ranks, 2, 10) == [(0, 21), (1, 21)]


def test_a_failing_rank_stops_the_others():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 fails"):
        launch(fail_on_rank_1, 2)


def test_a_rank_that_a_signal_ends_says_where_it_stood(capfd):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="process 1"):
        launch(end_by_a_signal, 2)
    assert "in end_by_a_signal" in capfd.readouterr().err
