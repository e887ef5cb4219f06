"""Mixtures of experts: those of transformers in both forms, and as people write them by hand."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import Built, tokens

WIDTH, HIDDEN, EXPERTS, WORDS = 24, 36, 6, 30


class Weights(nn.Module):
    """The weights of all experts, each in one tensor `[E, ...]`."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 5)


class Switch(Weights):
    """Fedus et al. 2021: one expert a token, a capacity, dispatch and combine by einsum."""

    capacity = 6

    def forward(self, x):
        share = self.router(x).softmax(-1)
        gate, expert = share.max(-1)
        chosen = F.one_hot(expert, EXPERTS)
        place = (chosen.cumsum(1) * chosen).sum(-1) - 1
        fits = (place < self.capacity).to(x.dtype)
        slot = F.one_hot(place.clamp(0, self.capacity - 1), self.capacity)
        dispatch = torch.einsum("bse,bsc,bs->bsec", chosen.to(x.dtype), slot.to(x.dtype), fits)
        rows = torch.einsum("bsec,bsh->ebch", dispatch, x)
        made = torch.einsum("ebcf,efh->ebch", torch.einsum("ebch,ehf->ebcf", rows, self.up).relu(),
                            self.down)  # fmt: skip
        balance = (chosen.to(x.dtype).mean((0, 1)) * share.mean((0, 1))).sum() * EXPERTS
        return torch.einsum("bsec,bs,ebch->bsh", dispatch, gate, made), balance


class Capacity(Weights):
    """Two experts a token; a table of slots is filled by scatter and read by gather."""

    capacity = 12

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        gate, expert = self.router(flat).softmax(-1).topk(2)
        gate, expert = (gate / gate.sum(-1, keepdim=True)).reshape(-1), expert.reshape(-1)
        chosen = F.one_hot(expert, EXPERTS)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        kept = place < self.capacity
        slot = torch.where(kept, expert * self.capacity + place, EXPERTS * self.capacity)
        rows = flat.repeat_interleave(2, 0)
        table = x.new_zeros(EXPERTS * self.capacity + 1, WIDTH)
        table = table.scatter(0, slot[:, None].expand(-1, WIDTH), rows)
        inside = table[:-1].view(EXPERTS, self.capacity, WIDTH)
        made = torch.bmm(F.silu(torch.bmm(inside, self.up)), self.down).reshape(-1, WIDTH)
        made = torch.cat([made, made.new_zeros(1, WIDTH)])
        out = made[slot] * (gate * kept)[:, None]
        return out.view(-1, 2, WIDTH).sum(1).view_as(x), x.new_zeros(())


class Dense(Weights):
    """All experts see all tokens; what the router did not choose counts nothing."""

    def forward(self, x):
        gate, expert = self.router(x).topk(2)
        weight = torch.zeros_like(self.router(x)).scatter(-1, expert, gate.softmax(-1))
        inside = torch.einsum("bsh,ehf->ebsf", x, self.up)
        made = torch.einsum("ebsf,efh->ebsh", F.gelu(inside), self.down)
        return torch.einsum("ebsh,bse->bsh", made, weight), x.new_zeros(())


class Sorted(Weights):
    """Rows sorted by expert, one product a group, and the results added where they came from."""

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        gate, expert = self.router(flat).softmax(-1).topk(2)
        order = expert.reshape(-1).argsort(stable=True)
        rows = order // 2
        share = torch.zeros(len(order), EXPERTS, dtype=x.dtype).scatter(
            1, expert.reshape(-1)[order][:, None], 1.0
        )
        inside = torch.einsum("th,ehf,te->tf", flat[rows], self.up, share).relu()
        made = torch.einsum("tf,efh,te->th", inside, self.down, share)
        made = made * gate.reshape(-1)[order][:, None]
        out = torch.zeros_like(flat).index_add(0, rows, made)
        return out.view_as(x), x.new_zeros(())


class Layer(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = experts

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        made, balance = self.experts(self.ln_2(x))
        return x + made, balance


class Decoder(nn.Module):
    """A language model of two layers with such experts; its loss holds their balance."""

    def __init__(self, experts):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Layer(experts()) for _ in range(2))

    def forward(self, ids, labels):
        x, balance = self.embed(ids), 0.0
        for layer in self.layers:
            x, more = layer(x)
            balance = balance + more
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()) + 0.01 * balance


def by_hand(experts) -> Built:
    return Decoder(experts), dict(ids=tokens(WORDS), labels=tokens(WORDS))


COMMON = dict(
    vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    num_experts_per_tok=2,
)  # fmt: skip


def labelled(model) -> Built:
    ids = tokens(WORDS)
    return model, dict(input_ids=ids, labels=ids.clone())


def mixtral(form, **more) -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**COMMON, **more, num_local_experts=EXPERTS, experts_implementation=form)
    return labelled(MixtralForCausalLM(config))


def qwen2_moe(form) -> Built:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **COMMON, num_experts=EXPERTS, moe_intermediate_size=12,
        shared_expert_intermediate_size=24, decoder_sparse_step=1, experts_implementation=form,
    )  # fmt: skip
    return labelled(Qwen2MoeForCausalLM(config))


def deepseek_v3(form) -> Built:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **(COMMON | dict(num_attention_heads=4, num_key_value_heads=4)), moe_intermediate_size=12,
        n_shared_experts=1, n_routed_experts=EXPERTS, kv_lora_rank=8, q_lora_rank=12,
        qk_rope_head_dim=4, v_head_dim=6, qk_nope_head_dim=6, n_group=2, topk_group=1,
        first_k_dense_replace=1, experts_implementation=form,
    )  # fmt: skip
    return labelled(DeepseekV3ForCausalLM(config))


MODELS: dict[str, Callable[[], Built]] = {
    "mixtral": lambda: mixtral("grouped_mm"),
    "mixtral batched": lambda: mixtral("batched_mm"),
    "mixtral balanced": lambda: mixtral("grouped_mm", output_router_logits=True),
    "qwen2-moe": lambda: qwen2_moe("grouped_mm"),
    "qwen2-moe batched": lambda: qwen2_moe("batched_mm"),
    "deepseek-v3": lambda: deepseek_v3("grouped_mm"),
    "deepseek-v3 batched": lambda: deepseek_v3("batched_mm"),
    "experts by einsum": lambda: by_hand(Switch),
    "experts by slots": lambda: by_hand(Capacity),
    "experts by sorting": lambda: by_hand(Sorted),
    "experts on all tokens": lambda: by_hand(Dense),
}
SAMPLE = ("mixtral", "experts by einsum")
SINGLE = ("mixtral", "mixtral balanced", "qwen2-moe", "deepseek-v3")  # grouped_mm has no float64
