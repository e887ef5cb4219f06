"""The models that the benchmarks train, and the batch of each: one builder per shape.

    SHAPES   name -> Shape; `build()` gives a model that returns its loss, and its inputs by name
    GPT      pre-norm, with separate q, k and v, which torch's own tensor parallelism splits too

Every batch divides by four, so that data parallelism may have it. `layers` overrides the depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]


class Attention(nn.Module):
    """Causal attention of `heads` heads."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.width = hidden // heads
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn, self.mlp = Attention(hidden, heads), Mlp(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """A GPT that returns its loss; `tied` uses one matrix for tokens and for logits."""

    def __init__(
        self, hidden: int, heads: int, layers: int, vocab: int, seq: int, tied: bool = False
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, hidden), nn.Embedding(seq, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.tied = tied
        if tied:
            nn.init.normal_(self.wte.weight, std=0.02)
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class WideMlp(nn.Module):
    """Linears between a narrow stream and a wide middle, `layers` times there and back."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        sizes = [(width, hidden), (hidden, width)] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x.square().mean()


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of `layers` layers and its batch; `about` says which.

    together   how many variants one set of processes holds at once: all their parameters are live
    """

    about: str
    layers: int
    make: Callable[[int], Built]
    together: int = 16

    def build(self, layers: int = 0) -> Built:
        """Return the model, its weights always the same, and its inputs."""
        torch.manual_seed(0)
        return self.make(layers or self.layers)


def gpt(
    batch: int, seq: int, hidden: int, layers: int, vocab: int = 1024, tied: bool = False
) -> Built:
    """Return a GPT with heads of 64, and tokens with their successors as labels."""
    tokens = torch.randint(0, vocab, (batch, seq))
    model = GPT(hidden, hidden // 64, layers, vocab, seq, tied)
    return model, {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def llama(batch: int, seq: int, hidden: int, layers: int) -> Built:
    """Return a Llama with half as many heads for keys and values as for queries."""
    import transformers  # costs every rank two seconds, whatever shape is asked for

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        use_cache=False,
    )
    tokens = torch.randint(0, 1024, (batch, seq))
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def wide_mlp(rows: int, width: int, hidden: int, layers: int) -> Built:
    return WideMlp(width, hidden, layers), {"x": torch.randn(rows, width)}


SHAPES: dict[str, Shape] = {
    "activation-heavy": Shape(
        "GPT, 8x512 tokens, hidden 256", 4, lambda layers: gpt(8, 512, 256, layers)
    ),
    "weight-heavy": Shape(
        "GPT, 4x64 tokens, hidden 1536", 2, lambda layers: gpt(4, 64, 1536, layers), together=5
    ),
    "balanced": Shape("GPT, 4x256 tokens, hidden 512", 2, lambda layers: gpt(4, 256, 512, layers)),
    "GPT-2 small": Shape(
        "GPT-2's sizes, 8x512 tokens, vocabulary 50257, tied",
        2,
        lambda layers: gpt(8, 512, 768, layers, 50257, tied=True),
        together=5,
    ),
    "Llama-GQA": Shape(
        "Llama, 4x512 tokens, hidden 512, 8 heads and 4 of keys",
        2,
        lambda layers: llama(4, 512, 512, layers),
    ),
    "wide MLP": Shape(
        "linears 512 to 4096 and back, 1024 rows",
        2,
        lambda layers: wide_mlp(1024, 512, 4096, layers),
    ),
    "tiny": Shape("GPT, 4x16 tokens, hidden 128: to try a script", 1, lambda n: gpt(4, 16, 256, n)),
}
"""The six shapes of docs/BENCHMARKS.md, and one to try a script with."""

MEASURED = tuple(name for name in SHAPES if name != "tiny")
