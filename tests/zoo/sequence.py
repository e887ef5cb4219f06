"""State-space, recurrent and audio networks, recommendation and message passing."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, VOCAB, Built, tokens


def language(model) -> Built:
    ids = tokens()
    return model, dict(input_ids=ids, labels=ids.clone())


def mamba() -> Built:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4, time_step_rank=3,
        use_cache=False,
    )  # fmt: skip
    return language(MambaForCausalLM(config))


def mamba2() -> Built:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4, num_heads=6,
        head_dim=8, n_groups=2, chunk_size=3, use_cache=False,
    )  # fmt: skip
    return language(Mamba2ForCausalLM(config))


def rwkv() -> Built:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, intermediate_size=36,
        attention_hidden_size=24, context_length=16, rescale_every=0, use_cache=False,
    )  # fmt: skip
    return language(RwkvForCausalLM(config))


class Recurrent(nn.Module):
    """A language model on LSTM or GRU layers, with the classifier that reads both directions."""

    def __init__(self, cell=nn.LSTM, width=12, hidden=18, bidirectional=False, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.rnn = cell(width, hidden, 2, batch_first=batch_first, bidirectional=bidirectional)
        self.norm = nn.LayerNorm(hidden * (1 + bidirectional))
        self.head = nn.Linear(hidden * (1 + bidirectional), VOCAB)
        self.batch_first = batch_first

    def forward(self, ids, targets):
        x = self.embed(ids)
        out, state = self.rnn(x if self.batch_first else x.transpose(0, 1))
        out = out if self.batch_first else out.transpose(0, 1)
        logits = self.head(self.norm(out))
        return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1)), state


class DLRM(nn.Module):
    """Tables of sums, dense features, all pairs of dot products, a click or none."""

    def __init__(self, tables=(29, 12, 18), width=12, dense=5):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum") for n in tables)
        self.bottom = nn.Sequential(
            nn.Linear(dense, 24), nn.ReLU(), nn.Linear(24, width), nn.ReLU()
        )
        features = len(tables) + 1
        self.top = nn.Sequential(
            nn.Linear(width + features * (features - 1) // 2, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, dense, sparse, offsets, clicks):
        x = self.bottom(dense)
        rows = [table(ids, at) for table, ids, at in zip(self.tables, sparse, offsets, strict=True)]
        features = torch.cat([x, *rows], dim=1).view(x.shape[0], -1, x.shape[1])
        dots = torch.bmm(features, features.transpose(1, 2))
        _, n, _ = dots.shape
        i, j = torch.tril_indices(n, n, offset=-1)
        joined = torch.cat([x, dots[:, i, j]], dim=1)
        return F.binary_cross_entropy_with_logits(self.top(joined).squeeze(1), clicks)


class MessagePassing(nn.Module):
    """A graph network: messages along edges, added up at their targets; degrees by scatter."""

    def __init__(self, features=5, width=24, classes=6):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.message = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.update = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.attention = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x, edges, labels):
        source, target = edges[0], edges[1]
        h = self.embed(x)
        ones = torch.ones(edges.shape[1], dtype=x.dtype, device=x.device)
        degree = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        degree = degree.scatter_add(0, target, ones).clamp(min=1)
        for message, update in zip(self.message, self.update, strict=True):
            sent = F.relu(message(torch.cat([h[source], h[target]], dim=-1)))
            sent = sent * torch.sigmoid(sent @ self.attention).unsqueeze(-1)
            got = torch.zeros_like(h).index_add_(0, target, sent) / degree.unsqueeze(-1)
            h = h + F.relu(update(torch.cat([h, got], dim=-1)))
        return F.nll_loss(F.log_softmax(self.head(h), dim=-1), labels)


def whisper(attention="sdpa") -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=8, d_model=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=36,
        decoder_ffn_dim=36, max_source_positions=8, max_target_positions=16, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None, attn_implementation=attention,
    )  # fmt: skip
    inputs = dict(input_features=torch.randn(BATCH, 8, 16), labels=tokens())
    return WhisperForConditionalGeneration(config), inputs


def recommendation() -> Built:
    offsets = torch.tensor([0, 2, 3, 5]).repeat(3, 1)
    sparse = torch.randint(12, (3, 7))
    dense, clicks = torch.randn(BATCH, 5), torch.rand(BATCH).round()
    return DLRM(), dict(dense=dense, sparse=sparse, offsets=offsets, clicks=clicks)


def graph() -> Built:
    nodes = 8
    edges, labels = torch.randint(nodes, (2, 18)), torch.randint(6, (nodes,))
    return MessagePassing(), dict(x=torch.randn(nodes, 5), edges=edges, labels=labels)


def recurrent(*args, **options) -> Callable[[], Built]:
    return lambda: (Recurrent(*args, **options), dict(ids=tokens(), targets=tokens()))


MODELS: dict[str, Callable[[], Built]] = {
    "mamba": mamba,
    "mamba2": mamba2,
    "rwkv": rwkv,
    "lstm": recurrent(),
    "lstm, both directions": recurrent(bidirectional=True, batch_first=False),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "dlrm": recommendation,
    "graph": graph,
    "whisper": whisper,
    "whisper eager": lambda: whisper("eager"),
}
SAMPLE = ("dlrm", "lstm, both directions")
