"""Networks as libraries have them: exporter, sizes, exact tiles or why not, and what INT8 costs."""

from importlib.metadata import version

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.calibration.report.engine_report import report_of
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.build import parity
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.parity import decided
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.from_torch.verify import expected_scores, verify
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.fcn.foreign import scores_of
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from library_networks import NETWORKS, network
from onnx import numpy_helper
from PIL import Image
from torch import nn

from fcn_deploy import DeployError, Segmenter

SIZES = ((1, 1), (5, 2), (33, 47), (64, 80), (71, 130), (131, 59))  # none was traced or verified


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """(name, the .onnx, its card, what was said) of each network."""
    path, notes = tmp_path_factory.mktemp("library") / "m.onnx", []
    card, _ = export_module(network(request.param), None, path, name=request.param, note=notes.append)
    return request.param, path, card, notes


def pytorchs(name, card):
    """PyTorch's scores of an image [H,W,3] uint8, float32 [K,H,W], padded as the card says."""
    module = scores_of(network(name), name)
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))

    def run(image):
        x = ((torch.from_numpy(image.copy()).permute(2, 0, 1).float() - mean) / std)[None]
        height, width = x.shape[2:]
        down, right = (
            -(-max(side, card.smallest) // card.size_multiple) * card.size_multiple for side in (height, width)
        )
        with torch.inference_mode():
            return module(F.pad(x, (0, right - width, 0, down - height)))[0, :, :height, :width].numpy()

    return run


def test_it_is_exported_for_every_size(exported):
    name, path, card, notes = exported
    kind = NETWORKS[name]
    written = onnx.load(path)
    assert (written.producer_name, written.producer_version) == ("fcn-deploy", version("fcn-deploy"))
    assert not any("is exported by dynamo" in note for note in notes)
    assert (card.size_multiple, card.smallest) == (kind.multiple, kind.smallest)
    assert any(kind.note in note for note in notes)


def test_its_labels_are_pytorchs_and_its_tiles_exact_or_refused(exported, tmp_path):
    name, path, card, _ = exported
    kind, run, seen = NETWORKS[name], pytorchs(name, card), set()
    config = BuildConfig(latency_sizes=[(32, 32)], tuning=TuningOptions(("onnxruntime",), seconds=1.0))
    build_engine(import_model(path), tmp_path / "e.engine", config)
    with Segmenter(tmp_path / "e.engine", threads=1) as net:
        whole = next((stage.whole for stage in net.network.manifest.stages if stage.halo is None), "")
        assert kind.whole in whole and bool(kind.whole) == bool(whole)
        for index, size in enumerate(SIZES):
            image = natural_noise(*size, net.card, seed=100 + index)
            scores = run(image)
            clear = decided(scores, card)
            assert (net(image) == scores.argmax(0))[clear].all()
            seen |= set(np.unique(scores.argmax(0)).tolist())
        assert len(seen) > 1
        large = natural_noise(700, 90, net.card, seed=7)
        labels, needed, scores = net(large), net.plan(700, 90).bytes, run(large)
    if whole:
        return
    with Segmenter(tmp_path / "e.engine", threads=1, memory=int(0.7 * needed)) as tiled:
        assert any(grid.count > 1 for grid in tiled.plan(700, 90).grids)
        assert (tiled(large) == labels)[decided(scores, card)].all()


def test_int8_keeps_every_class(exported, tmp_path):
    name, path, card, _ = exported
    run = pytorchs(name, card)
    for index in range(8):
        Image.fromarray(natural_noise(96, 128, card, seed=index)).save(tmp_path / f"{index}.png")
    options = QuantizationOptions(int8=True, calib=str(tmp_path / "*.png"), max_drop=100, max_class_drop=100)
    config = BuildConfig(
        quantization=options, latency_sizes=[(32, 32)], tuning=TuningOptions(("onnxruntime",), seconds=1.0)
    )
    build_engine(import_model(path), tmp_path / "e.engine", config)
    with EngineFile(tmp_path / "e.engine") as file:
        accuracy = report_of(file).accuracy
    assert accuracy is not None and accuracy.layers > len(accuracy.kept)
    classes = len(card.classes)
    both, either = np.zeros(classes), np.zeros(classes)
    with Segmenter(tmp_path / "e.engine", threads=1) as net:
        assert net.precision == "int8"
        for index in range(8):
            image = natural_noise(96, 128, card, seed=index)
            scores = run(image)
            clear = decided(scores, card, margin=0.05)  # others go either way
            found, expected = net(image)[clear], scores.argmax(0)[clear]
            for label in range(classes):
                both[label] += ((found == label) & (expected == label)).sum()
                either[label] += ((found == label) | (expected == label)).sum()
    judged = either >= 64
    assert judged.sum() > 1 and (both[judged] / either[judged]).min() > 0.9


class NearTies(nn.Module):
    """Puts maxima of two rows back, as ENet does; where an image is bright only rounding tells the rows apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(1, 2, 1)
        self.sums, self.same = nn.Conv2d(32, 1, 1, bias=False), nn.Conv2d(32, 1, 1, bias=False)
        self.register_buffer("bright", torch.tensor(4.0))
        with torch.no_grad():
            self.sums.weight.mul_(30)
            self.same.weight.copy_(self.sums.weight.flip(1))

    def forward(self, x):
        features = self.one(x)
        rounding = self.sums(features) - self.same(features.flip(1))
        x = x.amax(1, keepdim=True)
        rows = F.interpolate(F.max_pool2d(x, (2, 1)), scale_factor=(2.0, 1.0), mode="nearest")
        pooled, places = F.max_pool2d(rows + rounding + F.relu(self.bright - rows) * x, (2, 1), return_indices=True)
        return self.head(F.max_unpool2d(pooled, places, (2, 1)))


def changed(path, name, change):
    """The model of a file in which one of the weights is another."""
    graph = onnx.load(path)
    (weight,) = [each for each in graph.graph.initializer if each.name.endswith(name)]
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)).astype(np.float32), weight.name))
    return graph


def test_what_rounding_decides_is_compared_with_all_that_may_be_given(tmp_path, monkeypatch):
    module = NearTies().eval()
    path, notes = tmp_path / "m.onnx", []
    _, differences = export_module(module, None, path, name="ties", note=notes.append)
    assert max(difference.logits for difference in differences) < 1e-4
    assert any("ties uses the places of maxima: of two that are nearly equal" in note for note in notes)
    wrong = changed(path, "head.bias", lambda bias: bias + 0.05)
    with pytest.raises(DeployError, match="gives other scores in ONNX"):
        verify(expected_scores(module, AcceptedSizes(2, scores=2), "pad", 3, "ties"), wrong, "ties", wrong)

    onnx.save(changed(path, "bright", lambda _: np.array(2.63)), path)
    imported = import_model(path)
    for name, axis in (("one.weight", 0), ("one.bias", 0), ("sums.weight", 1), ("same.weight", 1)):
        onnx.save(changed(path, name, lambda weight, axis=axis: np.flip(weight, axis)), path)  # sums in another order
    monkeypatch.setattr(parity, "COMPARED_SIZES", ((61, 97), (64, 80)))
    build_engine(import_model(path), tmp_path / "m.engine", BuildConfig(latency_sizes=SIZES[2:3]))
    with Segmenter(tmp_path / "m.engine") as net:
        assert parity.compare(imported, net.network).wrong == 0
        onnx.save(changed(path, "head.bias", lambda bias: bias + np.array([0.1, 0])), path)
        with pytest.raises(DeployError, match="labels are not the model's"):
            parity.compare(import_model(path), net.network)


class OfItsHeight(nn.Module):
    """Multiples of 32, by a number that a trace takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.largest = nn.Conv2d(3, 4, 32, 32), 0

    def forward(self, x):
        height, width = np.asarray(x.shape[2:]).tolist()
        if height % 32 or width % 32:
            raise ValueError("it takes multiples of 32")
        self.largest = max(self.largest, height, width)
        return F.interpolate(self.score(x), scale_factor=32.0) * float(height)


def test_multiples_that_no_memory_holds_are_not_tried(tmp_path):
    """Swin's windows led to images of 6144×10240."""
    module = OfItsHeight().eval()
    with pytest.raises(DeployError, match="cannot be exported"):
        export_module(module, None, tmp_path / "m.onnx", name="it")
    assert module.largest <= 1280
