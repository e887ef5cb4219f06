"""The main job on real input: a byte-level GPT-2 learns the standard library's source.

`train` is a user's own loop: it knows nothing of ranks. One process runs it for the first steps,
four local ranks in a 2x2 grid run it on the parallelized model. The demo fails unless both report
the same losses and the last ones are well below the entropy of single bytes, the best that a model
without context can do.
"""

from __future__ import annotations

import logging
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import autotp
from autotp.launch import launch
from autotp.progress import bar, stage

GRID = (2, 2)
LAYERS, WIDTH, HEADS = 2, 128, 4
BATCH, SEQUENCE = 32, 64
STEPS, COMPARED_STEPS, WARMUP_STEPS = 300, 50, 20
LEARNING_RATE, BETAS, MAX_GRAD_NORM, SEED = 2e-3, (0.9, 0.95), 1.0, 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One claim of the demo: a measured value and the limit that it must stay under."""

    claim: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        """Say whether the claim held."""
        return self.value <= self.limit  # false for a loss that is not a number


def read_corpus() -> torch.Tensor:
    """Return the bytes of the standard library's own modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def unigram_entropy(corpus: torch.Tensor) -> float:
    """Return the entropy of single bytes of `corpus`, in nats: -sum p ln p.

    >>> unigram_entropy(torch.tensor([7, 7, 9, 9]).byte())
    0.6931...
    """
    frequency = torch.bincount(corpus.int()).double() / len(corpus)
    return float(torch.special.entr(frequency).sum())


def make_batch(corpus: torch.Tensor, step: int) -> torch.Tensor:
    """Return the windows of bytes that every rank sees at `step`: "b s"."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(corpus) - SEQUENCE, (BATCH, 1), generator=generator)
    return corpus[starts + torch.arange(SEQUENCE)].long()


def make_model() -> torch.nn.Module:
    """Return Hugging Face's GPT-2 over bytes, from its config, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of its own loss
    # torch warns that the norm of gradients on a 2D mesh takes two all-reduces.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=256,
        n_positions=SEQUENCE,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def train(model: torch.nn.Module, corpus: torch.Tensor, steps: int, title: str) -> list[float]:
    """Train `model` as any user would and return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
    )
    losses = []
    with bar(title, steps) as advance:
        for step in range(steps):
            tokens = make_batch(corpus, step)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            advance(f"loss {losses[-1]:.3f}")
    return losses


def train_rank(steps: int) -> list[float]:
    """Train on this rank of the grid; rank 0 shows the plan."""
    corpus = read_corpus()
    model, tokens = make_model(), make_batch(corpus, 0)
    inputs = dict(input_ids=tokens, labels=tokens)
    model = autotp.parallelize(model, grid=GRID, example_inputs=inputs, cluster="gloo_loopback")
    if os.environ["RANK"] == "0":
        print(model.plan, flush=True)
    return train(model, corpus, steps, "four ranks, 2x2")


def relative_differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return |a - b| / |b| step by step.

    >>> relative_differences([1.5, 2.0], [1.0, 2.0])
    [0.5, 0.0]
    """
    return [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)]


def judge(
    losses: Sequence[float], differences: Sequence[float], entropy: float
) -> tuple[Verdict, ...]:
    """Return the demo's three claims: two on equality, one on what was learned."""
    last = sum(losses[-10:]) / len(losses[-10:])
    return (
        Verdict("largest difference, first five steps", max(differences[:5]), 1e-5),
        Verdict(f"largest difference, first {COMPARED_STEPS} steps", max(differences), 1e-3),
        Verdict(f"loss after {len(losses)} steps, of {entropy:.3f}", last, 0.7 * entropy),
    )


def loss_table(losses: Sequence[float], reference: Sequence[float]) -> Table:
    """Return the losses of every compared step beside a single process's, in two halves."""
    differences = relative_differences(losses, reference)
    rows = [
        (f"{i + 1}", f"{a:.6f}", f"{b:.6f}", f"{d:.1e}")
        for i, (a, b, d) in enumerate(zip(losses, reference, differences, strict=True))
    ]
    half = (len(rows) + 1) // 2
    table = Table(title="loss: four ranks in a 2x2 grid, one process alone")
    for column in ("step", "2x2", "alone", "relative") * 2:
        table.add_column(column, justify="right")
    for i in range(half):
        table.add_row(*rows[i], *(rows[half + i] if half + i < len(rows) else ()))
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the claims with their values, limits and outcomes."""
    table = Table()
    for column in ("claim", "value", "at most", ""):
        table.add_column(column)
    for v in verdicts:
        outcome = "[green]ok[/]" if v.ok else "[red]failed[/]"
        table.add_row(v.claim, f"{v.value:.3g}", f"{v.limit:.3g}", outcome)
    return table


def run(steps: int = STEPS) -> bool:
    """Run the whole demo and print what it shows; say whether every claim held."""
    console: Any = Console()
    steps = max(steps, COMPARED_STEPS)
    with stage("read the standard library"):
        corpus = read_corpus()
    entropy = unigram_entropy(corpus)
    console.print(f"corpus: {len(corpus):,} bytes of Python, {entropy:.3f} nats per single byte")
    reference = train(make_model(), corpus, COMPARED_STEPS, "one process")
    losses = launch(train_rank, GRID[0] * GRID[1], steps)[0]
    console.print(loss_table(losses[:COMPARED_STEPS], reference))
    differences = relative_differences(losses[:COMPARED_STEPS], reference)
    verdicts = judge(losses, differences, entropy)
    console.print(verdict_table(verdicts))
    return all(v.ok for v in verdicts)
