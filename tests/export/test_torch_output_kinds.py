"""Modules whose output is no scores of classes are refused by what it is; in other shapes, scores are taken."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.options import ImportOptions
from torch import nn

from fcn_deploy import DeployError


class Trunk(nn.Module):
    """Scores at a quarter of the image, brought to its size by `full`; `give`: what of both is given."""

    def __init__(self, give, maps: int = 5, **more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head, self.give = nn.Conv2d(8, maps, 1), give
        for name, module in more.items():
            setattr(self, name, module)
        self.eval()

    def forward(self, x):
        features = self.second(self.first(x).relu()).relu()
        coarse = self.head(features)
        return self.give(self, features, coarse, F.interpolate(coarse, size=x.shape[2:], mode="bilinear"))


def detection():
    return nn.Conv2d(8, 4 + 3 + 32, 3, 8, 1)


def single():
    return nn.Conv2d(8, 1, 1)


REFUSED = {
    "distances beside a probability": (
        lambda: Trunk(lambda net, f, c, y: (net.p(f).sigmoid(), c), 32, p=single()),
        "whether the maps of 1 .* are distances or classes cannot be told",
    ),
    "prototypes beside boxes": (
        lambda: Trunk(lambda net, f, c, y: (net.d(f).flatten(2), c), 32, d=detection()),
        r"holds mask prototypes, no scores of classes \(beside 0",
    ),
    "embeddings": (lambda: Trunk(lambda net, f, c, y: F.normalize(y, dim=1)), "holds embeddings, no scores"),
    "a depth": (
        lambda: Trunk(lambda net, f, c, y: {"predicted_depth": y.relu()[:, 0]}, 1),
        "predicted_depth .* holds depths",
    ),
}
QUERIES = (lambda net, f, c, y: {"queries": net.q(f).flatten(2).transpose(1, 2)[:, :20], "masks": c}, 20)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_scores_is_named_and_given_as_values_when_asked(tmp_path, kind):
    make, said = REFUSED[kind]
    with pytest.raises(DeployError, match=said) as caught:
        export_module(make(), None, tmp_path / "m.onnx", exporter="torchscript", name="net:make")
    assert "--activation" in str(caught.value) and len(str(caught.value)) <= 300
    assert not (tmp_path / "m.onnx").exists()
    options = ImportOptions(activation="none")
    card, _ = export_module(make(), None, tmp_path / "m.onnx", exporter="torchscript", options=options)
    assert card.kind == "values"
    if kind != "a depth":  # of one map there are no classes
        options = ImportOptions(activation="softmax")
        card, _ = export_module(make(), None, tmp_path / "m.onnx", exporter="torchscript", options=options)
        assert card.kind == "labels"


def test_masks_of_queries_are_no_scores_either(tmp_path):
    give, maps = QUERIES
    module = Trunk(give, maps, q=nn.Conv2d(8, 6, 1))
    with pytest.raises(DeployError, match="holds masks of queries, no scores of classes"):
        export_module(module, None, tmp_path / "m.onnx", exporter="torchscript", options=ImportOptions(output="masks"))


def test_a_logit_within_0_and_1_for_weak_noise_is_no_probability_beside_scores(tmp_path):
    """Many maps beside one map are asked about only where that is a probability whatever the image."""
    weak = single()
    nn.init.constant_(weak.bias, 0.5)
    weak.weight.data.mul_(0.05)
    module = Trunk(lambda net, f, c, y: (y, net.p(f)), p=weak)
    card, _ = export_module(module, None, tmp_path / "m.onnx", exporter="torchscript")
    assert card.kind == "labels" and len(card.classes) == 5


FLAT = {
    "[N,HW,K]": lambda net, f, c, y: y.flatten(2).transpose(1, 2),
    "[N,K,HW]": lambda net, f, c, y: y.flatten(2),
    "coarse": lambda net, f, c, y: {"logits": c.flatten(2).transpose(1, 2)},
}


@pytest.mark.parametrize("shape", FLAT)
def test_flattened_scores_are_put_into_rows_and_columns(tmp_path, shape):
    notes, module = [], Trunk(FLAT[shape])
    plain = Trunk(lambda net, f, c, y: c if shape == "coarse" else y)
    card, _ = export_module(
        module, None, tmp_path / "m.onnx", exporter="torchscript", name="net:make", note=notes.append
    )
    assert len(card.classes) == 5 and any("pixels are flattened" in note for note in notes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in ((37, 61), (64, 96), (101, 43)):
        image = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = plain(image).numpy()
        given = session.run(None, {"image": image.numpy()})[0]
        assert given.shape == (2, 5, *size)
        if shape != "coarse":
            np.testing.assert_allclose(given, expected, atol=1e-5)


def planes(y):
    return F.one_hot(y.argmax(1), 5).permute(0, 3, 1, 2)


LABELS = {
    "labels": lambda net, f, c, y: {"out": y.argmax(1, keepdim=True).to(torch.uint8)},
    "one-hot": lambda net, f, c, y: planes(y).float(),
    "one-hot, classes last": lambda net, f, c, y: F.one_hot(y.softmax(1).max(dim=1)[1], 5),
    "written": lambda net, f, c, y: torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1.0),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_taken_off_and_their_scores_used(tmp_path, kind):
    notes, plain = [], Trunk(lambda net, f, c, y: y)
    card, _ = export_module(
        Trunk(LABELS[kind]), None, tmp_path / "m.onnx", exporter="torchscript", name="it", note=notes.append
    )
    assert len(card.classes) == 5 and any("the scores that it takes them of are used" in note for note in notes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    image = torch.randn(2, 3, 37, 61)
    with torch.inference_mode():
        expected = plain(image).argmax(1).numpy()
    assert (session.run(None, {"image": image.numpy()})[0].argmax(1) == expected).mean() > 0.999


def test_labels_that_are_changed_afterwards_are_refused(tmp_path):
    for give in (
        lambda net, f, c, y: (y.argmax(1) + 1) % 5,
        lambda net, f, c, y: F.interpolate(c.argmax(1, keepdim=True).float(), scale_factor=4),
    ):
        with pytest.raises(DeployError, match="it must give scores, before an argmax or a threshold"):
            export_module(Trunk(give), None, tmp_path / "m.onnx", exporter="torchscript")
    assert not (tmp_path / "m.onnx").exists()


def test_layers_named_for_flows_are_asked_about_and_three_maps_are_a_guess_said_aloud(tmp_path):
    module = Trunk(lambda net, f, c, y: net.flow_head(f), flow_head=nn.Conv2d(8, 3, 1))
    with pytest.raises(DeployError, match=r"flows or classes cannot be told \(its last layer is .*flow_head"):
        export_module(module, None, tmp_path / "m.onnx", exporter="torchscript")
    for give, said in ((lambda net, f, c, y: y, True), (lambda net, f, c, y: y.softmax(1), False)):
        notes = []
        export_module(Trunk(give, 3), None, tmp_path / "m.onnx", exporter="torchscript", note=notes.append)
        assert any("--activation none gives them as values" in note for note in notes) == said
