"""The networks: strides, any size, padding, upsampling, and weights from elsewhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILY, random_network

from fcn import backbones
from fcn.backbones.efficientnet_lite0 import published_weights
from fcn.checkpoint import from_torchvision
from fcn.model import Architecture, bilinear_deconvolution, build, upsample
from runtime import DeployError, MisuseError


@pytest.mark.parametrize("architecture", FAMILY, ids=lambda a: "-".join(map(str, a.values())))
def test_scores_come_at_the_stride_and_logits_at_any_size(architecture):
    model = random_network(classes=3, **architecture)
    with torch.inference_mode():
        core = model.core(torch.randn(2, 3, 96, 64))
        assert core.shape == (2, 3, 96 // model.stride, 64 // model.stride)
        for size in ((1, 1), (33, 95), (64, 96)):
            x = torch.randn(1, 3, *size)
            logits = model(x)
            assert logits.shape == (1, 3, *size)
            # Zeros right and bottom to the next multiple, cropped last.
            multiple = model.size_multiple
            padded = torch.zeros(1, 3, *(-(-side // multiple) * multiple for side in size))
            padded[:, :, : size[0], : size[1]] = x
            full = model.final_upsampling(model.core(padded))
            assert full.shape[2:] == padded.shape[2:]
            assert torch.allclose(logits, full[:, :, : size[0], : size[1]])
            cells = tuple(-(-side // model.stride) for side in size)
            assert torch.allclose(model.heatmap(x), model.core(padded)[:, :, : cells[0], : cells[1]])


@pytest.mark.parametrize("name", backbones.NAMES)
def test_features_have_the_channels_and_strides_they_say(name):
    backbone = backbones.build(name, channels=4, width=0.25).eval()
    with torch.inference_mode():
        features = backbone(torch.randn(1, 4, 64, 128))
    assert set(backbone.features) <= set(features)
    for stride, channels in backbone.features.items():
        assert features[stride].shape == (1, channels, 64 // stride, 128 // stride)


@pytest.mark.parametrize("factor", [2, 8, 16, 32])
def test_transposed_convolutions_start_as_bilinear_upsampling(factor):
    x = torch.randn(1, 3, 6, 5)
    for groups in (1, 3):
        result = bilinear_deconvolution(3, factor, groups)(x)
        assert result.shape == (1, 3, 6 * factor, 5 * factor)
        inside = slice(factor // 2, -(factor // 2))
        assert torch.allclose(result[:, :, inside, inside], upsample(x, factor)[:, :, inside, inside], atol=1e-5)


def test_near_the_border_all_classes_share_one_factor():
    x = torch.randn(1, 4, 5, 5)
    result, wanted = bilinear_deconvolution(4, 8, 4)(x), upsample(x, 8)
    assert torch.equal(result.argmax(1), wanted.argmax(1))
    assert not torch.allclose(result, wanted)


def test_learned_upsampling_is_trained_but_for_the_last_layer():
    model = build(Architecture(4, upsampling="learned", width=0.25))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "up.32.weight" in trained and "up.16.weight" in trained and "last.weight" not in trained


def test_efficientnet_shifts_with_the_image_by_its_stride():
    # TensorFlow's padding is constant at multiples of 32, which tiles rely on.
    model = random_network(classes=3, stride=32)
    x = torch.randn(1, 3, 640, 64)
    with torch.inference_mode():
        scores, shifted = model.core(x), model.core(x[:, :, 32:])
    assert torch.allclose(scores[:, :, 10:-10], shifted[:, :, 9:-10], atol=1e-4)


def test_published_weights_make_a_classifier_that_knows_a_daisy():
    from PIL import Image
    from sklearn.datasets import load_sample_images

    state = published_weights()
    backbone = backbones.build("efficientnet-lite0").eval()
    backbone.load_classification(state)
    flower = Image.fromarray(load_sample_images().images[1]).resize((336, 224))
    pixels = (np.asarray(flower, np.float32)[:, 56:280] - backbone.mean) / backbone.std
    with torch.inference_mode():
        features = backbone(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])[32].mean((2, 3))
        best = (features @ state["_fc.weight"].T + state["_fc.bias"]).argmax()
    assert best == 985  # ImageNet's daisy


def classification_state(name):
    """A state dict in torchvision's layout, of the right shapes, for a narrow network."""
    backbone = backbones.build(name, width=0.125)
    state = {}
    dense = {"vgg16": {"1": "0", "4": "3"}, "alexnet": {"1": "1", "4": "4"}}.get(name, {})
    for key, tensor in backbone.state_dict().items():
        value = torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        part, _, rest = key.partition(".")
        if part == "classifier":
            number, kind = rest.split(".")
            key = f"classifier.{dense[number]}.{kind}"
            value = value.flatten(1) if kind == "weight" else value
        elif part == "layers":
            key = f"features.{rest.replace('0.1.', '0.', 1) if name == 'alexnet' else rest}"
        state[key] = value
    head = {"resnet50": "fc", "efficientnet-lite0": "_fc", "mobilenet-v2": "classifier.1"}.get(name, "classifier.6")
    return state | {f"{head}.weight": torch.randn(10, 8), f"{head}.bias": torch.randn(10)}


@pytest.mark.parametrize("name", backbones.NAMES)
def test_classification_weights_in_torchvisions_layout(name):
    backbone = backbones.build(name, width=0.125)
    state = classification_state(name)
    backbone.load_classification(state)
    own = {tuple(tensor.flatten()[:3].tolist()) for tensor in backbone.state_dict().values() if tensor.ndim}
    used = [t for key, t in state.items() if t.ndim and t.numel() != 80 and t.numel() != 10]
    assert all(tuple(tensor.flatten()[:3].tolist()) in own for tensor in used)
    missing = dict(list(state.items())[1:])
    with pytest.raises(DeployError, match="have no"):
        backbones.build(name, width=0.125).load_classification(missing)
    with pytest.raises(DeployError, match="of shape"):
        backbones.build(name, width=0.5).load_classification(state)
    with pytest.raises(DeployError, match="which the network has not"):
        backbones.build(name, width=0.125).load_classification(state | {"surprise.weight": torch.ones(1)})


def test_vgg_names_are_torchvisions():
    names = set(classification_state("vgg16"))
    assert {"features.0.weight", "features.28.bias", "classifier.0.weight", "classifier.3.bias"} <= names
    names = set(classification_state("alexnet"))
    assert {"features.0.weight", "features.10.bias", "classifier.1.weight", "classifier.4.bias"} <= names
    names = set(classification_state("mobilenet-v2"))
    assert {"features.0.0.weight", "features.1.conv.0.0.weight", "features.18.1.running_var"} <= names
    names = set(classification_state("resnet50"))
    assert {"conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias"} <= names


def test_alexnet_gives_k_cells_for_32k_pixels():
    backbone = backbones.build("alexnet", width=0.125).eval()
    for k in (1, 2, 7):
        assert backbone(torch.randn(1, 3, 32 * k, 32))[32].shape[2:] == (k, 1)


def dilated_reference(state, x):
    """torchvision's fcn_resnet50 written out over its state dict, as its sources define it (eval mode)."""

    def norm(y, name):
        return F.batch_norm(y, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def block(y, name, stride, dilation):
        z = F.relu(norm(F.conv2d(y, state[f"{name}.conv1.weight"]), f"{name}.bn1"))
        z = F.conv2d(z, state[f"{name}.conv2.weight"], stride=stride, padding=dilation, dilation=dilation)
        z = norm(F.conv2d(F.relu(norm(z, f"{name}.bn2")), state[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in state:
            y = norm(F.conv2d(y, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return F.relu(y + z)

    size = x.shape[2:]
    x = F.relu(norm(F.conv2d(x, state["backbone.conv1.weight"], stride=2, padding=3), "backbone.bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    # (blocks, stride and dilation of the first, dilation of the others)
    for layer, (count, stride, first, rest) in enumerate(((3, 1, 1, 1), (4, 2, 1, 1), (6, 1, 1, 2), (3, 1, 2, 4)), 1):
        for index in range(count):
            name = f"backbone.layer{layer}.{index}"
            x = block(x, name, stride if index == 0 else 1, first if index == 0 else rest)
    x = F.relu(norm(F.conv2d(x, state["classifier.0.weight"], padding=1), "classifier.1"))
    x = F.conv2d(x, state["classifier.4.weight"], state["classifier.4.bias"])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_dilated8_is_torchvisions_fcn_resnet50_at_multiples_of_8():
    model = random_network(classes=21, arch="dilated8", backbone="resnet50", width=0.125)
    auxiliary = {"aux_classifier.0.weight": torch.randn(3, 3), "aux_classifier.4.bias": torch.randn(21)}
    checkpoint = from_torchvision(dict(model.state_dict()) | auxiliary, "weights.pth")
    assert checkpoint.card.classes[15] == "person" and checkpoint.card.size_multiple == 8
    for size in ((64, 96), (40, 72), (8, 8)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            expected = dilated_reference(model.state_dict(), x)
            difference = (checkpoint.model(x) - expected).abs().max()
        assert difference < 1e-4 * (expected.max() - expected.min())


def test_weights_of_another_network_are_not_taken_for_torchvisions():
    with pytest.raises(DeployError, match="fcn_resnet50"):
        from_torchvision({"conv1.weight": torch.ones(1)}, "x.pth")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"backbone": "vgg19"}, "vgg19"),
        ({"stride": 4}, "stride 4"),
        ({"backbone": "alexnet"}, "FCN-32s only"),
        ({"arch": "dilated8"}, "resnet50"),
        ({"upsampling": "cubic"}, "cubic"),
        ({"classes": 0}, "0 classes"),
        ({"width": -1}, "width -1"),
    ],
)
def test_architectures_that_are_none(wrong, said):
    with pytest.raises(MisuseError, match=said):
        build(Architecture(**({"classes": 2} | wrong)))
