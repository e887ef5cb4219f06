"""Decoders: causal language models of every family, and heads that stand on them."""

from collections.abc import Callable

import torch

from tests.models import Built
from tests.zoo.hugging_face import BATCH, model, padding, tokens


def causal(kind, attention="sdpa", mask=None, **config) -> Callable[[], Built]:
    """Return the builder of a causal language model with its loss."""

    def build() -> Built:
        ids = tokens()
        inputs = dict(input_ids=ids, labels=ids.clone())
        given = {} if mask is None else dict(attention_mask=padding(mask == "left"))
        return model(kind, "CausalLM", attention, **config), inputs | given

    return build


def classifier(kind, **config) -> Callable[[], Built]:
    """Return the builder of a decoder that classifies by its last token that is not padding."""

    def build() -> Built:
        inputs = dict(input_ids=tokens(), labels=torch.randint(3, (BATCH,)))
        return model(kind, "SequenceClassification", num_labels=3, **config), inputs

    return build


GROUPED = dict(num_key_value_heads=2)

MODELS: dict[str, Callable[[], Built]] = {
    "gpt2 padded": causal("gpt2", mask="right", num_attention_heads=4),
    "gpt2 classifies": classifier("gpt2", num_attention_heads=4),
    "openai-gpt": causal("openai-gpt", "eager", num_attention_heads=4),
    "gpt_bigcode": causal("gpt_bigcode"),
    "gpt_neo": causal("gpt_neo", "eager", num_heads=4, num_layers=2,
                      attention_types=[[["global", "local"], 1]], window_size=3),
    "gptj": causal("gptj", "eager", rotary_dim=2, num_attention_heads=6),
    "codegen": causal("codegen", "eager", rotary_dim=2, num_attention_heads=4),
    "gpt_neox": causal("gpt_neox"),
    "gpt_neox eager": causal("gpt_neox", "eager"),
    "bloom": causal("bloom", "eager", n_head=6),
    "opt": causal("opt", ffn_dim=36, word_embed_proj_dim=24),
    "opt projected": causal("opt", ffn_dim=36, word_embed_proj_dim=12, mask="left"),
    "mpt": causal("mpt", "eager", d_model=24, n_heads=6, n_layers=2, expansion_ratio=2),
    "llama eager": causal("llama", "eager", **GROUPED),
    "llama padded": causal("llama", mask="left", **GROUPED),
    "llama tied": causal("llama", tie_word_embeddings=True, attention_bias=True, **GROUPED),
    "mistral": causal("mistral", sliding_window=3, **GROUPED),
    "mistral eager": causal("mistral", "eager", sliding_window=3, **GROUPED),
    "qwen2": causal("qwen2", **GROUPED),
    "qwen3": causal("qwen3", head_dim=4, **GROUPED),
    "qwen3 classifies": classifier("qwen3", head_dim=4, **GROUPED),
    "gemma": causal("gemma", head_dim=4, num_key_value_heads=1),
    "gemma2": causal("gemma2", "eager", head_dim=4, sliding_window=3, **GROUPED),
    "gemma3": causal("gemma3_text", head_dim=4, sliding_window=3, **GROUPED),
    "gemma3 eager": causal("gemma3_text", "eager", head_dim=4, sliding_window=3, **GROUPED),
    "phi": causal("phi", **GROUPED),
    "phi3": causal("phi3", **GROUPED),
    "phi3 eager": causal("phi3", "eager", **GROUPED),
    "falcon": causal("falcon", multi_query=True, new_decoder_architecture=False),
    "falcon grouped": causal("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon alibi": causal("falcon", "eager", alibi=True, multi_query=False,
                           new_decoder_architecture=False),
    "stablelm": causal("stablelm", **GROUPED),
    "olmo": causal("olmo", **GROUPED),
    "olmo2": causal("olmo2", **GROUPED),
    "cohere": causal("cohere", **GROUPED),
    "starcoder2": causal("starcoder2", **GROUPED),
    "granite": causal("granite", **GROUPED),
    "glm": causal("glm", head_dim=4, **GROUPED),
    "xglm": causal("xglm", "eager", d_model=24, attention_heads=6, num_layers=2, ffn_dim=36),
    "biogpt": causal("biogpt"),
    "deepseek_v3": causal("deepseek_v3", first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8,
                          qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
                          num_key_value_heads=6),
}  # fmt: skip
SAMPLE = ("falcon", "qwen3 classifies")
SINGLE = ("xglm",)  # fills scores with the least float64, past the range of a scalar
