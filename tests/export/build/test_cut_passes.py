"""Networks that pool over the whole image, in tiles: passes for what they pool, then the scores, equal to PyTorch's."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.cut_passes import cut_passes
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.pooled import Statistic
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.pixels.prepare import prepare
from fcn_deploy.runtime.tiling.pooled import Totals
from helpers import command, photo, save_photos
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from torch import nn

from fcn_deploy import DeployError, Segmenter

CARD = ModelCard(classes=tuple("abcd"), mean=(120.0, 110.0, 100.0), std=(60.0, 58.0, 57.0))


def conv(into, out, side=3, stride=1, dilation=1):
    return nn.Sequential(
        nn.Conv2d(into, out, side, stride, dilation * (side // 2), dilation, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


def to_size_of(x, like, align=False):
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=align)


class DeepLabPlus(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(conv(3, 12, stride=2), conv(12, 16, stride=2))
        self.high = nn.Sequential(conv(16, 24, stride=2), conv(24, 32, stride=2))
        self.branches = nn.ModuleList([conv(32, 16, 1), conv(32, 16, dilation=2), conv(32, 16, dilation=4)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 16, 1), nn.ReLU())
        self.project, self.narrow = conv(64, 16, 1), conv(16, 8, 1)
        self.last = nn.Sequential(conv(24, 16), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        low = self.low(x)
        high = self.high(low)
        parts = [*(branch(high) for branch in self.branches), to_size_of(self.pool(high), high)]
        deep = to_size_of(self.project(torch.cat(parts, 1)), low)
        return to_size_of(self.last(torch.cat([deep, self.narrow(low)], 1)), x)


class PSP(nn.Module):
    def __init__(self, align=False):
        super().__init__()
        self.features = nn.Sequential(conv(3, 12, stride=2), conv(12, 16, stride=2), conv(16, 24, stride=2))
        pools = (nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(24, 6, 1), nn.ReLU()) for bins in (1, 2, 3, 6))
        self.pools, self.align = nn.ModuleList(pools), align
        self.last = nn.Sequential(conv(48, 16), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        y = self.features(x)
        parts = [y, *(to_size_of(pool(y), y, self.align) for pool in self.pools)]
        return to_size_of(self.last(torch.cat(parts, 1)), x)


class Excited(nn.Module):
    """Squeeze and excitation, with the mean taken over two dimensions at once."""

    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1), nn.ReLU(), nn.Conv2d(channels // 2, channels, 1)
        )

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class LRASPP(nn.Module):
    def __init__(self, excited=2):
        super().__init__()
        self.low = nn.Sequential(conv(3, 12, stride=2), conv(12, 16, stride=2), conv(16, 24, stride=2))
        blocks = [(conv(24, 24, stride=1 + (index == 0)), Excited(24)) for index in range(excited)]
        self.high = nn.Sequential(*(layer for block in blocks for layer in block))
        self.narrow = conv(24, 16, 1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 16, 1, bias=False), nn.Sigmoid())
        self.of_low, self.of_high = nn.Conv2d(24, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        low = self.low(x)
        high = self.high(low)
        deep = to_size_of(self.narrow(high) * self.scale(high), low)
        return to_size_of(self.of_low(low) + self.of_high(deep), x)


class Normed(nn.Module):
    """Instance normalisation, twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU())
        blocks = [(nn.Conv2d(12, 12, 3, 1, 1), nn.InstanceNorm2d(12, affine=True), nn.ReLU()) for _ in range(2)]
        self.blocks = nn.Sequential(*(layer for block in blocks for layer in block))
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return to_size_of(self.last(self.blocks(self.first(x))), x)


class Patches(nn.Module):
    """Convolutions of patches, which leave a rest, as ConvNeXt's; channels are shuffled, and normalised in groups."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 12, 4, 4), nn.Conv2d(12, 16, 2, 2), nn.GroupNorm(3, 12)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(16, 6, 1), nn.ReLU()) for bins in (1, 2)
        )
        self.last = nn.Sequential(conv(40, 16), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        x, given = self.first(x), x
        n, c, h, w = x.size()
        x = self.norm(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)).relu()
        y = self.second(x)
        y = torch.cat([y, *(to_size_of(pool(y), y) for pool in self.pools)], 1)
        return to_size_of(self.last(torch.cat([x, to_size_of(y, x)], 1)), given)


class Unpadded(nn.Module):
    """The first convolution is not padded, as Fast-SCNN's; a pyramid of maxima goes below the pooled map, as PAN's."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), conv(12, 16, stride=2), conv(16, 16, stride=2))
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), conv(16, 16)) for _ in range(2))
        self.pool, self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1)), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = self.features(x)
        first = self.down[0](y)
        coarse = to_size_of(to_size_of(self.down[1](first), first, align=True) + first, y, align=True)
        return to_size_of(self.last(y * coarse + to_size_of(self.pool(y), y)), x)


class PSPOfMultiples(PSP):
    """Raises at other sizes, as segmentation_models.pytorch's networks do, so that images are resized to multiples."""

    def forward(self, x):
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise RuntimeError("Wrong input shape: expected image height and width divisible by 8")
        return super().forward(x)


class MaxGrid(PSP):
    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveMaxPool2d(bins), nn.Conv2d(24, 6, 1)) for bins in (1, 2, 3, 6)
        )


def made(kind):
    torch.manual_seed(0)
    model = kind()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
            layer.weight.data.uniform_(0.8, 1.6)
            layer.bias.data.normal_(0, 0.2)
    return model.eval()


NETWORKS = {
    "deeplab": (DeepLabPlus, 1), "psp": (PSP, 1), "psp-aligned": (lambda: PSP(align=True), 1), "lraspp": (LRASPP, 3),
    "instance-norm": (Normed, 2), "psp-resized": (PSPOfMultiples, 1), "patches": (Patches, 2),
    "unpadded": (Unpadded, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An engine and an ONNX of each network, and the report of its build as JSON."""
    folder = tmp_path_factory.mktemp("pooled")
    config = BuildConfig(latency_sizes=[(32, 32)], tuning=TuningOptions(("onnxruntime",)))
    for name, (kind, _) in NETWORKS.items():
        export_module(made(kind), CARD, folder / f"{name}.onnx")
        report = build_engine(import_model(folder / f"{name}.onnx"), folder / f"{name}.engine", config)
        (folder / f"{name}.json").write_text(report.to_json())
    return folder


def of_torch(name, image):
    """(labels, whether each is sure) of PyTorch."""
    x = torch.from_numpy(prepare(image, CARD))
    nearest = [(side + 4) // 8 * 8 for side in image.shape[:2]] if name == "psp-resized" else image.shape[:2]
    with torch.no_grad():
        scores = made(NETWORKS[name][0])(F.interpolate(x, nearest, mode="bilinear"))
        scores = F.interpolate(scores, image.shape[:2], mode="bilinear")[0].numpy()
    best = np.partition(scores, -2, axis=0)[-2:]
    return scores.argmax(0), best[1] - best[0] > 1e-4 * np.ptp(scores)


def in_passes(path, size, shares=(0.9, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)):
    """The engine with so little memory that it needs passes for an image of this size: a share of all that it takes."""
    with Segmenter(path) as whole:
        needed = whole.plan(*size).bytes
    for share in shares:
        net = Segmenter(path, memory=int(needed * share))
        try:
            if net.plan(*size).passes:
                return net
        except OverBudgetError:
            pass
        net.close()
    raise AssertionError("no budget makes it run in passes")


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_in_passes_are_pytorchs_at_sizes_never_traced(folder, name):
    for size in ((701, 557), (403, 1499)):
        image = photo(*size)
        with Segmenter(folder / f"{name}.engine") as whole:
            scores = whole.network.scores(image)
        labels, sure = of_torch(name, image)
        with in_passes(folder / f"{name}.engine", size) as net:
            plan = net.plan(*size)
            assert len(plan.passes) == NETWORKS[name][1] and plan.bytes <= net.network.memory
            assert sum(grid.count for grids in (*plan.passes, plan.grids) for grid in grids) > len(plan.passes) + 1
            # The operator of group normalisation sums in float32 where the image is whole.
            most = 3e-6 if name == "patches" else 1e-6
            assert np.abs(net.network.scores(image) - scores).max() < most * np.ptp(scores)
            assert (net(image) == labels)[sure].all() and sure.mean() > 0.98
            rows = dict(net.bands(image, 40))
            np.testing.assert_array_equal(np.concatenate([rows[top] for top in sorted(rows)]), net(image)[40:])


def test_int8_engines_have_passes_too(folder, tmp_path):
    save_photos(tmp_path, [(90, 100), (97, 101), (64, 120)])
    config = BuildConfig(
        quantization=QuantizationOptions(int8=True, calib=str(tmp_path / "*.png"), max_drop=100, max_class_drop=100),
        latency_sizes=[(32, 32)],
        tuning=TuningOptions(("onnxruntime",)),
    )
    report = build_engine(import_model(folder / "psp.onnx"), tmp_path / "m.engine", config)
    assert report.precision == "int8" and report.passes.startswith("tiles in 1 pass")
    image = photo(701, 557)
    with Segmenter(tmp_path / "m.engine") as whole:
        scores = whole.network.scores(image)
    with in_passes(tmp_path / "m.engine", (701, 557)) as net:
        # A mean that is rounded to 8 bits the other way moves scores by a step.
        assert np.abs(net.network.scores(image) - scores).max() < 1e-2 * np.ptp(scores)


def test_the_build_says_how_far_tiles_are_from_the_whole(folder):
    report = json.loads((folder / "lraspp.json").read_text())
    assert report["passes"].startswith("tiles in 3 passes for what it pools over the whole image")
    assert "equal to the whole image's to rounding" in report["passes"]


MEASURED = """
import sys
from fcn_deploy import Segmenter
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.process_memory import forget_highest, highest, resident
with Segmenter(sys.argv[1], memory=int(sys.argv[2])) as net:
    image = natural_noise(1500, 1400, net.card, 0)
    net(natural_noise(200, 200, net.card, 0))
    if (before := resident()) is not None:
        forget_highest()
        net(image)
        print(highest(before) - before)
"""


def test_memory_is_kept(folder):
    """In a process of its own, which holds nothing else that is freed and taken again meanwhile."""
    path = folder / "deeplab.engine"
    with in_passes(path, (1500, 1400), shares=(0.5, 0.35, 0.25)) as net, Segmenter(path) as whole:
        memory, plan, needed = net.network.memory, net.plan(1500, 1400), whole.plan(1500, 1400).bytes
    done = subprocess.run([sys.executable, "-c", MEASURED, path, str(memory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("no /proc here")
    assert int(done.stdout) < 1.3 * plan.bytes + 20e6 < needed


def test_what_does_not_pay_is_said():
    """Seven values, one after the other: seven passes for each image."""
    reason = reason_of(lambda: LRASPP(excited=7))
    assert reason.startswith("no tiles in passes: 8 values are pooled") and "8 passes in tiles would take" in reason


def test_pooling_that_is_not_known_is_named():
    assert "makes a grid of the whole image, and is no average" in (reason := reason_of(MaxGrid)) and "/pools" in reason


def test_an_image_that_is_resized_to_nothing_where_it_is_small_is_left_to_the_network():
    resized = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        m (float[N, 3, H, W] image) => (float[N, 3, H, W] scores)
        <int64[1] four = {4}, int64[1] two = {2}, int64[1] zero = {0}, int64[2] step = {32, 32}> {
            sides = Shape (image)
            pixels = Slice (sides, two, four)
            count = Div (pixels, step)
            down = Mul (count, step)
            others = Slice (sides, zero, two)
            size = Concat <axis = 0> (others, down)
            small = Resize <mode = "linear"> (image, , , size)
            mean = GlobalAveragePool (small)
            scores = Add (small, mean)
        }""")
    found = cut_passes(resized, replace(CARD, smallest=32))
    assert found.pooled is None and "Resize small goes to what is 288×320 of 291×333" in found.reason


class Summed(nn.Module):
    """Pooled values beside sums along the height."""

    def __init__(self):
        super().__init__()
        self.first, self.excite, self.last = conv(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.first(x)
        x = x * torch.sigmoid(self.excite(F.adaptive_avg_pool2d(x, 1)))
        return self.last(torch.cumsum(x, 2))


def test_an_operator_that_is_not_known_is_said_in_a_sentence():
    reason = reason_of(Summed)
    assert reason == "no tiles in passes: CumSum /model/CumSum looks at the whole image, or may"


def reason_of(kind):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        export_module(made(kind), CARD, Path(folder) / "m.onnx")
        core = core_of(import_model(Path(folder) / "m.onnx"))
    found = cut_passes(optimise_offline(core.model), core.card)
    assert found.pooled is None and not found.members
    return found.reason


def test_the_plan_is_explained(folder, tmp_path):
    save_photos(tmp_path, [(1001, 900)])
    with in_passes(folder / "psp.engine", (1001, 900)) as net:
        memory = f"{net.network.memory // 10**6}MB"
    done = command(
        "label-images",
        folder / "psp.engine",
        tmp_path / "0.png",
        "-o",
        tmp_path / "out",
        "--explain",
        "--memory",
        memory,
    )
    assert "1 pass for what the network pools over the whole image" in done.stdout and "not bit for bit" in done.stdout


def test_an_engine_that_was_replaced_while_it_was_open_is_not_mixed_with_the_new_one(folder, tmp_path):
    path = tmp_path / "m.engine"
    shutil.copy(folder / "psp.engine", path)
    with in_passes(path, (301, 257)) as net:
        (tmp_path / "new").write_bytes((folder / "psp-aligned.engine").read_bytes())
        (tmp_path / "new").rename(path)
        with pytest.raises(DeployError, match="was replaced since it was opened"):
            net(photo(301, 257))


def test_a_closed_network_says_so(folder):
    net = in_passes(folder / "psp.engine", (301, 257))
    net.close()
    with pytest.raises(DeployError, match="closed"):
        net(photo(301, 257))


def test_passes_end_once_nobody_wants_the_scores(folder):
    stop = threading.Event()
    stop.set()
    with in_passes(folder / "psp.engine", (301, 257)) as net:
        plan = net.plan(301, 257)
        assert plan.passes
        with pytest.raises(DeployError, match="not wanted any more"):
            next(net.network.tiled.bands(photo(301, 257), plan, 0, stop))


def test_the_manifest_tells_of_passes_and_refuses_damaged_ones(folder):
    with EngineFile(folder / "deeplab.engine") as engine:
        manifest = engine.manifest
    text = manifest.to_json()
    assert Manifest.from_json(text, "m") == manifest and json.loads(text)["version"] == 6
    for change in (
        lambda data: data["pooled"]["passes"][0]["stages"][0].update(halo=None),
        lambda data: data["pooled"]["passes"][0]["statistics"][0].update(kind="median"),
        lambda data: data["pooled"]["passes"][0]["statistics"][0].update(cells=[0, 1]),
        lambda data: data["pooled"]["interpolations"][0].update(cells=0, source=0),
        lambda data: data["pooled"].update(stages=[]),
        lambda data: data["pooled"].update(resized=[8]),
    ):
        data = json.loads(text)
        change(data)
        with pytest.raises(DeployError, match="damaged manifest"):
            Manifest.from_json(json.dumps(data), "m")
    without = json.loads(text)
    del without["pooled"]  # as in engines of before
    assert Manifest.from_json(json.dumps(without), "m").pooled is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_statistics_of_bands_are_those_of_the_map(data):
    height, width, rows, columns = (data.draw(st.integers(1, 30)) for _ in range(4))
    x = np.random.default_rng(0).normal(1000, 3, (2, height, width)).astype(np.float32)
    given_ = (Statistic("grid", cells=(rows, columns)), Statistic("mean"), Statistic("variance", "variance"))
    totals, top = Totals(given_, (height, width)), 0
    while top < height:
        stop = data.draw(st.integers(top + 1, height))
        totals.add(top, x[:, top:stop])
        top = stop
    found, wide = totals.values(), torch.from_numpy(x).double()[None]
    np.testing.assert_allclose(found["grid"], F.adaptive_avg_pool2d(wide, (rows, columns)), rtol=1e-6)
    np.testing.assert_allclose(found["mean"], wide.mean((2, 3), keepdim=True), rtol=1e-6)
    np.testing.assert_allclose(found["variance"], wide.var((2, 3), correction=0, keepdim=True), rtol=1e-5, atol=1e-9)
