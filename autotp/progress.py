"""What a user sees while something runs: stages with their times, and a bar for training.

Everything goes to standard error, and only when that is a terminal and this is rank 0; elsewhere
both functions only run their block. Results are not progress: who has them prints them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[str], None]
"""Move a bar one step on, with a text beside it."""


def is_shown() -> bool:
    """Say whether somebody watches: a terminal, and the first of the ranks."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show `name` while the block runs, then the seconds it took.

    >>> with stage("capture"):
    ...     2 + 2
    4
    """
    if not is_shown():
        yield
        return
    console, start_s = Console(stderr=True), time.perf_counter()
    with console.status(name):
        yield
    console.print(f"[green]done[/] {name:<28} {time.perf_counter() - start_s:7.2f} s")


@contextmanager
def bar(name: str, total: int) -> Iterator[Advance]:
    """Show a bar of `total` steps; the block gets a function that moves it."""
    if not is_shown():
        yield lambda text: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, text="")
        yield lambda text: progress.update(task, advance=1, text=text)
