"""The cache of calibrations: one JSON file per machine, backend, world size and thread count.

    Identity      what a calibration holds for
    cache_path    where that file is: $XDG_CACHE_HOME/autotp, else ~/.cache/autotp
    save, load    a Calibration to its file and back; load refuses what it cannot trust, by name

The file ends with a digest of its content, so that one cut short or edited is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autotp.cost_model.calibration import Measured
from autotp.cost_model.cluster import Cluster, Link, Rate
from autotp.errors import CalibrationError

FORMAT = 7


@dataclass(frozen=True, slots=True)
class Identity:
    """The machine, the software and the process group that a calibration holds for."""

    machine: str
    processor: str
    cores: int
    device: str
    backend: str
    world_size: int
    ranks_per_node: int
    threads: int
    torch: str
    autotp: str

    def file_name(self) -> str:
        """Return the name of the file of all versions on this machine and process group."""
        words = (self.machine, self.device, self.backend, f"{self.world_size}ranks")
        nodes = (f"{self.ranks_per_node}pernode", f"{self.threads}threads")
        return re.sub(r"[^\w.-]", "_", "-".join((*words, *nodes))) + ".json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measured cluster, what it holds for, how long was measured, and the timings themselves."""

    identity: Identity
    cluster: Cluster
    seconds: float
    timings: Mapping[str, Any]


def plain(timings: Measured) -> dict[str, Any]:
    """Return timings as JSON holds them."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(timings)))
    return data


def cache_path(identity: Identity) -> Path:
    """Return the file in which the calibration of this identity is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "autotp" / identity.file_name()


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration whole or not at all: readers never see half a file."""
    body = {"format": FORMAT, **asdict(calibration)}
    text = json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def load(path: Path, identity: Identity) -> Calibration:
    """Return the calibration in a file.

    Raises CalibrationError where the file is not whole, or holds for something else.
    """
    body = _whole(path)
    found = body.get("identity", {})
    mine = asdict(identity)
    at = [
        (name, f"{found.get(name, 'absent')} in the file, {here} here")
        for name, here in mine.items()
        if found.get(name) != here
    ]
    if at:
        raise CalibrationError(f"calibration {path} holds for something else", at=at, remedy=REMEDY)
    cluster = _cluster(body["cluster"])
    return Calibration(identity, cluster, float(body["seconds"]), body["timings"])


REMEDY = "autotp calibrate --force"


def _whole(path: Path) -> dict[str, Any]:
    """Return the content of a file that is as it was written."""
    try:
        body: dict[str, Any] = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CalibrationError(
            f"calibration {path} cannot be read", at=[("file", reason)], remedy=REMEDY
        ) from error
    written = body.pop("digest", None) if isinstance(body, dict) else None
    if not written or written != _digest(body) or body["format"] != FORMAT:
        facts = [("digest", "differs from that of the content")]
        if written == _digest(body):
            facts = [("format", f"{body['format']}, {FORMAT} is read")]
        raise CalibrationError(
            f"calibration {path} is not as autotp writes it", at=facts, remedy=REMEDY
        )
    return body


def _digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _cluster(data: Mapping[str, Any]) -> Cluster:
    """Return a cluster as `asdict` and JSON have taken it apart."""
    ladders = [(d, tuple((w, r) for w, r in steps)) for d, steps in data["narrow_flops_per_s"]]
    parts = {
        "intra": _link(data["intra"]),
        "inter": _link(data["inter"]),
        "flops_per_s": tuple((d, r) for d, r in data["flops_per_s"]),
        "crossings": tuple((m, _link(link)) for m, link in data["crossings"]),
        "narrow_flops_per_s": tuple(ladders),
        "stream_bytes_per_s": tuple((n, r) for n, r in data["stream_bytes_per_s"]),
        "attention_flops_per_s": tuple((d, r) for d, r in data["attention_flops_per_s"]),
    }
    return Cluster(**{**data, **parts})


def _link(data: Mapping[str, Any]) -> Link:
    rates = tuple(Rate(**rate) for rate in data["rates"])
    low = data["low_latency"]
    return Link(**{**data, "rates": rates, "low_latency": _link(low) if low else None})
