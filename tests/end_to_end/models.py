"""Tiny models with fused, grouped, tied and uneven parameters, and a cluster that shards them."""

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from autotp.cost_model.cluster import bandwidth_bound

CLUSTER = bandwidth_bound(1e9, flops_per_s=1e9)  # slow enough that sharing the work pays
VOCAB = 65


def tokens():
    ids = torch.randint(VOCAB, (4, 16))
    return {"input_ids": ids, "labels": ids.clone()}


def gpt2(dropout=0.0):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Mlp(nn.Module):
    """Two linear layers, a buffer that counts calls, and a parameter that is not trained."""

    def __init__(self, width=32):
        super().__init__()
        self.fc1 = nn.Linear(8, width)
        self.fc2 = nn.Linear(width, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.ones(8), persistent=False)

    def forward(self, x, target=None):
        self.calls += 1
        y = self.fc2(torch.relu(self.fc1(x))) * self.scale + self.shift
        return y if target is None else ((y - target) ** 2).mean()


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def loss_of(output):
    return output if isinstance(output, torch.Tensor) else output.loss


def gradients(model):
    return {
        name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
    }


def train(model, inputs, call=None):
    """Return the loss, the norm and the gradients of three steps of `call`, by name in `model`.

    AdamW's eps is 1e-3: a key's bias has a true gradient of zero, whose rounding Adam would
    amplify.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    seen = {}
    for step in range(3):
        loss = loss_of((model if call is None else call)(**inputs))
        optimizer.zero_grad()
        loss.backward()
        seen |= {f"{name} {step}": g for name, g in gradients(model).items()}
        norm = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        seen |= {f"loss {step}": loss.detach(), f"norm {step}": whole(norm)}
    return seen


def assert_near(mine, theirs, bound=1e-5):
    """Hold that tensors by name differ by at most `bound` of each one's largest element."""
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        largest = expected.abs().max()
        distance = (mine[name] - expected).abs().max()
        assert distance <= bound * largest, f"{name}: {distance:.2e} of {largest:.2e}"
