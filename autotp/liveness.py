"""Who is there: asked through the process group's store, which answers when collectives do not.

    watch       let this process answer, from a thread that sleeps until it is asked
    lost        what a failed collective means: which rank is gone, or where each rank waits
    roll_call   wait until every rank has come to the same place, and say which have not

A process that has ended, or is stopped, does not answer; one that waits in a collective does, with
the line at which its main thread stands. The first rank to find out tells the others. The one
module that touches what torch keeps private about groups and stores.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from autotp.errors import LostRankError

ANSWER_S = 3.0
"""How long a living process may take to answer."""
WORD_S = 10.0
"""How long a roll call waits before it says for whom."""
POLL_S = 0.02
FOREVER = timedelta(days=365)
GRAPH_FILE = "<eval_with_key>"
"""How the files of code that torch.fx generates begin."""

APART = "the ranks do not meet in the same collective"
TOGETHER = "make every rank take the same steps: call the model under no condition on the rank"
RESTART = "see the log of the rank that is gone, and start all ranks again from a checkpoint"

PING, FINDING, PONG = "autotp/ping", "autotp/finding", "autotp/pong"


def watch() -> None:
    """Let this rank say that it lives whenever another asks; once for each process group."""
    if dist.get_world_size() == 1 or _store().add(f"autotp/watched/{dist.get_rank()}", 1) > 1:
        return
    rank, store = dist.get_rank(), _store().clone()  # a client of its own: a wait blocks it

    def serve() -> None:
        try:
            store.wait([PING], FOREVER)
            store.set(f"{PONG}/{rank}", _standing())
        except (RuntimeError, ValueError):
            return  # the store is gone: so is the run

    threading.Thread(target=serve, name="autotp watch", daemon=True).start()


# What a failed collective means ------------------------------------------------------------------


def lost(what: str, node: str, error: Exception) -> LostRankError:
    """Return the error that says what stopped `what`, called at `node` of the emitted program."""
    reason = str(error).strip().splitlines()[0]
    finding, at = _finding()
    rank = dist.get_rank()
    return LostRankError(
        finding,
        at=[
            *at,
            ("last node", f"{node} (rank {rank}, in {what})"),
            *[("your code", line) for line in [_user_line()] if line],
            ("torch", re.sub(r"^\[\S+\] ", "", reason).partition(". ")[0]),
        ],
        remedy=TOGETHER if finding == APART else RESTART,
    )


def _finding() -> tuple[str, list[tuple[str, str]]]:
    """Return what is wrong and the place of each rank: as the first rank that asked found it."""
    try:
        store = _store()
        if not store.check([FINDING]):
            store.compare_set(FINDING, "", _ask(store))
        text = store.get(FINDING).decode()
    except RuntimeError:
        return "rank 0 is gone", [("rank 0", "kept the process group's store")]
    first, *places = text.splitlines()
    return first, [(place, fact) for place, _, fact in (p.partition("\t") for p in places)]


def _ask(store: Any) -> str:
    """Ask every rank where it is; return the finding, and a line `place, tab, fact` per rank."""
    ranks = range(dist.get_world_size())
    store.set(PING, "1")
    end = time.monotonic() + ANSWER_S
    missing = [r for r in ranks if r != dist.get_rank()]
    while missing and time.monotonic() < end:
        missing = [r for r in missing if not store.check([f"{PONG}/{r}"])]
        time.sleep(POLL_S)
    if missing:
        rows = [f"rank {r}\tdoes not answer: its process has ended or is stopped" for r in missing]
        names = ", ".join(map(str, missing))
        many = len(missing) > 1
        return "\n".join([f"rank{'s' * many} {names} {'are' if many else 'is'} gone", *rows])
    where = {r: store.get(f"{PONG}/{r}").decode() for r in ranks if r != dist.get_rank()}
    where[dist.get_rank()] = _standing()
    rows = [f"rank {r}\t{where[r]}" for r in ranks]
    return "\n".join([APART, *rows])


# Roll calls --------------------------------------------------------------------------------------


def roll_call(what: str, remedy: Sequence[str]) -> None:
    """Wait until every rank has called this as often; warn after a while, then give up.

    Raises LostRankError, with the ranks that have not come, after the process group's timeout.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    rank, store = dist.get_rank(), _store()
    number = store.add(f"{what}/calls/{rank}", 1)
    keys = {r: f"{what}/{number}/{r}" for r in range(dist.get_world_size())}
    store.set(keys[rank], "1")
    start, told = time.monotonic(), False
    while missing := [r for r, key in keys.items() if not store.check([key])]:
        waited = time.monotonic() - start
        if waited > timeout_s():
            store.add(f"{what}/calls/{rank}", -1)  # as if it had not been called
            store.delete_key(keys[rank])
            raise _absent(what, missing, remedy)
        if waited > WORD_S and not told:
            told = True
            warnings.warn(
                f"rank {rank} waits in {what} for {_ranks(missing)}: every rank must call it",
                stacklevel=3,
            )
        time.sleep(POLL_S)


def _absent(what: str, missing: Sequence[int], remedy: Sequence[str]) -> LostRankError:
    rank, seconds = dist.get_rank(), timeout_s()
    return LostRankError(
        f"{what} was not called on every rank",
        at=[
            (f"rank {rank}", f"called it and waited {seconds:g} s, the process group's timeout"),
            *((f"rank {r}", "did not come") for r in missing),
        ],
        remedy=tuple(remedy),
    )


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


# Where a rank stands -----------------------------------------------------------------------------


def caller(depth: int) -> tuple[str, int]:
    """Return file and line of the frame that is `depth` calls above who asks."""
    frame = sys._getframe(depth + 1)
    return frame.f_code.co_filename, frame.f_lineno


def last_node(frame: FrameType | None) -> str:
    """Return the statement of an emitted program that calls what runs in `frame`, if one does.

    In backward it is the one whose move goes back: its autograd context knows the place.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith(GRAPH_FILE):
            return statement((frame.f_code.co_filename, frame.f_lineno))
        context = frame.f_locals.get("ctx")
        if frame.f_code.co_name == "backward" and context is not None:
            place = getattr(context, "place", None) or ("", 0)
            return f"backward of {statement(place) or type(context).__name__}"
        frame = frame.f_back
    return "outside of the program"


def statement(place: tuple[str, int]) -> str:
    """Return one line of an emitted program without its torch prefixes and what it lets go."""
    line = linecache.getline(*place).partition(";")[0].partition("#")[0].strip()
    return re.sub(r"\b(?:autotp_\w+?_(?=[a-z_]+\()|torch\.ops\.)", "", line)


def _standing() -> str:
    """Return where the main thread is: the user's innermost line, and its node if it has one."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    node, line = last_node(frame), _user_line(frame)
    return ", ".join([line or "outside of any code of yours", node])


def _user_line(frame: FrameType | None = None) -> str:
    """Return `file.py:line in function` of the innermost frame outside libraries."""
    stack = traceback.extract_stack(frame)
    here, libraries = os.path.dirname(__file__), os.path.dirname(os.path.dirname(torch.__file__))
    own = [
        f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}"
        for f in stack
        if os.path.dirname(f.filename) != here
        and not f.filename.startswith(("<", libraries, sys.base_prefix))
    ]
    return own[-1] if own else ""


# What torch keeps private ------------------------------------------------------------------------


def _group() -> Any:
    return distributed_c10d._get_default_group()


def _store() -> Any:
    return distributed_c10d._get_default_store()


def timeout_s() -> float:
    """Return the timeout of the default process group, in seconds."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found: timedelta = _group()._get_backend(torch.device(device)).options._timeout
    return found.total_seconds()


__all__ = ["caller", "last_node", "lost", "roll_call", "statement", "timeout_s", "watch"]
