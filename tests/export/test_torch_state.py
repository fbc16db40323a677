"""What modules keep of images, draw at random, and compute of their weights, while they are exported."""

import functools
import itertools
import random
import threading
import time

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.from_torch import export_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fcn_deploy import DeployError


class Looks(nn.Module):
    """A network of stride 2, whose scores go through `look` before they are resized to the image's size."""

    def __init__(self, look):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.look = look

    def forward(self, x):
        return F.interpolate(self.look(self.body(x)), size=x.shape[-2:], mode="bilinear")


def exported(look, path, plain=None, **options):
    """(module, notes) of what was written, compared at a size that was neither traced nor verified.

    `plain`: what `look` comes to in float32; None: itself.
    """
    module, notes = Looks(look).eval(), []
    export_module(module, None, path, name="it", note=notes.append, **options)
    x = torch.randn(1, 3, 53, 151)
    with torch.inference_mode():
        expected = Looks(plain or look).eval()(x).numpy()
    scores = onnxruntime.InferenceSession(path).run(None, {"image": x.numpy()})[0]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    return module, notes


def grid(height, width):
    return torch.linspace(0, 1, height)[:, None] * torch.linspace(-1, 1, width)


@functools.lru_cache
def cached_grid(height, width):
    return grid(height, width)


GRIDS = {}
NOTED = ["before"]


def by_cache(y):
    return y + cached_grid(int(y.shape[2]), int(y.shape[3]))


def by_global(y):
    size = int(y.shape[2]), int(y.shape[3])
    if size not in GRIDS:
        GRIDS[size] = grid(*size)
    return y + GRIDS[size]


class Grows(nn.Module):
    """Its grid of places is that of the largest image so far."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.zeros(0), persistent=False)

    def forward(self, y):
        if len(self.places) < y.shape[2]:
            self.places = torch.arange(y.shape[2], dtype=torch.float32).sin()
        return y + self.places[: y.shape[2], None]


@pytest.mark.parametrize("look", [by_cache, by_global, Grows()], ids=["lru_cache", "global", "growing"])
def test_grids_that_are_kept_by_size_are_functions_of_it_and_stay_the_users(tmp_path, look):
    module, _ = exported(look, tmp_path / "m.onnx", exporter="torchscript")
    for size in ((4224, 64), (64, 96), (160, 96)):  # at which the module was followed without values
        assert module(torch.zeros(1, 3, *size)).device.type == "cpu"
    assert NOTED == ["before"]


def test_what_a_users_lists_are_given_meanwhile_stays(tmp_path):
    export_module(Looks(by_global).eval(), None, tmp_path / "m.onnx", name="it", note=NOTED.append)
    assert len(NOTED) > 1
    NOTED[1:] = []


def test_threads_export_one_after_another(tmp_path):
    """What stands for Python's names, and PyTorch's exporters, are of the whole process."""
    seen, errors = [], []

    def look(y):
        seen.append(threading.get_ident())
        time.sleep(0.005)
        return F.interpolate(y, size=(int(y.shape[2] * 0.29) + 1, int(y.shape[3] * 0.57) + 1))

    def export(index):
        try:
            exported(look, tmp_path / f"{index}.onnx")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=export, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = [look_of for look_of, _ in itertools.groupby(seen)]
    assert not errors and len(ends) <= 4  # the comparison of one beside the export of the other


def rarely_dropped(y):
    return y if torch.rand(1) < 0.95 else -y


def scaled_by_python(y):
    return y * random.random()


@pytest.mark.parametrize("look", [rarely_dropped, scaled_by_python])
def test_random_numbers_that_no_operator_draws_are_refused(tmp_path, look):
    with pytest.raises(DeployError, match="it draws random numbers in evaluation mode"):
        exported(look, tmp_path / "m.onnx")


def test_random_numbers_that_change_nothing_are_said(tmp_path):
    _, notes = exported(lambda y: y if torch.rand(1) < 2 else -y, tmp_path / "m.onnx")
    assert any("draws random numbers in evaluation mode; " in note for note in notes)


def test_weights_that_are_computed_of_others_are_constants(tmp_path):
    """As matrix exponentials, which no exporter writes; the module itself still computes them."""
    layer = parametrizations.orthogonal(nn.Conv2d(4, 4, 3, padding=1))
    exported(layer, tmp_path / "m.onnx", exporter="torchscript")
    assert parametrize.is_parametrized(layer) and "forward" not in vars(layer.parametrizations.weight)


def test_casts_to_half_do_nothing_and_are_said(tmp_path):
    def cast(y):
        return y.half().to(torch.bfloat16).float()

    _, notes = exported(cast, tmp_path / "m.onnx", plain=lambda y: y)
    assert any("by autocast or casts" in note for note in notes)
