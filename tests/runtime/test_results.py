"""Probabilities, masks and values of networks: the model's own, at any size, whole or in tiles, on any backend."""

import functools
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import tifffile
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.standalone import build_standalone
from fcn_deploy.export.graph.edit import set_metadata
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.passes.pad_and_crop import pad_and_crop
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.fcn.evaluate import open_model
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.pixels.prepare import prepare
from fcn_deploy.runtime.sizes import parse_sizes
from fcn_deploy.runtime.verify import verify
from helpers import ROOT, command, label_records, needs, one_error, photo, save_photos
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter

NAMES = ("cat", "dog", "wet")


def network(card, before=None, after=None, mode="linear", to_size=False, reach=0, total=False):
    """A small network of the card's scores at stride 4, upsampled.

    Args:
        before, after: `Sigmoid` or `Softmax`, before or after the upsampling.
        to_size: the upsampling is to the image's size, which may be any; else by 4.
        reach: pixels that are mirrored at the borders first, so that an image must have more.
        total: the scores depend on the mean of the whole image.
    """
    random, classes = np.random.default_rng(len(card.classes)), card.scores
    weights = {
        "k1": random.normal(size=(8, 3, 7, 7)) / 8, "b1": random.normal(size=8),
        "k2": random.normal(size=(classes, 8, 1, 1)), "four": [1, 1, 4, 4],
        "box": np.full((3, 1, 2 * reach + 1, 1), 0.2),
    }  # fmt: skip
    constants = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    constants |= {"borders": np.array([0, 0, reach, 0, 0, 0, reach, 0]), "two": np.array([2])}
    node, nodes, image = helper.make_node, [], "image"
    if reach:
        nodes.append(node("Pad", ["image", "borders"], ["mirrored"], mode="reflect"))
        nodes.append(node("Conv", ["mirrored", "box"], ["blurred"], group=3))
        image = "blurred"
    nodes.append(node("Conv", [image, "k1", "b1"], ["f"], strides=[4, 4], pads=[3, 3, 3, 3]))
    nodes.append(node("Relu", ["f"], ["features"]))
    if total:
        nodes.append(node("GlobalAveragePool", ["features"], ["mean"], name="pool"))
        nodes.append(node("Add", ["features", "mean"], ["context"]))
    nodes.append(node("Conv", ["context" if total else "features", "k2"], ["coarse"]))
    for name, read, result in ((before, "coarse", "scores"), (after, "full", "logits")):
        if result == "logits":
            kinds = {"mode": mode, "coordinate_transformation_mode": "half_pixel"}
            if to_size:
                nodes.append(node("Shape", ["image"], ["size"], start=2))
                nodes.append(node("Shape", ["scores"], ["front"], end=2))
                nodes.append(node("Concat", ["front", "size"], ["sizes"], axis=0))
                nodes.append(node("Resize", ["scores", "", "", "sizes"], ["full"], **kinds))
            else:
                nodes.append(node("Resize", ["scores", "", "four"], ["full"], **kinds))
        options = {"axis": 1} if name == "Softmax" else {}
        nodes.append(node(name or "Identity", [read], [result], **options))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes, "H", "W"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if not to_size:
        model = pad_and_crop(model, card.size_multiple, card.smallest).model
    set_metadata(model, CARD_KEY, card.to_json())
    onnx.checker.check_model(model)
    return model


FOUR = {"size_multiple": 4, "stride": 4}
CARDS = {
    "softmax": (ModelCard(NAMES, **FOUR), {}),
    "softmax-after": (ModelCard(NAMES), {"after": "Softmax", "to_size": True}),
    "softmax-before": (ModelCard(NAMES, **FOUR), {"before": "Softmax"}),
    "sigmoid": (ModelCard(("no", "yes"), activation="sigmoid", threshold=0.6), {"to_size": True}),
    "probability-after": (ModelCard(("no", "yes"), activation="probability", **FOUR), {"after": "Sigmoid"}),
    "probability-before": (
        ModelCard(("no", "yes"), activation="probability", threshold=0.4), {"before": "Sigmoid", "to_size": True}),
    "multilabel": (ModelCard(NAMES, activation="multilabel", threshold=(0.5, 0.7, 0.3), **FOUR), {}),
    "multilabel-after": (
        ModelCard(NAMES, activation="multilabel", threshold=0.6), {"after": "Sigmoid", "to_size": True}),
    "multilabel-before": (ModelCard(NAMES, activation="multilabel", **FOUR), {"before": "Sigmoid", "mode": "nearest"}),
    "none": (ModelCard(("depth",), activation="none", **FOUR), {}),
    "none-to-size": (ModelCard(("x", "y", "z"), activation="none"), {"to_size": True}),
    "none-sigmoid": (ModelCard(("matte",), activation="none", **FOUR), {"after": "Sigmoid"}),
    "smallest": (ModelCard(NAMES, activation="multilabel", smallest=9, **FOUR), {"reach": 8}),
    "smallest-by-far": (ModelCard(("depth",), activation="none", smallest=61, **FOUR), {}),
}  # fmt: skip
PROBABLE = [name for name, (card, _) in CARDS.items() if card.kind != "values"]
SIZES = ((1, 1), (2, 9), (31, 7), (26, 28), (61, 97), (120, 33), (7, 150))
FAST = BuildConfig(latency_sizes=[(32, 32)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name → (its model's path, its engine's path), built when they are asked for."""
    folder = tmp_path_factory.mktemp("results")

    @functools.cache
    def make(name):
        card, how = CARDS[name]
        onnx.save(network(card, **how), folder / f"{name}.onnx")
        build_engine(import_model(folder / f"{name}.onnx"), folder / f"{name}.engine", FAST)
        return folder / f"{name}.onnx", folder / f"{name}.engine"

    return make


@functools.cache
def reference(path):
    return session(path)


def own(path, card, image):
    """What the model itself gives for an image, [K, H, W]."""
    return reference(path).run(None, {"image": prepare(image, replace(card, size_multiple=1, smallest=1))})[0][0]


def expected_probabilities(name, given, card):
    if name.endswith(("before", "after")):
        return given
    if card.activation == "softmax":
        exponents = np.exp(given - given.max(0))
        return exponents / exponents.sum(0)
    return 1 / (1 + np.exp(-given.astype(np.float64)))


def near(found, expected, share=1e-5):
    assert found.dtype == np.float32 and found.shape == expected.shape and found.flags.c_contiguous
    assert np.abs(found - expected).max() <= share * max(np.ptp(expected), 1e-3)


@pytest.mark.parametrize("name", CARDS)
def test_results_are_the_models_own_at_any_size(made, name):
    path, engine = made(name)
    card = CARDS[name][0]
    with Segmenter(path) as plain, Segmenter(engine) as net:
        assert net.network.kind == plain.network.kind == card.kind
        assert (net.card.smallest, net.card.size_multiple) == (card.smallest, card.size_multiple)
        for index, size in enumerate(SIZES):
            image = photo(*size, index)
            given = own(path, card, image)
            near(plain.values(image), given, 0)
            if name in PROBABLE:
                expected = expected_probabilities(name, given, card)
                near(net.probabilities(image), expected)
                # A plain ONNX of masks whose Sigmoid is in it does not say so: its card says logits.
                if name != "multilabel-after" and name != "multilabel-before":
                    near(plain.probabilities(image), expected)
            if not name.endswith("after"):
                near(net.values(image), given)
            if card.kind == "masks":
                masks, thresholds = net.masks(image), np.array(card.thresholds)[:, None, None]
                assert masks.dtype == bool and masks.shape == (3, *size)
                clear = np.abs(expected - thresholds) > 1e-5
                assert clear.mean() > 0.9
                np.testing.assert_array_equal(masks[clear], (expected > thresholds)[clear])
            elif card.kind == "labels" and card.scores == 1:
                clear = np.abs(expected[0] - card.threshold) > 1e-5
                np.testing.assert_array_equal(net(image)[clear], (expected[0] > card.threshold)[clear])


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "multilabel", "none", "none-to-size", "smallest"])
def test_tiles_and_bands_and_streams_give_what_a_call_gives(made, name):
    _, engine = made(name)
    card = CARDS[name][0]
    kinds = ["values", card.kind, *(["probabilities"] if name in PROBABLE else [])]
    with Segmenter(engine) as net:
        for size in ((150, 61), (203, 90), (97, 300)):
            image = photo(*size)
            whole = {kind: net.network.result(image, kind) for kind in kinds}
            result = sum(array.nbytes for array in whole.values() if array.ndim == 3)
            budget = net.plan(*size).bytes // 2
            with Segmenter(engine, memory=budget + result) as tiled:
                for kind in dict.fromkeys(kinds):
                    plan = tiled.plan(*size, kinds=(kind,))
                    if kind == kinds[-1]:
                        tiled.network.memory = budget + (whole[kind].nbytes if whole[kind].ndim == 3 else 0)
                        plan = tiled.plan(*size, kinds=(kind,))
                        assert plan.grids and plan.bytes <= tiled.network.memory
                    close(tiled.network.result(image, kind), whole[kind])
                    start = 37
                    tiled.network.memory = budget
                    assert tiled.plan(*size, bands=True).grids
                    found = list(tiled.bands(image, start, kind))
                    assert [top for top, _ in found] == [start + sum(part.shape[-2] for _, part in found[:n])
                                                         for n in range(len(found))]  # fmt: skip
                    close(np.concatenate([part for _, part in found], axis=-2), whole[kind][..., start:, :])
                    tiled.network.memory = budget + result
            with Segmenter(made(name)[0]) as plain:
                for kind in kinds:
                    bands = [part for _, part in plain.bands(image, 5, kind)]
                    close(np.concatenate(bands, axis=-2), whole[kind][..., 5:, :])
            for kind in kinds:
                for found in net.map([image, image], kind=kind):
                    np.testing.assert_array_equal(found, whole[kind])
                bands = [part for _, part in net.bands(image, 5, kind)]
                np.testing.assert_array_equal(np.concatenate(bands, axis=-2), whole[kind][..., 5:, :])


def close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype == np.float32:
        assert np.abs(found - expected).max() <= 1e-5 * max(np.ptp(expected), 1e-3)
    else:
        assert (found != expected).mean() < 1e-3


@pytest.mark.parametrize("name", ["smallest", "smallest-by-far"])
def test_tiles_are_never_smaller_than_the_network_takes(made, name):
    (_, engine), least = made(name), CARDS[name][0].smallest
    with Segmenter(engine) as net:
        image = photo(300, 200)
        expected = net.values(image)
        needed = net.plan(300, 200).bytes
        seen = 0
        for share in (0.9, 0.5, 0.3, 0.2):
            with Segmenter(engine, memory=int(needed * share) + expected.nbytes) as tiled:
                for grid in tiled.plan(300, 200, kinds=("values",)).grids:
                    for axis in (0, 1):
                        spans = grid.spans(axis)
                        seen += len(spans) > 1
                        assert all(span.outer_stop - span.outer_start >= least for span in spans)
                near(tiled.values(image), expected)
        assert seen


def test_a_result_that_exceeds_the_budget_is_refused_in_one_line_and_comes_in_bands(made):
    _, engine = made("none-to-size")
    size = (400, 300)
    with Segmenter(engine, memory=3 * 4 * 400 * 300 - 1) as net:
        with pytest.raises(OverBudgetError, match=r"result .* 400×300 pixels takes 1\.44 MB, .*bands\(\).*--memory"):
            net.values(photo(*size))
        with pytest.raises(OverBudgetError, match=r"result of an image of 400×300"):
            next(net.map([photo(*size)], kind="values"))
        assert sum(part.shape[1] for _, part in net.bands(photo(*size), kind="values")) == 400


def test_bands_of_a_wide_image_are_short(made, monkeypatch):
    monkeypatch.setattr("fcn_deploy.runtime.network.BAND_BYTES", 3 * 4 * 100 * 10)
    _, engine = made("softmax")
    image = photo(95, 100)
    with Segmenter(engine) as net:
        bands = list(net.bands(image, 2, "probabilities"))
        assert [part.shape for _, part in bands] == [(3, 10, 100)] * 9 + [(3, 3, 100)]
        np.testing.assert_array_equal(np.concatenate([part for _, part in bands], 1), net.probabilities(image)[:, 2:])


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("multilabel", "labels", r"gives masks \(multilabel\), not labels; call masks\(\), or pass kind='masks'"),
        ("none", "labels", r"gives values \(none\), not labels; call values\(\), or pass kind='values'"),
        ("none", "masks", r"gives values \(none\), not masks; call values\(\)"),
        ("none", "probabilities", r"gives values \(none\), not probabilities; call values\(\)"),
        ("softmax", "masks", r"gives labels \(softmax\), not masks; call the Segmenter"),
        ("sigmoid", "masks", r"gives labels \(sigmoid\), not masks"),
        ("softmax", "heat", r"kind 'heat'; choose labels, probabilities, masks, values"),
    ],
)
def test_what_a_network_does_not_give_is_refused_by_the_name_of_what_it_does(made, name, wrong, said):
    for path in made(name):
        with Segmenter(path) as net:
            calls = [lambda: net.network.result(photo(9, 9), wrong), lambda: net.map([], kind=wrong),
                     lambda: net.bands(photo(9, 9), kind=wrong)]  # fmt: skip
            calls += {"labels": [lambda: net(photo(9, 9)), lambda: net.map([])]}.get(wrong, [])
            for call in calls:
                with pytest.raises(MisuseError, match=said):
                    call()


def test_engines_on_openvino_give_the_same(made, tmp_path):
    needs("openvino")
    for name in ("none-to-size", "multilabel", "smallest"):
        path, engine = made(name)
        build_engine(import_model(path), tmp_path / "o.engine", replace(FAST, tuning=TuningOptions(("openvino",))))
        with Segmenter(engine) as net, Segmenter(tmp_path / "o.engine") as other:
            assert other.backend == "openvino"
            for size in ((3, 5), (61, 83), (140, 90)):
                near(other.values(photo(*size)), net.values(photo(*size)), 1e-4)
                near(other.network.result(photo(*size), "values"), net.values(photo(*size)), 1e-4)


@pytest.mark.parametrize("name", ["softmax", "multilabel", "none-to-size", "smallest"])
def test_engines_on_a_gpu_give_the_same(made, gpu, tmp_path, monkeypatch, name):
    needs("tensorrt_rtx")
    from gpu_sim import tensorrt_sim

    path, engine = made(name)
    source, gpus = import_model(path), tmp_path / "g.engine"
    build_engine(source, gpus, BuildConfig(target="sm89", sizes=parse_sizes("1x1:64x64:160x192")))
    gpu.load_kernels(ROOT / "runtime" / "backends" / "tensorrt" / "kernels.cu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with EngineFile(gpus) as file:
        (profile,) = file.manifest.gpu.profiles
        least = max(source.card.smallest, 1)
        assert least <= min(profile.min) < least + source.card.size_multiple
        shapes = [{"image": tuple((1, 3, *getattr(profile, which)) for which in ("min", "opt", "max"))}]
        core = optimise_offline(core_of(source).model)
        tensorrt_sim.register(file.read("stage-0.plan"), core.SerializeToString(), shapes)
    with gpu.tensorrt(), Segmenter(gpus) as net, Segmenter(engine) as other:
        kinds = ["values", net.network.kind, *(["probabilities"] if name in PROBABLE else [])]
        for size in ((1, 1), (9, 150), (61, 83), (160, 20), (300, 120)):
            image = photo(*size)
            assert bool(net.plan(*size).grids) == (size == (300, 120))
            for kind in kinds:
                expected = other.network.result(image, kind)
                close(net.network.result(image, kind), expected)
                for found in net.map([image], kind=kind):
                    close(found, expected)
                bands = [part for _, part in net.bands(image, size[0] // 2, kind)]
                close(np.concatenate(bands, axis=-2), expected[..., size[0] // 2 :, :])
            near(net.heatmap(image), other.heatmap(image))
        net.network.memory = 4 * 300 * 120
        with pytest.raises(OverBudgetError, match="result of an image of 300×120 pixels takes"):
            net.network.result(photo(300, 120), "values")


def test_a_network_that_sees_the_whole_image_is_tiled_before_that_alone(tmp_path):
    card = ModelCard(NAMES, whole="GlobalAveragePool pool", **FOUR)
    onnx.save(network(card, total=True), tmp_path / "m.onnx")
    build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", FAST)
    # On a card's word alone, nothing is tiled: any part may be what sees the whole image.
    onnx.save(network(card), tmp_path / "said.onnx")
    report = build_engine(import_model(tmp_path / "said.onnx"), tmp_path / "said.engine", FAST)
    assert [stage.tiles for stage in report.stages] == ["none: GlobalAveragePool pool"]
    image = photo(600, 500)
    with Segmenter(tmp_path / "m.engine") as net:
        expected, needed = net.values(image), net.plan(600, 500).bytes
        assert net.network.manifest.stages[-1].halo is None
    said = pytest.raises(OverBudgetError, match=r"cannot be cut into tiles \(GlobalAveragePool pool")
    with Segmenter(tmp_path / "said.engine", memory=needed // 100) as net, said:
        net(image)
    with Segmenter(tmp_path / "m.engine") as net:
        net.network.memory = needed // 8 + expected.nbytes
        assert net.plan(600, 500, kinds=("values",)).passes
        near(net.values(image), expected)
    with Segmenter(tmp_path / "m.engine") as net:
        net.network.memory = int(needed * 0.8) + expected.nbytes
        plan = net.plan(600, 500, kinds=("values",))
        assert plan.grids[0].count > 1 and plan.grids[1].count == 1
        near(net.values(image), expected)
        near(np.concatenate([part for _, part in net.bands(image, 77, "values")], 1), expected[:, 77:])


def test_an_engine_whose_stages_have_halos_is_not_tiled_where_its_card_names_an_operator(made, tmp_path):
    with EngineFile(made("softmax")[1]) as file:
        members = {name: file.read(name) for name in file.manifest.members}
        card = replace(file.manifest.card, whole="Attention a")
        assert file.manifest.stages[0].halo is not None
        write_engine(tmp_path / "m.engine", replace(file.manifest, card=card), members)
    said = pytest.raises(OverBudgetError, match=r"cannot be cut into tiles \(Attention a\)")
    with Segmenter(tmp_path / "m.engine", memory=100_000) as net, said:
        net(photo(300, 300))


@pytest.mark.slow
def test_infer_writes_masks_and_values_and_probabilities(made, tmp_path):
    save_photos(tmp_path, [(40, 61), (33, 20)])
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    for name in ("multilabel", "none", "none-to-size", "softmax", "sigmoid"):
        engine, out = made(name)[1], tmp_path / name
        card, probable = CARDS[name][0], name in PROBABLE
        words = ["--overlay", "--json", *(["--probabilities"] if probable else [])]
        records = label_records(command("infer", engine, *images, "-o", out, *words))
        assert set(records[0]) == {"schema", "record", "file", "size", "plan", "ms", "overlay", card.kind,
                                   *(["probabilities"] if probable else [])}  # fmt: skip
        with Segmenter(engine) as net:
            for index, record in enumerate(records):
                image = np.asarray(Image.open(images[index]))
                expected = net.network.result(image)
                with Image.open(record["overlay"]) as picture:
                    assert picture.mode == "RGB" and picture.width >= image.shape[1] and picture.height >= len(image)
                if card.kind == "labels":
                    np.testing.assert_array_equal(np.asarray(Image.open(record["labels"])), expected)
                else:
                    assert record[card.kind] == str(out / f"{index}.tif")
                    check_maps(record[card.kind], expected, card.classes)
                if probable:
                    assert record["probabilities"] == str(out / f"{index}.probabilities.tif")
                    check_maps(record["probabilities"], net.probabilities(image), card.score_names)
    again = command("infer", made("none")[1], *images, "-o", tmp_path / "none", "--resume", "--json")
    assert [record["skipped"] for record in label_records(again)] == [True, True]


def check_maps(path, expected, names):
    """One image of named bands, which tifffile opens as one array."""
    found = tifffile.imread(path)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1 and file.pages.first.samplesperpixel == len(expected)
        items = ElementTree.fromstring(file.pages.first.tags[42112].value)
    assert [(item.get("role"), int(item.get("sample")), item.text) for item in items] == [
        ("description", band, name) for band, name in enumerate(names)]  # fmt: skip


def test_infer_takes_large_files_of_them_too(made, tmp_path, monkeypatch):
    from fcn_deploy.runtime.labelling.files import label_files

    monkeypatch.setattr("fcn_deploy.runtime.images.regions.REGION_PIXELS", 10_000)
    image = photo(700, 90)
    tifffile.imwrite(tmp_path / "l.tif", image, photometric="rgb", extratags=[(33550, "d", 3, (1.0, 1.0, 0.0), True)])
    for name in ("multilabel", "none-to-size", "softmax"):
        engine, out, probable = made(name)[1], tmp_path / name, name in PROBABLE
        with Segmenter(engine, memory=700_000) as net:
            (record,) = label_files(net.network, [tmp_path / "l.tif"], out, overlay=True, probabilities=probable)
            assert "error" not in record and record["plan"]["stages"]
            net.network.memory = None
            for kind in [net.network.kind, *(["probabilities"] if probable else [])]:
                expected = net.network.result(image, kind)
                with tifffile.TiffFile(record[kind]) as file:
                    (page,) = file.pages
                    assert page.is_tiled and page.tags[33550].value == (1.0, 1.0, 0.0)
                    close(file.asarray().reshape(expected.shape), expected)
        assert {path.name for path in out.iterdir()} == {
            "l.tif", "l.overlay.png", *(["l.probabilities.tif"] if probable else []),
            *(["l.tif.aux.xml"] if net.network.kind == "labels" else [])}  # fmt: skip


def test_a_large_run_of_two_results_goes_on_where_it_stopped(made, tmp_path, monkeypatch):
    from fcn_deploy.runtime.labelling.regions import label_regions

    image = photo(700, 90)
    tifffile.imwrite(tmp_path / "l.tif", image, photometric="rgb")
    monkeypatch.setattr("fcn_deploy.runtime.network.BAND_BYTES", 100_000)
    with Segmenter(made("multilabel")[1]) as net:
        whole = net.network.bands_of

        def stopped(image, start, *kinds):
            for count, band in enumerate(whole(image, start, *kinds)):
                if count == 3:
                    raise KeyboardInterrupt
                yield band

        out = {"out": tmp_path / "o.tif", "probabilities": tmp_path / "p.tif"}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="interrupted at row"):
            patch.setattr(net.network, "bands_of", stopped)
            label_regions(net.network, tmp_path / "l.tif", **out)
        begun = []
        monkeypatch.setattr(
            net.network, "bands_of", lambda image, start, *kinds: begun.append(start) or whole(image, start, *kinds)
        )
        label_regions(net.network, tmp_path / "l.tif", **out)
        assert begun[0] > 0 and sorted(path.name for path in tmp_path.iterdir()) == ["l.tif", "o.tif", "p.tif"]
        np.testing.assert_array_equal(tifffile.imread(out["out"]), net.masks(image))
        np.testing.assert_array_equal(tifffile.imread(out["probabilities"]), net.probabilities(image))


def test_misuse_of_infer_is_one_line(made, tmp_path):
    Image.fromarray(photo(20, 20)).save(tmp_path / "i.png")
    (tmp_path / "clip.mp4").write_bytes(b"")
    none, softmax = made("none")[1], made("softmax")[1]
    for words, said in (
        ((none, tmp_path / "i.png", "--probabilities"), "gives values, which are written as they are; omit it"),
        ((none, tmp_path), r"clip.mp4 is a video, of which labels are written and no values"),
        ((softmax, tmp_path, "--probabilities"), r"of which labels are written and no probabilities; extract"),
    ):
        assert re.search(said, one_error(command("infer", *words, "-o", tmp_path / "out", ok=2)))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_commands_take_networks_of_masks_and_values_or_say_why_not(made, tmp_path):
    for name in ("multilabel", "none"):
        path, engine = made(name)
        done = command("verify-engine", engine, "--json")
        report = json.loads(done.stdout)
        assert report["passed"] and report["labels_equal"] == (1.0 if name == "multilabel" else None)
        text = command("bench-engine", engine, "--sizes", "40x50,64x64", "--seconds", "0.2").stdout
        assert "40x50" in text and "mixed" in text
        with pytest.raises(MisuseError, match=r"these metrics are of labels; compare what Segmenter\.(masks|values)"):
            open_model(engine)
        with pytest.raises(MisuseError, match="--standalone gives labels, and this model gives"):
            build_standalone(import_model(path), tmp_path / "s.onnx")
    done = command("build-engine", made("none")[0], "-o", tmp_path / "m.engine", "--sizes", "32x32", "--backend",
                   "onnxruntime")  # fmt: skip
    assert re.search(r"values differ from the model's at 8 sizes by \d.\de-\d\d of their range at most", done.stdout)
    assert verify(tmp_path / "m.engine", sizes=[(20, 20)])["labels_equal"] is None


def test_a_card_that_takes_probabilities_for_logits_is_refused(tmp_path):
    for how in ({"before": "Sigmoid"}, {"after": "Sigmoid"}):
        onnx.save(network(ModelCard(("no", "yes"), activation="sigmoid", **FOUR), **how), tmp_path / "m.onnx")
        with pytest.raises(DeployError, match="ends in a Sigmoid, and its card says that it gives logits; mend the"):
            build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", FAST)


def test_a_model_whose_values_are_not_the_engines_is_refused(made, monkeypatch):
    from fcn_deploy.export.build import engine as build

    source = import_model(made("none")[0])
    real = build.core_of

    def wrong(source):
        core = real(source)
        for tensor in core.model.graph.initializer:
            if tensor.name == "b1":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), "b1"))
        return core

    monkeypatch.setattr(build, "core_of", wrong)
    with pytest.raises(DeployError, match=r"values are not the model's: they differ by \d.\de-0\d of their range"):
        build_engine(source, made("none")[1].parent / "wrong.engine", FAST)


@pytest.mark.slow
def test_int8_is_judged_by_values_and_masks(made, tmp_path):
    save_photos(tmp_path, [(60 + index, 70) for index in range(6)])
    for name in ("none", "multilabel"):
        source = import_model(made(name)[0])
        options = QuantizationOptions(int8=True, calib=str(tmp_path), max_drop=5)
        report = build_engine(source, tmp_path / "m.engine", replace(FAST, quantization=options))
        accuracy = report.accuracy
        assert accuracy.metric == "agreement" and accuracy.float32 == 1 and 0.9 < accuracy.int8 < 1
        with Segmenter(made(name)[1]) as net, Segmenter(tmp_path / "m.engine") as low:
            image = photo(61, 83, 9)
            assert low.precision == "int8"
            expected = net.values(image)
            lost = np.abs(low.values(image) - expected).mean() / np.ptp(expected)
            assert 0 < lost < 0.05
        with pytest.raises(MisuseError, match="--labels has a label for each pixel, and this network gives"):
            build_engine(source, tmp_path / "m.engine", replace(FAST, quantization=replace(options, labels=tmp_path)))
