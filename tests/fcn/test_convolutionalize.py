"""A classifier turned convolutional gives the classifier's own answers, slid over larger images."""

import pytest
import torch
from fcn_deploy.fcn.convolutionalize import convolutionalize
from torch import nn

from fcn_deploy import MisuseError


def classifier(pool="max"):
    """No padding in its features, so that sliding it is exact; 20×20 images, stride 4."""
    torch.manual_seed(0)
    pooling = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        pooling,
        nn.Sequential(nn.Conv2d(6, 8, 2, stride=2), nn.ReLU()),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8 * 4 * 4, 12),
        nn.BatchNorm1d(12),
        nn.Tanh(),
        nn.Linear(12, 7),
    ).eval()


@pytest.mark.parametrize("pool", ["max", "average"])
def test_at_the_original_size_the_output_is_the_classifiers_own(pool):
    net = classifier(pool)
    convolutional = convolutionalize(net, (3, 20, 20))
    x = torch.randn(4, 3, 20, 20)
    assert torch.allclose(convolutional(x).flatten(1), net(x), atol=1e-5)


@pytest.mark.parametrize("size", [(24, 20), (44, 60), (41, 57)])
def test_each_cell_of_the_heat_map_is_the_slid_classifier(size):
    net = classifier()
    heat = convolutionalize(net, (3, 20, 20))(x := torch.randn(1, 3, *size))[0]
    rows, columns = ((side - 20) // 4 + 1 for side in size)
    assert heat.shape == (7, rows, columns)
    for row in range(rows):
        for column in range(columns):
            window = x[:, :, 4 * row : 4 * row + 20, 4 * column : 4 * column + 20]
            assert torch.allclose(heat[:, row, column], net(window)[0], atol=1e-5)


def test_weights_are_reshaped_and_not_copied_anew():
    net = classifier()
    convolution = next(m for m in convolutionalize(net, (3, 20, 20)).modules() if isinstance(m, nn.Conv2d)
                       and m.out_channels == 12)  # fmt: skip
    assert convolution.weight.shape == (12, 8, 4, 4)
    assert torch.equal(convolution.weight.reshape(12, -1), net[7].weight)


def test_same_padding_keeps_as_many_cells_as_the_features_have():
    convolutional = convolutionalize(classifier(), (3, 20, 20), padding="same")
    assert convolutional(torch.randn(1, 3, 20, 20)).shape == (1, 7, 4, 4)
    assert convolutional(torch.randn(1, 3, 52, 36)).shape == (1, 7, 12, 8)
    # Inside, its cells are those of the valid one.
    x = torch.randn(1, 3, 52, 36)
    valid = convolutionalize(classifier(), (3, 20, 20))(x)
    assert torch.allclose(convolutional(x)[:, :, 1:-2, 1:-2], valid, atol=1e-5)


class TorchvisionStyle(nn.Module):
    def __init__(self, pool, cells):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = nn.Sequential(nn.Linear(5 * cells, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@pytest.mark.parametrize(("pool", "cells"), [((3, 3), 9), ((1, 1), 1), (1, 1), ((None, 3), 9)])
def test_classifiers_in_torchvisions_form(pool, cells):
    net = TorchvisionStyle(pool, cells).eval()
    heat = convolutionalize(net, (3, 12, 12))(x := torch.randn(2, 3, 16, 12))
    assert heat.shape == (2, 3, 2, 1)
    for row in range(2):
        assert torch.allclose(heat[:, :, row, 0], net(x[:, :, 4 * row : 4 * row + 12]), atol=1e-5)


def test_what_has_no_convolutional_counterpart_is_named():
    with pytest.raises(MisuseError, match="AdaptiveAvgPool2d"):
        convolutionalize(TorchvisionStyle((2, 2), 4), (3, 12, 12))
    with pytest.raises(MisuseError, match="no Flatten"):
        convolutionalize(nn.Sequential(nn.Conv2d(3, 4, 3)), (3, 12, 12))
    with pytest.raises(MisuseError, match="LayerNorm"):
        convolutionalize(nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.LayerNorm(4)), (3, 4, 4))
    with pytest.raises(MisuseError, match="input_shape"):
        convolutionalize(classifier(), (3, 28, 28))
