"""How far is the prediction from the step: time, bytes and memory, for every published scheme?

Four gloo ranks. The machine is measured first, on the CPU clock; then each scheme of
`autotp.schemes`, and what the search picks by itself, is planned, run and compared with its plan:
CPU-seconds per rank and step (AdamW included), bytes sent, and the peak memory of the
step: parameters and all that was taken since the program was ready.
Prints one line per scheme, and per shape the rank correlation, the median errors and the regret:
the measured time of the pick over the best measured. Writes one JSON.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py [--all] [--steps 3] [--out accuracy.json]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from scipy.stats import spearmanr
from step_time import GPT, stepper
from torch import Tensor, nn
from torch.nn import functional as F

import autotp
from autotp.cost_model.calibration import fit
from autotp.cost_model.cluster import Cluster
from autotp.launch import launch
from autotp.measure import QUICK, measure
from autotp.schemes import SCHEMES, scheme_pins

Inputs = dict[str, Tensor]
RANKS, GRID = 4, (2, 2)
PICK = "what autotp picks"


def tokens(batch: int, seq: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (batch, seq))


def gpt(batch: int, seq: int, hidden: int, vocab: int = 1024, layers: int = 2) -> Any:
    x = tokens(batch, seq, vocab)
    model = GPT(hidden, hidden // 64, layers, vocab, seq)
    return model, {"tokens": x, "labels": x.roll(-1, 1)}


def gpt2_small() -> Any:
    config = transformers.GPT2Config(n_layer=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    x = tokens(8, 512, config.vocab_size)
    return transformers.GPT2LMHeadModel(config), {"input_ids": x, "labels": x}


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    x = tokens(4, 512, 1024)
    return transformers.LlamaForCausalLM(config), {"input_ids": x, "labels": x}


class WideMlp(nn.Module):
    """Four linears between a narrow stream and a wide middle."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        sizes = [(width, hidden), (hidden, width)] * 2
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x.square().mean()


SHAPES: dict[str, Callable[[], Any]] = {
    "activation-heavy": lambda: gpt(8, 512, 256, layers=4),
    "weight-heavy": lambda: gpt(2, 128, 1536),
    "balanced": lambda: gpt(4, 256, 512),
    "GPT-2 small": gpt2_small,
    "Llama-GQA": llama,
    "wide MLP": lambda: (WideMlp(512, 4096), {"x": torch.randn(1024, 512)}),
}
WARM = "warm"
SHORT = ("activation-heavy", "weight-heavy", "balanced")


@dataclass(frozen=True)
class Row:
    """One scheme on one shape, predicted and measured, per rank and step."""

    shape: str
    scheme: str
    predicted_s: float
    cpu_s: float
    wall_s: float
    predicted_bytes: float
    sent_bytes: float
    predicted_memory: float
    peak_memory: float


def run_scheme(shape: str, scheme: str, cluster: Cluster, steps: int) -> Row | str:
    """Plan, run and measure one scheme on this rank; say why where it is refused."""
    torch.manual_seed(0)
    model, inputs = SHAPES[shape]() if shape != WARM else gpt(4, 16, 256)
    try:
        pins = None if scheme == PICK else scheme_pins(scheme, model, GRID, inputs)
        model = autotp.parallelize(model, GRID, inputs, cluster=cluster, pins=pins)
    except autotp.AutotpError as error:
        return error.what
    plan = model.plan
    before = resident_bytes() - plan.memory.parameters
    step, axes = stepper(model, inputs), model._autotp.axes.values()
    step()
    for axis in axes:
        axis.reset_sent()
    resident_bytes()
    reset_peak()
    spent = [both_clocks(step) for _ in range(steps)]
    sent = float(sum(sum(axis.sent.values()) for axis in axes)) / steps
    return Row(
        shape,
        scheme,
        plan.step_time_s,
        statistics.median(cpu for _, cpu in spent),
        statistics.median(wall for wall, _ in spent),
        float(plan.comm_bytes),
        sent,
        plan.memory.total,
        peak_bytes() - before,
    )


def both_clocks(step: Callable[[], object]) -> tuple[float, float]:
    """Return the wall seconds and the CPU-seconds of one step, the means over ranks."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    spent = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu])
    dist.all_reduce(spent)
    mean = (spent / dist.get_world_size()).tolist()
    return mean[0], mean[1]


def resident_bytes() -> float:
    """Return what this process holds, after giving back what it can."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status_bytes("VmRSS")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> float:
    return status_bytes("VmHWM")


def status_bytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(name))


def work(shapes: list[str], schemes: list[str], steps: int, seconds: float) -> Any:
    dist.init_process_group("gloo")
    measured = measure(replace(QUICK, seconds=seconds), torch.device("cpu"))
    cluster = fit(measured, "measured_cpu_clock", "cpu")
    run_scheme(WARM, "megatron", cluster, steps=1)  # what is imported late counts for no scheme
    rows, refused = [], []
    for shape in shapes:
        for scheme in schemes:
            found = run_scheme(shape, scheme, cluster, steps)
            if isinstance(found, Row):
                rows.append(found)
                if dist.get_rank() == 0:
                    print(line(found), flush=True)
            else:
                refused.append((shape, scheme, found))
    return rows, refused, asdict(measured)


def line(row: Row) -> str:
    times = f"{row.predicted_s:8.3f} s {row.cpu_s:8.3f} s {row.predicted_s / row.cpu_s:6.2f}"
    sent = f"{row.predicted_bytes / 1e6:8.2f} {row.sent_bytes / 1e6:8.2f} MB"
    memory = f"{row.predicted_memory / 1e6:7.0f} {row.peak_memory / 1e6:7.0f} MB"
    return f"{row.shape:<17} {row.scheme:<18} {times}  {sent}  {memory}"


def summary(rows: list[Row]) -> dict[str, float]:
    """Return how well one shape's schemes are ordered and met, and the regret of the pick."""
    predicted, measured = [r.predicted_s for r in rows], [r.cpu_s for r in rows]
    pick = next((r for r in rows if r.scheme == PICK), min(rows, key=lambda r: r.predicted_s))
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "time_error": statistics.median(abs(r.predicted_s / r.cpu_s - 1) for r in rows),
        "memory_error": statistics.median(
            abs(r.predicted_memory / r.peak_memory - 1) for r in rows
        ),
        "bytes_error": max(abs(r.predicted_bytes / r.sent_bytes - 1) for r in rows),
        "regret": pick.cpu_s / min(measured) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all shapes, not three")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHORT)
    parser.add_argument("--schemes", nargs="+", choices=[*SCHEMES, PICK], default=[*SCHEMES, PICK])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring the machine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shapes = list(SHAPES) if args.all else list(args.shapes)
    print(f"{'':36} predicted   measured  ratio    bytes sent: both      memory: both")
    found = launch(work, RANKS, shapes, list(args.schemes), args.steps, args.seconds)
    rows, refused, measured = found[0]
    for shape, scheme, why in refused:
        print(f"{shape:<17} {scheme:<18} refused: {why}")
    summaries = {s: summary(mine) for s in shapes if (mine := [r for r in rows if r.shape == s])}
    for shape, values in summaries.items():
        print(f"{shape:<17}", "  ".join(f"{name} {x:.3f}" for name, x in values.items()))
    if args.out:
        about = {"torch": torch.__version__, "machine": platform.processor()}
        body = {"about": about, "rows": [asdict(r) for r in rows], "summary": summaries}
        args.out.write_text(json.dumps({**body, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
