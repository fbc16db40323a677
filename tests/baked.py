"""Networks with the size they were traced at written into them, each in another way."""

import io
import logging
import math
import warnings
from contextlib import redirect_stderr, redirect_stdout

import onnx
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 8


def ints(x: torch.Tensor) -> tuple[int, ...]:
    """The shape as numbers, which a tracer writes down."""
    return tuple(int(side) for side in x.shape)


class Baked(nn.Module):
    """Stride 4, some blocks at that stride, scores, and a Resize to the image's size as numbers."""

    def __init__(self, *blocks, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        c = CHANNELS
        self.first, self.second = nn.Conv2d(3, c, 3, 2, 1), nn.Conv2d(c, c, 3, 2, 1)
        self.mix, self.join, self.down = nn.Conv2d(c, c, 1), nn.Conv2d(2 * c, c, 3, 1, 1), nn.Conv2d(c, c, 3, 2, 1)
        self.expand, self.reduce, self.coordinates = (
            nn.Conv2d(c, 4 * c, 1),
            nn.Conv2d(4 * c, c, 1),
            nn.Conv2d(c + 2, c, 1),
        )
        self.linear, self.norm = nn.Linear(c, c), nn.LayerNorm(c)
        self.group, self.instance = nn.GroupNorm(2, c), nn.InstanceNorm2d(c, affine=True)
        self.places, self.flat_places = nn.Parameter(torch.randn(1, c, 16, 16)), nn.Parameter(torch.randn(1, 256, c))
        self.near, self.dense = nn.Parameter(torch.randn(16, 16)), nn.Linear(256, 256)
        self.recurrent = nn.GRU(c, c // 2, batch_first=True, bidirectional=True)
        self.spatial = nn.LayerNorm([c, 16, 16])
        nn.init.normal_(self.spatial.weight)
        self.score = nn.Conv2d(c, 4, 1)
        self.blocks = blocks

    def features(self, x):
        y = torch.relu(self.second(torch.relu(self.first(x))))
        for block in self.blocks:
            y = block(self, y)
        return y

    def forward(self, x):
        _, _, h, w = ints(x)
        return F.interpolate(self.score(self.features(x)), size=(h, w), mode="bilinear")


class Coarse(Baked):
    """Scores at stride 4."""

    def forward(self, x):
        return self.score(self.features(x))


class Corners(Baked):
    """Sizes of 4k + 1, and corners aligned."""

    def forward(self, x):
        _, _, h, w = ints(x)
        half = self.first(x)
        y = F.interpolate(self.second(half), size=ints(half)[2:], mode="bilinear", align_corners=True) + half
        return F.interpolate(self.score(y), size=(h, w), mode="bilinear", align_corners=True)


class Cascade(Baked):
    """The image at half its size beside it."""

    def forward(self, x):
        _, _, h, w = ints(x)
        y = self.features(x) + self.first(F.interpolate(x, size=(h // 2, w // 2), mode="bilinear"))
        return F.interpolate(self.score(y), size=(h, w), mode="bilinear")


class PaddedAndCropped(Baked):
    """As FCN-8s' first version: padded widely, upsampled, and cropped from the 20th pixel on."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 16, 4)

    def forward(self, x):
        _, _, h, w = ints(x)
        return self.up(self.score(self.features(F.pad(x, (20, 20, 20, 20)))))[:, :, 19 : 19 + h, 19 : 19 + w]


class Mirrored(Baked):
    """Mirrored around, and as much cropped from the middle of what it gives, as U-Nets of 2015 do."""

    def forward(self, x):
        _, _, h, w = ints(x)
        y = self.features(F.pad(x, (16, 16, 16, 16), mode="reflect"))
        y = F.interpolate(self.score(y), scale_factor=4.0, mode="bilinear")
        down, right = (y.shape[2] - h) // 2, (y.shape[3] - w) // 2
        return y[:, :, down : down + h, right : right + w]


class ToMultiple(Baked):
    """Pads to a multiple of 8 by itself, by a number."""

    def forward(self, x):
        _, _, h, w = ints(x)
        x = F.pad(x, (0, -w % 8, 0, -h % 8))
        return F.interpolate(self.score(self.features(x)), scale_factor=4.0, mode="bilinear")[:, :, :h, :w]


class ToSquare(Baked):
    """Pads to a square by itself, by a number."""

    def forward(self, x):
        _, _, h, w = ints(x)
        x = F.pad(x, (0, max(h - w, 0), 0, max(w - h, 0)))
        return F.interpolate(self.score(self.features(x)), scale_factor=4.0, mode="bilinear")[:, :, :h, :w]


# Blocks: (the module with its layers, features) → features of the same size.


def flattened(m, y):
    n, c, h, w = ints(y)
    t = y.view(n, c, h * w)
    return (t - t.mean(2, keepdim=True)).view(n, c, h, w)


def channel_shuffle(m, y):
    n, c, h, w = ints(y)
    return y.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def attention(m, y):
    n, c, h, w = ints(y)
    q, k, v, _ = m.expand(y).view(n, 4, 2, c // 2, h * w).unbind(1)
    a = torch.softmax(q.transpose(-2, -1) @ k / 2, -1)
    return (v @ a.transpose(-2, -1)).reshape(n, c, h, w) + y


def tokens(m, y):
    n, c, h, w = ints(y)
    t = y.flatten(2).transpose(1, 2)
    q = m.linear(m.norm(t))
    t = t + torch.softmax(q @ q.transpose(1, 2) / c**0.5, -1) @ q
    return t.transpose(1, 2).reshape(n, c, h, w)


def axial_attention(m, y):
    n, c, h, w = ints(y)
    rows = y.permute(0, 2, 3, 1).reshape(n * h, w, c)
    y = (torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows).view(n, h, w, c).permute(0, 2, 1, 3)
    columns = y.reshape(n * w, h, c)
    return (torch.softmax(columns @ columns.transpose(1, 2), -1) @ columns).view(n, w, h, c).permute(0, 3, 2, 1)


def windows(m, y):
    n, c, h, w = ints(y)
    t = y.permute(0, 2, 3, 1).reshape(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    q = m.linear(t)
    t = torch.softmax(q @ q.transpose(1, 2) + m.near, -1) @ t
    t = t.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return t.permute(0, 3, 1, 2)


def aspp_pooling(m, y):
    _, _, h, w = ints(y)
    pooled = m.mix(F.avg_pool2d(y, (h, w)))
    return m.join(torch.cat([y, F.interpolate(pooled, size=(h, w), mode="bilinear")], 1))


def squeeze_and_excite(m, y):
    n, c, h, w = ints(y)
    return y * torch.sigmoid(m.linear(y.view(n, c, h * w).mean(2))).view(n, c, 1, 1)


def strips(m, y):
    _, _, h, w = ints(y)
    return y * torch.sigmoid(F.avg_pool2d(y, (1, w)) + F.avg_pool2d(y, (h, 1)))


def global_max(m, y):
    return y + F.max_pool2d(y, ints(y)[2:])


def pixel_shuffle(m, y):
    n, c, h, w = ints(y)
    return m.down(m.expand(y).view(n, c, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, 2 * h, 2 * w))


def pixel_unshuffle(m, y):
    n, c, h, w = ints(y)
    t = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
    return F.interpolate(m.reduce(t), size=(h, w), mode="nearest") + y


def crop(m, y):
    _, _, h, w = ints(y)
    return F.pad(y, (1, 1, 1, 1), mode="reflect")[:, :, 1 : h + 1, 1 : w + 1] + F.pad(y, (0, 3, 0, 2))[:, :, :h, :w]


def roll(m, y):
    return y + torch.roll(y, 3, 2)


def skips(m, y):
    _, _, h, w = ints(y)
    deep = m.down(y)
    deeper = F.interpolate(m.down(deep), size=ints(deep)[2:], mode="nearest")
    deep = m.join(torch.cat([deep, deeper], 1))
    return m.join(torch.cat([y, F.interpolate(deep, size=(h, w), mode="bilinear", align_corners=True)], 1))


def average_pooled(m, y):
    _, _, h, w = ints(y)
    return m.join(torch.cat([y, F.interpolate(F.avg_pool2d(y, 2), size=(h, w), mode="bilinear")], 1))


def coordinates(m, y):
    n, _, h, w = ints(y)
    down, right = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return m.coordinates(torch.cat([y, torch.stack([right, down])[None].expand(n, -1, -1, -1)], 1))


def centres(m, y):
    _, _, h, w = ints(y)
    down = ((torch.arange(h).float() + 0.5) / h).view(1, 1, h, 1)
    return y * down + ((torch.arange(w).float() + 0.5) / w * 2 - 1).view(1, 1, 1, w)


def interpolated_position(m, y):
    return y + F.interpolate(m.places[:, :, :5, :7], size=ints(y)[2:], mode="bilinear")


def counted(m, y):
    _, _, h, w = ints(y)
    return y + torch.arange(h).float().view(1, 1, h, 1) + 8 * torch.arange(w).float().view(1, 1, 1, w)


def ones(m, y):
    n, _, h, w = ints(y)
    return torch.cat([y[:, 1:], torch.ones(1, 1, h, w) * 0.5 + torch.zeros(n, 1, h, w)], 1)


def expanded(m, y):
    return m.join(torch.cat([y, y.mean((2, 3), keepdim=True).expand(*ints(y))], 1))


def repeated(m, y):
    _, _, h, w = ints(y)
    return m.join(torch.cat([y, y.mean((2, 3), keepdim=True).repeat(1, 1, h, w)], 1))


def summed(m, y):
    _, _, h, w = ints(y)
    return y - y.sum((2, 3), keepdim=True) / (h * w)


def affinity(m, y):
    n, c, h, w = ints(y)
    t = y.view(n, c, h * w)
    return (t @ t.transpose(1, 2) / (h * w) @ t).view(n, c, h, w) + y


def norms(m, y):
    return m.instance(m.group(y))


def variance(m, y):
    """As SimAM: the squared distances from the mean, summed and divided by the places less 1."""
    _, _, h, w = ints(y)
    apart = (y - y.mean((2, 3), keepdim=True)).pow(2)
    return y * torch.sigmoid(apart / (4 * apart.sum((2, 3), keepdim=True) / (h * w - 1) + 1e-4))


def gram(m, y):
    n, c, h, w = ints(y)
    t = y.flatten(2)
    return y + (t @ t.transpose(1, 2) / (c * h * w) @ t).view(n, c, h, w)


def recurrent(m, y):
    """A GRU along the rows, and back."""
    n, c, h, w = ints(y)
    rows = m.recurrent(y.permute(0, 2, 3, 1).reshape(n * h, w, c))[0]
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


def coordinate_attention(m, y):
    """Hou et al., 2021: means along rows and columns, put together, convolved and taken apart."""
    _, _, h, w = ints(y)
    both = torch.cat([y.mean(3, keepdim=True), y.mean(2, keepdim=True).transpose(2, 3)], 2)
    rows, columns = torch.relu(m.mix(both)).split([h, w], 2)
    return y * torch.sigmoid(rows) * torch.sigmoid(columns.transpose(2, 3))


BLOCKS = [
    flattened, channel_shuffle, attention, tokens, axial_attention, windows, aspp_pooling, squeeze_and_excite, strips,
    global_max, pixel_shuffle, pixel_unshuffle, crop, roll, skips, average_pooled, coordinates, centres,
    interpolated_position, counted, ones,
    expanded, repeated, summed, affinity, norms, variance, gram,
    recurrent, coordinate_attention,
]  # fmt: skip
# What they do is the same wherever an image goes on beyond the traced one.
LOCAL = [channel_shuffle, windows, pixel_shuffle, pixel_unshuffle, crop, ones]


# Blocks that cannot be freed.


def pyramid(m, y):
    _, _, h, w = ints(y)
    return y + sum(F.interpolate(F.adaptive_avg_pool2d(y, bins), size=(h, w), mode="bilinear") for bins in (1, 2, 8))


def maxima(m, y):
    return y + F.interpolate(F.adaptive_max_pool2d(y, 2), size=ints(y)[2:])


def one_grid(m, y):
    return y + F.interpolate(F.adaptive_avg_pool2d(y, 2), size=ints(y)[2:])


def even_shares(m, y):
    n, c, h, w = ints(y)
    return y + F.interpolate(y.view(n, c, 4, h // 4, 4, w // 4).mean((3, 5)), size=(h, w))


def embedding(m, y):
    return y + m.places


def token_embedding(m, y):
    return (y.flatten(2).transpose(1, 2) + m.flat_places).transpose(1, 2).reshape(*ints(y))


def dense(m, y):
    n, c, h, w = ints(y)
    return m.dense(y.view(n, c, h * w)).view(n, c, h, w)


def fixed_context(m, y):
    small = torch.relu(F.interpolate(y, size=(8, 8), mode="bilinear"))
    return y + F.interpolate(small, size=ints(y)[2:], mode="bilinear")


def spatial_norm(m, y):
    return m.spatial(y)


def one_image(m, y):
    _, c, h, w = ints(y)
    t = y.view(c, h * w)
    return (torch.softmax(t @ t.t(), -1) @ t).view(1, c, h, w)


def divided(m, y):
    n, c, h, w = ints(y)
    t = y.view(n, c, h * w)
    return (t @ (t.transpose(1, 2) @ t / (h * w))).view(n, c, h, w)


def ranks(m, y):
    n, c, h, w = ints(y)
    return (y.flatten(2).cumsum(2) / (h * w)).view(n, c, h, w)


def warped(m, y):
    """A grid of flows, as SFNet's: they are divided by the map's width and height."""
    n, _, h, w = ints(y)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    flow = y[:, :2].permute(0, 2, 3, 1) / torch.tensor([[[[w, h]]]]).type_as(y)
    return F.grid_sample(y, torch.stack((columns, rows), -1).repeat(n, 1, 1, 1) + flow, align_corners=True)


def warped_by_axis(m, y):
    _, _, h, w = ints(y)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    grid = torch.stack([columns, rows]).float() + y[:, :2]
    grid = torch.stack((2 * grid[:, 0] / (w - 1) - 1, 2 * grid[:, 1] / (h - 1) - 1), -1)
    return F.grid_sample(y, grid, align_corners=True)


def quarter_of_all(m, y):
    n, _, h, w = ints(y)
    scores = y.mean(1).flatten(1)
    least = scores.topk(h * w // 4, 1).values.amin(1, keepdim=True)
    return y * (scores >= least).float().view(n, 1, h, w)


def middle(m, y):
    return y + y[:, :, ints(y)[2] // 2][:, :, None]


def rooted(m, y):
    """Sums and lengths over all places, by the root of how many there are."""
    _, _, h, w = ints(y)
    length = y.pow(2).sum((2, 3), keepdim=True).sqrt() / math.sqrt(h * w)
    return (y - y.sum((2, 3), keepdim=True) * (h * w) ** -0.5) / (length + 1)


def log_scaled(m, y):
    """Attention whose scale grows with the logarithm of how many places there are."""
    n, c, h, w = ints(y)
    t = y.view(n, c, h * w)
    return (t @ torch.softmax(t.transpose(1, 2) @ t * math.log(h * w), -1)).view(n, c, h, w)


def half_rolled(m, y):
    return y + torch.roll(y, ints(y)[2] // 2, 2)


def sorted_places(m, y):
    """The median of all places."""
    _, _, h, w = ints(y)
    return y - y.flatten(2).sort(2).values[:, :, h * w // 2][..., None, None]


def clipped(m, y):
    return (20 * y).clamp(0, ints(y)[3] - 1)


def by_height(m, y):
    return torch.tanh(y * (ints(y)[2] / 2))


def one_and_root(m, y):
    _, _, h, w = ints(y)
    return torch.tanh(y * (1 + math.sqrt(h * w) / 100))


def dilated(m, y):
    h, w = (side // 8 for side in ints(y)[2:])
    return F.conv2d(y, m.down.weight, padding=(h, w), dilation=(h, w))


def upper_left(m, y):
    _, _, h, w = ints(y)
    return y + F.interpolate(y[:, :, : h // 2, : w // 2], size=(h, w))


def upper_third(m, y):
    _, _, h, w = ints(y)
    return y + F.interpolate(y[:, :, : h // 3], size=(h, w))


def mirrored(m, y):
    return y + y[:, :, :, torch.arange(ints(y)[3] - 1, -1, -1)]


def sampled(m, y):
    _, _, h, w = ints(y)
    places = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(1, -1, w), indexing="ij")
    return F.grid_sample(y, torch.stack(places[::-1], -1)[None].expand(len(y), -1, -1, -1), align_corners=True)


def thirds(m, y):
    _, _, h, w = ints(y)
    windows = (-(-h // 3), -(-w // 3))
    return y + F.interpolate(F.avg_pool2d(y, windows, windows, ceil_mode=True), size=(h, w))


def static(model: nn.Module, size: tuple[int, int], opset: int = 13, dynamo: bool = False) -> onnx.ModelProto:
    """A module as its exporter writes it where nobody asks for dynamic axes."""
    image, buffer = torch.zeros(1, 3, *size), io.BytesIO()
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            if dynamo:
                return torch.onnx.export(model.eval(), (image,), dynamo=True, opset_version=opset).model_proto
            torch.onnx.export(model.eval(), (image,), buffer, dynamo=False, opset_version=opset)
        finally:
            logging.disable(level)
    return onnx.load_from_string(buffer.getvalue())
