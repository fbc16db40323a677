"""Small seeded networks in the style of those that people bring, and what is expected of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 4


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def resized(x: torch.Tensor, like: torch.Tensor, corners: bool = False) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=corners)


class UNet(nn.Module):
    """Ronneberger et al., 2015. Upsampling is learned, or bilinear with corners aligned and then padded to the skip."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        widths = (6, 8, 10, 12)
        self.down = nn.ModuleList(
            nn.Sequential(conv(inputs, width), conv(width, width))
            for inputs, width in zip((3, *widths), widths, strict=False)
        )
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for deep, width in ((12, 10), (10, 8), (8, 6)):
            self.up.append(
                nn.ConvTranspose2d(deep, deep, 2, 2)
                if transposed
                else nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            )
            self.merge.append(conv(deep + width, width))
        self.transposed = transposed
        self.score = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x):
        skips = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = up(x)
            if not self.transposed:
                down, right = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
                x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
            x = merge(torch.cat([skip, x], 1))
        return self.score(x)


class Encoder(nn.Module):
    """Features at strides 4, 8 and then 16 and 32, or dilated at 8."""

    def __init__(self, dilated: bool = False) -> None:
        super().__init__()
        step = 1 if dilated else 2
        self.stem = nn.Sequential(conv(3, 6, stride=2), conv(6, 8, stride=2))
        self.eighth = conv(8, 10, stride=2)
        self.next = conv(10, 12, stride=step, dilation=2 if dilated else 1)
        self.last = conv(12, 12, stride=step, dilation=4 if dilated else 1)

    def forward(self, x):
        quarter = self.stem(x)
        eighth = self.eighth(quarter)
        sixteenth = self.next(eighth)
        return quarter, eighth, sixteenth, self.last(sixteenth)


class DeepLabV3(nn.Module):
    """Chen et al., 2017: dilated convolutions side by side, and the mean of the whole image. As torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(dilated=True)
        self.branches = nn.ModuleList([conv(12, 8, 1), *(conv(12, 8, dilation=rate) for rate in (2, 4, 6))])
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv(12, 8, 1))
        self.project = conv(40, 12, 1)
        self.score = nn.Conv2d(12, CLASSES, 1)
        self.auxiliary = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x):
        *_, middle, features = self.encoder(x)
        pooled = resized(self.pooling(features), features)
        joined = torch.cat([*(branch(features) for branch in self.branches), pooled], 1)
        return {
            "out": resized(self.score(self.project(joined)), x),
            "aux": resized(self.auxiliary(middle), x),
        }


class PSPNet(nn.Module):
    """Zhao et al., 2017: means over grids of 1, 2, 3 and 6 cells; corners aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(dilated=True)
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(bins), *conv(12, 6, 1)) for bins in (1, 2, 3, 6))
        self.merge = conv(36, 12)
        self.score = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x):
        features = self.encoder(x)[-1]
        pyramid = [features, *(resized(pool(features), features, corners=True) for pool in self.pools)]
        return resized(self.score(self.merge(torch.cat(pyramid, 1))), x, corners=True)


class LRASPP(nn.Module):
    """Howard et al., 2019: features gated by the mean of the whole image, and a skip. As torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.features = conv(12, 12, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1, bias=False), nn.Sigmoid())
        self.low = nn.Conv2d(10, CLASSES, 1)
        self.score = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x):
        _, low, high, _ = self.encoder(x)
        high = resized(self.features(high) * self.gate(high), low)
        return {"out": resized(self.low(low) + self.score(high), x)}


class BiSeNet(nn.Module):
    """Yu et al., 2018: a path for detail, one for context with attention; further outputs for training."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(conv(3, 6, 7, 2), conv(6, 8, stride=2), conv(8, 8, stride=2))
        self.encoder = Encoder()
        self.refine = nn.ModuleList([conv(12, 8), conv(12, 8)])
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Sigmoid()) for _ in range(2)
        )
        self.average = conv(12, 8, 1)
        self.fuse = conv(16, 12, 1)
        self.excite = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 1), nn.Sigmoid())
        self.score = nn.Conv2d(12, CLASSES, 1)
        self.auxiliary = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        spatial = self.spatial(x)
        *_, sixteenth, last = self.encoder(x)
        context = F.interpolate(self.average(last.mean((2, 3), keepdim=True)), last.shape[2:], mode="nearest")
        maps = []
        for features, refine, attention, finer in (
            (last, self.refine[0], self.attention[0], sixteenth),
            (sixteenth, self.refine[1], self.attention[1], spatial),
        ):
            y = refine(features)
            y = y * attention(y.mean((2, 3), keepdim=True)) + context
            context = F.interpolate(y, finer.shape[2:], mode="nearest")
            maps.append(context)
        y = self.fuse(torch.cat([spatial, context], 1))
        y = y + y * self.excite(y.mean((2, 3), keepdim=True))
        up = nn.Upsample(scale_factor=8, mode="bilinear", align_corners=False)
        return up(self.score(y)), self.auxiliary(maps[0]), self.auxiliary(maps[1])


class SegNet(nn.Module):
    """Badrinarayanan et al., 2017: unpooling puts values back where the maxima were."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 8, 10)
        self.encode = nn.ModuleList(conv(inputs, width) for inputs, width in zip((3, *widths), widths, strict=False))
        self.decode = nn.ModuleList([conv(10, 8), conv(8, 6), conv(6, 6)])
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)
        self.score = nn.Conv2d(6, CLASSES, 3, padding=1)

    def forward(self, x):
        places = []
        for block in self.encode:
            x, indices = self.pool(block(x))
            places.append(indices)
        for block in self.decode:
            x = block(self.unpool(x, places.pop()))
        return self.score(x)


class DBNet(nn.Module):
    """Liao et al., 2020: the probability of text at every pixel. A feature pyramid, and learned upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1, bias=False) for width in (8, 10, 12, 12))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1, bias=False) for _ in range(4))
        self.body = conv(16, 8)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.score = nn.ConvTranspose2d(6, 1, 2, 2)

    def forward(self, x):
        maps = [lateral(y) for lateral, y in zip(self.lateral, self.encoder(x), strict=True)]
        for index in (2, 1, 0):
            maps[index] = maps[index] + F.interpolate(maps[index + 1], scale_factor=2)
        maps = [smooth(y) for smooth, y in zip(self.smooth, maps, strict=True)]
        joined = [F.interpolate(y, scale_factor=2**index) for index, y in enumerate(maps)]
        return torch.sigmoid(self.score(self.up(self.body(torch.cat(joined, 1)))))


class ChannelsLast(nn.Module):
    """An encoder and decoder of [N, H, W, C] → [N, H, W, K], as a port from TensorFlow has it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv(3, 6, stride=2), conv(6, 8, stride=2), conv(8, 8))
        self.decode = nn.Sequential(nn.Upsample(scale_factor=2), conv(8, 6))
        self.score = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x):
        y = self.score(self.decode(self.encode(x.permute(0, 3, 1, 2))))
        return F.interpolate(y, scale_factor=2.0, mode="bilinear").permute(0, 2, 3, 1)


class Plain(nn.Module):
    """Two strided convolutions, and scores that end as `end(image, coarse scores)` says."""

    def __init__(self, end: Callable = resized, middle: nn.Module | None = None, classes: int = CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, stride=2), conv(8, 8, stride=2))
        self.middle = middle or nn.Identity()
        self.score = nn.Conv2d(8, classes, 1)
        self.end = end

    def forward(self, x):
        y = self.score(self.middle(self.body(x)))
        return self.end(y, x)


class Shadowing(nn.Module):
    """An attribute hides nn.Module.modules, which exporters call."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = [conv(3, 8, stride=2), conv(8, 8)]
        for index, module in enumerate(self.modules):
            self.add_module(f"block{index}", module)
        self.score = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        y = x
        for module in self.modules:
            y = module(y)
        return resized(self.score(y), x)


class Excited(nn.Module):
    """A gate by the mean of the whole image, spelled as a pooling whose kernel is the image (Hu et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(F.avg_pool2d(x, x.size()[2:]))


class Grid(nn.Module):
    """Maxima over a grid of the image, brought back to its size."""

    def forward(self, x):
        return x + resized(F.adaptive_max_pool2d(x, (2, 3)), x)


class Antialiased(nn.Module):
    """Smaller and back, without aliasing."""

    def forward(self, x):
        smaller = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
        return resized(smaller, x)


class Normalised(nn.Module):
    """Normalises over channels by their root mean square, as newer backbones do."""

    def forward(self, x):
        return F.rms_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)


class Mirrored(nn.Module):
    """Mirrors a border of 5 cells, so an image must have 6 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.ReflectionPad2d(5), nn.Conv2d(8, 8, 11, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        return self.layer(x)


class BGR(Plain):
    """Takes blue, green, red in 0 to 255 and normalises them itself, in place."""

    def forward(self, x):
        x -= x.new_tensor([104.0, 117.0, 124.0])[:, None, None]
        x /= x.new_tensor([57.0, 57.5, 58.5])[:, None, None]
        return super().forward(x)


class Attention(nn.Module):
    """Every cell looks at every other, with a position that is interpolated to the size."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.position = nn.Parameter(torch.randn(1, 8, 5, 7) / 4)

    def forward(self, x):
        batch, channels, height, width = x.shape
        x = x + F.interpolate(self.position, (height, width), mode="bilinear")
        keys, values = self.keys(x).flatten(2), self.values(x).flatten(2)
        weights = (keys.transpose(1, 2) @ keys / 8).softmax(2)
        return x + (weights @ values.transpose(1, 2)).transpose(1, 2).reshape(batch, channels, height, width)


class Pair(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


@dataclass
class Output:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: tuple = ()


def baked(y, x):
    """What a port from another framework writes: the size as numbers, which tracers make constants of."""
    return F.interpolate(y, size=(int(x.shape[2]), int(x.shape[3])), mode="bilinear")


BAKED = r"size baked in: at 1×1 .*\(Resize\); usual cause: interpolate\(size=<int>\)"


@dataclass(frozen=True)
class Network:
    """One of the zoo.

    Attributes:
        build: the module, as torch initialises it.
        multiple, smallest: of the sizes it takes.
        whole: whether an operator that looks at the whole image is named.
        tiles: whether images can be run in exact tiles.
        head: mode of the head that split_head finds.
        activation: of its card, and of its engine's where that differs.
        options: what a user says of it, as fields of ImportOptions.
        notes: parts of what is said of it when it is exported.
        refused: {"torchscript", "dynamo" or "rtx": why, as a regular expression}.
        last: whether it takes and gives [N,H,W,C].
        style: whether it stands for a network of the literature, and not for a habit of some.
    """

    build: Callable[[], nn.Module]
    multiple: int = 1
    smallest: int = 1
    whole: bool = False
    tiles: bool = True
    head: str = "linear"
    activation: tuple[str, str] = ("softmax", "softmax")
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    last: bool = False
    style: bool = False


SEVERAL = "several outputs"
ZOO = {
    "unet-transposed": Network(lambda: UNet(True), multiple=8, head="none", style=True),
    "unet-bilinear": Network(lambda: UNet(False), smallest=8, tiles=False, head="none", style=True),
    "deeplabv3": Network(DeepLabV3, whole=True, tiles=False, notes=(SEVERAL, "out is used"), style=True),
    "pspnet": Network(PSPNet, whole=True, tiles=False, notes=("adaptive_avg_pool2d: written as",), style=True),
    "lraspp": Network(LRASPP, whole=True, tiles=False, style=True),
    "bisenet": Network(BiSeNet, 8, whole=True, tiles=False, notes=(SEVERAL, "resized bilinearly"), style=True),
    "segnet": Network(
        SegNet,
        multiple=8,
        tiles=False,
        head="none",
        notes=("max_unpool2d: written as",),
        # It has no pooling that gives indices.
        refused={"rtx": r"TensorRT refuses node \S+ \(MaxPool\): it is not supported"},
        style=True,
    ),
    "dbnet": Network(DBNet, multiple=32, head="none", activation=("probability", "sigmoid"), style=True),
    "channels-last": Network(ChannelsLast, multiple=4, last=True, notes=("takes [N,H,W,C]",), style=True),
    "shadowing": Network(Shadowing),
    "adaptive-max": Network(lambda: Plain(middle=Grid()), tiles=False, notes=("adaptive_max_pool2d: written as",)),
    "pooled-by-kernel": Network(
        lambda: Plain(middle=Excited()), whole=True, tiles=False, notes=("avg_pool2d: written as",)
    ),
    "mirrored": Network(lambda: Plain(middle=Mirrored()), smallest=21, notes=("no sides below 21",)),
    "attention": Network(lambda: Plain(middle=Attention()), whole=True, tiles=False),
    "rms-norm": Network(
        lambda: Plain(middle=Normalised()),
        tiles=False,  # RMSNormalization is not known to be local
        refused={"torchscript": "Exporting the operator 'aten::rms_norm'"},
    ),
    # ONNX Runtime's antialiasing is another than PyTorch's where sizes are odd: it holds for multiples only.
    "antialiased": Network(
        lambda: Plain(middle=Antialiased()),
        multiple=16,
        smallest=5,
        tiles=False,
        refused={"torchscript": "_upsample_bilinear2d_aa", "rtx": "_upsample_bilinear2d_aa"},
        notes=("for multiples of 16",),
    ),
    "resize-int": Network(lambda: Plain(baked), refused={"dynamo": BAKED}),
    "bgr-in-place": Network(BGR, options={"bgr": True}, notes=("wants BGR", "normalises 8-bit images by itself")),
    "coarse": Network(lambda: Plain(lambda y, x: y), notes=("scores at 1/4",)),
    "one-score": Network(lambda: Plain(classes=1), activation=("sigmoid", "sigmoid")),
    "values": Network(lambda: Plain(classes=1), activation=("none", "none"), options={"activation": "none"}),
    "softmax-first": Network(lambda: Plain(lambda y, x: resized(y.softmax(1), x))),
    "softmax-last": Network(lambda: Plain(lambda y, x: resized(y, x).softmax(1))),
    "tuple": Network(lambda: Plain(lambda y, x: (resized(y, x), y)), notes=(SEVERAL, "0 is used")),
    "named-tuple": Network(lambda: Plain(lambda y, x: Pair(y, resized(y, x))), notes=(SEVERAL, "logits is used")),
    "dataclass": Network(
        lambda: Plain(lambda y, x: Output(logits=resized(y, x), hidden=(y,))), notes=(SEVERAL, "logits is used")
    ),
}


def network(name: str) -> nn.Module:
    """One of the zoo, seeded: statistics that fit its weights, and scores of about unit spread around zero."""
    torch.manual_seed(sorted(ZOO).index(name))
    model = ZOO[name].build()
    for layer in torch.nn.Module.modules(model):
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a true mean over the batches that follow
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    kind, scores = ZOO[name], []

    def images():
        """Detail at several scales, as the module takes it."""
        image = F.interpolate(torch.randn(2, 3, 8, 12), (128, 192), mode="bilinear") + 0.5 * torch.randn(2, 3, 128, 192)
        image = 115 + 57 * image if isinstance(model, BGR) else image
        return image.permute(0, 2, 3, 1) if kind.last else image

    watch = model.score.register_forward_hook(lambda layer, inputs, output: scores.append(output))
    with torch.no_grad():
        for _ in range(2):
            model.train()(images())
        model.eval()(images())
        mean, spread = scores[-1].mean((0, 2, 3)), scores[-1].std((0, 2, 3)).clamp(min=1e-3)
        transposed = isinstance(model.score, nn.ConvTranspose2d)
        model.score.weight /= spread[:, None, None] if transposed else spread[:, None, None, None]
        model.score.bias.copy_((model.score.bias - mean) / spread)
    watch.remove()
    return model
