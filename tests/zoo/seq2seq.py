"""Encoder-decoders."""

from collections.abc import Callable

from torch import nn
from torch.nn import functional as F

from tests.models import Built
from tests.zoo.hugging_face import VOCAB, model, padding, tokens


def translator(kind, attention="sdpa", **config) -> Callable[[], Built]:
    """Return the builder of an encoder-decoder with its loss; one source sequence is padded."""

    def build() -> Built:
        labels = tokens(seq=5)
        labels[0, 3:] = -100
        inputs = dict(input_ids=tokens(), attention_mask=padding(), labels=labels)
        return model(kind, "Seq2SeqLM", attention, **config), inputs

    return build


class Transformer(nn.Module):
    """torch's own encoder-decoder with a causal mask and padding in the source."""

    def __init__(self, width=24, heads=6, batch_first=True):
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, width), nn.Embedding(VOCAB, width)
        self.inner = nn.Transformer(width, heads, 2, 2, 36, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(width, VOCAB)
        self.batch_first = batch_first

    def forward(self, source, target, padded):
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x, y = self.source(source), self.target(target)
        if not self.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        out = self.inner(
            x, y, tgt_mask=causal.to(x.dtype), tgt_is_causal=False, src_key_padding_mask=padded,
            memory_key_padding_mask=padded,
        )  # fmt: skip
        out = out if self.batch_first else out.transpose(0, 1)
        logits = self.head(out)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()), logits


def transformer(batch_first) -> Callable[[], Built]:
    def build() -> Built:
        padded = padding() == 0
        inputs = dict(source=tokens(), target=tokens(seq=5), padded=padded)
        return Transformer(batch_first=batch_first), inputs

    return build


T5 = dict(d_model=24, d_kv=4, d_ff=36, num_layers=2, num_heads=6, decoder_start_token_id=0)
BART = dict(
    d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6,
    decoder_attention_heads=6, encoder_ffn_dim=36, decoder_ffn_dim=36, decoder_start_token_id=0,
)  # fmt: skip

MODELS: dict[str, Callable[[], Built]] = {
    "t5": translator("t5", "eager", **T5),
    "t5 gated": translator("t5", "eager", feed_forward_proj="gated-gelu",
                           tie_word_embeddings=False, **T5),
    "mt5": translator("mt5", "eager", **T5),
    "umt5": translator("umt5", "eager", **T5),
    "longt5": translator("longt5", "eager", local_radius=2, **T5),
    "bart": translator("bart", **BART),
    "bart eager": translator("bart", "eager", **BART),
    "mbart": translator("mbart", **BART),
    "pegasus": translator("pegasus", **BART),
    "marian": translator("marian", **BART),
    "m2m_100": translator("m2m_100", **BART),
    "blenderbot": translator("blenderbot", **BART),
    "nn.Transformer": transformer(True),
    "nn.Transformer, sequence first": transformer(False),
}  # fmt: skip
SAMPLE = ("nn.Transformer",)
