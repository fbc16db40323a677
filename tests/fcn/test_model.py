"""The networks: strides, any size, padding, upsampling, and weights from elsewhere."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.fcn import backbones
from fcn_deploy.fcn.architecture import TORCHVISION, Architecture, upsample
from fcn_deploy.fcn.backbones.efficientnet_lite0 import published_weights
from fcn_deploy.fcn.checkpoint import from_torchvision
from fcn_deploy.fcn.model import bilinear_deconvolution, build_network
from helpers import FAMILY, random_network

from fcn_deploy import DeployError, MisuseError


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
    backbone = backbones.build_backbone(name, channels=4, width=0.25).eval()
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
    model = build_network(Architecture(4, upsampling="learned", width=0.25))
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
    backbone = backbones.build_backbone("efficientnet-lite0").eval()
    backbone.load_classification(state)
    flower = Image.fromarray(load_sample_images().images[1]).resize((336, 224))
    pixels = (np.asarray(flower, np.float32)[:, 56:280] - backbone.mean) / backbone.std
    with torch.inference_mode():
        features = backbone(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])[32].mean((2, 3))
        best = (features @ state["_fc.weight"].T + state["_fc.bias"]).argmax()
    assert best == 985  # ImageNet's daisy


def classification_state(name):
    """A state dict in torchvision's layout, of the right shapes, for a narrow network."""
    backbone = backbones.build_backbone(name, width=0.125)
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
    backbone = backbones.build_backbone(name, width=0.125)
    state = classification_state(name)
    backbone.load_classification(state)
    own = {tuple(tensor.flatten()[:3].tolist()) for tensor in backbone.state_dict().values() if tensor.ndim}
    used = [t for key, t in state.items() if t.ndim and t.numel() != 80 and t.numel() != 10]
    assert all(tuple(tensor.flatten()[:3].tolist()) in own for tensor in used)
    missing = dict(list(state.items())[1:])
    with pytest.raises(DeployError, match="have no"):
        backbones.build_backbone(name, width=0.125).load_classification(missing)
    with pytest.raises(DeployError, match="of shape"):
        backbones.build_backbone(name, width=0.5).load_classification(state)
    with pytest.raises(DeployError, match="which the network has not"):
        backbones.build_backbone(name, width=0.125).load_classification(state | {"surprise.weight": torch.ones(1)})


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
    backbone = backbones.build_backbone("alexnet", width=0.125).eval()
    for k in (1, 2, 7):
        assert backbone(torch.randn(1, 3, 32 * k, 32))[32].shape[2:] == (k, 1)


def norm(state, y, name, eps=1e-5):
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(y, *parts, eps=eps)


def conv_norm_relu(state, y, name, **options):
    """A convolution, a batch norm and a ReLU of an nn.Sequential."""
    first, second = name if isinstance(name, tuple) else (f"{name}.0", f"{name}.1")
    return F.relu(norm(state, F.conv2d(y, state[f"{first}.weight"], **options), second))


def resnet_reference(state, x):
    """torchvision's ResNet, dilated to stride 8, written out over its state dict as its sources define it."""

    def block(y, name, stride, dilation):
        z = conv_norm_relu(state, y, (f"{name}.conv1", f"{name}.bn1"))
        options = {"stride": stride, "padding": dilation, "dilation": dilation}
        z = conv_norm_relu(state, z, (f"{name}.conv2", f"{name}.bn2"), **options)
        z = norm(state, F.conv2d(z, state[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in state:
            y = F.conv2d(y, state[f"{name}.downsample.0.weight"], stride=stride)
            y = norm(state, y, f"{name}.downsample.1")
        return F.relu(y + z)

    x = conv_norm_relu(state, x, ("backbone.conv1", "backbone.bn1"), stride=2, padding=3)
    x = F.max_pool2d(x, 3, 2, 1)
    # Stride and dilation of the first block, dilation of the others.
    for layer, (stride, first, rest) in enumerate(((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)), 1):
        index = 0
        while f"backbone.layer{layer}.{index}.conv1.weight" in state:
            name = f"backbone.layer{layer}.{index}"
            x = block(x, name, stride if index == 0 else 1, first if index == 0 else rest)
            index += 1
    return x


def mobilenet_reference(state, x):
    """torchvision's MobileNetV3-Large, dilated to stride 16: features of layers 4 and 16."""
    strides, swish, eps = {2: 2, 4: 2, 7: 2}, range(7, 16), 0.001

    def conv(y, name, activation, **options):
        return activation(norm(state, F.conv2d(y, state[f"{name}.0.weight"], **options), f"{name}.1", eps))

    x = conv(x, "backbone.0", F.hardswish, stride=2, padding=1)
    for layer in range(1, 16):
        name, number, y = f"backbone.{layer}.block", 0, x
        activation = F.hardswish if layer in swish else F.relu
        if layer > 1:
            y, number = conv(y, f"{name}.0", activation), 1
        kernel, dilation = state[f"{name}.{number}.0.weight"].shape[2], 2 if layer >= 13 else 1
        options = {"padding": kernel // 2 * dilation, "dilation": dilation, "groups": y.shape[1]}
        y = conv(y, f"{name}.{number}", activation, stride=strides.get(layer, 1), **options)
        if f"{name}.{number + 1}.fc1.weight" in state:
            number += 1
            gate = y.mean((2, 3), keepdim=True)
            for part, after in (("fc1", F.relu), ("fc2", F.hardsigmoid)):
                gate = after(F.conv2d(gate, *(state[f"{name}.{number}.{part}.{kind}"] for kind in ("weight", "bias"))))
            y = y * gate
        y = conv(y, f"{name}.{number + 1}", lambda z: z)
        x = x + y if layer in (1, 3, 5, 6, 8, 9, 10, 12, 14, 15) else y
        if layer == 4:
            low = x
    return low, conv(x, "backbone.16", F.hardswish)


def to_size(y, size):
    return F.interpolate(y, size=size, mode="bilinear", align_corners=False)


def torchvision_reference(name, state, x):
    """torchvision's segmentation networks in evaluation mode, written out over their state dicts."""
    low, features = mobilenet_reference(state, x) if "mobilenet" in name else (None, resnet_reference(state, x))
    if name.startswith("fcn"):
        y = conv_norm_relu(state, features, "classifier", padding=1)
    elif name.startswith("deeplabv3"):
        rates = (12, 24, 36)
        maps = [conv_norm_relu(state, features, "classifier.0.convs.0")]
        for index, rate in enumerate(rates, 1):
            options = {"padding": rate, "dilation": rate}
            maps.append(conv_norm_relu(state, features, f"classifier.0.convs.{index}", **options))
        mean, names = features.mean((2, 3), keepdim=True), ("classifier.0.convs.4.1", "classifier.0.convs.4.2")
        maps.append(to_size(conv_norm_relu(state, mean, names), features.shape[2:]))
        y = conv_norm_relu(state, torch.cat(maps, 1), "classifier.0.project")
        y = conv_norm_relu(state, y, ("classifier.1", "classifier.2"), padding=1)
    else:
        gate = F.conv2d(features.mean((2, 3), keepdim=True), state["classifier.scale.1.weight"]).sigmoid()
        y = to_size(conv_norm_relu(state, features, "classifier.cbr") * gate, low.shape[2:])
        low, y = (
            F.conv2d(z, *(state[f"classifier.{part}_classifier.{kind}"] for kind in ("weight", "bias")))
            for part, z in (("low", low), ("high", y))
        )
        return to_size(low + y, x.shape[2:])
    return to_size(F.conv2d(y, state["classifier.4.weight"], state["classifier.4.bias"]), x.shape[2:])


@pytest.mark.parametrize(("arch", "backbone"), TORCHVISION)
def test_state_dicts_of_torchvisions_networks(arch, backbone):
    name = f"{'fcn' if arch == 'dilated8' else arch}_{backbone.replace('-', '_')}"
    stride = TORCHVISION[arch, backbone]
    width = 0.5 if "mobilenet" in backbone else 0.125
    model = random_network(classes=21, arch=arch, backbone=backbone, stride=stride, width=width)
    state = {f"module.{key}": value for key, value in model.state_dict().items() if "num_batches" not in key}
    auxiliary = {"module.aux_classifier.0.weight": torch.randn(3, 3), "module.aux_classifier.4.bias": torch.randn(21)}
    notes = []
    checkpoint = from_torchvision(state | auxiliary, "weights.pth", notes.append)
    assert len(notes) == 1 and f"torchvision's {name}" in notes[0]
    assert checkpoint.card.classes[15] == "person" and checkpoint.card.stride == stride
    assert checkpoint.card.size_multiple == (8 if arch == "dilated8" else 1)
    for size in ((64, 96), (40, 72), (8, 8)) if arch == "dilated8" else ((64, 96), (33, 57), (1, 1)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            expected = torchvision_reference(name, model.state_dict(), x)
            difference = (checkpoint.model(x) - expected).abs().max()
        assert difference < 1e-4 * (expected.max() - expected.min())


def test_a_state_dict_that_is_not_known_is_told_the_nearest_and_the_way_out():
    with pytest.raises(DeployError, match=r"no state dict of torchvision's.*--weights x\.pth"):
        from_torchvision({"conv1.weight": torch.ones(1)}, "x.pth")
    state = random_network(arch="dilated8", backbone="resnet50", width=0.125).state_dict()
    del state["backbone.layer4.2.conv3.weight"]
    with pytest.raises(DeployError, match=r"nearest is fcn_resnet50, but for 1 names, backbone.layer4.2.conv3.weight;"):
        from_torchvision(state, "x.pth")
    state = random_network(arch="dilated8", backbone="resnet50", width=0.125).state_dict()
    state["classifier.0.weight"] = state["classifier.0.weight"][:, :8]
    with pytest.raises(DeployError, match=r"not torchvision's fcn_resnet50: .* classifier.0.weight of shape"):
        from_torchvision(state, "x.pth")


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
        build_network(Architecture(**({"classes": 2} | wrong)))
