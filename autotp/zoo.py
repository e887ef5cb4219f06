"""Models by name for the command line: built from their config, with inputs to match.

A small variant keeps the architecture (fused projections, grouped heads, tied weights) and makes
every size small enough to run all ranks in one process. Weights are random or, on the meta device,
absent: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Entry:
    """A Hugging Face class, its config class, and the config's fields in full and in small."""

    model: str
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    reads: str = "tokens"


GPT2_SMALL = dict(n_layer=2, n_embd=64, n_head=4, vocab_size=257, n_positions=64)
GPT2_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
ENCODER_SMALL = dict(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128
)
ENCODER_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LLAMA_3_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
LLAMA_SMALL = ENCODER_SMALL | dict(num_key_value_heads=2, vocab_size=256)

ZOO: dict[str, Entry] = {
    "gpt2": Entry("GPT2LMHeadModel", "GPT2Config", GPT2_NO_DROPOUT, GPT2_SMALL),
    "gpt2-xl": Entry(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2_NO_DROPOUT | dict(n_layer=48, n_embd=1600, n_head=25),
        GPT2_SMALL,
    ),
    "llama-3-8b": Entry("LlamaForCausalLM", "LlamaConfig", LLAMA_3_8B, LLAMA_SMALL),
    "bert": Entry(
        "BertForMaskedLM", "BertConfig", ENCODER_NO_DROPOUT, ENCODER_SMALL | dict(vocab_size=256)
    ),
    "vit": Entry(
        "ViTForImageClassification",
        "ViTConfig",
        ENCODER_NO_DROPOUT | dict(num_labels=1000),
        ENCODER_SMALL | dict(image_size=32, patch_size=8, num_labels=10),
        reads="images",
    ),
}


def build(
    name: str, *, small: bool = False, batch: int = 8, seq: int = 1024, device: str = "meta"
) -> tuple[torch.nn.Module, Inputs]:
    """Return the model called `name` and keyword inputs, labels among them, for one training step.

    >>> model, inputs = build("llama-3-8b", batch=4, seq=128)
    >>> sum(p.numel() for p in model.parameters()), tuple(inputs["labels"].shape)
    (8030261248, (4, 128))
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of its own loss

    entry = ZOO[name]
    fields = dict(entry.fields) | (dict(entry.small) if small else {})
    if entry.reads == "tokens":
        fields["use_cache"] = False
    config = getattr(transformers, entry.config)(**fields)
    with torch.device(device):
        model: torch.nn.Module = getattr(transformers, entry.model)(config)
        inputs = _images(config, batch) if entry.reads == "images" else _tokens(config, batch, seq)
    return model, inputs


def _tokens(config: Any, batch: int, seq: int) -> Inputs:
    tokens = torch.randint(config.vocab_size, (batch, min(seq, config.max_position_embeddings)))
    return {"input_ids": tokens, "labels": tokens.clone()}


def _images(config: Any, batch: int) -> Inputs:
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    labels = torch.randint(config.num_labels, (batch,))
    return {"pixel_values": torch.randn(shape), "labels": labels}
