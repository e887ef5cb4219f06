"""Links of a known speed between local ranks: a private network namespace, and two of them.

    private_network    leave the machine's network for an empty one with a loopback of its own
    limit              make an interface as slow as said; None takes the limit away
    sent_bytes         what all interfaces of this namespace have sent: exact, also of torch's own
    two_hosts          a second namespace beside this one, and one slow wire between them

The machine's own interfaces are never touched: what is changed here is seen by this process and its
children only, and goes when they end. It takes root on Linux; `missing` says what is lacking.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
"""Source: linux/sched.h."""

GIGABIT = "1gbit"
WIRE = ("wire0", "wire1")
"""The two ends of the wire between two hosts."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Return why there can be no private network here; nothing where there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "it takes root"
    lacking = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    tried = [["ip", "link", "set", "lo", "up"], _tbf("lo", GIGABIT)]
    script = " && ".join(" ".join(command) for command in tried)
    found = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True)
    return found.stderr.strip() if found.returncode else ""


def private_network() -> None:
    """Move this process, and all that it starts, to an empty network with a loopback."""
    before = _namespace()
    _check(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET))
    assert _namespace() != before, "still in the machine's own network"
    _run("ip", "link", "set", "lo", "up")


def limit(interface: str, rate: str | None) -> None:
    """Let `interface` of this namespace send no faster than `rate`, such as "1gbit"."""
    shown = subprocess.run(
        ["tc", "qdisc", "show", "dev", interface], capture_output=True, text=True
    )
    if "tbf" in shown.stdout:
        _run("tc", "qdisc", "del", "dev", interface, "root")
    if rate is not None:
        _run(*_tbf(interface, rate))


def sent_bytes(interface: str = "") -> int:
    """Return the bytes that this namespace's interfaces, or the one named, have sent so far."""
    lines = [line.split(":") for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
    named = [(name.strip(), figures) for name, figures in lines]
    return sum(int(text.split()[8]) for name, text in named if interface in ("", name))


@contextmanager
def two_hosts(rate: str) -> Iterator[int]:
    """Give this private network a neighbour; a wire of `rate` joins them.

    Yield the id of a process that lives on the other host: `enter` moves a rank to it.
    """
    here, there = WIRE
    other = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
    try:
        _await_namespace(other.pid)
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
        _run("ip", "link", "set", there, "netns", str(other.pid))
        inside = ("nsenter", "-t", str(other.pid), "-n")
        for place, end, address in (((), here, ADDRESSES[0]), (inside, there, ADDRESSES[1])):
            _run(*place, "ip", "link", "set", "lo", "up")
            _run(*place, "ip", "addr", "add", f"{address}/24", "dev", end)
            _run(*place, "ip", "link", "set", end, "up")
            _run(*place, *_tbf(end, rate))
        yield other.pid
    finally:
        other.kill()
        other.wait()


def enter(host: int) -> None:
    """Move this process to the network of the process `host`, before it opens any connection."""
    with open(f"/proc/{host}/ns/net") as file:
        _check(ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET))


def _await_namespace(pid: int) -> None:
    """Wait until a process is in a network of its own."""
    for _ in range(500):
        if _namespace(pid) != _namespace():
            return
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} did not leave this network")


def _namespace(pid: int | str = "self") -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _tbf(interface: str, rate: str) -> list[str]:
    """Return the command of a token bucket: netem is not in every kernel."""
    bucket = ["rate", rate, "burst", "256kb", "latency", "400ms"]
    return ["tc", "qdisc", "add", "dev", interface, "root", "tbf", *bucket]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
