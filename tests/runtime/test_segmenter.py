"""Segmenter: any size, any thread, one clear line for what cannot be."""

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from fcn_deploy.runtime.process_memory import available_memory
from helpers import check_threads, photo
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter


@pytest.fixture(scope="module")
def net(exports):
    with Segmenter(exports / "narrow.engine") as net:
        yield net


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (600, 2), (31, 33), (97, 61)])
def test_labels_have_the_images_size(net, size):
    labels = net(photo(*size))
    assert labels.shape == size and labels.dtype == np.uint8 and labels.max() < 5


def test_an_image_may_be_a_view(net):
    image = photo(60, 80)
    np.testing.assert_array_equal(net(image[::-1, 5:70]), net(image[::-1, 5:70].copy()))


def test_labels_do_not_depend_on_what_came_before(net):
    small, large = photo(33, 47, 1), photo(150, 222, 2)
    first = net(small)
    net(large)
    np.testing.assert_array_equal(net(small), first)


def test_many_threads_share_one_segmenter(net):
    images = [photo(20 + 13 * i, 150 - 11 * i, i) for i in range(10)]
    check_threads(net, images)


def test_map_keeps_the_order_of_mixed_sizes(net):
    images = [photo(40, 50), photo(10, 10), photo(77, 31)]
    for labels, image in zip(net.map(iter(images)), images, strict=True):
        np.testing.assert_array_equal(labels, net(image))


def test_the_heatmap_is_the_cropped_coarse_scores(net, exports):
    import torch
    from fcn_deploy.fcn.checkpoint import load_checkpoint
    from fcn_deploy.runtime.pixels.prepare import prepare

    model = load_checkpoint(exports / "narrow.safetensors").model
    for size in ((64, 96), (37, 41), (1, 1)):
        image = photo(*size)
        heat = net.heatmap(image)
        assert heat.shape == (5, -(-size[0] // 8), -(-size[1] // 8)) and heat.dtype == np.float32
        x = prepare(image, net.card)[:, :, : size[0], : size[1]]
        with torch.inference_mode():
            expected = model.heatmap(torch.from_numpy(x.copy()))[0].numpy()
        np.testing.assert_allclose(heat, expected, atol=1e-4 * np.ptp(expected))


def test_warmup_takes_sizes(net):
    net.warmup([(40, 60), (1, 1)])


def test_a_plain_onnx_gives_the_same_labels(net, exports, caplog):
    with Segmenter(exports / "narrow.onnx") as plain:
        assert plain.card.classes == net.card.classes and not caplog.text
        for size in ((1, 1), (37, 41), (120, 77)):
            np.testing.assert_array_equal(plain(photo(*size)), net(photo(*size)))
        with pytest.raises(MisuseError, match="build-engine"):
            plain.heatmap(photo(40, 40))


def test_an_onnx_without_a_card_says_what_it_assumes(exports, tmp_path, caplog):
    import onnx

    model = onnx.load(exports / "narrow.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with Segmenter(tmp_path / "bare.onnx") as net:
        assert net.card.classes == tuple(f"class {i}" for i in range(5))
        assert net(photo(30, 50)).shape == (30, 50)
    assert "no model card; assuming" in caplog.text and "123.67" in caplog.text


def one_conv(path, classes, outputs, stride=1, end=None):
    """An ONNX of one convolution, with a card of so many classes (None: without)."""
    import onnx
    from onnx import TensorProto, helper

    weight = np.random.default_rng(0).normal(size=(outputs, 3, stride, stride)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[stride] * 2),
        helper.make_node(end or "Neg", ["c"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, "H", "W"]) for n, c in (("x", 3), ("y", outputs))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [onnx.numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if classes:
        card = ModelCard(tuple(map(str, range(classes))))
        model.metadata_props.add(key="fcn_deploy.card", value=card.to_json())
    onnx.save(model, path)
    return path


def test_plain_onnx_models_that_would_give_wrong_labels_are_refused(tmp_path):
    net = Segmenter(one_conv(tmp_path / "coarse.onnx", 4, 4, stride=8))
    with pytest.raises(DeployError, match=r"gives 8×12 scores for an image of 64×96.*build-engine"):
        net(photo(64, 96))
    with pytest.raises(DeployError, match="has 4 scores, and its model card says 2"):
        Segmenter(one_conv(tmp_path / "card.onnx", 2, 4))
    with pytest.raises(DeployError, match="a logit or a probability cannot be told"):
        Segmenter(one_conv(tmp_path / "one.onnx", None, 1, end="Sigmoid"))


def test_an_image_over_the_memory_budget_is_refused_before_it_runs(exports):
    with Segmenter(exports / "narrow.engine", memory=5_000_000) as net:
        assert net(photo(60, 60)).shape == (60, 60)
        with pytest.raises(
            DeployError, match=r"20000×20000 pixels needs .* in the smallest tiles it takes .* raise it"
        ):
            net.plan(20000, 20000)
    with Segmenter(exports / "narrow.engine", memory=1_000_000_000) as net:
        plan = net.plan(20000, 20000)
        assert plan.grids[0].count > 1 and plan.bytes <= 1_000_000_000 and 1 < plan.overhead < 10
    assert 100e6 < available_memory() < 1e13


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda"}, "device 'cuda'"),
        ({"threads": 0}, "threads is 0"),
        ({"memory": -1}, "memory is -1"),
        ({"memory": "2GB"}, "memory is '2GB'"),
        ({"memory": True}, "memory is True"),
    ],
)
def test_bad_arguments(exports, options, said):
    with pytest.raises(MisuseError, match=said):
        Segmenter(exports / "narrow.engine", **options)


def test_a_budget_that_is_too_small_is_named_as_it_was_given(exports):
    with (
        Segmenter(exports / "narrow.engine", memory=2_000_000) as net,
        pytest.raises(DeployError, match=r"budget of 1\.00 MB.*; of the 2\.00 MB given, the rest is for its labels$"),
    ):
        net(np.zeros((1000, 1000, 3), np.uint8))


def test_bad_models(tmp_path, exports):
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(DeployError, match="does not exist"):
        Segmenter(tmp_path / "none.engine")
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(DeployError, match="cannot load the model"):
        Segmenter(tmp_path / "x.onnx")
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 10]) for name in "xy"]
    graph = helper.make_graph([node], "classifier", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "c.onnx")
    with pytest.raises(DeployError, match=r"segmentation model takes float32 \[N,C,H,W\]"):
        Segmenter(tmp_path / "c.onnx")


def test_a_closed_segmenter_says_so(exports):
    net = Segmenter(exports / "narrow.engine")
    net.close()
    net.close()
    with pytest.raises(MisuseError, match="closed"):
        net(photo(10, 10))


def test_the_runtime_imports_nothing_heavy():
    code = """
import sys
import fcn_deploy
assert "numpy" not in sys.modules
fcn_deploy.Segmenter
heavy = {"torch", "onnx", "onnxruntime", "PIL", "typer", "rich", "tifffile"}
heavy |= {f"fcn_deploy.{floor}" for floor in ("fcn", "export", "calibration")}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_photograph_loads_nothing_that_it_does_not_need(exports, tmp_path):
    """Each takes milliseconds of a run of which the network has a few tens."""
    Image.fromarray(photo(360, 480)).save(tmp_path / "a.jpg")
    code = f"""
import contextlib, sys
from fcn_deploy.runtime.infer import main
sys.argv = ["label-images", {str(exports / "narrow.engine")!r}, {str(tmp_path / "a.jpg")!r}, "-o", {str(tmp_path)!r}]
with contextlib.suppress(SystemExit):
    main()
ours = ("backends.openvino", "labelling.objects", "labelling.regions", "reuse", "tiling.pooled")
others = {{"numpy.ma", "typer", "rich", "tifffile", "html", "secrets", "PIL.ImageOps"}}
print(sorted((others | {{f"fcn_deploy.runtime.{{name}}" for name in ours}}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "a.png").exists() and done.stdout.splitlines()[-1] == "[]"


def test_a_missing_backend_names_what_to_install(exports):
    code = f"""
import sys
sys.modules["onnxruntime"] = None
from fcn_deploy import Segmenter, DeployError
try:
    Segmenter({str(exports / "narrow.engine")!r})
except DeployError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "onnxruntime is not installed; run: pip install 'fcn-deploy[cpu]'" in done.stdout


def labelled(net, image):
    """In a worker process: its labels, and how the Segmenter was opened there."""
    return net(image), net.precision, net.network.memory, net.refine


@pytest.mark.slow
def test_worker_processes_are_given_a_segmenter(exports):
    images = [photo(61, 97), photo(20, 30, 1)]
    with (
        Segmenter(exports / "narrow.engine", threads=1, memory=10**9, refine=True) as net,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers,
    ):
        for image, found in zip(images, workers.map(labelled, [net, net], images), strict=True):
            labels, *opened = found
            np.testing.assert_array_equal(labels, net(image))
            assert opened == ["float32", 10**9, True]


def test_a_pickled_segmenter_opens_the_file_again_from_any_folder(exports, tmp_path, monkeypatch):
    shutil.copy(exports / "narrow.engine", tmp_path / "m.engine")
    monkeypatch.chdir(tmp_path)
    with Segmenter("m.engine", memory=10**9) as net:
        net.network.memory = None  # what it is now counts
        data, expected = pickle.dumps(net), net(photo(40, 50))
    monkeypatch.chdir("/")
    with pickle.loads(data) as again:
        np.testing.assert_array_equal(again(photo(40, 50)), expected)
        assert again.network.memory is None
    (tmp_path / "m.engine").unlink()
    with pytest.raises(MisuseError, match=r"m\.engine does not exist"):
        pickle.loads(data)


def test_a_closed_segmenter_does_not_pickle(exports):
    net = Segmenter(exports / "narrow.engine")
    net.close()
    with pytest.raises(MisuseError, match="closed"):
        pickle.dumps(net)


def test_the_public_members_are_few():
    """What else our own commands use is Network's, and no part of the API."""
    assert {name for name in vars(Segmenter) if not name.startswith("_")} == {
        "card", "backend", "precision", "refine", "plan", "probabilities", "masks", "values", "heatmap", "map", "bands",
        "warmup", "close", "outputs", "results",
    }  # fmt: skip
