"""Run a function on every rank of a grid of local processes, as torchrun would a script.

The parent keeps the rendezvous store, so its port is taken from the moment it is chosen. Each rank
finds RANK, WORLD_SIZE and MASTER_* in its environment; who needs a process group initialises it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

T = TypeVar("T")
HOST = "127.0.0.1"


def launch(function: Callable[..., T], ranks: int, *args: Any) -> list[T]:
    """Return what `function(*args)` returned on each of `ranks` new processes, in rank order.

    `function` must be importable by name, and its result one that `torch.save` can write. A rank
    that raises stops the others, and its traceback is raised here; one that a signal ends prints
    where its threads stood.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, store.port, folder, function, args)
        spawn(_run_rank, arguments, nprocs=ranks)  # type: ignore[no-untyped-call]
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(ranks)]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables from which a rank joins the store that its parent keeps."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    store = {"MASTER_ADDR": HOST, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {name: str(value) for name, value in (variables | store | loopback).items()}


def _run_rank(
    rank: int, ranks: int, port: int, folder: str, function: Callable[..., T], args: tuple[Any, ...]
) -> None:
    os.environ.update(rank_environment(rank, ranks, port))
    torch.set_num_threads(1)  # ranks share the machine's cores
    faulthandler.enable()
    try:
        torch.save(function(*args), _result(folder, rank))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"
