"""Networks as libraries of segmentation have them, written out small and seeded, and what is expected of each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from zoo import CLASSES, conv, resized


class Stages(nn.Module):
    """An encoder of strides 2, 4, 8, 16."""

    def __init__(self, widths=(6, 8, 10, 12), inputs: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            conv(before, width, stride=2) for before, width in zip((inputs, *widths), widths, strict=False)
        )

    def forward(self, x):
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class SizedUNet(nn.Module):
    """segmentation_models.pytorch's Unet: nearest neighbours to the size of each skip, then to twice the last."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stages()
        self.merge = nn.ModuleList((conv(22, 10), conv(18, 8), conv(14, 6), conv(6, 6)))
        self.score = nn.Conv2d(6, CLASSES, 3, padding=1)

    def forward(self, x):
        *skips, y = self.encoder(x)
        for merge, skip in zip(self.merge, (*reversed(skips), None), strict=True):
            size = (2 * y.shape[2], 2 * y.shape[3]) if skip is None else skip.shape[2:]
            y = F.interpolate(y, size=size, mode="nearest")
            y = merge(y if skip is None else torch.cat([y, skip], 1))
        return self.score(y)


class FPN(nn.Module):
    """Kirillov et al., 2019: a pyramid from the coarsest map down, each brought to stride 4 and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stages()
        self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (12, 10, 8))
        self.smooth = nn.ModuleList(conv(8, 8) for _ in range(3))
        self.score = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        _, *maps = self.encoder(x)
        y, total = None, 0
        for lateral, smooth, map_, factor in zip(self.lateral, self.smooth, reversed(maps), (4, 2, 1), strict=True):
            y = lateral(map_) if y is None else lateral(map_) + F.interpolate(y, scale_factor=2.0, mode="nearest")
            total = total + F.interpolate(smooth(y), scale_factor=float(factor), mode="bilinear")
        return F.interpolate(self.score(total), scale_factor=4.0, mode="bilinear")


class DeepLabV3Plus(nn.Module):
    """Chen et al., 2018: atrous convolutions and a global pooling at stride 16, joined with stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stages()
        self.atrous = nn.ModuleList((conv(12, 6, 1), conv(12, 6, dilation=2), conv(12, 6, dilation=4)))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 6, 1), nn.ReLU())
        self.join, self.low = conv(24, 8, 1), conv(8, 4, 1)
        self.merge, self.score = conv(12, 8), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        _, low, _, deep = self.encoder(x)
        pooled = resized(self.pooled(deep), deep)
        y = resized(self.join(torch.cat([*(layer(deep) for layer in self.atrous), pooled], 1)), low)
        return resized(self.score(self.merge(torch.cat([y, self.low(low)], 1))), x)


class Attention(nn.Module):
    """Attention of a map's cells on a coarser map, as SegFormer has it."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else nn.Identity()
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        batch, width, height, columns = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        coarse = self.reduce(normed.transpose(1, 2).reshape(batch, width, height, columns)).flatten(2).transpose(1, 2)
        key, value = self.kv(coarse).chunk(2, 2)
        share = (self.q(normed) @ key.transpose(1, 2) * width**-0.5).softmax(2)
        tokens = tokens + self.out(share @ value)
        tokens = tokens + self.mix(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(batch, width, height, columns)


class SegFormer(nn.Module):
    """Xie et al., 2021, of three stages: overlapping patches, attention, and a decoder of 1×1 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleList((nn.Conv2d(3, 8, 7, 4, 3), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)))
        self.blocks = nn.ModuleList((Attention(8, 4), Attention(12, 2), Attention(16, 1)))
        self.project = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (8, 12, 16))
        self.fuse, self.score = conv(24, 8, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        y, maps = x, []
        for patch, block, to in zip(self.patches, self.blocks, self.project, strict=True):
            y = block(patch(y))
            maps.append(to(y))
        maps = [resized(each, maps[0]) for each in maps]
        return resized(self.score(self.fuse(torch.cat(maps, 1))), x)


class UPerNet(nn.Module):
    """Xiao et al., 2018: pooling over whole maps and quarters of them, then a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stages()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(side), conv(12, 4, 1)) for side in (1, 2))
        self.deep, self.lateral = conv(20, 8), nn.ModuleList((conv(10, 8, 1), conv(8, 8, 1)))
        self.smooth, self.fuse = nn.ModuleList((conv(8, 8), conv(8, 8))), conv(24, 8)
        self.score = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        _, low, middle, deep = self.encoder(x)
        maps = [self.deep(torch.cat([deep, *(resized(pool(deep), deep) for pool in self.pools)], 1))]
        for lateral, smooth, skip in zip(self.lateral, self.smooth, (middle, low), strict=True):
            side = lateral(skip)
            maps.append(smooth(side + resized(maps[-1], side)))
        y = self.fuse(torch.cat([resized(each, maps[-1]) for each in maps], 1))
        return resized(self.score(y), x)


class HRNet(nn.Module):
    """Wang et al., 2019: branches at strides 4, 8 and 16 that exchange what they have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6, stride=2), conv(6, 6, stride=2))
        self.down, self.deeper = conv(6, 8, stride=2), conv(8, 10, stride=2)
        self.branches = nn.ModuleList((conv(6, 6), conv(8, 8), conv(10, 10)))
        self.across = nn.ModuleList((nn.Conv2d(8, 6, 1), nn.Conv2d(10, 6, 1)))
        self.fuse, self.score = conv(24, 8, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        fine = self.stem(x)
        middle = self.down(fine)
        maps = [branch(each) for branch, each in zip(self.branches, (fine, middle, self.deeper(middle)), strict=True)]
        fine = F.relu(maps[0] + sum(resized(to(each), fine) for to, each in zip(self.across, maps[1:], strict=True)))
        y = self.fuse(torch.cat([fine, resized(maps[1], fine), resized(maps[2], fine)], 1))
        return F.interpolate(self.score(y), size=x.shape[2:], mode="bilinear")


class SupervisedUNetPlusPlus(nn.Module):
    """Zhou et al., 2018: nested skips, and scores of every depth, the coarsest first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 6), conv(6, 8), conv(8, 10)
        self.inner, self.outer, self.last = conv(14, 6), conv(18, 8), conv(20, 6)
        self.scores = nn.ModuleList((nn.Conv2d(8, CLASSES, 1), nn.Conv2d(6, CLASSES, 1)))

    def forward(self, x):
        def up(y):
            return F.interpolate(y, scale_factor=2.0, mode="nearest")

        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.third(F.max_pool2d(b, 2))
        nested = self.inner(torch.cat([a, up(b)], 1))
        deep = self.outer(torch.cat([b, up(c)], 1))
        finest = self.last(torch.cat([a, nested, up(deep)], 1))
        return [self.scores[0](deep), self.scores[1](finest)]


class PadsIfOdd(nn.Module):
    """MONAI's BasicUNet: transposed convolutions, padded by the edge where the skip is one wider."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 6), conv(6, 8), conv(8, 10)
        self.up = nn.ModuleList((nn.ConvTranspose2d(10, 8, 2, 2), nn.ConvTranspose2d(8, 6, 2, 2)))
        self.merge, self.score = nn.ModuleList((conv(16, 8), conv(12, 6))), nn.Conv2d(6, CLASSES, 1)

    def forward(self, x):
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        y = self.third(F.max_pool2d(b, 2))
        for up, merge, skip in zip(self.up, self.merge, (b, a), strict=True):
            y, pads = up(y), [0, 0, 0, 0]
            for axis in (0, 1):
                if skip.shape[-axis - 1] != y.shape[-axis - 1]:
                    pads[2 * axis + 1] = 1
            y = merge(torch.cat([skip, F.pad(y, pads, "replicate")], 1))
        return self.score(y)


@dataclass(frozen=True)
class Expected:
    """What becomes of a network.

    Attributes:
        build: the module.
        multiple, smallest: of the sizes that it is run at; others are padded.
        whole: what makes it look at the whole image; "": its tiles are exact.
        note: a part of what is said of it.
    """

    build: Callable[[], nn.Module]
    multiple: int = 1
    smallest: int = 1
    whole: str = ""
    note: str = ""


NETWORKS: dict[str, Expected] = {
    "sized-unet": Expected(SizedUNet, 2),
    "fpn": Expected(FPN, 16),
    "deeplabv3plus": Expected(DeepLabV3Plus, whole="GlobalAveragePool"),
    "segformer": Expected(SegFormer, smallest=13, whole="MatMul"),
    "upernet": Expected(UPerNet, whole="GlobalAveragePool", note="adaptive_avg_pool2d: written as"),
    "hrnet": Expected(HRNet, whole="stretches odd sizes"),
    "supervised-unet++": Expected(SupervisedUNetPlusPlus, 4, note="1 is used"),
    "pads-if-odd": Expected(PadsIfOdd, 4, 4, note="looks at the sizes of its maps"),
}


def network(name: str) -> nn.Module:
    """One of them, seeded, with statistics of its batch norms that fit its weights."""
    torch.manual_seed(sorted(NETWORKS).index(name))
    model = NETWORKS[name].build()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a true mean over what follows
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    with torch.no_grad():
        model.train()(F.interpolate(torch.randn(2, 3, 8, 12), (128, 192), mode="bilinear"))
        model.eval()
    return model
