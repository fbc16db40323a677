"""Validation in the stages and tiles of engines: the labels of whole logits."""

from unittest import mock

import numpy as np
import pytest
import torch
from fcn_deploy.fcn import staged
from fcn_deploy.fcn.backbones import NAMES
from fcn_deploy.fcn.checkpoint import card_for
from fcn_deploy.fcn.quantization import fake_quantized
from fcn_deploy.fcn.staged import TorchPredictor, staged_network
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession
from fcn_deploy.runtime.backends.openvino import OpenVinoSession
from fcn_deploy.runtime.pixels.prepare import normalise
from helpers import FAMILY, photo, random_network

# Each backbone once, and each kind of upsampling.
ONE_EACH = [{"backbone": name, "stride": 32 if name == "alexnet" else 8} for name in NAMES]
ONE_EACH += [FAMILY[1], FAMILY[-1]]
LOGITS = 1e-4  # of their range: sums in another order


def whole_logits(model, card, image):
    x = np.empty((1, card.channels, *image.shape[:2]), np.float32)
    normalise(image, card, x[0])
    with torch.inference_mode():
        return model(torch.from_numpy(x))[0].numpy()


def check(labels, logits):
    """Labels are by argmax of the logits, but where the two best are equal in all but rounding."""
    best = np.sort(logits, axis=0)[-2:]
    clear = best[1] - best[0] > LOGITS * np.ptp(logits)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], logits.argmax(0)[clear])


@pytest.fixture(scope="module", params=ONE_EACH, ids=lambda a: "-".join(map(str, a.values())))
def network(request):
    """A network, its card, and what runs it in stages and small tiles."""
    model = random_network(width=0.125, **request.param)
    card = card_for(model.architecture, tuple("abcde"))
    with mock.patch.object(staged, "TILE", 64):
        yield model, card, staged_network(model, card)


def test_labels_in_stages_and_tiles_are_those_of_whole_logits(network):
    model, card, net = network
    image = photo(141, 203)
    assert net.plan(141, 203).grids[0].count > 4
    check(net.result(image, "labels"), whole_logits(model, card, image))


def test_where_memory_is_short_all_parts_are_run_in_tiles(network, monkeypatch):
    """The late layers too, whose halo is wide: scenes of any size are validated."""
    model, card, net = network
    image = photo(1200, 72)
    whole = net.plan(1200, 72).bytes
    monkeypatch.setattr(net, "memory", int(whole * 0.8))
    grids = net.plan(1200, 72).grids
    assert grids[1].count > 1 and grids[1].halo[0] >= 160
    check(net.result(image, "labels"), whole_logits(model, card, image))


def test_only_what_counts_of_a_scene_is_run_and_its_labels_are_those_of_all_of_it(monkeypatch):
    model = random_network(width=0.125)
    card = card_for(model.architecture, tuple("abcde"))
    predict, image = TorchPredictor(model, card), photo(640, 741)
    logits, run = whole_logits(model, card, image), []
    result = predict._net.result
    monkeypatch.setattr(predict._net, "result", lambda part, kind: (run.append(part.shape[:2]), result(part, kind))[1])
    wanted = np.zeros((640, 741), bool)
    np.testing.assert_array_equal(predict.where(wanted, image), 0)
    assert not run
    wanted[3:20, 700:740] = wanted[60, 720] = True
    labels = predict.where(wanted, image)
    assert run[0][0] < 640 and run[0][1] < 741
    check(np.where(wanted, labels, logits.argmax(0)), logits)
    wanted[-1, 0] = True
    predict.where(wanted, image)
    assert run[1] == (640, 741)


@pytest.mark.parametrize(
    ("arch", "backbone", "stride"), [("lraspp", "mobilenet-v3-large", 8), ("deeplabv3", "resnet50", 8)]
)
def test_what_is_pooled_over_the_image_is_run_whole(arch, backbone, stride):
    model = random_network(arch=arch, backbone=backbone, stride=stride)
    net = staged_network(model, card_for(model.architecture, tuple("abcde")))
    assert net.stages[-1].halo is None and "whole image" in net.stages[-1].whole


@pytest.mark.parametrize("opens", [OnnxRuntimeSession, OpenVinoSession], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("architecture", [FAMILY[1], FAMILY[-1]], ids=["lite0", "dilated8"])
def test_exported_for_validation_it_gives_the_same(architecture, opens, monkeypatch):
    monkeypatch.setattr(staged, "TILE", 64)
    monkeypatch.setattr(staged, "OPENVINO_TILE", 64)
    model = random_network(**architecture)
    card = card_for(model.architecture, tuple("abcde"))
    net = staged_network(model, card, exported=True, opens=opens)
    assert net.backend.name == ("openvino" if opens is OpenVinoSession else "onnxruntime")
    assert net.plan(141, 203).grids[0].count > 4
    for size in ((141, 203), (1, 1), (64, 65)):
        check(net.result(photo(*size), "labels"), whole_logits(model, card, photo(*size)))


def test_what_cannot_be_exported_stays_in_pytorch(monkeypatch):
    model = random_network()
    card = card_for(model.architecture, tuple("abcde"))
    with fake_quantized(model):
        net = staged_network(model, card, exported=True)
        assert net.backend.name == "PyTorch"
        check(net.result(photo(64, 96), "labels"), whole_logits(model, card, photo(64, 96)))
    missing: set[str] = set()
    real = staged.find_spec
    monkeypatch.setattr(staged, "find_spec", lambda name: None if name in missing else real(name))
    for absent, runs in (("", "openvino"), ("openvino", "onnxruntime"), ("onnxruntime", "PyTorch")):
        missing.add(absent)
        assert staged_network(model, card, exported=True).backend.name == runs
    missing.clear()
    missing.add("onnx")
    assert staged_network(model, card, exported=True).backend.name == "PyTorch"
