"""How long is a training step: the emitted program against the original and against torch's own.

Two questions, each answered by the median ratio of interleaved runs (A B A B) in CPU-seconds summed
over ranks, forward, backward and AdamW:

    1x1   autotp on a grid of one against the unmodified module
    1x4   autotp's `megatron` against torch's `parallelize_module` for the same scheme

Run: python benchmarks/step_time.py [--rounds 9] [--out step_time.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

import autotp
from autotp import schemes
from autotp.launch import launch

BATCH, SEQ, HIDDEN, HEADS, LAYERS, VOCAB = 8, 512, 256, 4, 4, 1024
"""The activation-heavy shape: 4,096 tokens for 256 hidden."""


class Block(nn.Module):
    """A pre-norm transformer block with separate q, k and v, which both libraries can split."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        width = x.shape[-1] // self.heads
        q, k, v = (
            f(y).unflatten(-1, (-1, width)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.ln_2(x))))


class GPT(nn.Module):
    """A small GPT that returns its loss."""

    def __init__(self, hidden: int, heads: int, layers: int, vocab: int, seq: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, hidden), nn.Embedding(seq, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def build() -> tuple[GPT, dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    model = GPT(HIDDEN, HEADS, LAYERS, VOCAB, SEQ)
    return model, {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def torch_1d(model: GPT) -> GPT:
    """Apply torch's tensor parallel: column, row, vocabulary-parallel embedding, head and loss."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    column, row = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, object] = {
        "wte": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for i in range(len(model.blocks)):
        for name in ("q", "k", "v", "fc1"):
            plan[f"blocks.{i}.{name}"] = column
        for name in ("o", "fc2"):
            plan[f"blocks.{i}.{name}"] = row
    return parallelize_module(model, mesh, plan)  # type: ignore[arg-type,return-value]


def stepper(
    model: nn.Module, inputs: dict[str, Tensor], around: Callable[[], object] | None = None
) -> Callable[[], float]:
    """Return a function that makes one training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        if around is None:
            loss = model(**inputs)
            loss.backward()
        else:
            with around():  # type: ignore[attr-defined]
                loss = model(**inputs)
                loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def cpu_seconds(step: Callable[[], float], steps: int) -> float:
    """Return the CPU-seconds per step, summed over ranks."""
    if dist.is_initialized():
        dist.barrier()
    start = time.process_time()
    for _ in range(steps):
        step()
    spent = torch.tensor((time.process_time() - start) / steps, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(spent)
    return float(spent)


def compare(
    first: Callable[[], float], second: Callable[[], float], rounds: int, steps: int = 2
) -> dict[str, float]:
    """Run A B A B and return medians and the median of the ratios A/B."""
    losses = [abs(first() - second()) for _ in range(2)]
    pairs = [(cpu_seconds(first, steps), cpu_seconds(second, steps)) for _ in range(rounds)]
    return {
        "first_cpu_s": statistics.median(a for a, _ in pairs),
        "second_cpu_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "loss_difference": max(losses),
    }


def one_rank(rounds: int) -> dict[str, float]:
    model, inputs = build()
    ours = autotp.parallelize(copy.deepcopy(model), grid=(1, 1), example_inputs=inputs)
    return compare(stepper(ours, inputs), stepper(model, inputs), rounds)


def four_ranks(rounds: int) -> dict[str, float]:
    model, inputs = build()
    pins = schemes.megatron(model, (1, 4), inputs)
    theirs = copy.deepcopy(model)
    ours = autotp.parallelize(model, (1, 4), inputs, cluster="gloo_loopback", pins=pins)
    return compare(stepper(ours, inputs), stepper(torch_1d(theirs), inputs, loss_parallel), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {
        "1x1 autotp / original module": launch(one_rank, 1, args.rounds)[0],
        "1x4 autotp megatron / torch parallelize_module": launch(four_ranks, 4, args.rounds)[0],
    }
    print(f"CPU-seconds per step, {BATCH}x{SEQ} tokens, hidden {HIDDEN}, {LAYERS} layers")
    for name, row in rows.items():
        print(f"{name:<48} {row['first_cpu_s']:8.3f} {row['second_cpu_s']:8.3f}", end="")
        print(f"   ratio {row['ratio']:.3f}   loss differs by {row['loss_difference']:.1e}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
