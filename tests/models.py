"""Small models of every family that autotp covers, each with the inputs of one training step.

Sizes are such that some dims divide by 2, 3 and 4 and others do not. Dropout is off unless said.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, dict[str, torch.Tensor]]
BATCH, SEQ, VOCAB = 4, 6, 29


class ResidualMLP(nn.Module):
    def __init__(self, width=12, hidden=24, depth=2):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, y):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(x)))
        return F.mse_loss(self.norm(x), y)


class CausalAttention(nn.Module):
    """nanoGPT's: one projection for q, k and v, and a flag for the mask."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.c_proj(F.gelu(self.c_fc(self.ln_2(x)))))


class NanoGPT(nn.Module):
    """A language model as nanoGPT writes it: tied embeddings, loss inside, logits beside it."""

    def __init__(self, width=24, heads=6, depth=2, dropout=0.0):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(16, width)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)
        return logits, loss


class Encoder(nn.Module):
    """torch's own encoder between two projections; it returns no loss."""

    def __init__(self, batch_first, width=24, heads=6, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 36, dropout=0.0, batch_first=batch_first, norm_first=norm_first
        )
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.inner(x)


def tokens(count=VOCAB):
    return torch.randint(count, (BATCH, SEQ))


def mlp() -> Built:
    return ResidualMLP(), dict(x=torch.randn(8, 12), y=torch.randn(8, 12))


def nanogpt(dropout=0.0) -> Built:
    targets = tokens()
    targets[0, :2] = -1
    return NanoGPT(dropout=dropout), dict(idx=tokens(), targets=targets)


def encoder(batch_first: bool) -> Built:
    shape = (BATCH, SEQ, 24) if batch_first else (SEQ, BATCH, 24)
    return Encoder(batch_first, norm_first=batch_first), dict(x=torch.randn(shape))


def gpt2(attention="sdpa", dropout=0.0) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=4, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        attn_implementation=attention, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = tokens()
    return GPT2LMHeadModel(config), dict(input_ids=ids, labels=ids.clone())


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    ids = tokens()
    return LlamaForCausalLM(config), dict(input_ids=ids, labels=ids.clone())


def bert(attention="sdpa", dropout=0.0) -> Built:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=36, max_position_embeddings=16, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation=attention,
    )  # fmt: skip
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = dict(input_ids=tokens(), attention_mask=mask, labels=tokens())
    return BertForMaskedLM(config), inputs


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=36,
        image_size=8, patch_size=4, num_labels=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    inputs = dict(pixel_values=torch.randn(BATCH, 3, 8, 8), labels=torch.randint(5, (BATCH,)))
    return ViTForImageClassification(config), inputs


MODELS: dict[str, Callable[[], Built]] = {
    "mlp": mlp,
    "nanogpt": nanogpt,
    "encoder, batch first": lambda: encoder(True),
    "encoder, sequence first": lambda: encoder(False),
    "gpt2": gpt2,
    "gpt2 eager": lambda: gpt2("eager"),
    "llama": llama,
    "bert": bert,
    "bert eager": lambda: bert("eager"),
    "vit": vit,
}


def build(name: str, *, double: bool = False, seed: int = 0) -> Built:
    """Return the model called `name`, in float64 if asked, with its inputs."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    if double:
        model = model.double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model, inputs
