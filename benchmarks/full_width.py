"""Networks of the literature at the width they were published in, with random weights, in PyTorch alone."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.architecture import Architecture
from fcn_deploy.fcn.backbones.resnet50 import ResNet
from fcn_deploy.fcn.model import build_network
from torch import nn

CLASSES = 19  # as of Cityscapes


def _layer(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, 1, padding, dilation, groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al., 2015: 64 to 1024 channels, with padded convolutions and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        inputs = (3, *widths)
        self.down = nn.ModuleList(
            nn.Sequential(_layer(i, o), _layer(o, o)) for i, o in zip(inputs, widths, strict=False)
        )
        deep = list(reversed(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairwise(deep))
        self.merge = nn.ModuleList(nn.Sequential(_layer(2 * o, o), _layer(o, o)) for o in deep[1:])
        self.score = nn.Conv2d(64, CLASSES, 1)

    def forward(self, x):
        skips = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.score(x)


class DeepLabV3Plus(nn.Module):
    """Chen et al., 2018: ResNet-50 at stride 16, dilations 6, 12 and 18, the image's mean, a decoder at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        net = ResNet(3, 1.0)
        for block in net.layer4:
            block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (2, 2), (2, 2)
            if block.downsample is not None:
                block.downsample[0].stride = (1, 1)
        self.stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.early, self.late = net.layer1, nn.Sequential(net.layer2, net.layer3, net.layer4)
        self.branches = nn.ModuleList([_layer(2048, 256, 1), *(_layer(2048, 256, 3, rate) for rate in (6, 12, 18))])
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_layer(2048, 256, 1))
        self.project, self.low = _layer(1280, 256, 1), _layer(256, 48, 1)
        self.decode = nn.Sequential(_layer(304, 256), _layer(256, 256))
        self.score = nn.Conv2d(256, CLASSES, 1)

    def forward(self, x):
        early = self.early(self.stem(x))
        late = self.late(early)
        pooled = F.interpolate(self.pooling(late), size=late.shape[2:], mode="bilinear")
        features = self.project(torch.cat([*(branch(late) for branch in self.branches), pooled], 1))
        features = F.interpolate(features, size=early.shape[2:], mode="bilinear")
        scores = self.score(self.decode(torch.cat([features, self.low(early)], 1)))
        return F.interpolate(scores, size=x.shape[2:], mode="bilinear")


class _Attention(nn.Module):
    """Attention whose keys and values are of a map that is `reduction` times smaller."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.keys, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width)

    def forward(self, x, height: int, width: int):
        batch, count, channels = x.shape
        y = x
        if self.reduce is not None:
            y = self.reduce(x.transpose(1, 2).reshape(batch, channels, height, width)).flatten(2).transpose(1, 2)
            y = self.norm(y)
        depth = channels // self.heads
        query = self.query(x).reshape(batch, count, self.heads, depth).transpose(1, 2)
        keys, values = (
            each.reshape(batch, -1, self.heads, depth).transpose(1, 2) for each in self.keys(y).chunk(2, dim=2)
        )
        weights = (query @ keys.transpose(2, 3) * depth**-0.5).softmax(3)
        return self.out((weights @ values).transpose(1, 2).reshape(batch, count, channels))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.before, self.attend = nn.LayerNorm(width), _Attention(width, heads, reduction)
        self.after, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.mix = nn.Conv2d(4 * width, 4 * width, 3, 1, 1, groups=4 * width)

    def forward(self, x, height: int, width: int):
        x = x + self.attend(self.before(x), height, width)
        y = self.wide(self.after(x))
        batch, _, channels = y.shape
        y = self.mix(y.transpose(1, 2).reshape(batch, channels, height, width)).flatten(2).transpose(1, 2)
        return x + self.narrow(F.gelu(y))


class SegFormer(nn.Module):
    """Xie et al., 2021: MiT-B0 with its decoder, for multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        widths, heads, reductions = (32, 64, 160, 256), (1, 2, 5, 8), (8, 4, 2, 1)
        inputs, kernels = (3, *widths), ((7, 4, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1))
        self.embed = nn.ModuleList(
            nn.Conv2d(i, o, *kernel) for i, o, kernel in zip(inputs, widths, kernels, strict=False)
        )
        self.norm_in, self.norm_out = (nn.ModuleList(map(nn.LayerNorm, widths)) for _ in range(2))
        self.blocks = nn.ModuleList(
            nn.ModuleList([_Block(*each), _Block(*each)]) for each in zip(widths, heads, reductions, strict=True)
        )
        self.linear = nn.ModuleList(nn.Conv2d(width, 256, 1) for width in widths)
        self.fuse, self.score = _layer(1024, 256, 1), nn.Conv2d(256, CLASSES, 1)

    def forward(self, x):
        maps = []
        for embed, norm_in, blocks, norm_out in zip(self.embed, self.norm_in, self.blocks, self.norm_out, strict=True):
            x = embed(x)
            batch, channels, height, width = x.shape
            x = norm_in(x.flatten(2).transpose(1, 2))
            for block in blocks:
                x = block(x, height, width)
            x = norm_out(x).transpose(1, 2).reshape(batch, channels, height, width)
            maps.append(x)
        size = maps[0].shape[2:]
        maps = [
            F.interpolate(linear(each), size=size, mode="bilinear")
            for linear, each in zip(self.linear, maps, strict=True)
        ]
        return self.score(self.fuse(torch.cat(maps[::-1], 1)))


def _fcn8s() -> nn.Module:
    """Long, Shelhamer, Darrell, 2015, on VGG16: 134.5 million parameters."""
    return build_network(Architecture(CLASSES, backbone="vgg16"))


FULL_WIDTH: dict[str, Callable[[], nn.Module]] = {
    "unet": UNet,
    "deeplabv3plus": DeepLabV3Plus,
    "segformer": SegFormer,
    "fcn8s": _fcn8s,
}


def full_width(name: str) -> nn.Module:
    """One of FULL_WIDTH, seeded, in evaluation mode."""
    torch.manual_seed(0)
    return FULL_WIDTH[name]().eval()
