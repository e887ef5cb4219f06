"""Ranks that are lost, in real processes: one is killed in the middle of a step, or does not come."""

import os
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

import autotp
from autotp.dist_axis import DistAxis
from autotp.errors import AutotpError
from autotp.launch import HOST, rank_environment
from tests.end_to_end.models import CLUSTER, Mlp
from tests.end_to_end.on_ranks import on_ranks
from tests.faults.table import assert_says, refused, row

PINS = {"fc1": {"row": "b", "col": "o"}, "fc2": {"row": "b", "col": "i"}}


def end_of(body, ranks, timeout_s=60.0):
    """Run `body(rank)` in real processes; return the exit code and the last words of each."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        arguments = [(r, ranks, store.port, body, files[r], timeout_s) for r in range(ranks)]
        processes = [context.Process(target=run, args=a) for a in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
            process.kill()
        said = [file.read_text() if file.exists() else "" for file in files]
        return [process.exitcode for process in processes], said


def run(rank, ranks, port, body, file, timeout_s):
    os.environ.update(rank_environment(rank, ranks, port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        body(rank)
    except AutotpError as error:
        file.write_text(str(error))
        raise


def batch():
    torch.manual_seed(0)
    return {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


def parallel(grid, inputs=None):
    torch.manual_seed(0)
    return autotp.parallelize(Mlp(), grid, inputs or batch(), cluster=CLUSTER, pins=PINS)


def killed_at_the_next_collective():
    """Make the next collective of this process its end."""

    def end(*_args):
        os.kill(os.getpid(), signal.SIGKILL)

    return mock.patch.object(DistAxis, "_call", end)


# A rank is killed --------------------------------------------------------------------------------


def killed_in_forward(rank):
    model = parallel((2, 2))
    for step in range(3):
        if rank == 3 and step == 2:
            killed_at_the_next_collective().start()
        model(**batch()).backward()


IN_FORWARD = row(
    "A rank is killed in the middle of forward, as all others say",
    """
    LostRankError: rank 3 is gone
      at      rank 3      does not answer: its process has ended or is stopped
      at      last node   ..._P_to_I = all_reduce(..., to = 'I') (rank ..., in all_reduce on axis ...)
      at      your code   test_lost_ranks.py:... in killed_in_forward
      at      torch       ...
      remedy  see the log of the rank that is gone, and start all ranks again from a checkpoint
    """,
)


def test_the_others_name_a_rank_that_is_killed():
    codes, said = end_of(killed_in_forward, 4, timeout_s=3600.0)  # which they do not wait for
    assert codes == [1, 1, 1, -signal.SIGKILL]
    for text in said[:3]:
        assert_says(text, IN_FORWARD)


def killed_in_backward(rank):
    inputs = batch()
    inputs["x"].requires_grad_()  # so that its gradient is gathered from all ranks
    model = parallel((1, 2), inputs)
    for step in range(2):
        loss = model(**inputs)
        if rank == 1 and step == 1:
            killed_at_the_next_collective().start()
        loss.backward()


IN_BACKWARD = row(
    "A rank is killed in the middle of backward",
    """
    LostRankError: rank 1 is gone
      at      rank 1      does not answer: its process has ended or is stopped
      at      last node   backward of x_I_to_R = invariant_to_replicate(x, col) (rank 0, in all_reduce on axis 'col')
      at      your code   test_lost_ranks.py:... in killed_in_backward
      at      torch       ...
      remedy  see the log of the rank that is gone, and start all ranks again from a checkpoint
    """,
)


@pytest.mark.slow
def test_the_node_of_a_collective_in_backward_is_named():
    codes, said = end_of(killed_in_backward, 2)
    assert codes == [1, -signal.SIGKILL]
    assert_says(said[0], IN_BACKWARD)


def killed_before_gradients_are_summed(rank):
    pins = {"*": {"row": "b"}}
    torch.manual_seed(0)
    model = autotp.parallelize(Mlp(), (2, 1), batch(), cluster=CLUSTER, pins=pins)
    loss = model(**batch())
    if rank == 1:
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        mock.patch.object(DistAxis, "begin", kill).start()
    loss.backward()


@pytest.mark.slow
def test_who_does_not_bring_its_gradients_is_named():
    codes, said = end_of(killed_before_gradients_are_summed, 2)
    assert codes == [1, -signal.SIGKILL]
    assert "LostRankError: rank 1 is gone" in said[0]
    assert "row_begun" in said[0] and "begin_replicate([" in said[0]


# A rank does not come ----------------------------------------------------------------------------


ALONE = row(
    "full_state_dict on rank 0 only",
    """
    LostRankError: autotp.full_state_dict was not called on every rank
      at      rank 0   called it and waited 1 s, the process group's timeout
      at      rank 1   did not come
      remedy  call autotp.full_state_dict(model) on every rank, and save what it returns on rank 0
      remedy  model.state_dict() is this rank's own part, and may be called on one rank alone
    """,
)


@on_ranks((1, 2))
def test_who_does_not_come_is_named_and_a_later_call_is_answered(grid):
    model = parallel(grid)
    if dist.get_rank() == 0:
        with mock.patch("autotp.liveness.timeout_s", lambda: 1.0), refused(ALONE):
            autotp.full_state_dict(model)
    dist.barrier()
    assert autotp.full_state_dict(model).keys() == Mlp().state_dict().keys()


def asleep_on_rank_1(rank):
    model = parallel((1, 2))
    for _ in range(3):
        model(**batch())
    if rank == 1:
        time.sleep(15)
    model(**batch())


ASLEEP = row(
    "A rank that is somewhere else when the timeout ends",
    """
    LostRankError: the ranks do not meet in the same collective
      at      rank 0      test_lost_ranks.py:... in asleep_on_rank_1, fc2_P_to_I = all_reduce(fc2, col, to = 'I')
      at      rank 1      test_lost_ranks.py:... in asleep_on_rank_1, outside of the program
      at      last node   fc2_P_to_I = all_reduce(fc2, col, to = 'I') (rank 0, in all_reduce on axis 'col')
      at      your code   test_lost_ranks.py:... in asleep_on_rank_1
      at      torch       Timed out waiting 8000ms for ... operation to complete
      remedy  make every rank take the same steps: call the model under no condition on the rank
    """,
)


@pytest.mark.slow
def test_where_each_rank_stands_is_said():
    codes, said = end_of(asleep_on_rank_1, 2, timeout_s=8.0)
    assert codes[0] == 1
    assert_says(said[0], ASLEEP)
