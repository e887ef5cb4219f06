"""Networks on images and points as people write them by hand."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.models import BATCH, Built


def conv_bn(c_in, c_out, kernel=3, stride=1, groups=1, act=nn.ReLU6):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), act(inplace=True))


class BasicBlock(nn.Module):
    """torchvision's: two 3x3 convolutions, an in-place ReLU, a projection where shapes change."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width=12, classes=7):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.layer1 = BasicBlock(width, width, 1)
        self.layer2 = BasicBlock(width, 2 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x, y):
        x = self.avgpool(self.layer2(self.layer1(self.stem(x))))
        return F.cross_entropy(self.fc(torch.flatten(x, 1)), y)


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x):
        scale = self.fc2(F.relu(self.fc1(self.pool(x))))
        return x * F.hardsigmoid(scale)


class InvertedResidual(nn.Module):
    def __init__(self, width, expand=2):
        super().__init__()
        wide = width * expand
        self.body = nn.Sequential(
            conv_bn(width, wide, 1, act=nn.Hardswish),
            conv_bn(wide, wide, 3, groups=wide, act=nn.Hardswish),
            SqueezeExcite(wide),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width, momentum=None),
        )

    def forward(self, x):
        return x + self.body(x)


class MobileNet(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excite, BatchNorm of several kinds."""

    def __init__(self, width=12, classes=6):
        super().__init__()
        self.stem = conv_bn(3, width, 3, 2)
        self.blocks = nn.Sequential(InvertedResidual(width), InvertedResidual(width))
        self.mix = conv_bn(width, 2 * width, 3, groups=3)
        self.norm = nn.BatchNorm2d(2 * width, affine=False, track_running_stats=False)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x, y):
        x = self.norm(self.mix(self.blocks(self.stem(x)))).mean((2, 3))
        return F.cross_entropy(self.head(x), y, label_smoothing=0.1)


class MixerBlock(nn.Module):
    def __init__(self, patches, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 18), nn.GELU(), nn.Linear(18, patches))
        self.channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width=24, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(6, width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x, y):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return F.cross_entropy(self.head(self.norm(self.blocks(x)).mean(1)), y)


class PointNet(nn.Module):
    """Shared MLPs over points by 1x1 convolutions, a learned transform, the maximum over points."""

    def __init__(self, classes=6):
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.ReLU())
        self.matrix = nn.Linear(12, 9)
        self.local = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, points, y):
        x = points.transpose(1, 2)
        turn = self.matrix(self.transform(x).max(dim=2)[0]).view(-1, 3, 3)
        turn = turn + torch.eye(3, dtype=x.dtype, device=x.device)
        x = torch.bmm(points, turn).transpose(1, 2)
        pooled = torch.max(self.local(x), 2, keepdim=True)[0].view(-1, 24)
        return F.nll_loss(F.log_softmax(self.head(pooled), dim=1), y)


class Detector(nn.Module):
    """DETR's form: a convolutional backbone, learned queries that attend to it, two heads."""

    def __init__(self, width=24, heads=4, queries=6, classes=5):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, width, 1))
        self.row, self.col = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(8, 12))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.kind = nn.Linear(width, classes + 1)
        self.box = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x, kinds, boxes):
        x = self.backbone(x)
        h, w = x.shape[-2:]
        row = self.row[:h].unsqueeze(1).repeat(1, w, 1)
        col = self.col[:w].unsqueeze(0).repeat(h, 1, 1)
        where = torch.cat([col, row], -1).flatten(0, 1)
        memory = x.flatten(2).permute(0, 2, 1) + where
        q = self.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
        q = self.norm1(q + self.self_attn(q, q, q, need_weights=False)[0])
        attended, weights = self.cross(q, memory, memory)
        q = self.norm2(q + attended)
        scores, found = self.kind(q), self.box(q).sigmoid()
        loss = F.cross_entropy(scores.transpose(1, 2), kinds) + F.l1_loss(found, boxes)
        return dict(loss=loss + F.smooth_l1_loss(found, boxes), scores=scores, weights=weights)


class Perceiver(nn.Module):
    """Latents attend to all pixels, to themselves, and are read out by one more query."""

    def __init__(self, width=24, latents=8, classes=5):
        super().__init__()
        self.inputs, self.latents = nn.Linear(3, width), nn.Parameter(torch.randn(latents, width))
        self.read = nn.MultiheadAttention(width, 2, batch_first=True, kdim=width, vdim=width)
        layer = nn.TransformerEncoderLayer(width, 4, 36, 0.0, batch_first=True, norm_first=True)
        self.think = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.ask = nn.Parameter(torch.randn(1, 1, width))
        self.answer = nn.MultiheadAttention(width, 4, batch_first=True, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, pixels, y):
        b = pixels.shape[0]
        x = self.inputs(pixels.flatten(2).transpose(1, 2))
        z = self.latents.expand(b, -1, -1)
        z = self.think(z + self.read(z, x, x)[0])
        out = self.answer(self.ask.repeat(b, 1, 1), z, z)[0].squeeze(1)
        return F.cross_entropy(self.head(out), y)


def pictures(size, classes, width=None):
    x = torch.randn(BATCH, 3, size, width or size)
    return dict(x=x, y=torch.randint(classes, (BATCH,)))


def detector() -> Built:
    kinds, boxes = torch.randint(6, (BATCH, 6)), torch.rand(BATCH, 6, 4)
    return Detector(), dict(x=torch.randn(BATCH, 3, 8, 8), kinds=kinds, boxes=boxes)


MODELS: dict[str, Callable[[], Built]] = {
    "resnet by hand": lambda: (ResNet(), pictures(16, 7)),
    "mobilenet": lambda: (MobileNet(), pictures(8, 6)),
    "mixer": lambda: (Mixer(), pictures(8, 5, 12)),
    "pointnet": lambda: (
        PointNet(), dict(points=torch.randn(BATCH, 10, 3), y=torch.randint(6, (BATCH,))),
    ),
    "detector": detector,
    "perceiver": lambda: (
        Perceiver(), dict(pixels=torch.randn(BATCH, 3, 4, 4), y=torch.randint(5, (BATCH,)))
    ),
}  # fmt: skip
SAMPLE = ("mobilenet", "resnet by hand")
