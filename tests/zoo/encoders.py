"""Encoders with their heads: masked tokens, classes, spans, tokens' classes, choices."""

from collections.abc import Callable

import torch

from tests.models import Built
from tests.zoo.hugging_face import BATCH, SEQ, VOCAB, model, padding, tokens


def masked(kind, attention="sdpa", **config) -> Callable[[], Built]:
    """Return the builder of a masked language model, some tokens of which are padding."""

    def build() -> Built:
        labels = tokens()
        labels[:, ::2] = -100
        inputs = dict(input_ids=tokens(), attention_mask=padding(), labels=labels)
        return model(kind, "MaskedLM", attention, **config), inputs

    return build


def headed(kind, head, labels, attention="sdpa", **config) -> Callable[[], Built]:
    """Return the builder of an encoder with a head; `labels` makes what it learns."""

    def build() -> Built:
        inputs = dict(input_ids=tokens(), attention_mask=padding(), **labels())
        return model(kind, head, attention, **config), inputs

    return build


def classes() -> dict[str, torch.Tensor]:
    return dict(labels=torch.randint(3, (BATCH,)))


def token_classes() -> dict[str, torch.Tensor]:
    return dict(labels=torch.randint(3, (BATCH, SEQ)))


def spans() -> dict[str, torch.Tensor]:
    return dict(
        start_positions=torch.randint(SEQ, (BATCH,)), end_positions=torch.randint(SEQ, (BATCH,))
    )


def choices() -> Built:
    inputs = dict(input_ids=torch.randint(2, VOCAB, (BATCH, 3, SEQ)))
    return model("bert", "MultipleChoice", initializer_range=0.3), inputs | dict(
        labels=torch.randint(3, (BATCH,))
    )


DISENTANGLED = dict(
    relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
    norm_rel_ebd="layer_norm", share_att_key=True, num_attention_heads=4,
)  # fmt: skip

MODELS: dict[str, Callable[[], Built]] = {
    "bert classifies": headed("bert", "SequenceClassification", classes, num_labels=3),
    "bert answers": headed("bert", "QuestionAnswering", spans),
    "bert chooses": choices,
    "roberta": masked("roberta"),
    "roberta classifies": headed("roberta", "SequenceClassification", classes, num_labels=3),
    "distilbert": masked("distilbert", dim=24, hidden_dim=36, n_heads=6, n_layers=2),
    "distilbert answers": headed("distilbert", "QuestionAnswering", spans, dim=24, hidden_dim=36,
                                 n_heads=6, n_layers=2),
    "albert": masked("albert", embedding_size=12),
    "electra": masked("electra", embedding_size=12),
    "electra tags": headed("electra", "TokenClassification", token_classes, num_labels=3),
    "camembert": masked("camembert"),
    "deberta": masked("deberta", "eager", **DISENTANGLED),
    "deberta-v2": masked("deberta-v2", "eager", **DISENTANGLED),
    "modernbert": masked("modernbert", local_attention=4, global_attn_every_n_layers=2),
    "modernbert eager": masked("modernbert", "eager", local_attention=4,
                               global_attn_every_n_layers=2),
    "mpnet": masked("mpnet", "eager"),
    "roformer": masked("roformer", "eager"),
    "rembert": masked("rembert", "eager", input_embedding_size=12, output_embedding_size=12),
    "esm": masked("esm", position_embedding_type="rotary", mask_token_id=2, token_dropout=False),
    "fnet": masked("fnet", "eager"),
    "squeezebert": masked("squeezebert", "eager", embedding_size=24, q_groups=2, k_groups=2,
                          v_groups=2, post_attention_groups=1, intermediate_groups=2,
                          output_groups=2),
    "xlm": masked("xlm", "eager", emb_dim=24, n_heads=6, n_layers=2),
}  # fmt: skip
SAMPLE = ("modernbert",)
