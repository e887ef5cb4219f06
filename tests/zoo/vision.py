"""Transformers and convolutional networks of the transformers library that read images."""

from collections.abc import Callable

import torch

from tests.models import BATCH, SEQ, VOCAB, Built, tokens

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOWER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36,
}  # fmt: skip


def images(size=8, labels=5, channels=3):
    pixels = torch.randn(BATCH, channels, size, size)
    return dict(pixel_values=pixels, labels=torch.randint(labels, (BATCH,)))


def vit_eager() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **TOWER, **NO_DROPOUT, image_size=8, patch_size=4, num_labels=5,
        attn_implementation="eager",
    )  # fmt: skip
    return ViTForImageClassification(config), images()


def deit(attention="sdpa") -> Built:
    from transformers import DeiTConfig, DeiTForImageClassification

    config = DeiTConfig(
        **TOWER, **NO_DROPOUT, image_size=8, patch_size=4, num_labels=6,
        attn_implementation=attention,
    )  # fmt: skip
    return DeiTForImageClassification(config), images(labels=6)


def beit() -> Built:
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(
        **TOWER, **NO_DROPOUT, image_size=12, patch_size=4, num_labels=5, drop_path_rate=0.0,
        use_relative_position_bias=True, out_indices=[0, 1],
    )  # fmt: skip
    return BeitForImageClassification(config), images(12)


def swin() -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        **NO_DROPOUT, image_size=16, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 4],
        window_size=4, drop_path_rate=0.0, num_labels=5,
    )  # fmt: skip
    return SwinForImageClassification(config), images(16)


def clip(attention="sdpa") -> Built:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={**TOWER, "vocab_size": VOCAB, "max_position_embeddings": 16,
                     "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        vision_config={**TOWER, "image_size": 8, "patch_size": 4},
        projection_dim=18, attn_implementation=attention,
    )  # fmt: skip
    inputs = dict(
        input_ids=tokens(), pixel_values=torch.randn(BATCH, 3, 8, 8), return_loss=True,
        attention_mask=torch.ones(BATCH, SEQ, dtype=torch.long),
    )  # fmt: skip
    return CLIPModel(config), inputs


def siglip(attention="sdpa") -> Built:
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(
        text_config={**TOWER, "vocab_size": VOCAB, "max_position_embeddings": SEQ},
        vision_config={**TOWER, "image_size": 8, "patch_size": 4}, attn_implementation=attention,
    )  # fmt: skip
    inputs = dict(input_ids=tokens(), pixel_values=torch.randn(BATCH, 3, 8, 8), return_loss=True)
    return SiglipModel(config), inputs


def convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        depths=[1, 2], hidden_sizes=[12, 24], num_stages=2, patch_size=2, num_labels=5,
        drop_path_rate=0.0, layer_scale_init_value=0.1,
    )  # fmt: skip
    return ConvNextForImageClassification(config), images(12)


def resnet() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=12, hidden_sizes=[12, 24], depths=[2, 1], layer_type="bottleneck",
        num_labels=5,
    )  # fmt: skip
    return ResNetForImageClassification(config), images(16)


MODELS: dict[str, Callable[[], Built]] = {
    "vit eager": vit_eager,
    "deit": deit,
    "deit eager": lambda: deit("eager"),
    "beit": beit,
    "swin": swin,
    "clip": clip,
    "clip eager": lambda: clip("eager"),
    "siglip": siglip,
    "siglip eager": lambda: siglip("eager"),
    "convnext": convnext,
    "resnet": resnet,
}
SAMPLE = ("swin", "clip")
