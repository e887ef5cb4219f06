"""Build a small transformers model from its configuration, with random weights and no dropout."""

import torch

BATCH, SEQ, VOCAB = 4, 6, 29

SIZES = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
    num_attention_heads=6, max_position_embeddings=32, use_cache=False,
    bos_token_id=0, eos_token_id=0, pad_token_id=1,
)  # fmt: skip
"""What most configurations call their sizes; aliases do the rest."""


def model(kind, head, attention="sdpa", **config):
    """Return the `transformers.AutoModelFor...` of a model type; it takes the sizes that it has."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **config})
    for part in (config, *vars(config).values()):
        for name, value in getattr(part, "__dict__", {}).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    auto = getattr(transformers, f"AutoModelFor{head}")
    return auto.from_config(config, attn_implementation=attention)


def tokens(count=VOCAB, batch=BATCH, seq=SEQ):
    """Return random ids without the special ones."""
    return torch.randint(2, count, (batch, seq))


def padding(left=False):
    """Return an attention mask in which one sequence is shorter."""
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1, :2] = 0 if left else 1
    mask[1, 4:] = 1 if left else 0
    return mask
