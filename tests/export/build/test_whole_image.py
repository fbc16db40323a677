"""Networks that look at the whole image, and those that take no small one: built, labelled, never tiled silently."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.pixels.prepare import prepare
from helpers import command, photo
from torch import nn

from fcn_deploy import DeployError, MisuseError, Segmenter


class Excited(nn.Module):
    """Squeeze and excitation around a U of one level: what a pixel gets depends on the mean of the image."""

    def __init__(self, levels):
        super().__init__()
        self.first, self.deep, self.last = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)
        self.excite, self.levels = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid()), levels

    def forward(self, x):
        x = self.first(x).relu()
        deep = self.deep(F.max_pool2d(x, 2**self.levels)).relu() if self.levels else self.deep(x)
        deep = deep * self.excite(deep) * 4
        if self.levels:
            deep = F.interpolate(deep, scale_factor=float(2**self.levels), mode="nearest")
        return self.last(x + deep)


class Mirrored(nn.Module):
    """Takes no side below 12: mirrored padding wants more to mirror."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 3, 11)

    def forward(self, x):
        y = self.last(F.pad(self.first(x), (5, 5, 5, 5), mode="reflect"))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear")


def exported(model, path):
    torch.manual_seed(0)
    torch.onnx.export(
        model().eval(), (torch.zeros(1, 3, 64, 64),), path, dynamo=False, opset_version=17, input_names=["image"],
        output_names=["logits"], dynamic_axes={"image": {0: "N", 2: "H", 3: "W"}, "logits": {0: "N", 2: "H", 3: "W"}},
    )  # fmt: skip
    return path


SIZES = ((1, 1), (2, 9), (37, 41), (64, 64), (101, 67), (203, 150))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """free, resized and padded .engine, of networks with a global layer, and mirrored.engine; their reports beside."""
    folder = tmp_path_factory.mktemp("whole")
    for name, model, options in (
        ("free", lambda: Excited(0), None),
        ("resized", lambda: Excited(3), None),
        ("padded", lambda: Excited(3), ImportOptions(fit="pad")),
        ("mirrored", Mirrored, None),
    ):
        source = import_model(exported(model, folder / f"{name}.onnx"), options)
        build_engine(source, folder / f"{name}.engine", BuildConfig(latency_sizes=[(32, 32)]))
        (folder / f"{name}.notes").write_text("\n".join(source.notes))
    return folder


def expected(folder, name, image, size=None, resize=False):
    """argmax of the original's own scores for an image, padded or resized to a size that it takes."""
    with Segmenter(folder / f"{name}.engine") as net:
        card = net.card
    run = session((folder / f"{name}.onnx").read_bytes())
    values = torch.from_numpy(prepare(image, replace_sizes(card)))
    height, width = image.shape[:2]
    if resize:
        values = F.interpolate(values, size, mode="bilinear")
    elif size:
        values = F.pad(values, (0, size[1] - width, 0, size[0] - height))
    scores = torch.from_numpy(run.run(None, {"image": values.numpy()})[0])
    if resize:
        scores = F.interpolate(scores, (height, width), mode="bilinear")
    scores = scores[0, :, :height, :width].numpy()
    best = np.partition(scores, -2, axis=0)[-2:]
    return scores.argmax(0), best[1] - best[0] > 1e-4 * np.ptp(scores)


def replace_sizes(card):
    from dataclasses import replace

    return replace(card, size_multiple=1, smallest=1)


def test_a_global_network_of_free_sizes_is_run_at_the_images_own_size(folder):
    with Segmenter(folder / "free.engine") as net:
        assert net.card.whole.startswith("GlobalAveragePool") and net.card.size_multiple == net.card.smallest == 1
        for size in SIZES:
            image = photo(*size)
            assert net.plan(*size).padded == size
            labels, sure = expected(folder, "free", image)
            assert (net(image) == labels)[sure].all()


@pytest.mark.parametrize("name", ["free", "resized"])
def test_labels_of_a_global_network_never_depend_on_the_company(folder, name):
    images = [photo(*size, seed) for seed in range(9) for size in ((33, 40), (40, 33), (33, 41), (7, 7))]
    with Segmenter(folder / f"{name}.engine") as net:
        alone = [net(image) for image in images]
        for ours, theirs in zip(net.map(images), alone, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["free", "padded", "resized"])
def test_a_global_network_is_run_in_passes_where_memory_does_not_suffice(folder, name):
    image = photo(400, 400)
    labels, sure = expected(folder, name, image)
    with Segmenter(folder / f"{name}.engine", memory=1_000_000) as net:
        assert len(net.plan(400, 400).passes) == 1
        assert (net(image) == labels)[sure].all() and sure.mean() > 0.9
    with Segmenter(folder / f"{name}.engine", memory=50_000) as net, pytest.raises(DeployError, match="smallest tiles"):
        net(image)


def test_a_global_network_of_multiples_is_resized_and_that_is_said(folder):
    notes = (folder / "resized.notes").read_text()
    assert "multiples of 8 only, and GlobalAveragePool" in notes and "resized bilinearly to the nearest" in notes
    with Segmenter(folder / "resized.engine") as net:
        assert net.card.size_multiple == 1 and net.card.whole.startswith("GlobalAveragePool")
        for size in SIZES:
            nearest = tuple(max(8, (side + 4) // 8 * 8) for side in size)
            labels, sure = expected(folder, "resized", photo(*size), nearest, resize=True)
            assert (net(photo(*size)) == labels)[sure].all(), size


def test_padding_a_global_network_is_said_too(folder):
    assert "padded to them with zeros, which GlobalAveragePool" in (folder / "padded.notes").read_text()
    with Segmenter(folder / "padded.engine") as net:
        assert net.card.size_multiple == 8
        for size in SIZES:
            padded = tuple(-(-side // 8) * 8 for side in size)
            assert net.plan(*size).padded == padded
            labels, sure = expected(folder, "padded", photo(*size), padded)
            assert (net(photo(*size)) == labels)[sure].all(), size


def test_small_images_are_padded_to_the_smallest_size_and_no_further(folder):
    assert "takes no sides below 11" in (folder / "mirrored.notes").read_text()
    with Segmenter(folder / "mirrored.engine") as net:
        assert (net.card.size_multiple, net.card.smallest, net.card.whole) == (1, 11, "")
        for size in SIZES:
            padded = tuple(max(side, 11) for side in size)
            assert net.plan(*size).padded == padded
            labels, sure = expected(folder, "mirrored", photo(*size), padded)
            assert (net(photo(*size)) == labels)[sure].all(), size


def test_tiles_of_a_network_with_a_smallest_size_are_exact(folder):
    image = photo(301, 203)
    with Segmenter(folder / "mirrored.engine") as whole:
        needed, labels, scores = whole.plan(301, 203).bytes, whole(image), whole.network.scores(image)
    with Segmenter(folder / "mirrored.engine", memory=needed // 2) as tiled:
        assert sum(grid.count for grid in tiled.plan(301, 203).grids) > 1
        assert np.abs(tiled.network.scores(image) - scores).max() < 1e-5 * np.ptp(scores)
        assert (tiled(image) != labels).mean() < 1e-3


def test_the_choice_from_the_command_line(folder, tmp_path):
    out = tmp_path / "m.engine"
    done = command("build-engine", folder / "resized.onnx", "-o", out, "--fit", "pad", "--sizes", "32x32")
    assert "which GlobalAveragePool" in done.stderr and "multiples of 8" in done.stdout
    command("build-engine", folder / "resized.onnx", "-o", out, "--fit", "crop", ok=2)
    with pytest.raises(MisuseError, match="--fit crop"):
        import_model(folder / "free.onnx", ImportOptions(fit="crop"))
    notes = import_model(folder / "free.onnx", ImportOptions(fit="resize")).notes
    assert any("takes every size by itself; --fit resize changes nothing" in note for note in notes)


def test_normalisations_whose_sums_are_the_librarys_are_said_to_lose_them_on_large_plain_maps(tmp_path):
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 4, 3, 1, 1), nn.InstanceNorm2d(4), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    imported = import_model(exported(Normalised, tmp_path / "m.onnx"))
    notes = build_engine(imported, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)])).notes
    said = [note for note in notes if "sums whole maps in float32" in note]
    assert len(said) == 1 and len(said[0]) <= 300, notes
    assert said[0].startswith("/norm/InstanceNormalization") and said[0].endswith("run in passes, summed in float64")
