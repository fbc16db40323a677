"""Scores of a picture at twice its size: alike in networks that follow the image, and not where a size is baked in."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.analysis import twice_the_size
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.analysis.twice_the_size import likeness_of, note_on_twice_the_size, patches
from fcn_deploy.export.importer.import_model import import_model
from helpers import onnx_model
from onnx import helper
from zoo import ZOO

REAL = ("unet-bilinear", "deeplabv3", "pspnet", "lraspp", "bisenet", "segnet", "dbnet", "mirrored", "adaptive-max")
BAKED = ("unet-bilinear", "deeplabv3", "pspnet", "lraspp", "bisenet", "segnet", "mirrored")


def scores_of(name, seen=None):
    """A network of the zoo as images → scores; `seen`: so many pixels a side of any image alone, stretched back."""
    torch.manual_seed(0)
    model = ZOO[name].build().eval()

    def run(images):
        with torch.inference_mode():
            x = torch.from_numpy(images)
            whole = x.shape[-2:]
            if seen:
                x = F.pad(x, (0, seen - whole[1], 0, seen - whole[0]))
            y = model(x)
            y = next(iter(y.values())) if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y
            return (F.interpolate(y, size=whole, mode="bilinear") if seen else y).numpy()

    return run


@pytest.mark.parametrize("name", REAL)
def test_real_networks_pass(name):
    assert note_on_twice_the_size(scores_of(name), AcceptedSizes(32), 3, False, "it") == ""


@pytest.mark.parametrize("name", BAKED)
def test_a_network_that_sees_one_size_of_every_image_is_named(name):
    note = note_on_twice_the_size(scores_of(name, seen=256), AcceptedSizes(32), 3, False, "it")
    assert note.startswith("it: its scores of a picture at twice its size") and len(note) <= 300


def test_what_tells_nothing_is_no_reason_to_speak():
    def fails(images):
        raise ValueError("too large")

    assert note_on_twice_the_size(fails, AcceptedSizes(), 3, False, "it") == ""
    assert note_on_twice_the_size(lambda x: np.ones((1, 2, *x.shape[2:])), AcceptedSizes(), 3, False, "it") == ""
    assert likeness_of(np.zeros((2, 8, 8)), np.zeros((2, 16, 16))) is None


def test_attention_over_all_pixels_is_not_run_at_the_larger_size():
    sides = []

    def attends(images):
        sides.append(images.shape[-1])
        np.ones((images.shape[-1] ** 2 // 10,) * 2, np.float32)  # 172 MB at 256×256, and 2.7 GB at 512×512
        return images[:, :, :128, :128]  # the first quarter of the usual picture

    assert "at twice its size" in note_on_twice_the_size(attends, AcceptedSizes(32), 3, False, "it")
    assert sides == [256, 128]


def test_pictures_of_whole_numbers_are_whole():
    picture = patches(1, 64, whole_numbers=True)
    assert (picture == picture.round()).all() and picture.min() >= 0 and 100 < picture.max() <= 255


def test_an_import_says_it(tmp_path, monkeypatch):
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["y"], pads=[1] * 4),
        helper.make_node("Relu", ["y"], ["logits"]),
    ]
    model = onnx_model(nodes, {"w": weight}, takes=("N", 3, "H", "W"), names=("image", "logits"))
    onnx.save(model, tmp_path / "m.onnx")
    assert not any("twice its size" in note for note in import_model(tmp_path / "m.onnx").notes)
    monkeypatch.setattr(twice_the_size, "ALIKE", 1.1)  # as if its scores were not alike
    assert any("at twice its size are not those of the picture" in n for n in import_model(tmp_path / "m.onnx").notes)
