"""Work shared out over the cores: forked processes, so that what is shared is not copied or sent.

Not threads: what is shared out here is Python's own work, which holds its lock.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

import torch

PARALLEL_FROM = 4
"""Items from which it pays to share them out: the grids of eight ranks, even of a small model."""

MAX_WORKERS = 8
"""Each may need some hundred megabytes."""

T = TypeVar("T")
U = TypeVar("U")


def in_parallel(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """Return `work` of every item, in order, in as many processes as there are cores.

    What a process fails to return is worked out here, where its error is raised.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    workers = min(cores, MAX_WORKERS, len(items))
    if workers < 2 or len(items) < PARALLEL_FROM:
        return [work(item) for item in items]
    found = _from_workers(work, items, workers)
    return [found[n] if n in found else work(item) for n, item in enumerate(items)]


def _from_workers(work: Callable[[T], U], items: Sequence[T], workers: int) -> dict[int, U]:
    """Return what processes returned of `work`, by item: each takes the next as it is free."""
    context = multiprocessing.get_context("fork")
    following = context.Value("i", 0)
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        context.Process(target=_serve, args=(work, items, following, pipes, k), daemon=True)
        for k in range(workers)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a fork leaves behind
        for process in processes:
            process.start()
    found: dict[int, U] = {}
    for (incoming, outgoing), process in zip(pipes, processes, strict=True):
        outgoing.close()
        with contextlib.suppress(EOFError):
            found |= incoming.recv()
        process.join()
    return found


def _serve(
    work: Callable[[T], U],
    items: Sequence[T],
    following: Synchronized[int],
    pipes: Sequence[tuple[Connection, Connection]],
    place: int,
) -> None:
    """Work on one item after another until none is left, and send what was found."""
    found: dict[int, U] = {}
    gc.freeze()  # what was there before is not searched for garbage, which would copy its pages
    gc.disable()  # nor is what one item makes, before it is done

    def serve() -> None:
        torch.set_num_threads(1)  # a fork has none of OpenMP's threads either
        with contextlib.suppress(Exception):
            while (n := _next(following)) < len(items):
                found[n] = work(items[n])
                gc.collect()

    for k, (_, outgoing) in enumerate(pipes):
        if k != place:
            outgoing.close()  # or the end of another process would not be seen
    thread = threading.Thread(target=serve)  # HiGHS keeps workers per thread; a fork has none
    thread.start()
    thread.join()
    pipes[place][1].send(found)


def _next(following: Synchronized[int]) -> int:
    with following.get_lock():
        n: int = following.value
        following.value += 1
    return n
