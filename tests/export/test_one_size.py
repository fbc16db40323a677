"""Networks that take one size, or squares alone: refused with what to do, and run at a size that is named."""

import warnings
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from helpers import photo
from torch import nn

from fcn_deploy import DeployError, MisuseError, Segmenter

FAST = BuildConfig(latency_sizes=((16, 16),), tuning=TuningOptions(("onnxruntime",)))
SIZES = ((1, 1), (37, 61), (64, 64), (101, 43), (200, 330))


class Windows(nn.Module):
    """Attention in shifted windows of 7×7 patches, with a position for each patch, as Swin has it."""

    def __init__(self, side: int = 112, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.img_size = side
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, (side // 4) ** 2, width))
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scores = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        y = self.patches(x)
        count, width, rows, columns = y.shape
        y = y.flatten(2).transpose(1, 2) + self.places
        z = torch.roll(self.norm(y).view(count, rows, columns, width), (-3, -3), (1, 2))
        z = z.view(count, rows // 7, 7, columns // 7, 7, width).transpose(2, 3).reshape(-1, 49, width)
        q, k, v = self.qkv(z).chunk(3, -1)
        z = self.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)
        z = z.view(count, rows // 7, columns // 7, 7, 7, width).transpose(2, 3).reshape(count, rows, columns, width)
        z = torch.roll(z, (3, 3), (1, 2)).reshape(count, rows * columns, width) + y
        scores = self.scores(z.transpose(1, 2).reshape(count, width, rows, columns))
        return F.interpolate(scores, size=x.shape[2:], mode="bilinear")


class Patches(nn.Module):
    """A transformer that checks its image's size, and gives what libraries give, an object with `logits`."""

    def __init__(self, side: int = 64, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.side, self.patches = side, nn.Conv2d(3, width, 8, 8)
        self.places = nn.Parameter(torch.randn(1, (side // 8) ** 2, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.scores = nn.Linear(width, classes)

    def forward(self, x):
        if tuple(x.shape[2:]) != (self.side, self.side):
            raise ValueError(f"Input image size {tuple(x.shape[2:])} doesn't match model ({self.side})")
        y = self.layer(self.patches(x).flatten(2).transpose(1, 2) + self.places)
        y = self.scores(y).transpose(1, 2).reshape(x.shape[0], -1, self.side // 8, self.side // 8)
        return {"logits": F.interpolate(y, scale_factor=8, mode="bilinear")}


class Rectangle(nn.Module):
    """Of one size that is no square, which it names as pytorchcv does."""

    def __init__(self) -> None:
        super().__init__()
        self.in_size, self.patches, self.scores = (96, 64), nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.patches(x)
        context = F.interpolate(y.mean((2, 3), keepdim=True), size=(12, 8))
        return F.interpolate(self.scores(y + torch.cat([context[..., :4], context[..., 4:]], 3)), scale_factor=8)


class Squares(nn.Module):
    """Positions are interpolated to the root of the number of patches."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, width, 8, 8))
        self.mix, self.scores = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, classes, 1)

    def forward(self, x):
        y = self.patches(x)
        side = int((y.shape[2] * y.shape[3]) ** 0.5)
        y = y + F.interpolate(self.places, size=(side, side), mode="bilinear")
        return F.interpolate(self.scores(self.mix(y).relu()), size=x.shape[2:], mode="bilinear")


def random(kind, **settings):
    torch.manual_seed(0)
    return kind(**settings).eval()


def resized(run, side, image):
    """A network's scores by the way that is promised: bilinearly to its size, and bilinearly back."""
    x = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1)[None].float()
    scores = torch.as_tensor(run(F.interpolate(x, (side, side), mode="bilinear")))
    return F.interpolate(scores, image.shape[:2], mode="bilinear")[0].numpy()


MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
REFUSED = [
    (Rectangle, "takes 96×64 only; --fit 96x64 resizes"),
    (Windows, "takes 112×112 only; --fit 112x112 resizes"),
    (Patches, "takes 64×64 only; --fit 64x64 resizes"),
    (partial(Patches, 96), "takes 96×96 only; --fit 96x96 resizes"),  # which it names nowhere
    (Squares, "takes squares only, such as 224×224; --fit 224x224 resizes"),
]


@pytest.mark.parametrize(("kind", "said"), REFUSED)
def test_a_module_of_one_size_is_refused_with_what_to_do(tmp_path, kind, said):
    with pytest.raises(DeployError) as caught:
        export_module(random(kind), None, tmp_path / "m.onnx", name="net:make")
    assert f"net:make {said}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(("kind", "side"), [(Windows, 112), (Patches, 64), (Squares, 96)])
def test_a_module_of_one_size_is_exported_for_all_when_that_is_named(tmp_path, kind, side):
    module, notes = random(kind), []
    options = ImportOptions(fit=f"{side}x{side}")
    export_module(module, None, tmp_path / "m.onnx", options=options, note=notes.append)
    (said,) = [note for note in notes if "every image is resized" in note]
    assert f"{side}×{side} alone" in said and "not antialiased" in said and "inexact" in said
    report = build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", FAST)
    assert report.agreement.wrong == 0

    def run(x):
        with torch.inference_mode():
            result = module(x)
        return result["logits"] if isinstance(result, dict) else result

    with Segmenter(tmp_path / "m.engine") as net:
        for size in SIZES:
            image = photo(*size)
            expected = resized(run, side, image)
            assert net(image).shape == size
            assert (net(image) == expected.argmax(0)).mean() > 0.999
            apart = np.abs(net.values(image) - expected).max()
            assert apart < 1e-3 * max(np.ptp(expected), 1)


@pytest.mark.parametrize(("kind", "side"), [(Windows, 112), (Squares, 96)])
def test_an_onnx_of_one_size_is_refused_or_built_for_it(tmp_path, kind, side):
    path = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(random(kind), (torch.zeros(1, 3, side, side),), str(path), dynamo=False, opset_version=18)
    with pytest.raises(DeployError, match=rf"cannot be freed: node .*resized \(inexact\): --fit {side}x{side}$"):
        import_model(path)
    with pytest.raises(MisuseError, match=f"takes {side}x{side} alone; say --fit {side}x{side}"):
        import_model(path, ImportOptions(fit="40x48"))
    source = import_model(path, ImportOptions(fit=f"{side}x{side}"))
    assert source.fit == "resize" and any("inexact" in note for note in source.notes)
    report = build_engine(source, tmp_path / "m.engine", FAST)
    assert report.fit == "resize" and report.agreement.wrong == 0
    foreign = onnxruntime.InferenceSession(str(path))

    def run(x):
        return foreign.run(None, {foreign.get_inputs()[0].name: x.numpy()})[0]

    with Segmenter(tmp_path / "m.engine") as net:
        for size in SIZES:
            image = photo(*size)
            assert (net(image) == resized(run, side, image).argmax(0)).mean() > 0.999
        stream = list(net.map([photo(40, 50, seed) for seed in range(3)]))
        for seed, labels in enumerate(stream):
            np.testing.assert_array_equal(labels, net(photo(40, 50, seed)))


def test_a_network_that_takes_every_size_may_be_run_at_one(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    export_module(net, None, tmp_path / "m.onnx", options=ImportOptions(fit="48x80"))
    image = photo(96, 160)
    found = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        expected = F.interpolate(net(F.interpolate(x, (48, 80), mode="bilinear")), (96, 160), mode="bilinear")
    given = found.run(None, {"image": x.numpy()})[0]
    np.testing.assert_allclose(given, expected.numpy(), atol=1e-3 * np.ptp(given))


@pytest.mark.parametrize("fit", ["512", "0x5", "-1x5", "axb", "512x", "stretch", "100000x5"])
def test_what_is_no_size_is_refused(fit):
    with pytest.raises(MisuseError, match="choose pad, resize, or one size for all images, such as 512x512"):
        ImportOptions(fit=fit)


def test_a_size_at_which_a_module_fails_is_named(tmp_path):
    with pytest.raises(DeployError, match=r"fails at 64×96: .*; name the size that it takes with --fit"):
        export_module(random(Squares), None, tmp_path / "m.onnx", options=ImportOptions(fit="64x96"))


def test_a_program_that_was_exported_at_one_size_runs_at_that(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    program = torch.export.export(net, (torch.zeros(1, 3, 64, 64),)).module()
    with pytest.raises(
        DeployError, match=r"takes 64×64 only; export the program with dynamic_shapes .*; or --fit 64x64"
    ):
        export_module(program, None, tmp_path / "m.onnx")
    export_module(program, None, tmp_path / "m.onnx", options=ImportOptions(fit="64x64"))
    report = build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", FAST)
    assert report.agreement.wrong == 0
    images = [photo(40, 50, seed) for seed in range(9)]
    with Segmenter(tmp_path / "m.engine") as engine:
        for image, labels in zip(images, engine.map(images), strict=True):  # in batches, where it takes them
            expected = resized(lambda x: net(x).detach(), 64, image).argmax(0)
            assert (labels == expected).mean() > 0.999


def test_a_program_of_one_batch_is_told_so(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    free = {2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.export.export(net, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=(free,)).module()
    with pytest.raises(DeployError, match="one batch size; export it with dynamic_shapes, N too"):
        export_module(program, None, tmp_path / "m.onnx")
