"""Transformers as people write them by hand: one skeleton, many ways to attend.

`x: "b s h"`, and the attention of each is a module from x to x.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import Built
from tests.zoo.hugging_face import VOCAB, tokens

WIDTH, HEADS, HEAD = 24, 6, 4


def frequencies():
    return 1 / 100 ** (torch.arange(0, HEAD, 2) / HEAD)


class Attention(nn.Module):
    """Heads made by `heads(x)`, mixed by `mix(q, k, v)`: the parts that differ."""

    groups = HEADS

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.ones(16, 16).tril().bool(), persistent=False)
        self.make()

    def make(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x):
        b, s, _ = x.shape
        return (y.view(b, s, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x):
        out = self.mix(*self.heads(x))
        return self.proj(out.transpose(1, 2).flatten(2))


class Unbound(Attention):
    """timm's: three times heads in one dim, unbound after a permutation."""

    def heads(self, x):
        b, s, _ = x.shape
        return self.qkv(x).reshape(b, s, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)


class Interleaved(Attention):
    """Each head has its q, k and v side by side: `b s (n 3 d)`."""

    def heads(self, x):
        qkv = self.qkv(x).unflatten(-1, (HEADS, 3 * HEAD)).transpose(1, 2)
        return qkv[..., :HEAD], qkv[..., HEAD : 2 * HEAD], qkv[..., 2 * HEAD :]


class Rearranged(Attention):
    """As einops writes "b s (d n three) -> three b n s d": the head is the middle factor."""

    def heads(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, HEAD, HEADS, 3).permute(4, 0, 3, 1, 2)
        return q, k, v


class ByMask(Attention):
    """minGPT's: products, a buffer for the mask, softmax."""

    def mix(self, q, k, v):
        s = q.shape[-2]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.seen[:s, :s].logical_not(), float("-inf"))
        return F.softmax(att, dim=-1) @ v


class ByEinsum(Attention):
    """Products by einsum, with heads behind positions."""

    def heads(self, x):
        b, s, _ = x.shape
        return self.qkv(x).view(b, s, 3, HEADS, HEAD).unbind(2)

    def mix(self, q, k, v):
        att = torch.einsum("bind,bjnd->bnij", q, k) / HEAD**0.5
        att = att + torch.full(att.shape[-2:], -1e9).triu(1)
        return torch.einsum("bnij,bjnd->bnid", att.softmax(-1), v)


class Grouped(Attention):
    """Grouped queries from one unequal projection: 6 heads of q, 2 of k and of v."""

    groups = 2

    def make(self):
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * self.groups) * HEAD, bias=False)

    def heads(self, x):
        b, s, _ = x.shape
        wide = self.groups * HEAD
        q, k, v = self.qkv(x).split([WIDTH, wide, wide], dim=-1)
        q, k, v = (y.view(b, s, -1, HEAD).transpose(1, 2) for y in (q, k, v))
        return q, self.repeat(k), self.repeat(v)

    def repeat(self, x):
        return x.repeat_interleave(HEADS // self.groups, dim=1)


class GroupedByFlag(Grouped):
    """Grouped queries by the flag of torch's attention."""

    def repeat(self, x):
        return x

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class GroupedByExpand(Grouped):
    """Grouped queries by expand and reshape, as Llama's repeat_kv."""

    def repeat(self, x):
        b, m, s, d = x.shape
        return x[:, :, None].expand(b, m, HEADS // m, s, d).reshape(b, HEADS, s, d)


class GroupedByBroadcast(Grouped):
    """Grouped queries with the group as a dim of its own, never repeated."""

    def repeat(self, x):
        return x.unsqueeze(2)

    def mix(self, q, k, v):
        q = q.unflatten(1, (self.groups, HEADS // self.groups))
        att = q @ k.transpose(-2, -1) / HEAD**0.5
        att = att.masked_fill(~self.seen[: q.shape[-2], : q.shape[-2]], -1e9)
        return (att.softmax(-1) @ v).flatten(1, 2)


class MultiQuery(Grouped):
    """One head of keys and values for all."""

    groups = 1

    def repeat(self, x):
        return x.expand(-1, HEADS, -1, -1)


class Rotary(Attention):
    """Llama's reference: rotation by complex numbers."""

    def rotate(self, x):
        angles = torch.outer(
            torch.arange(x.shape[-2]), 1 / 100 ** (torch.arange(0, HEAD, 2) / HEAD)
        )
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3).type_as(x)

    def mix(self, q, k, v):
        return super().mix(self.rotate(q), self.rotate(k), v)


class RotaryPairs(Attention):
    """GPT-J's and PaLM's: rotation of neighbouring elements."""

    def rotate(self, x):
        s = torch.arange(x.shape[-2], dtype=x.dtype)
        angles = torch.einsum(
            "i,j->ij", s, 1 / 100 ** (torch.arange(0, HEAD, 2) / HEAD).to(x.dtype)
        )
        angles = angles.repeat_interleave(2, -1)
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack((-b, a), dim=-1).flatten(-2)
        return x * angles.cos() + turned * angles.sin()

    def mix(self, q, k, v):
        return super().mix(self.rotate(q), self.rotate(k), v)


class Alibi(Attention):
    """A slope per head times the distance."""

    def mix(self, q, k, v):
        s = torch.arange(q.shape[-2])
        slopes = torch.pow(2.0, -torch.arange(1, HEADS + 1, dtype=q.dtype))
        bias = slopes[:, None, None] * -(s[:, None] - s[None, :]).abs()
        bias = bias.masked_fill(s[:, None] < s[None, :], float("-inf")).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class Relative(Attention):
    """A learned bias per head and distance, looked up in a table."""

    def make(self):
        super().make()
        self.table = nn.Embedding(7, HEADS)

    def mix(self, q, k, v):
        s = torch.arange(q.shape[-2])
        bias = self.table((s[:, None] - s[None, :]).clamp(-3, 3) + 3).permute(2, 0, 1)
        att = (q @ k.mT * HEAD**-0.5 + bias).masked_fill(s[:, None] < s, -1e9)
        return att.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


class Latent(Attention):
    """Multi-head latent attention: keys and values from a narrow projection, one rotary key."""

    def make(self):
        self.q_down, self.q_up = nn.Linear(WIDTH, 8), nn.Linear(8, HEADS * (HEAD + 2))
        self.kv_down = nn.Linear(WIDTH, 8 + 2)
        self.kv_norm, self.kv_up = nn.RMSNorm(8), nn.Linear(8, HEADS * 2 * HEAD)

    def heads(self, x):
        b, s, _ = x.shape
        q = self.q_up(self.q_down(x)).view(b, s, HEADS, -1).transpose(1, 2)
        low, rope = self.kv_down(x).split([8, 2], dim=-1)
        kv = self.kv_up(self.kv_norm(low)).view(b, s, HEADS, 2 * HEAD).transpose(1, 2)
        k, v = kv.split([HEAD, HEAD], dim=-1)
        rope = rope.view(b, s, 1, 2).transpose(1, 2).expand(-1, HEADS, -1, -1).cos()
        return q, torch.cat([k, rope], dim=-1), v


class Normed(Attention):
    """Queries and keys normalised over the head, with a learned scale."""

    def make(self):
        super().make()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)
        self.scale = nn.Parameter(torch.ones(HEADS, 1, 1))

    def mix(self, q, k, v):
        return super().mix(self.q_norm(q) * self.scale, F.normalize(self.k_norm(k), dim=-1), v)


class Linear(Attention):
    """Linear attention by running sums over positions."""

    def mix(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bnsd,bnse->bnsde", k, v).cumsum(2)
        return torch.einsum("bnsd,bnsde->bnse", q, state) / (q * k.cumsum(2)).sum(-1, True)


class Differential(Attention):
    """The difference of two attentions, learned per head."""

    def make(self):
        self.qk, self.v = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.rand(HEADS))

    def heads(self, x):
        b, s, _ = x.shape
        q, k = self.qk(x).view(b, s, 2, 2 * HEADS, HEAD).permute(2, 0, 3, 1, 4)
        return q, k, self.v(x).view(b, s, HEADS, HEAD).transpose(1, 2)

    def mix(self, q, k, v):
        att = (q @ k.mT + torch.full((q.shape[-2],) * 2, float("-inf")).triu(1)).softmax(-1)
        one, two = att.unflatten(1, (HEADS, 2)).unbind(2)
        return (one - self.weight[:, None, None] * two) @ v


class TalkingHeads(ByMask):
    """Heads are mixed before and after the softmax."""

    def make(self):
        super().make()
        self.before, self.after = nn.Linear(HEADS, HEADS, False), nn.Linear(HEADS, HEADS, False)

    def mix(self, q, k, v):
        att = self.before((q @ k.mT).permute(0, 2, 3, 1))
        att = self.after(att.softmax(2)).permute(0, 3, 1, 2)
        return att @ v


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 36), nn.GELU(), nn.Linear(36, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Fused(nn.Module):
    """PaLM's block: one projection for attention and feed-forward, side by side."""

    def __init__(self):
        super().__init__()
        self.sizes = (WIDTH, HEAD, HEAD, 2 * 36)
        self.norm, self.inner = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, sum(self.sizes), bias=False)
        self.out, self.down = nn.Linear(WIDTH, WIDTH, False), nn.Linear(36, WIDTH, False)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v, ff = self.inner(self.norm(x)).split(self.sizes, dim=-1)
        q = q.view(b, s, HEADS, HEAD).transpose(1, 2)
        att = torch.einsum("bnid,bjd->bnij", q, k).softmax(-1)
        att = torch.einsum("bnij,bjd->bnid", att, v).transpose(1, 2).reshape(b, s, WIDTH)
        up, gate = ff.chunk(2, dim=-1)
        return x + self.out(att) + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    """Embeddings, blocks, a loss; `shared` blocks are one block called twice."""

    def __init__(self, block, loss, shared=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(1, 16, WIDTH) / 9)
        blocks = [block()] * 2 if shared else [block(), block()]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.loss = loss

    def forward(self, ids):
        x = self.wte(ids) * WIDTH**0.5 + self.wpe[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return self.loss(logits[:, :-1], ids[:, 1:]), logits


def cross_entropy(logits, ids):
    return F.cross_entropy(logits.reshape(-1, VOCAB), ids.reshape(-1), label_smoothing=0.1)


def by_class_dim(logits, ids):
    return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean()


def by_gather(logits, ids):
    scores = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return -(scores * (ids != 3)).sum() / (ids != 3).sum()


def with_z_loss(logits, ids):
    z = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(2, ids.unsqueeze(2)).squeeze(2)
    return (z - picked).mean() + 1e-2 * z.square().mean()


def by_nll(logits, ids):
    return F.nll_loss(F.log_softmax(logits, dim=-1).flatten(0, 1), ids.flatten(), ignore_index=3)


def gpt(attention, loss=cross_entropy, **options) -> Callable[[], Built]:
    return lambda: (GPT(lambda: Block(attention), loss, **options), dict(ids=tokens()))


MODELS: dict[str, Callable[[], Built]] = {
    "by hand: chunk": gpt(Attention),
    "by hand: unbind": gpt(Unbound, by_gather),
    "by hand: interleaved": gpt(Interleaved, with_z_loss),
    "by hand: rearrange": gpt(Rearranged, by_nll),
    "by hand: mask": gpt(ByMask, by_class_dim),
    "by hand: einsum": gpt(ByEinsum),
    "by hand: grouped": gpt(Grouped),
    "by hand: grouped by flag": gpt(GroupedByFlag),
    "by hand: grouped by expand": gpt(GroupedByExpand),
    "by hand: grouped by broadcast": gpt(GroupedByBroadcast),
    "by hand: multi-query": gpt(MultiQuery),
    "by hand: complex rotary": gpt(Rotary),
    "by hand: paired rotary": gpt(RotaryPairs),
    "by hand: alibi": gpt(Alibi),
    "by hand: relative": gpt(Relative),
    "by hand: latent": gpt(Latent),
    "by hand: normed": gpt(Normed),
    "by hand: linear": gpt(Linear),
    "by hand: differential": gpt(Differential),
    "by hand: talking heads": gpt(TalkingHeads),
    "by hand: shared": gpt(Attention, shared=True),
    "by hand: fused": lambda: (GPT(Fused, cross_entropy), dict(ids=tokens())),
}
SAMPLE = ("by hand: complex rotary",)
