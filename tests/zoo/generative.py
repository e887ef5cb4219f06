"""Networks that make images: diffusion and autoencoders."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Built


def sinusoids(t, width):
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].to(freqs.dtype) * freqs[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU("tanh"), nn.Linear(48, width))
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Patches in, patches out, conditioned on time and class by adaptive layer norm."""

    def __init__(self, size=8, patch=2, channels=4, width=24, heads=4, classes=7):
        super().__init__()
        self.patch, self.channels, self.side = patch, channels, size // patch
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.pos = nn.Parameter(torch.randn(1, self.side**2, width))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, patch * patch * channels)

    def unpatchify(self, x):
        p, s = self.patch, self.side
        x = x.reshape(x.shape[0], s, s, p, p, self.channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], self.channels, s * p, s * p)

    def forward(self, x, t, y, noise):
        c = self.time(sinusoids(t, 16).to(x.dtype)) + self.label(y)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adaln(c).chunk(2, dim=1)
        return F.mse_loss(self.unpatchify(self.out(modulate(self.norm(h), shift, scale))), noise)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(3, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(3, width), nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).unbind(1)
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(c), dim=-1)
        return x + self.proj(torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, h, w))


class UNet(nn.Module):
    """Down, attention, up, with skips by concatenation: a denoising network."""

    def __init__(self, width=12, time=24):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.shrink = ResBlock(width, width, time), nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = ResBlock(width, 2 * width, time)
        self.middle = SpatialAttention(2 * width)
        self.up2 = ResBlock(2 * width, width, time)
        self.grow = nn.Conv2d(width, width, 3, padding=1)
        self.up1 = ResBlock(2 * width, width, time)
        self.norm, self.out = nn.GroupNorm(3, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t, noise):
        t = self.time(sinusoids(t, 8).to(x.dtype))
        a = self.down1(self.stem(x), t)
        b = self.middle(self.down2(self.shrink(a), t))
        up = F.interpolate(self.up2(b, t), scale_factor=2.0, mode="nearest")
        h = self.up1(torch.cat([self.grow(up), a], dim=1), t)
        return F.mse_loss(self.out(F.silu(self.norm(h))), noise)


class VAE(nn.Module):
    """A convolutional autoencoder: transposed convolutions, BatchNorm, a KL term.

    The noise is an input, so that the model draws nothing.
    """

    def __init__(self, width=12, latent=10):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.InstanceNorm2d(2 * width, affine=True, track_running_stats=True),
            nn.LeakyReLU(0.2), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_var = nn.Linear(8 * width, latent), nn.Linear(8 * width, latent)
        self.lift = nn.Linear(latent, 8 * width)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (2 * width, 2, 2)),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, x, noise):
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + noise * torch.exp(0.5 * log_var)
        made = self.decoder(self.lift(z))
        kl = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp()) / x.shape[0]
        return F.binary_cross_entropy_with_logits(made, x) + kl


def dit() -> Built:
    x, noise = torch.randn(2, BATCH, 4, 8, 8)
    t, y = torch.randint(100, (BATCH,)), torch.randint(8, (BATCH,))
    return DiT(), dict(x=x, t=t, y=y, noise=noise)


def unet() -> Built:
    x, noise = torch.randn(2, BATCH, 3, 8, 8)
    return UNet(), dict(x=x, t=torch.randint(100, (BATCH,)), noise=noise)


MODELS: dict[str, Callable[[], Built]] = {
    "dit": dit,
    "unet": unet,
    "vae": lambda: (VAE(), dict(x=torch.rand(BATCH, 3, 8, 8), noise=torch.randn(BATCH, 10))),
}
SAMPLE = ("unet",)
