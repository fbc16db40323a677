"""export-onnx: every size, verified against PyTorch; what cannot be exported is named."""

import json
import math
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import WholeImageError
from fcn_deploy.export.build.core import core_of
from fcn_deploy.export.from_torch import VERIFIED_SIZES, export_module
from fcn_deploy.export.from_torch.network import Network, _refuse_state
from fcn_deploy.export.graph.edit import metadata, opset
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.fcn import backbones
from helpers import checkpoint_of, command, one_error, random_network
from torch import nn

from fcn_deploy import DeployError, ModelCard

NETWORKS = [
    {"backbone": name, "stride": 32 if name == "alexnet" else 8, "upsampling": upsampling}
    for name in backbones.NAMES
    for upsampling in ("fixed", "learned")
] + [
    {"stride": 32},
    {"stride": 16, "upsampling": "learned"},
    {"arch": "dilated8", "backbone": "resnet50"},
    {"channels": 4},
]


def export_network(model, path, **options):
    checkpoint = checkpoint_of(model)
    return export_module(model, checkpoint.card, path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: "-".join(map(str, a.values())))
def test_every_network_exports_and_takes_every_size(tmp_path, architecture):
    model = random_network(width=0.125, **architecture)
    card, differences = export_network(model, tmp_path / "m.onnx")
    assert len(differences) >= 12 and max(d.logits for d in differences) < 1e-4
    written = onnx.load(tmp_path / "m.onnx")
    assert opset(written) == 18
    assert ModelCard.from_json(metadata(written, "fcn_deploy.card"), "x") == card
    assert [value.name for value in (*written.graph.input, *written.graph.output)] == ["image", "logits"]
    # Constant padding and scales are numbers in the file, which TensorRT wants.
    assert not {"Constant", "ConstantOfShape", "Shape"} & {
        node.op_type for node in written.graph.node if not node.name.startswith("any_size/")
    }
    # At sizes that the export itself did not verify, in stock ONNX Runtime.
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for size in ((1, 97), (53, 5), (43, 149)):
        x = torch.randn(1, model.architecture.channels, *size)
        with torch.inference_mode():
            expected = model(x).numpy()
        np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], expected, atol=1e-4 * np.ptp(expected))


def test_the_sizes_that_are_verified():
    assert len(VERIFIED_SIZES) >= 12 and (1, 1) in VERIFIED_SIZES and (64, 96) not in VERIFIED_SIZES
    assert any(max(size) == 8 * min(size) for size in VERIFIED_SIZES)
    assert any(min(size) > 96 for size in VERIFIED_SIZES)
    for axis in (0, 1):
        assert any(size[axis] > 256 for size in VERIFIED_SIZES)
    assert sum(height * width for height, width in VERIFIED_SIZES) < 70_000, "an export waits for each pixel"


@pytest.mark.slow
def test_pytorchs_other_exporter_and_newer_opsets(tmp_path):
    model = random_network(backbone="vgg16", width=0.05, classes=3, stride=16)
    export_network(model, tmp_path / "d.onnx", exporter="dynamo")
    export_network(model, tmp_path / "t.onnx", exporter="torchscript", opset_version=21)
    assert opset(onnx.load(tmp_path / "t.onnx")) == 21
    x = torch.randn(2, 3, 45, 77).numpy()
    first, second = (onnxruntime.InferenceSession(tmp_path / f"{n}.onnx").run(None, {"image": x})[0] for n in "dt")
    np.testing.assert_allclose(first, second, atol=1e-4 * np.ptp(first))


class Segments(nn.Module):
    """A foreign network of stride 2, by what it does to the size at its end."""

    def __init__(self, end):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.end = end

    def forward(self, x):
        y = self.body(x)
        return self.end(x, y)


def to_size(x, y):
    return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    ("end", "sizes", "card_says"),
    [
        (to_size, (1, 1), (1, 2)),
        (lambda x, y: {"out": to_size(x, y)}, (1, 1), (1, 2)),
        (lambda x, y: (to_size(x, y), y), (1, 1), (1, 2)),
        (lambda x, y: y, (1, 2), (1, 2)),  # ⌈H/2⌉ scores of any H: nothing is padded
        (lambda x, y: F.interpolate(y, scale_factor=2.0, mode="bilinear") + x.mean(1, True), (2, 1), (2, 1)),
    ],
    ids=["to-size", "dict", "tuple", "coarse", "multiples-only"],
)
def test_foreign_modules_are_probed_for_the_sizes_they_take(tmp_path, end, sizes, card_says):
    torch.manual_seed(0)
    model = Segments(end).eval()

    def run(height, width):
        result = model(torch.zeros(1, 3, height, width))
        return (result["out"] if isinstance(result, dict) else result[0] if isinstance(result, tuple) else result).shape

    with torch.inference_mode():
        found = find_accepted_sizes(run, "it")
        assert (found.multiple, found.factor) == sizes and found.smallest == 1
    card, _ = export_module(model, None, tmp_path / "m.onnx", name="it")
    assert (card.size_multiple, card.stride) == card_says
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in ((1, 1), (37, 53)):
        logits = session.run(None, {"image": np.zeros((1, 3, *size), np.float32)})[0]
        assert logits.shape == (1, 4, *size)


class PadsIfOdd(nn.Module):
    """Its skip is padded by one where the image was odd, as MONAI's BasicUNet does."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 1, 1), nn.ConvTranspose2d(4, 2, 2, 2)

    def forward(self, x):
        y = self.up(F.max_pool2d(self.down(x), 2))
        odd = [1 if y.shape[axis] != x.shape[axis] else 0 for axis in (3, 2)]
        return F.pad(y, (0, odd[0], 0, odd[1]), "replicate") + x.mean(1, True)


def test_a_network_that_pads_odd_maps_by_code_is_padded_to_even_sizes(tmp_path):
    notes = []
    torch.manual_seed(0)
    card, _ = export_module(PadsIfOdd().eval(), None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert card.size_multiple == 2
    assert any("code that looks at the sizes of its maps" in note and "multiples of 2" in note for note in notes)


class Flexible(nn.Module):
    """Steps of 2 and then of its first `step`, whose maps pad their skips where they are odd, as MONAI's FlexibleUNet.

    Its first skip is at 1/step of the image, so it takes no other sizes than multiples of that by itself.
    """

    def __init__(self, step: int, depth: int = 4):
        super().__init__()
        self.first, self.step = nn.Conv2d(3, 4, step, step), step
        self.steps = nn.ModuleList(nn.Conv2d(4, 4, 2, 2) for _ in range(depth))
        self.joins = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(depth))

    def forward(self, x):
        skips = [self.first(x)]
        for step in self.steps:
            skips.append(step(skips[-1]).relu())
        y = skips.pop()
        for join in self.joins:
            skip, y = skips.pop(), F.interpolate(y, scale_factor=2.0)
            odd = [1 if y.shape[axis] != skip.shape[axis] else 0 for axis in (3, 2)]
            y = join(torch.cat([skip, F.pad(y, (0, odd[0], 0, odd[1]), "replicate")], 1)).relu()
        return F.interpolate(y, scale_factor=float(self.step))


@pytest.mark.parametrize(("step", "multiple"), [(2, 32), (3, 48)])
def test_padding_of_odd_maps_is_found_where_a_network_takes_multiples_too(tmp_path, step, multiple):
    """It takes multiples of its step; padded by code it is the ONNX at the multiples that have no odd map."""
    notes = []
    torch.manual_seed(0)
    model = Flexible(step).eval()
    card, _ = export_module(
        model, None, tmp_path / "m.onnx", exporter="torchscript", name="it", note=notes.append
    )  # the other takes its time, and does not do it either
    assert card.size_multiple == multiple
    (said,) = (note for note in notes if f"what that does for multiples of {multiple}" in note)
    assert said.endswith("get the scores of the padded or resized image")
    image = torch.randn(1, 3, 3 * multiple, 5 * multiple)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    with torch.inference_mode():
        expected = model(image).numpy()
    np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, atol=1e-5)


class Stretches(Segments):
    """A U-Net whose decoder goes to its skip's size by linear interpolation: odd sizes are stretched."""

    def forward(self, x):
        y = self.body(x)
        return to_size(y, F.max_pool2d(y, 2, ceil_mode=True)) + y


class PadsItsMaps(nn.Module):
    """As the widely copied Pytorch-UNet: a transposed convolution, and a Pad of what odd sizes lack to its skip."""

    def __init__(self, whole=1):
        super().__init__()
        self.whole, self.first, self.score = whole, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x):
        rows, columns = x.shape[2:]
        skip = self.first(F.pad(x, (0, -columns % self.whole, 0, -rows % self.whole), mode="replicate"))
        y = self.up(F.max_pool2d(skip, 2))
        below, right = skip.size(2) - y.size(2), skip.size(3) - y.size(3)
        y = F.pad(y, [right // 2, right - right // 2, below // 2, below - below // 2])
        return self.score(skip + y)[..., :rows, :columns]


@pytest.mark.parametrize(
    ("model", "multiple", "period"),
    [(Stretches(to_size), 4, 4), (PadsItsMaps(), 2, 2), (PadsItsMaps(whole=4), 4, 2)],
)
def test_fit_pad_pads_a_network_of_any_size_to_multiples_where_it_can_be_tiled(tmp_path, model, multiple, period):
    torch.manual_seed(0)
    free, _ = export_module(model.eval(), None, tmp_path / "a.onnx", name="it")
    padded, _ = export_module(model.eval(), None, tmp_path / "b.onnx", name="it", options=ImportOptions(fit="pad"))
    assert (free.size_multiple, padded.size_multiple) == (1, multiple)
    with pytest.raises(WholeImageError, match="odd sizes to another map's; export-onnx --fit pad avoids that"):
        receptive_field(core_of(import_model(tmp_path / "a.onnx")).model)
    assert receptive_field(core_of(import_model(tmp_path / "b.onnx")).model).period == period


def test_one_logit_that_is_within_0_and_1_for_noise_is_no_probability(tmp_path):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 1, 1)
    nn.init.constant_(model.bias, 0.5)
    model.weight.data.mul_(0.05)
    card, _ = export_module(model.eval(), None, tmp_path / "m.onnx", name="it")
    assert card.activation == "sigmoid"
    notes = []
    export_module(nn.Sequential(model, nn.LogSigmoid()).eval(), None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert any("would call class 0 everywhere" in note for note in notes)
    bounded = nn.Sequential(model, nn.Hardsigmoid()).eval()
    card, _ = export_module(bounded, None, tmp_path / "m.onnx", name="it")
    assert card.activation == "probability"


class Deep(nn.Module):
    """Pools by 64 and upsamples to the image's size: smaller images vanish on the way."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(64), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        y = F.interpolate(self.body(x), scale_factor=64.0) if self.exact else F.interpolate(self.body(x), x.shape[-2:])
        return y + x.mean(1, True)


@pytest.mark.parametrize("exact", [True, False])
def test_networks_of_large_strides_are_padded(tmp_path, exact):
    card, _ = export_module(Deep(exact).eval(), None, tmp_path / "m.onnx", name="it")
    assert (card.size_multiple, card.smallest) == ((64, 1) if exact else (1, 64))


def test_a_modules_own_card_must_fit_it(tmp_path):
    with pytest.raises(DeployError, match="has 4 scores, and its model card says 3"):
        export_module(Segments(to_size).eval(), ModelCard(("a", "b", "c")), tmp_path / "m.onnx", name="it")


class BakedResize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x):
        return F.interpolate(self.conv(x), size=np.asarray(x.shape[2:]).tolist(), mode="bilinear")


class BakedReshape(BakedResize):
    def forward(self, x):
        n, c, h, w = (int(side) for side in x.shape)
        return x.reshape(n, c, h * w).mean(1, keepdim=True).reshape(n, 1, h, w) + torch.cat([x, x.relu()], 1)


class Positional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        grid = torch.linspace(0, 1, int(x.shape[3]))
        return self.conv(x) + grid


class Shifted(BakedResize):
    """Its two exporters see another branch than PyTorch does at small sizes: a silent difference."""

    def forward(self, x):
        y = self.conv(x)
        y = y * 2 if int(x.shape[2]) > 50 else y
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (BakedResize, r"size baked in.*Resize.*usual cause: interpolate\(size=<int>\)"),
        (Shifted, r"other scores in ONNX than in PyTorch: at 1×1"),
    ],
)
def test_a_size_baked_in_fails_and_names_the_node_and_the_cause(tmp_path, module, said):
    torch.manual_seed(0)
    with pytest.raises(DeployError, match=said) as caught:
        export_module(module(), None, tmp_path / "m.onnx", exporter="torchscript", name="it")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


class Keeps(nn.Module):
    """Means of images so far: in a buffer, a bank, a list, or a whole map; or a count that nothing reads."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.where, self.seen, self.last = nn.Conv2d(3, 4, 3, padding=1), where, [], None
        self.register_buffer("mean", torch.zeros(1, 4, 1, 1))
        self.register_buffer("bank", torch.zeros(8, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.conv(x)
        of_this = y.mean((2, 3), keepdim=True)
        if self.where == "buffer":
            self.mean.mul_(0.99).add_(0.01 * of_this.mean(0))
            return y - self.mean
        self.count += 1
        if self.where == "bank":
            self.bank[int(self.count) % 8] = of_this.mean((0, 2, 3))
            return y + self.bank.mean(0)[None, :, None, None]
        if self.where == "list":
            self.seen.append(of_this.mean(0))
            return y + torch.stack(self.seen).mean(0)
        if self.where == "pixels":  # a grid by the number of pixels, so that 96×64 has that of 64×96
            if self.last is None or self.last.numel() != y[0, 0].numel():
                self.last = torch.linspace(0, 1, y.shape[2])[:, None].expand(y.shape[2:]).flatten()
            return y + self.last.view(y.shape[2:])
        if self.where == "map":
            self.last = y if self.last is None else 0.5 * self.last + 0.5 * y
            return self.last
        return y


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("buffer", "(mean)"), ("bank", "(bank, count)"), ("list", "(count, seen)"), ("map", "last)"),
        ("pixels", "last)"),
    ],
)  # fmt: skip
def test_what_is_kept_from_image_to_image_is_named(tmp_path, where, said):
    torch.manual_seed(0)
    with pytest.raises(DeployError, match="it keeps state from image to image") as caught:
        export_module(Keeps(where).eval(), None, tmp_path / "m.onnx", name="it")
    assert said in str(caught.value) and "if self.training" in str(caught.value) and not list(tmp_path.iterdir())
    if where == "buffer":  # a size that is said changes nothing
        with pytest.raises(DeployError, match="it keeps state"):
            export_module(Keeps(where).eval(), None, tmp_path / "m.onnx", name="it", options=ImportOptions(fit="64x64"))


def test_a_count_of_images_that_no_score_is_made_of_is_no_state(tmp_path):
    export_module(Keeps("nowhere").eval(), None, tmp_path / "m.onnx", exporter="torchscript", name="it")
    assert (tmp_path / "m.onnx").is_file()


class Wide(torch.nn.Conv2d):
    def forward(self, x):
        if x.shape[2] > x.shape[3]:
            raise ValueError("an image is wider than high")
        return super().forward(x)


def test_a_network_that_refuses_images_turned_round_keeps_no_state():
    network = Network(Wide(3, 2, 3, padding=1).eval(), 3, AcceptedSizes(), "it", False)
    _refuse_state(network, (32, 48))  # the error of the network itself would end the export


@pytest.mark.parametrize(("module", "said"), [(BakedReshape, "Reshape"), (Positional, "constant")])
def test_sizes_that_an_exporter_bakes_in_are_freed_where_pytorch_agrees(tmp_path, module, said):
    torch.manual_seed(0)
    model, notes = module().eval(), []
    export_module(model, None, tmp_path / "m.onnx", exporter="torchscript", name="it", note=notes.append)
    assert any(said in note for note in notes), notes
    x = torch.randn(1, 3, 29, 143)
    with torch.inference_mode():
        expected = model(x).numpy()
    logits = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": x.numpy()})[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


WHOLE = 3


def often_padded(side):
    """As by each block of a network of windows; each reads the side before it twice."""
    for _ in range(24):
        side = side + -side % 2
    return side


@pytest.mark.parametrize(
    "size_of",
    [
        lambda height, width: (int(height) + int(height % 2 != 0), {int: 1}[type(len("a"))] * int(width)),
        lambda height, width: (round(height * round(0.7, ndigits=1)), int(width / 3) + int("1", base=16)),
        lambda height, width: (math.ceil(height / 3), max(width // 2, 40)),
        lambda height, width: (int(float(height) * 1.25), min(math.floor(width * 0.5) + 1, 2 * int(width))),
        lambda height, width: (
            int(often_padded(height) * 0.29) + 1,
            math.floor(0.7 * width) + 1,
        ),  # 0.29 · 100 is 28.999…
        lambda height, width: (max(height, 8), round(width / 3) + torch.zeros(1, dtype=float).ndim),
        lambda height, width: (
            int(height / 2) if type(WHOLE) is int and type(WHOLE / 2) in (int, float) else 7,
            int(width) if issubclass(bool, int) and isinstance(int, type) and int.__name__ == "int" else 7,
        ),
    ],
    ids=["int", "round", "math", "float", "in-double", "float-is-a-dtype", "types"],
)
def test_numbers_that_python_makes_of_sizes_stay_functions_of_them(tmp_path, size_of):
    torch.manual_seed(0)

    def look(x, y):
        return F.interpolate(y, size=size_of(*x.shape[2:]), mode="bilinear")

    model, notes = Looks(look).eval(), []
    export_module(model, None, tmp_path / "m.onnx", exporter="torchscript", name="it", note=notes.append)
    assert any("makes plain numbers of sizes" in note for note in notes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in ((53, 151), (100, 190)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            expected = model(x).numpy()
        np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], expected, atol=1e-4)
    assert "int" not in globals() and int(7.9) == 7 and not hasattr(torch.Tensor, "__round__")


@pytest.mark.parametrize("options", [{}, {"align_corners": True}], ids=["by-the-factor", "by-corners"])
def test_a_map_resized_by_a_factor_has_the_length_that_python_gives_it(tmp_path, options):
    """0.29 · 100 is 28.999…, and 29 in single precision, in which ONNX has factors; 0.29 · 300 is 87 in both."""
    torch.manual_seed(0)

    def look(x, y):
        return to_size(y, F.interpolate(y, scale_factor=0.29, mode="bilinear", **options))

    model = Looks(look).eval()
    export_module(model, None, tmp_path / "m.onnx", exporter="torchscript", name="it")
    x = torch.randn(1, 3, 200, 600)
    with torch.inference_mode():
        expected = model(x).numpy()
    logits = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": x.numpy()})[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


class Looks(Segments):
    """A network whose code looks at its image: at its size or values, by `look`."""

    def __init__(self, look):
        super().__init__(to_size)
        self.look = look

    def forward(self, x):
        return self.end(x, self.look(x, self.body(x)))


class ByArea(nn.Module):
    """Of small images the scores by some weights, of large ones by others."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x, y):
        return (self.large if x.shape[2] * x.shape[3] > 40_000 else self.small)(y)


class GridBySize(nn.Module):
    """Adds a grid, which it keeps by the image's size."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x, y):
        height, width = y.shape[2:]
        if (height, width) not in self.kept:
            self.kept[height, width] = torch.linspace(0, 1, height)[:, None] * torch.linspace(0, 1, width)
        return y + self.kept[height, width]


class Rows(nn.Module):
    """A recurrent layer along each row, whose result counts twice in images of some widths."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 2, batch_first=True, bidirectional=True)

    def forward(self, x, y):
        count, scores, height, width = y.shape
        rows, _ = self.layer(y.permute(0, 2, 3, 1).reshape(count * height, width, scores))
        rows = rows.reshape(count, height, width, scores).permute(0, 3, 1, 2)
        return y + rows * (2 if 300 < x.shape[3] < 310 else 1)


class Locked(nn.Module):
    """What cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x, y):
        with self.lock:
            return y * 2 if 300 < x.shape[2] < 400 else y


@torch.jit.script
def twice_from_300_to_310(y: torch.Tensor, height: int) -> torch.Tensor:
    if height > 300 and height < 310:
        return y * 2
    return y


def of_quiet_images(x, y):
    assert x.abs().max() < 20, "normalise it"
    return y


def by_exponents(x, y):
    return y.exp() / y.exp().sum(1, keepdim=True) if x.isfinite().all() else y


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (ByArea(), "does otherwise at 64×640 than at smaller sizes"),
        (lambda x, y: y * 2 if x.shape[2] > 512 else y, "does otherwise at 544×64 than at smaller sizes"),
        (lambda x, y: y.abs() if x.shape[2] * x.shape[3] > 700 * 700 else y, "does otherwise at 704×704"),
        (lambda x, y: y * (1 + max(0, int(x.shape[3]) - 512) / 100), "does otherwise at 64×544"),
        (lambda x, y: y / 255 if x.max() > 20 else y, "looks at the values of its image"),
        (lambda x, y: y * 2 if 300 < x.shape[2] < 400 else y, "does otherwise at 301×96 than at other sizes"),
        (lambda x, y: y * (1 + (x.shape[2] > 300 and x.shape[2] < 400)), "otherwise at 4224×64 than at other sizes"),
        (lambda x, y: y * 2 if x.shape[3] / 2 == 250 else y, "does otherwise at 64×500 than at other sizes"),
        (lambda x, y: y * 2 if x.shape[2:] == (500, 401) else y, "does otherwise at 500×401 than at other sizes"),
        (lambda x, y: y * 2 if 301 < x.shape[2] < 310 and 401 < x.shape[3] < 411 else y, "does otherwise at 302×402"),
        (lambda x, y: y * 2 if 300 < math.sqrt(x.shape[2] * x.shape[3]) < 310 else y, "does otherwise at "),
        (lambda x, y: y * 2 if int(math.log2(x.shape[2])) == 9 else y, "does otherwise at "),
        (lambda x, y: y * 2 if 300 < math.hypot(*x.shape[2:]) < 320 else y, "does otherwise at "),
        (lambda x, y: y * 2 if 300 < int(x.shape[2]) < 310 else y, "does otherwise at 301×96 than at other sizes"),
        (lambda x, y: y * 2 if x.shape[2] // 300 % 2 else y, "does otherwise at 300×96 than at other sizes"),
        (lambda x, y: y * [1.0, 2.0, *[1.0] * 99][x.shape[2] // 300], "does otherwise at 300×96 than at other sizes"),
        (lambda x, y: y * 2 if abs(x.shape[2] - 350) < 10 else y, "does otherwise at 341×96 than at other sizes"),
        (lambda x, y: y * 2 if (y.shape[3] - 170) ** 2 < 25 else y, "does otherwise at 64×3"),
        (lambda x, y: y * 2 if x.shape[2] % 23 == 0 else y, "does otherwise at 69×96 than at other sizes"),
        (lambda x, y: y * 2 if x.shape[2] % 50 == 17 else y, "does otherwise at 67×96 than at other sizes"),
        (lambda x, y: y * 2 if 500 < max(x.shape[2:]) < 520 else y, "does otherwise at 64×501 than at other sizes"),
        (lambda x, y: y * 2 if 150 < len(y.unbind(2)) < 160 else y, "does otherwise at 301×96 than at other sizes"),
        (lambda x, y: y * 2 if 300 < x.stride(2) < 310 else y, "does otherwise at 64×301 than at other sizes"),
        (lambda x, y: y * {500: 2.0}.get(x.shape[2], 1.0), "does otherwise at 500×96 than at other sizes"),
        (lambda x, y: y * {64: 2.0}.get(x.shape[2], 1.0), "does otherwise at 64×"),
        (lambda x, y: y * 2 if str(x.shape[2]).startswith("108") else y, "does otherwise at 1080×96 than at other"),
        (lambda x, y: y * 2 if str(x.shape[2]) == "500" else y, "does otherwise at 500×96 than at other sizes"),
        (lambda x, y: y * 2 if 300 < np.sqrt(x.shape[2]) ** 2 < 310 else y, "does otherwise at 30"),
        (lambda x, y: y * 2 if torch.tensor(x.shape[2]) > 300 and x.shape[2] < 310 else y, "does otherwise at 309×96"),
        (lambda x, y: twice_from_300_to_310(y, x.shape[2]), "does otherwise at 309×96 than at other sizes"),
        (
            lambda x, y: y * 2 if torch.ones(1, dtype=float).ndim and 300 < x.shape[2] < 310 else y,
            "otherwise at 301×96",
        ),
        (Rows(), "does otherwise at 64×301 than at other sizes"),
        (Locked(), "does otherwise at 301×96 than at other sizes"),
    ],
)
def test_code_that_does_otherwise_for_large_or_loud_images_is_refused(tmp_path, look, said):
    torch.manual_seed(0)
    with pytest.raises(DeployError, match=said) as caught:
        export_module(Looks(look).eval(), None, tmp_path / "m.onnx", name="it")
    assert len(str(caught.value)) <= 300 and not list(tmp_path.iterdir())


def test_what_may_depend_on_a_size_unseen_is_said(tmp_path):
    notes = []
    looked_up = Looks(lambda x, y: y * {96: 1.0}.get(x.shape[2], 1.0)).eval()
    export_module(looked_up, None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert any("makes a key of a size (test_from_torch.py" in note and "not at all others" in note for note in notes)


def test_where_a_module_cannot_be_followed_is_said(tmp_path):
    notes = []
    of_loud_large_ones = Looks(lambda x, y: y * 2 if x.shape[2] > 512 and x.max() > 1e9 else y).eval()
    export_module(of_loud_large_ones, None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert any("it cannot be followed at 4224×64, where it runs" in note for note in notes), notes


def by_places(x, y):
    rows, columns = torch.linspace(-1, 1, y.shape[2]), torch.linspace(0, 1, y.shape[3])
    return y * (1 + rows[:, None] * columns)


def by_a_flow(x, y):
    """As SFNet's alignment: a flow in pixels over the size, added to a grid."""
    height, width = y.shape[2:]
    rows = torch.linspace(-1, 1, height).view(-1, 1).repeat(1, width)
    columns = torch.linspace(-1, 1, width).repeat(height, 1)
    flow = y[:, :2].permute(0, 2, 3, 1) / torch.tensor([[[[width, height]]]]).type_as(y)
    return F.grid_sample(y, torch.stack((columns, rows), -1) + flow, align_corners=True)


def turned(x, y, align_corners=False):
    """As a spatial transformer."""
    theta = torch.tensor([[1.0, 0.2, 0.1], [-0.1, 0.9, 0.2]]).expand(len(x), 2, 3)
    return F.grid_sample(y, F.affine_grid(theta, y.size(), align_corners=align_corners), align_corners=align_corners)


def of_corners(x, y):
    return turned(x, y, align_corners=True)


def as_dino(x, y, mode="bicubic"):
    """Embeddings of 7×7 places resized by a factor, as DINO does."""
    places = torch.arange(49.0).reshape(1, 1, 7, 7).sin()
    factors = tuple((side + 0.1) / 7 for side in y.shape[2:])
    return y + F.interpolate(places, scale_factor=factors, mode=mode)


def as_dino_bilinearly(x, y):
    return as_dino(x, y, "bilinear")


class ToSkip(nn.Module):
    """A transposed convolution to the size of a skip, by its `output_size`."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1)

    def forward(self, x, y):
        return y + self.up(self.down(y), output_size=y.shape[2:])


@pytest.mark.parametrize("look", [ToSkip(), by_places, by_a_flow, turned, of_corners, as_dino, as_dino_bilinearly])
def test_grids_of_the_images_size_are_exported_as_functions_of_it(tmp_path, look):
    torch.manual_seed(0)
    notes = []
    export_module(Looks(look).eval(), None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert not any("multiples" in note for note in notes)
    assert any("written as operators that take every size" in note for note in notes)


def test_one_score_without_its_axis_is_cut_off_where_it_is_made(tmp_path):
    """Exporters branch at squeeze(1), and a network of branches has no tiles."""
    module = Looks(lambda x, y: y)
    module.end = lambda x, y: to_size(x, y[:, :1]).squeeze(1)
    card, _ = export_module(module.eval(), None, tmp_path / "m.onnx", name="it")
    assert not card.whole and not any(node.op_type == "If" for node in onnx.load(tmp_path / "m.onnx").graph.node)


def test_a_choice_by_the_images_values_is_said(tmp_path):
    notes = []
    looks = Looks(lambda x, y: [y, y * 2][int(x.mean() > 1e9)]).eval()
    export_module(looks, None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert any("makes a number, or a choice, of its image's values" in note for note in notes)
    tinted = Looks(lambda x, y: [y, y * 2][int(x.mean() > 1)]).eval()
    with pytest.raises(DeployError, match="looks at the values of its image"):
        export_module(tinted, None, tmp_path / "n.onnx", name="it")


def test_a_quotient_and_its_rest_are_functions_of_the_size(tmp_path):
    def halves(x, y):
        half, rest = divmod(y.shape[2], 2)
        return F.interpolate(F.interpolate(y, size=(half + rest, y.shape[3])), size=y.shape[2:])

    notes = []
    export_module(Looks(halves).eval(), None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert any("plain numbers of sizes" in note for note in notes)


def test_a_module_that_goes_on_after_an_error_does_not_end_the_process(tmp_path):
    """PyTorch's tracer loses its place where an operator fails, and crashes at the end of the trace."""

    def in_sevenths(x, y):
        try:
            return F.pixel_shuffle(F.pixel_unshuffle(y, 7), 7) * 2
        except RuntimeError:
            return y

    with pytest.raises(DeployError, match="it goes on after pixel_unshuffle has failed"):
        export_module(Looks(in_sevenths).eval(), None, tmp_path / "m.onnx", name="it")


@pytest.mark.parametrize(
    "look",
    [
        lambda x, y: torch.cat([each.relu() for each in y.relu().split(1, 1)], 1) if x.shape[2] > 512 else y.relu(),
        lambda x, y: y / torch.tensor(2.0).item() if x.shape[2] > 0 else y,
        lambda x, y: y + torch.ones(200, 200)[: y.shape[2], : y.shape[3]],
        of_quiet_images,
        by_exponents,
    ],
    ids=["in-parts", "of-a-constant", "up-to-a-size", "up-to-a-value", "until-it-overflows"],
)
def test_code_that_comes_to_the_same_for_large_images_is_taken(tmp_path, look):
    torch.manual_seed(0)
    export_module(Looks(look).eval(), None, tmp_path / "m.onnx", name="it")


def test_a_module_runs_at_every_size_after_it_was_exported(tmp_path):
    module = Looks(GridBySize()).eval()
    export_module(module, None, tmp_path / "m.onnx", name="it")
    assert module(torch.zeros(1, 3, 4224, 64)).device.type == "cpu"


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 62 * 62, 10))

    def forward(self, x):
        return self.layers(x)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_networks_that_are_no_segmentation_networks_are_refused(tmp_path):
    with pytest.raises(DeployError, match="dense layer after Flatten"):
        export_module(Classifier(), None, tmp_path / "m.onnx", name="it")
    with pytest.raises(DeployError, match=r"gives \[1, 3\]; a segmentation network gives scores"):
        export_module(Pooled(), None, tmp_path / "m.onnx", name="it")


FACTORIES = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1))

class Several(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return {"aux": y + 1, "masks": y}

def several():
    return Several(*net())

def broken():
    raise RuntimeError("no weights here")

def text():
    return "net"
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "my_networks.py").write_text(FACTORIES)
    return tmp_path


@pytest.mark.slow
def test_a_factory_from_the_command_line(factories):
    options = ("--classes", "no,yes", "--input-mean", "1,2,3", "--input-std", "4,5,6")
    done = command("export-onnx", "my_networks:net", "-o", "m.onnx", *options, cwd=factories)
    assert "takes every H, W ≥ 1; 2 classes" in done.stdout
    assert done.stderr.startswith("note: ") and "assuming 3-channel uint8 images (RGB), labels by argmax" in done.stderr
    card = ModelCard.from_json(metadata(onnx.load(factories / "m.onnx"), "fcn_deploy.card"), "x")
    assert card.classes == ("no", "yes") and card.mean == (1, 2, 3) and card.std == (4, 5, 6)


@pytest.mark.slow
def test_weights_outputs_and_opsets_from_the_command_line(factories):
    """--weights in a training script's file, --output, an old opset, and what is said of them."""
    sys.path.insert(0, str(factories))
    try:
        import my_networks
    finally:
        sys.path.pop(0)
    state = {f"module.{name}": torch.ones_like(value) / 8 for name, value in my_networks.net().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, factories / "w.pth")
    options = ("--weights", "w.pth", "--output", "masks", "--opset", "11", "--bgr", "--input-mean", "1,2,3", "--json")
    done = command("export-onnx", "my_networks:several", "-o", "m.onnx", *options, cwd=factories)
    record = json.loads(done.stdout)
    said = " ".join(record["notes"])
    for part in ("under 'state_dict'", "prefix 'module.'", "wants BGR", "unnamed classes"):
        assert part in said, said
    assert record["card"]["mean"] == [3, 2, 1] and record["card"]["std"] == [1, 1, 1]
    written = onnx.load(factories / "m.onnx")
    assert opset(written) == 11
    model = my_networks.net()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    x = torch.randn(1, 3, 13, 31)
    with torch.inference_mode():
        expected = model(x.flip(1)).numpy()
    logits = onnxruntime.InferenceSession(factories / "m.onnx").run(None, {"image": x.numpy()})[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    torch.save({"0.weight": torch.ones(1)}, factories / "wrong.pth")
    for words, code, text in (
        (("my_networks:net", "--weights", "wrong.pth"), 1, "wrong.pth does not fit my_networks:net"),
        (("my_networks:several", "--output", "x"), 2, "gives no output x; choose one of aux, masks"),
        (("my_networks:several",), 2, "name the scores with --output"),
        (("w.pth",), 1, "no state dict of torchvision's"),
        (("w.pth", "--weights", "w.pth"), 2, "--weights is for package.module:factory"),
    ):
        assert text in one_error(command("export-onnx", *words, "-o", "n.onnx", ok=code, cwd=factories))
    assert not (factories / "n.onnx").exists()


def test_a_checkpoint_from_the_command_line(exports, tmp_path):
    done = command("export-onnx", exports / "narrow.safetensors", "-o", tmp_path / "m.onnx", "--json")
    record = json.loads(done.stdout)
    assert len(record["differences"]) >= 12 and record["card"]["size_multiple"] == 32
    done = command("export-onnx", exports / "narrow.safetensors", "-o", tmp_path / "m.onnx", ok=2)
    assert "exists already" in one_error(done)


@pytest.mark.slow
def test_misuse_and_failures_are_one_line(factories, exports):
    checkpoint = exports / "narrow.safetensors"
    for words, code, said in (
        (("none.safetensors", "-o", "m.onnx"), 2, "does not exist"),
        ((checkpoint, "-o", "m.pb"), 2, "not named .onnx"),
        ((checkpoint, "-o", "m.onnx", "--opset", "10"), 2, "opset"),
        ((checkpoint, "-o", "m.onnx", "--classes", "a,b"), 2, "has a model card"),
        (("no_module:net", "-o", "m.onnx"), 2, "no_module"),
        (("my_networks:none", "-o", "m.onnx"), 2, "has no none"),
        (("my_networks:broken", "-o", "m.onnx"), 1, "no weights here"),
        (("my_networks:text", "-o", "m.onnx"), 1, "gives str"),
    ):
        assert said in one_error(command("export-onnx", *words, ok=code, cwd=factories))
    assert not list(factories.glob("*.onnx"))


@pytest.mark.slow
def test_misused_class_names_leave_nothing_behind(factories):
    done = command("export-onnx", "my_networks:net", "-o", "m.onnx", "--classes", "a,b,c", ok=2, cwd=factories)
    assert "3 classes are named" in one_error(done)
    assert not list(factories.glob("*.onnx"))


class OfOneImage(nn.Module):
    """It takes one image at a time, as code does that was written to run on photographs."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 3, padding=1), form

    def forward(self, x):
        assert self.form != "asserted" or x.shape[0] == 1
        y = self.conv(x).view(4, x.shape[2], x.shape[3])
        return {"asserted": y[None], "[K,h,w]": y, "[h,w,K]": y.permute(1, 2, 0), "[h,w]": y.mean(0)}[self.form]


@pytest.mark.parametrize("form", ["asserted", "[K,h,w]", "[h,w,K]", "[h,w]"])
def test_a_module_of_one_image_at_a_time_is_exported_as_that(tmp_path, form):
    torch.manual_seed(0)
    model, notes = OfOneImage(form).eval(), []
    export_module(model, None, tmp_path / "m.onnx", name="it", note=notes.append)
    assert "it takes one image at a time, and so does what is written" in notes
    assert any("of one image, without an axis for several" in note for note in notes) == (form != "asserted")
    image = torch.rand(1, 3, 19, 37)
    with torch.inference_mode():
        scores = model.conv(image).mean(1, keepdim=True) if form == "[h,w]" else model.conv(image)
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"image": image.numpy()})[0]
    np.testing.assert_allclose(found, scores.numpy(), atol=1e-5)
