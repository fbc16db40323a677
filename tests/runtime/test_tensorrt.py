"""Engines for NVIDIA GPUs: the whole backend on a simulated driver, with plans that TensorRT for RTX built."""

import gc
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.runtime.backends import KERNELS_PTX
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Profile
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.verify import verify
from gpu_engines import KERNELS, ROOT, SIZES, changed, profiles_of, ready
from helpers import needs, one_error, photo, save_photos, window
from PIL import Image

from fcn_deploy import DeployError, MisuseError, Segmenter


def sizes(count, seed=0, largest=(320, 416)):
    random = np.random.default_rng(seed)
    return [tuple(int(random.integers(1, side + 1)) for side in largest) for _ in range(count)]


def runnable(net, size):
    return any(p.holds(padded_size(*size, net.card)) for p in net.network.manifest.gpu.profiles)


@pytest.mark.slow
def test_labels_equal_the_cpu_engines_at_200_sizes_across_profiles(gpu_engine, exports, gpu):
    used = set()
    with Segmenter(gpu_engine) as net, Segmenter(exports / "narrow.engine") as cpu:
        wanted = [size for size in sizes(400) if runnable(net, size)][:200]
        assert len(wanted) == 200
        for index, (height, width) in enumerate(wanted):
            image = photo(height, width, index)
            plan = net.plan(height, width)
            used.add(plan.profile)
            scores = cpu.network.scores(image)
            np.testing.assert_allclose(net.network.scores(image), scores, atol=1e-4 * np.ptp(scores))
            found, expected = net(image), cpu(image)
            # The same core: only ties of the head may be broken otherwise.
            assert (found != expected).mean() < 1e-3, (height, width)
        assert used == {0, 1, 2} and len(net.network.backend.lanes[0].contexts) == 3
    assert gpu.counts()["allocations"] == gpu.counts()["pinned"] == gpu.counts()["contexts"] == 0


def test_labels_are_refined_as_the_cpu_engines_are(gpu_engine, exports):
    refined, narrow = Segmenter(gpu_engine, refine=True), exports / "narrow.engine"
    with refined as net, Segmenter(narrow, refine=True) as cpu, Segmenter(narrow) as plain:
        for size in [size for size in sizes(40) if runnable(net, size)][:10]:
            image = photo(*size)
            assert (net(image) != cpu(image)).mean() < 1e-3, size
        assert (net(image) != plain(image)).any()
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in net.bands(image)]), net(image))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_engines_in_float16_and_int8_take_float16_and_give_the_labels_of_their_reference(
    exports, gpu, tmp_path, precision, monkeypatch
):
    needs("tensorrt_rtx")
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.build.targets.tensorrt import builder as tensorrt
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.export.quantization.options import QuantizationOptions
    from fcn_deploy.runtime.sizes import parse_sizes
    from gpu_sim import tensorrt_sim

    save_photos(tmp_path, [(90 + index, 100) for index in range(4)])
    cores, real = [], tensorrt.build_plan
    monkeypatch.setattr(tensorrt, "build_plan", lambda core, *rest: cores.append(core) or real(core, *rest))
    options = QuantizationOptions(int8=precision == "int8", fp16=True, calib=str(tmp_path), max_drop=100)
    config = BuildConfig(target="sm89", quantization=options, sizes=parse_sizes(SIZES))
    path = tmp_path / "m.engine"
    build_engine(import_model(exports / "narrow.onnx"), path, config)
    gpu.load_kernels(KERNELS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with EngineFile(path) as file:
        plan = file.read("stage-0.plan")
        tensorrt_sim.register(plan, cores[0].SerializeToString(), profiles_of(file.manifest.gpu))
    with gpu.tensorrt(), Segmenter(path) as net:
        assert (net.network.backend.network.input_type, net.network.backend.network.score_type) == (
            "float16",
            "float16",
        )
        report = verify(path)
        # A deep random network amplifies what INT8 rounds; trained ones are judged in test_mixed_precision.py.
        assert report["passed"] or precision == "int8"
        for size in ((61, 97), (130, 200), (311, 401)):
            image = photo(*size)
            scores, plan = net.network.scores(image), net.plan(*size)
            expected = labels_from_scores(window(scores, plan.padded, size), net.network.upsampling, net.card)
            assert (net(image) != expected).mean() < 1e-3


@pytest.mark.slow
def test_thousands_of_calls_from_8_threads_leak_nothing(gpu_engine, exports, gpu):
    with Segmenter(gpu_engine) as net, Segmenter(exports / "narrow.engine", threads=1) as cpu:
        wanted = [size for size in sizes(300, 1, (128, 160)) if runnable(net, size)]
        images = [photo(*size, index) for index, size in enumerate(wanted[:40])]
        expected = [cpu(image) for image in images]
        errors = []

        def work(seed, calls=250):
            random = np.random.default_rng(seed)
            for _ in range(calls):
                index = int(random.integers(len(images)))
                if (net(images[index]) != expected[index]).mean() > 1e-3:
                    errors.append(images[index].shape)

        with ThreadPoolExecutor(8) as pool:
            # Both slots see the largest image, and the contexts their largest memory.
            list(pool.map(net, [np.zeros((128, 160, 3), np.uint8)] * 8 + [photo(320, 416)] * 8))
            list(pool.map(lambda seed: work(seed, 20), range(8)))
            before = gpu.counts()
            list(pool.map(work, range(8)))
        after = gpu.counts()
        assert not errors and not gpu.misuse()
        for name in ("allocations", "bytes", "pinned", "pinned_bytes", "streams", "events", "modules"):
            assert after[name] == before[name], name
        lanes = net.network.backend.lanes
        assert all(len(lane.contexts) <= 3 and len(lane.graphs) <= 16 for lane in lanes)
        assert 0 < after["graph_execs"] <= 32


def calls_of(gpu, work):
    """What `work` does on the GPU: names of copies, kernels, networks and graphs, and all that was called."""
    gpu.clear()
    gpu.log(True)
    work()
    gpu.log(False)
    names = ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuLaunchKernel", "gpusim_launch_task", "cuGraphLaunch")
    return [call.name for call in gpu.calls() if call.name in names], gpu.calls()


def test_a_size_already_seen_takes_one_graph_launch_and_nothing_else(gpu_engine, gpu):
    with Segmenter(gpu_engine) as net:
        image = photo(150, 170)
        for _ in range(4):
            expected = net(image)
        found = []
        launched, calls = calls_of(gpu, lambda: found.append(net(image)))
        np.testing.assert_array_equal(found[0], expected)
        assert launched == ["cuGraphLaunch"]
        names = [call.name for call in calls]
        assert not [name for name in names if "Alloc" in name or "Free" in name or name.startswith("cuCtxSync")]
        # Another size that is padded likewise comes by the same graph.
        assert calls_of(gpu, lambda: net(photo(129, 161)))[0] == ["cuGraphLaunch"]


def test_a_new_size_takes_two_copies_three_kernels_and_one_network(gpu_engine, gpu):
    with Segmenter(gpu_engine) as net:
        net(photo(150, 170))  # of the same profile, and as large
        launched, calls = calls_of(gpu, lambda: net(photo(100, 170)))
        assert launched == [
            "cuMemcpyHtoDAsync", "cuLaunchKernel", "gpusim_launch_task", "cuLaunchKernel", "cuLaunchKernel",
            "cuMemcpyDtoHAsync",
        ]  # fmt: skip
        kernels = [call.detail.split("_")[0] for call in calls if call.name == "cuLaunchKernel"]
        assert kernels == ["prepare", "best", "label"]
        assert not any(call.detail == "pageable" for call in calls)
        up, down = (next(call.bytes for call in calls if direction in call.name) for direction in ("HtoD", "DtoH"))
        # The padded image with its labels' places, and the labels: 16 bytes for the sizes, and for each row and column.
        assert (up, down) == (128 * 192 * 3 + 16 * (1 + 128 + 192), 128 * 192)


def test_a_batch_of_small_images_takes_a_quarter_of_the_launches_and_copies_or_less(gpu_engine, gpu):
    """Of what an image alone took before there were batches: two copies, two kernels and a network, or its graph."""
    images = [photo(90 + index % 7, 65 + index % 32, index) for index in range(8)]  # of one padded size
    with Segmenter(gpu_engine) as net:
        assert net.network.manifest.gpu.profiles[0].batch == 8
        expected = [net(image) for image in images]
        backend = net.network.backend
        for launches in (6, 6, 7, 1):  # as it is, in a context of its own, captured (and launched), by its graph
            found = []
            launched, _ = calls_of(gpu, lambda found=found: found.extend(backend.labels(images)))
            assert len(launched) <= launches <= 0.25 * 5 * len(images), launched
            for labels, each in zip(found, expected, strict=True):
                np.testing.assert_array_equal(labels, each)


def test_a_stream_batches_small_images_of_equal_padded_size_where_that_pays(gpu_engine, gpu):
    from fcn_deploy.runtime.planning.batch_cost import BatchCost

    images = [photo(90 + index % 7, 65 + index % 32, index) for index in range(32)]
    with Segmenter(gpu_engine) as net:
        expected = [net(image) for image in images]
        net.network.batch_costs[96, 96] = BatchCost([2.0] * 8, [1.0] * 8, True, net.network.backend.first_runs - 1)
        found = []
        list(net.map(images))  # graphs are captured
        list(net.map(images))
        launched, _ = calls_of(gpu, lambda: found.extend(net.map(images)))
        for labels, each in zip(found, expected, strict=True):
            np.testing.assert_array_equal(labels, each)
        assert len(launched) <= 0.25 * 5 * len(images), launched
        del net.network.batch_costs[96, 96]
        np.testing.assert_array_equal(list(net.map(images[:16]))[3], expected[3])  # measured, in turns
        assert net.network.batch_costs[96, 96].equal is True


def test_without_memory_for_two_lanes_one_has_it_all(rtx_engine, gpu):
    with Segmenter(rtx_engine) as net:
        image, other = photo(320, 416), photo(40, 50)
        expected, small = net(image), net(other)
        gpu.set_memory(gpu.counts()["bytes"] + 300_000)
        errors = []

        def work(index):
            try:
                for _ in range(8):
                    np.testing.assert_array_equal(net(image if index < 4 else other), expected if index < 4 else small)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads)
    gpu.clear()  # what did not fit was refused, as it should be


def test_calls_of_two_threads_share_no_stream(rtx_engine, gpu):
    with Segmenter(rtx_engine) as net:
        net.warmup([(60, 90)])
        ready = threading.Barrier(2)
        real = net.network.backend._labels_of

        def together(*arguments):
            ready.wait(20)
            return real(*arguments)

        net.network.backend._labels_of = together
        threads = [threading.Thread(target=net, args=(photo(60, 90),)) for _ in range(2)]

        def work():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)

        launched, calls = calls_of(gpu, work)
        assert launched == ["cuGraphLaunch"] * 2
        assert len({call.stream for call in calls if call.name == "cuGraphLaunch"}) == 2


def test_graphs_are_bounded_and_the_oldest_goes(gpu_engine, gpu):
    from fcn_deploy.runtime.backends.tensorrt.backend import TensorRTBackend

    with EngineFile(gpu_engine) as file:
        kernels = {name: file.read(name) for name in file.manifest.members if name.startswith("kernels")}
        backend = TensorRTBackend(file.manifest, file.read("stage-0.plan"), kernels, graphs=2)
    try:
        lane, other = backend.lanes
        for width in (128, 96, 64, 32, 160):
            for _ in range(4):
                backend.labels([photo(32, width)])
            if not lane.graphs:
                lane, other = other, lane
            if width == 32:
                assert [batch.padded for batch in lane.graphs] == [(32, 64), (32, 32)]
            assert len(lane.graphs) <= 2 and gpu.counts()["graph_execs"] <= 2
        # The last one is larger than all before: buffers grew, whose old addresses the graphs had.
        assert [batch.padded for batch in lane.graphs] == [(32, 160)]
        assert not other.graphs and not other.held  # calls of one thread take one lane
    finally:
        backend.close()


def test_the_profile_with_the_nearest_opt_runs_an_image(rtx_engine):
    with Segmenter(rtx_engine) as net:
        assert [net.plan(*size).profile for size in ((1, 1), (128, 128), (128, 160), (300, 400))] == [0, 1, 1, 2]
        with pytest.raises(DeployError, match=r"32×448 \(padded\) is outside every profile .*build it with --sizes"):
            net(photo(10, 420))
        assert net(photo(20, 30)).shape == (20, 30)  # as well as before


def small_field(path):
    """A network whose receptive field is a few pixels: its tiles fit into small profiles."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(6, 3, 3, 3)), "v": random.normal(size=(4, 6, 3, 3))}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w"], ["a"], pads=[1] * 4, strides=[2, 2]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "v"], ["c"], pads=[1] * 4, strides=[2, 2]),
            helper.make_node("Resize", ["c", "", "four"], ["logits"], mode="linear"),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4, "H", "W"])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
        + [numpy_helper.from_array(np.float32([1, 1, 4, 4]), "four")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


def test_images_outside_every_profile_are_run_in_tiles(gpu, tmp_path):
    needs("tensorrt_rtx")
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.runtime.sizes import parse_sizes

    small_field(tmp_path / "small.onnx")
    source = import_model(tmp_path / "small.onnx")
    build_engine(source, tmp_path / "cpu.engine", BuildConfig(latency_sizes=[(32, 32)]))
    sizes = parse_sizes("1x1:32x32:48x64,48x64:64x64:96x96")
    build_engine(source, tmp_path / "gpu.engine", BuildConfig(target="sm89", sizes=sizes))
    (tmp_path / "sim").mkdir()
    image = photo(301, 207)
    running = ready(
        gpu,
        (tmp_path / "gpu.engine", optimise_offline(core_of(source).model).SerializeToString()),
        tmp_path / "sim",
        "tensorrt_rtx",
    )
    with Segmenter(next(running)) as net, Segmenter(tmp_path / "cpu.engine") as reference:
        plan = net.plan(301, 207)
        assert plan.grids[0].count > 10 and 1 < plan.overhead < 2
        assert (net(image) == reference(image)).mean() > 0.9999
        assert np.abs(net.network.scores(image) - reference.network.scores(image)).max() < 1e-4
        assert not net.plan(80, 80).grids
        rows = np.concatenate([labels for _, labels in net.bands(image, 100)])
        assert (rows == reference(image)[100:]).mean() > 0.9999
    next(running, None)


def test_what_was_compiled_is_kept_for_the_next_time(rtx_engine, tmp_path):
    for _ in range(2):
        with Segmenter(rtx_engine) as net:
            net(photo(40, 50))
        (cache,) = (tmp_path / "cache" / "fcn-deploy").iterdir()
        assert cache.stat().st_size > 0
    cache.write_bytes(b"damaged")
    with Segmenter(rtx_engine) as net:
        assert net(photo(40, 50)).shape == (40, 50)


def test_closing_waits_for_calls_and_ends_them(rtx_engine, gpu):
    net, failures, done = Segmenter(rtx_engine), [], []

    def work():
        try:
            while True:
                done.append(net(photo(60, 60)).shape)
        except MisuseError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(done) < 8:
        pass
    net.close()
    for thread in threads:
        thread.join(20)
    assert len(failures) == 4 and all("closed" in text for text in failures)
    net.close()
    assert gpu.counts()["allocations"] == 0


def test_memory_that_runs_out_is_one_line_and_leaves_the_engine_usable(rtx_engine, gpu):
    with Segmenter(rtx_engine) as net:
        net(photo(40, 50))
        gpu.set_memory(gpu.counts()["bytes"] + 200_000)
        with pytest.raises(DeployError, match=r"an image of 320×416 .* of the GPU's memory, and .* GB are free"):
            net(photo(320, 416))
        assert net(photo(40, 50)).shape == (40, 50)
        gpu.set_memory(8 << 30)
        assert net(photo(320, 416)).shape == (320, 416)
    gpu.set_memory(100_000)
    with pytest.raises(
        DeployError, match=r"cannot load the plan \(.*out of memory.*\); close what else uses the GPU's"
    ):
        Segmenter(rtx_engine)
    gpu.clear()  # what did not fit was refused, as it should be


def test_a_gpu_that_failed_says_so_at_every_later_call(rtx_engine, gpu, monkeypatch):
    net = Segmenter(rtx_engine)
    cuda = net.network.backend._cuda

    def broken(*arguments):
        raise cuda.Error("cuStreamSynchronize failed: an illegal memory access was encountered")

    lane = net.network.backend.lanes[0]
    monkeypatch.setattr(lane, "labels", broken)
    with monkeypatch.context() as patched:
        patched.setattr(lane, "settle", broken)
        with pytest.raises(DeployError, match="the GPU failed while it ran"):
            net(photo(40, 50))
    monkeypatch.undo()
    with pytest.raises(DeployError, match="cannot be used in this process any more"):
        net(photo(40, 50))
    net.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"targets": ("sm86", "sm120")},
            r"is for sm86, sm120, and this GPU \(Simulated GPU\) is sm89; build it with --target sm89, or on this",
        ),
        ({"version": "1.2.0.5"}, r"built by tensorrt_rtx 1.2.0.5, and 1.7.* pip install 'tensorrt-rtx-cu13==1.2.0.5'"),
        (
            {"library": "tensorrt", "version": "10.16.1.11"},
            r"is not installed; run: pip install 'fcn-deploy\[tensorrt\]' 'tensorrt-cu13==10.16.1.11', the version",
        ),
        ({"profiles": (Profile((32, 32), (32, 32), (64, 64)),)}, "disagree on the profiles"),
        ({"members": lambda m: m | {"stage-0.plan": m["stage-0.plan"][:-9] + bytes(9)}}, "cannot load the plan"),
        ({"members": lambda m: {n: b for n, b in m.items() if "kernels" not in n}}, "kernels cannot be loaded"),
        (
            {"members": lambda m: {n: b.replace(b"label_batch", b"label_older") for n, b in m.items()}},
            r"has GPU kernels of another release \(there is no label_batch_float32_uint8\); build it again",
        ),
        ({"members": lambda m: m | {n: b"junk" for n in m if "kernels" in n}}, "kernels cannot be loaded"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_they_run(rtx_engine, gpu, tmp_path, changes, said):
    path = changed(rtx_engine, tmp_path / "x.engine", **changes)
    with pytest.raises(DeployError, match=said):
        Segmenter(path)
    gc.collect()
    assert gpu.counts()["allocations"] == 0
    gpu.clear()


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ((7, 5), "is sm75; build it with --target sm75, or on this machine with --target cuda$"),
        ((9, 0), "is sm90; build it on this machine with --target cuda$"),  # there is no --target sm90
        ((7, 0), "is sm70; no library here has plans for GPUs before sm75: build one with --target cpu$"),
    ],
)
def test_an_engine_on_another_gpu_names_the_way_that_serves_that(rtx_engine, gpu, capability, said):
    gpu.set_capability(*capability)
    with pytest.raises(DeployError, match=said):
        Segmenter(rtx_engine)
    assert gpu.counts()["allocations"] == 0


def test_devices(rtx_engine, exports, gpu):
    with pytest.raises(MisuseError, match=r"cuda:1: there are 1 GPUs"):
        Segmenter(rtx_engine, device="cuda:1")
    with pytest.raises(MisuseError, match="an engine for sm89"):
        Segmenter(rtx_engine, device="cpu")
    with pytest.raises(MisuseError, match="an engine for cpu"):
        Segmenter(exports / "narrow.engine", device="cuda")
    with pytest.raises(MisuseError, match="choose auto, cpu, cuda"):
        Segmenter(rtx_engine, device="gpu")
    with Segmenter(rtx_engine, device="cuda:0") as net:
        assert net.backend == "tensorrt_rtx 1.7.1.116"
    gpu.set_devices(0)
    with pytest.raises(DeployError, match="no NVIDIA GPU can be used here"):
        Segmenter(rtx_engine)


def test_the_gpus_own_code_is_preferred_and_ptx_serves_the_others(rtx_engine, gpu, tmp_path):
    without = changed(
        rtx_engine, tmp_path / "x.engine", members=lambda m: {n: b for n, b in m.items() if "cubin" not in n}
    )
    for path in (rtx_engine, without):
        with EngineFile(path) as file:
            assert KERNELS_PTX in file.manifest.members
        with Segmenter(path) as net:
            assert net(photo(33, 44)).shape == (33, 44)


@pytest.mark.parametrize("words", [["fcn_deploy.runtime.infer"], ["fcn_deploy.runtime.verify"]])
def test_command_lines_on_a_simulated_gpu(gpu_built, gpu, tmp_path, words):
    from gpu_sim import tensorrt_sim

    path, core = gpu_built
    (tmp_path / "plans").mkdir()
    with EngineFile(path) as file:
        tensorrt_sim.save(tmp_path / "plans", file.read("stage-0.plan"), core, profiles_of(file.manifest.gpu))
    Image.fromarray(photo(70, 90)).save(tmp_path / "a.png")
    Image.fromarray(photo(500, 90)).save(tmp_path / "b.png")
    arguments = [str(path)]
    if words == ["fcn_deploy.runtime.infer"]:
        arguments += [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "-o", str(tmp_path / "out"), "--explain"]
    environment = os.environ | {"PYTHONPATH": "tests", "FCN_GPU_SIM_PLANS": str(tmp_path / "plans"),
                                "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
    command = [sys.executable, "-m", "gpu_sim", *words, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if words == ["fcn_deploy.runtime.infer"]:
        assert done.returncode == 1, done.stderr  # of two images one is outside the profiles
        assert "profile 0" in done.stdout and (tmp_path / "out" / "a.png").exists()
        assert "outside every profile" in one_error(done)
    else:
        assert done.returncode == 0, done.stderr
        assert "golden sample: ok" in done.stdout and "tensorrt_rtx 1.7" in done.stdout
        assert len(re.findall(r"\d+x\d+ +[\d.]+ ms", done.stdout)) == 3  # the OPT of each profile


def test_without_a_driver_one_line_says_what_to_do(gpu_built, tmp_path):
    pytest.importorskip("pycuda", reason="pycuda is not installed; run: python tests/gpu_sim/build.py")
    command = [sys.executable, "-m", "fcn_deploy.runtime.verify", str(gpu_built[0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU that runs the engine")
    assert "is an engine for sm89, and no NVIDIA" in one_error(done) and "--target cpu" in one_error(done)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("cuda", "cuda.bindings is not installed; run: pip install cuda-bindings"), ("tensorrt_rtx", "fcn-deploy[rtx]")],
)
def test_a_package_that_is_missing_is_named_with_how_to_install_it(rtx_engine, gpu, monkeypatch, missing, said):
    absent = (
        {"cuda", "pycuda", "fcn_deploy.runtime.backends.tensorrt.cuda_bindings"} if missing == "cuda" else {missing}
    )
    for name in [name for name in sys.modules if name in absent or name.split(".")[0] in absent] + list(absent):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeployError, match=re.escape(said)):
        Segmenter(rtx_engine)
