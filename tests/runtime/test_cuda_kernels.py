"""The CUDA kernels against NumPy, on the simulated driver: every type, batches, and indices of the largest images."""

from functools import cache

import numpy as np
import pytest
from fcn_deploy.runtime.backends import KERNELS_PTX
from fcn_deploy.runtime.backends.tensorrt.places import places
from fcn_deploy.runtime.engine_format.stage import COORDINATES, ROUNDINGS, Upsampling
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from fcn_deploy.runtime.pixels.prepare import prepare
from gpu_engines import KERNELS
from helpers import window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fcn_deploy import ModelCard

BLOCK = (32, 8, 1)


@cache
def compiled():
    from fcn_deploy.export.build.targets.tensorrt.kernels import compile_kernels

    return compile_kernels([])[KERNELS_PTX]


@pytest.fixture
def kernels(gpu):
    import pycuda.driver as cuda

    gpu.load_kernels(KERNELS)
    context = cuda.Device(0).retain_primary_context()
    context.push()
    yield Launcher(cuda, cuda.module_from_buffer(compiled()))
    cuda.Context.pop()
    context.detach()


class Launcher:
    """Runs a kernel on arrays: those of `out` are written and returned."""

    def __init__(self, cuda, module):
        self.cuda, self.module = cuda, module

    def __call__(self, name, formats, grid, out, *arguments, block=BLOCK):
        held, given = [], []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                held.append((self.cuda.mem_alloc(max(argument.nbytes, 1)), argument))
                self.cuda.memcpy_htod(held[-1][0], np.ascontiguousarray(argument))
                given.append(int(held[-1][0]))
            else:
                given.append(argument)
        function = self.module.get_function(name)
        function.prepare(formats)
        function.prepared_call(grid, block, *given)
        memory = next(memory for memory, array in held if array is out)
        found = np.empty_like(out)
        self.cuda.memcpy_dtoh(found, memory)
        for memory, _ in held:
            memory.free()
        return found


def grid(size, count=1):
    return -(-size[1] // BLOCK[0]), -(-size[0] // BLOCK[1]), count


def laid_out(arrays, padded):
    """Images or labels of a batch, each in its place: flat, with rubbish between them."""
    room = padded[0] * padded[1] * (arrays[0].shape[2] if arrays[0].ndim == 3 else 1)
    found = np.full((len(arrays), room), 113, arrays[0].dtype)
    for place, array in zip(found, arrays, strict=True):
        place[: array.size] = array.ravel()
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("input_type", ["float32", "float16"])
def test_the_prepare_kernel_equals_numpy_bit_for_bit(kernels, dtype, input_type):
    random = np.random.default_rng(0)
    for channels, sizes in ((3, [(37, 50), (64, 33), (33, 64)]), (1, [(1, 1)]), (5, [(64, 32), (40, 1)])):
        mean, std = tuple(random.uniform(50, 150, channels)), tuple(random.uniform(20, 90, channels))
        card = ModelCard(("a", "b"), channels=channels, dtype=dtype, mean=mean, std=std, size_multiple=32)
        images = [(random.random((*size, channels)) * 255 - 99 * (dtype == "int16")).astype(dtype) for size in sizes]
        if dtype == "float32":
            images[0][0, 0, 0] = 1e-6 * std[0] + mean[0]  # a subnormal float16
            images[0][-1, -1, 0] = 1e9  # infinite in float16
        with np.errstate(over="ignore"):
            expected = np.concatenate([prepare(image, card) for image in images]).astype(input_type)
        factors = [np.float32([1 / s for s in std]), np.float32([m / s for m, s in zip(mean, std, strict=True)])]
        out, padded = np.full_like(expected, 7), expected.shape[2:]
        found = kernels(
            f"prepare_batch_{dtype}_{input_type}", "PPPPPiii", grid(padded, len(images)), out,
            np.int32(sizes), laid_out(images, padded), out, *factors, channels, *padded,
        )  # fmt: skip
        np.testing.assert_array_equal(found, expected)


def labels_by_kernels(kernels, scores, head, card, sizes, padded):
    """Labels of a batch of scores, [N, K, h, w], each [h, w] of `sizes`."""
    count, classes, rows, columns = scores.shape
    single = card.activation != "softmax"
    rule = int(single), card.score_threshold if single else 0.0
    kind = f"{scores.dtype}_{card.label_dtype}"
    best = np.full((count, rows, columns), 99, card.label_dtype)
    best = kernels(
        f"best_of_cells_{kind}", "PPiiif", (-(-rows * columns // 256), 1, count), best,
        scores, best, classes, rows * columns, *rule, block=(256, 1, 1),
    )  # fmt: skip
    table, even = places(head, (rows, columns), padded)
    out = np.full((count, padded[0] * padded[1]), 77, card.label_dtype)
    found = kernels(
        f"label_batch_{kind}", "PPPPPiiiiiiif", grid(padded, count), out,
        np.int32(sizes), table.view(np.uint8), scores, best, out, classes, rows, columns, *padded, int(even), *rule,
    )  # fmt: skip
    return [place[: size[0] * size[1]].reshape(size) for place, size in zip(found, sizes, strict=True)]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_label_kernels_equal_the_exact_head_bit_for_bit(kernels, data):
    mode = data.draw(st.sampled_from(["linear", "nearest", "none"]))
    rows, columns = (data.draw(st.integers(1, 9)) for _ in range(2))
    factor = data.draw(st.sampled_from([(8.0, 8.0), (4.0, 16.0), (3.0, 5.0), (2.5, 3.3), (1.0, 1.0), None]))
    head = Upsampling(mode, data.draw(st.sampled_from(COORDINATES)), factor, data.draw(st.sampled_from(ROUNDINGS)))
    if mode == "none":
        head, padded = Upsampling("none"), (rows, columns)
    else:
        vertical, horizontal = factor or (7, 5.5)
        padded = int(rows * vertical), int(columns * horizontal)
    sizes = [tuple(data.draw(st.integers(1, side)) for side in padded) for _ in range(data.draw(st.integers(1, 3)))]
    single = data.draw(st.booleans())
    classes = 1 if single else data.draw(st.integers(2, 300))
    card = ModelCard(("a", "b"), activation="sigmoid", threshold=0.7) if single else ModelCard(
        tuple(str(n) for n in range(classes)))  # fmt: skip
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = random.normal(size=(len(sizes), classes, rows, columns))
    scores = scores.astype(data.draw(st.sampled_from(["float32", "float16"])))
    found = labels_by_kernels(kernels, scores, head, card, sizes, padded)
    for labels, each, size in zip(found, scores, sizes, strict=True):
        np.testing.assert_array_equal(labels, labels_from_scores(window(each, padded, size), head, card))


def test_cells_whose_corners_agree_are_not_interpolated(kernels):
    """Of such a cell no score is read: these say something else than its corners' best class."""
    card, head = ModelCard(("a", "b", "c")), Upsampling("linear", factor=(8.0, 8.0))
    scores = np.zeros((1, 3, 4, 4), np.float32)
    best, out = np.full((1, 4, 4), 2, np.uint8), np.zeros((1, 32 * 32), np.uint8)
    best[0, 0, 0] = 1
    table, even = places(head, (4, 4), (32, 32))
    found = kernels(
        "label_batch_float32_uint8", "PPPPPiiiiiiif", grid((32, 32)), out,
        np.int32([32, 32]), table.view(np.uint8), scores, best, out, 3, 4, 4, 32, 32, int(even), 0, 0.0,
    )  # fmt: skip
    found = found.reshape(32, 32)
    assert (found[:4, :4] == 1).all()  # beyond the outermost corners there is one cell
    assert (found[:12, :12][4:] == 0).all() and (found[12:] == 2).all() and (found[:, 12:] == 2).all()
    assert card.label_dtype == "uint8"


def test_scores_that_only_differ_between_classes_have_the_first_of_equals(kernels):
    card, head = ModelCard(("a", "b", "c")), Upsampling("linear", factor=(8.0, 8.0))
    scores = np.float32([[[1, 1], [1, 1]], [[1, 2], [1, 1]], [[1, 1], [2, 2]]])[None]
    (found,) = labels_by_kernels(kernels, scores, head, card, [(16, 16)], (16, 16))
    np.testing.assert_array_equal(found, labels_from_scores(window(scores[0], (16, 16), (16, 16)), head, card))


FAR = r"""
KERNELS
// One block of a large grid: that at (from_x, from_y, from_z).
extern "C" __global__ void prepare_far(const int* sizes, const uint8* images, float* out, const float* scale,
                                       const float* shift, unsigned int channels, unsigned int height,
                                       unsigned int width, unsigned int x, unsigned int y, unsigned int z) {
    blockIdx = {x, y, z};
    prepare(sizes, images, out, scale, shift, channels, height, width);
    blockIdx = {0, 0, 0};
}
extern "C" __global__ void best_far(const float* scores, uint16* winners, unsigned int classes, unsigned int cells,
                                    unsigned int x, unsigned int z) {
    blockIdx = {x, 0, z};
    best(scores, winners, classes, cells, 0u, 0.0f);
    blockIdx = {0, 0, 0};
}
extern "C" __global__ void label_far(const int* sizes, const Place* places, const float* scores,
                                     const uint16* winners, uint16* labels, unsigned int classes, unsigned int rows,
                                     unsigned int columns, unsigned int height, unsigned int width, unsigned int x,
                                     unsigned int y, unsigned int z) {
    blockIdx = {x, y, z};
    label(sizes, places, scores, winners, labels, classes, rows, columns, height, width, 1u, 0u, 0.0f);
    blockIdx = {0, 0, 0};
}
"""


class Far:
    """Memory that is larger than this machine's: a part of it is written and read."""

    def __init__(self, cuda, dtype, count):
        self.cuda, self.dtype, self.memory = cuda, np.dtype(dtype), cuda.mem_alloc(count * np.dtype(dtype).itemsize)

    def at(self, index):
        return int(self.memory) + index * self.dtype.itemsize

    def __setitem__(self, index, value):
        self.cuda.memcpy_htod(self.at(index), np.array([value], self.dtype))

    def __getitem__(self, index):
        found = np.empty(1, self.dtype)
        self.cuda.memcpy_dtoh(found, self.at(index))
        return found[0]


def test_no_index_overflows_in_the_last_pixel_of_a_batch_of_20000_by_20000(gpu, tmp_path):
    """Of two images of 16 channels and 900 classes: 6.4 billion values each, and 5.6 billion scores."""
    import pycuda.driver as cuda

    source = tmp_path / "far.cu"
    source.write_text(FAR.replace("KERNELS", KERNELS.read_text()))
    gpu.load_kernels(source)
    gpu.set_memory(1 << 38)
    context = cuda.Device(0).retain_primary_context()
    context.push()

    def launch(name, types, *arguments):
        parameters = ",".join(f".param .{'u64' if one == 'P' else 'u32'} p{n}" for n, one in enumerate(types))
        ptx = f".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry {name}({parameters})\n{{\nret;\n}}\n"
        function = cuda.module_from_buffer(ptx.encode()).get_function(name)
        function.prepare(types)
        block = (256, 1, 1) if name == "best_far" else BLOCK
        function.prepared_call((1, 1), block, *arguments)
        cuda.Context.synchronize()

    side, channels, count = 20000, 16, 2
    area, block = side * side, (side // 32 - 1 + (side % 32 > 0), side // 8 - 1, count - 1)
    sizes, factors = Far(cuda, np.int32, 4), Far(cuda, np.float32, 2 * channels)
    for index in range(4):
        sizes[index] = side
    for index in range(channels):
        factors[index], factors[channels + index] = 2.0, 1.0
    images, out = Far(cuda, np.uint8, count * area * channels), Far(cuda, np.float32, count * area * channels)
    for channel in range(channels):
        images[count * area * channels - channels + channel] = channel
    launch("prepare_far", "PPPPPiiiiii", sizes.at(0), images.at(0), out.at(0), factors.at(0), factors.at(channels),
           channels, side, side, *block)  # fmt: skip
    for channel in range(channels):
        assert out[area * channels + (channel + 1) * area - 1] == 2 * channel - 1
    for memory in (images, out):
        memory.memory.free()

    rows, classes = side // 8, 900
    cells = rows * rows
    scores, best = Far(cuda, np.float32, count * cells * classes), Far(cuda, np.uint16, count * cells)
    for entry in range(classes):
        scores[cells * classes + (entry + 1) * cells - 1] = 5.0 if entry == 299 else 1.0
    launch("best_far", "PPiiii", scores.at(0), best.at(0), classes, cells, -(-cells // 256) - 1, 1)
    assert best[count * cells - 1] == 299
    table, even = places(Upsampling("linear", factor=(8.0, 8.0)), (rows, rows), (side, side))
    where, labels = Far(cuda, np.uint8, table.nbytes), Far(cuda, np.uint16, count * area)
    cuda.memcpy_htod(where.memory, table.view(np.uint8))
    assert even
    for agree in (True, False):
        best[count * cells - 1] = 299 if agree else 7
        best[count * cells - 2] = best[count * cells - 1 - rows] = best[count * cells - 2 - rows] = 299
        for entry in range(classes):  # the last pixels are between the last cell and those before it
            for place in (1, 2, 1 + rows, 2 + rows):
                scores[cells * classes + (entry + 1) * cells - place] = 5.0 if entry == 298 else 1.0
        launch("label_far", "PPPPPiiiiiiii", sizes.at(0), where.at(0), scores.at(0), best.at(0), labels.at(0),
               classes, rows, rows, side, side, *block)  # fmt: skip
        beyond = count * area - 1  # past the last centre there is one cell alone
        inside = count * area - 1 - 5 * side - 5
        assert labels[inside] == (299 if agree else 298), agree
        assert labels[beyond] == (299 if agree else 7)
    for memory in (sizes, factors, scores, best, where, labels):
        memory.memory.free()
    cuda.Context.pop()
    context.detach()
