"""Faults as a table: `@fault(title, message)` holds a test's error to the exact message.

`...` in a message stands for what differs from run to run (times, ports, line numbers), within one
line. docs/FAULTS.md is these titles and messages: `python -m tests.faults.table` writes it.
"""

import contextlib
import functools
import importlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from autotp.errors import AutotpError

PAGE = Path(__file__).parents[2] / "docs" / "FAULTS.md"
CHAPTERS = {
    "test_grids": "Grids and process groups",
    "test_models": "Models",
    "test_capture": "Capture",
    "test_inputs": "Inputs",
    "test_ranks": "Ranks that differ",
    "test_lost_ranks": "Ranks that are lost",
    "test_plans": "Plans, pins and budgets",
    "test_state": "Parameters, optimizers and checkpoints",
    "test_numerics": "Numbers that are not finite",
    "test_rule": "Rules of your own",
}
FAULTS = {}


@dataclass(frozen=True)
class Fault:
    chapter: str
    title: str
    message: str


def fault(title, message):
    """Make a body that must raise exactly `message` a test, and a row of the table."""

    def register(body):
        wanted = row(title, message, body.__module__)

        @functools.wraps(body)
        def test(*args, **kwargs):
            with refused(wanted):
                body(*args, **kwargs)

        return test

    return register


def row(title, message, module="tests.faults.test_lost_ranks"):
    """Enter a row for a message that a test holds by itself, and return the message."""
    chapter, wanted = module.rpartition(".")[2], textwrap.dedent(message).strip()
    FAULTS[chapter, title] = Fault(CHAPTERS[chapter], title, wanted)
    return wanted


@contextlib.contextmanager
def refused(wanted):
    with pytest.raises(AutotpError) as refusal:
        yield
    assert_says(str(refusal.value), wanted)


def assert_says(text, wanted):
    wanted = textwrap.dedent(wanted).strip()
    pattern = re.escape(aligned(wanted)).replace(r"\.\.\.", r".*?")
    assert re.fullmatch(pattern, aligned(text)), f"says\n{text}\nwanted\n{wanted}"


def aligned(text):
    """Leave out how wide the column of places is: line numbers decide it."""
    return re.sub(r" {3,}", "   ", text)


def render():
    """Return the page of all faults."""
    for module in CHAPTERS:
        importlib.import_module(f"tests.faults.{module}")
    lines = [HEAD]
    for module, chapter in CHAPTERS.items():
        lines.append(f"## {chapter}\n")
        for (owner, _), found in FAULTS.items():
            if owner == module:
                lines.append(f"**{found.title}**\n\n```text\n{found.message}\n```\n")
    return "\n".join(lines)


HEAD = (
    inspect.cleandoc(
        """
    # Faults, and what autotp says

    Every error is an `autotp.AutotpError`: one line that says what is wrong, the places (`at`) with
    the fact at each, and what to do. All problems that are found are in one error. Where ranks
    differ, or one of them fails, all raise, within seconds; where one is lost, the others raise
    within the timeout of the process group.

    This page is made from the tests that hold each message to the letter (`tests/faults`); `...`
    stands for what differs from run to run. `python -m tests.faults.table` writes it.
    """
    )
    + "\n"
)


if __name__ == "__main__":
    from tests.faults.table import render as rendered  # the module that the tests import

    PAGE.write_text(rendered())
