"""Ranges of activations, from histograms that are collected in constant memory over images of any size."""

import base64
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.files import replacing

BINS = 4096
CHUNK = 1 << 18  # values at a time: they are read several times, and stay in the cache
MOST_STEP = 16  # one of so many neighbouring values is counted, where there are many
LEAST_COUNTED = 1 << 12  # values of a tensor and image
METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
VERSION = 2


class Histogram:
    """Counts of a tensor's values in BINS equal bins over [-limit, limit].

    The limit is a power of two that doubles as larger values come; pairs of bins then become one, so every
    count stays exact.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Count float32 values of any shape. Raises ValueError where one is NaN or infinite."""
        if values.size:
            self.see(float(values.min()), float(values.max()))
            self.count(values)

    def see(self, low: float, high: float) -> None:
        """Take in the least and the largest of some values, before they are counted.

        Raises ValueError where one is NaN or infinite.
        """
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("it has NaN or infinite values")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach(max(-low, high))

    def count(self, values: np.ndarray, times: int = 1) -> None:
        """Count float32 values within what was seen, each for so many that are like it."""
        self.counts += times * self._count(values.reshape(-1))

    def _count(self, values: np.ndarray) -> np.ndarray:
        if self.limit == 0.0:  # nothing but zeros so far
            counts = np.zeros(BINS, np.int64)
            counts[BINS // 2] = values.size - np.count_nonzero(values)
            return counts
        # The limit is a power of two, so a value's bin at a larger limit is half its bin at this one.
        limits = (-self.limit, self.limit)
        counts = need("fast_histogram", "export").histogram1d(values, BINS, limits)
        return np.asarray(counts, np.int64)

    def _reach(self, magnitude: float) -> None:
        if magnitude < self.limit or magnitude == 0.0:
            return
        wanted = 2.0 ** (np.floor(np.log2(max(magnitude, 1e-30))) + 1)  # above it, never equal
        if self.limit == 0.0:
            self.limit = wanted
        while self.limit < wanted:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 4 : BINS // 4 * 3] = pairs
            self.limit *= 2

    @property
    def centers(self) -> np.ndarray:
        """Middle of each bin."""
        return ((np.arange(BINS) + 0.5) / (BINS / 2) - 1) * self.limit

    def range(self, method: str, symmetric: bool = False) -> tuple[float, float]:
        """(low, high) to quantize by, always around zero.

        Args:
            method: `minmax`: what was seen. `percentile`: all but 0.01 % of the values. `mse`: the clipping of
                least squared error of 8-bit rounding. `entropy`: of least KL divergence (Migacz, 2017).
            symmetric: low = -high.
        """
        if method not in METHODS:
            raise MisuseError(f"method {method!r}; choose one of {', '.join(METHODS)}")
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if high <= low:
            return (-1.0, 1.0) if symmetric else (0.0, 1.0)  # always zero: any range serves
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        if method == "percentile":
            share = self.counts.cumsum() / self.counts.sum()
            tail = (1 - PERCENTILE / 100) / (2 if low < 0 else 1)
            edges = (np.arange(BINS + 1) / (BINS / 2) - 1) * self.limit
            top = edges[min(int(np.searchsorted(share, 1 - tail)) + 1, BINS)]
            bottom = edges[int(np.searchsorted(share, tail))] if low < 0 else 0.0
            low, high = max(low, min(bottom, 0.0)), min(high, max(top, 0.0))
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
        elif method == "mse":
            low, high = self._least_error(low, high)
        elif method == "entropy":
            low, high = self._least_divergence(low, high)
        return (low, high) if high > low else (low, low + 1e-6)

    def _least_error(self, low: float, high: float) -> tuple[float, float]:
        seen = np.flatnonzero(self.counts)
        values, counts = self.centers[seen], self.counts[seen].astype(np.float64)
        best = (np.inf, low, high)
        for share in np.linspace(0.2, 1.0, 81):
            bottom, top = low * share, high * share
            step = (top - bottom) / 255
            rounded = np.clip(np.round(values / step), np.round(bottom / step), np.round(top / step)) * step
            error = float((counts * (values - rounded) ** 2).sum())
            if error < best[0]:
                best = (error, bottom, top)
        return best[1:]

    def _least_divergence(self, low: float, high: float) -> tuple[float, float]:
        magnitudes = self.counts[BINS // 2 :] + self.counts[BINS // 2 - 1 :: -1]
        # Migacz takes the first bin for the second's: a ReLU's zeros would outweigh all else.
        magnitudes[0] = magnitudes[1]
        levels = 128 if low < 0 else 255
        width = self.limit / len(magnitudes)
        used = min(len(magnitudes), int(np.ceil(max(-low, high) / width)))
        if used <= levels:
            return low, high
        best = (np.inf, used)
        for cut in range(levels, used + 1, max(1, (used - levels) // 128)):
            reference = magnitudes[:cut].astype(np.float64)
            reference[-1] += magnitudes[cut:].sum()
            # As many bins to each level as there is room for; empty ones stay empty.
            level = np.arange(cut) * levels // cut
            filled = magnitudes[:cut] > 0
            totals = np.bincount(level, magnitudes[:cut], levels)
            members = np.bincount(level, filled, levels)
            candidate = np.where(filled, (totals / np.maximum(members, 1))[level], 0)
            mask = (reference > 0) & (candidate > 0)
            p, q = reference[mask] / reference.sum(), candidate[mask] / max(candidate.sum(), 1)
            # What the candidate cannot show at all counts as a loss of its own.
            lost = reference[(reference > 0) & (candidate == 0)].sum() / reference.sum()
            divergence = float((p * np.log(p / q)).sum()) + lost * 10
            if divergence < best[0]:
                best = (divergence, cut)
        top = best[1] * width
        return max(low, -top), min(high, top)


class Sample:
    """Which values of one image's tensors are counted: one of each `step` that follow each other, drawn at random.

    Draws of CHUNK / 2 values and more are independent; they are the same in the next CHUNK. So the share of counted
    values that lie below any number is that of all values, whatever they are, but for √(ln(2 / δ) / 2n) with
    probability 1 - δ (Hoeffding, 1963), where n is 4096 for each image: 2.1 % at δ = 5 %, and over 100 images 0.21 %.

    Args:
        seed: of the draws, one for each image.
    """

    def __init__(self, seed: int) -> None:
        draws = np.random.default_rng(seed).integers(0, MOST_STEP, CHUNK // 2, np.uint8)
        self._places: dict[int, np.ndarray] = {}
        step = 2
        while step <= MOST_STEP:
            count = CHUNK // step
            self._places[step] = np.arange(count) * step + draws[:count] // (MOST_STEP // step)
            step *= 2

    @staticmethod
    def step(size: int) -> int:
        """Of a tensor of so many values: a power of two."""
        step = 1
        while step < MOST_STEP and size >= 2 * step * LEAST_COUNTED:
            step *= 2
        return step

    def of(self, values: np.ndarray, step: int) -> np.ndarray:
        """The values of CHUNK or fewer, [n], that are counted."""
        return values if step == 1 else values.take(self._places[step][: values.size // step])


@dataclass
class Ranges:
    """What was measured of a network's tensors.

    Attributes:
        model: SHA-256 of the network and its preparation, in hexadecimal; ranges fit those alone.
        histograms: by tensor.
        means: by tensor, the sum over images of its mean per channel (each image counts once).
        images: names of those that were seen.
    """

    model: str
    histograms: dict[str, Histogram] = field(default_factory=dict)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.next_image()

    def add(self, name: str, values: np.ndarray, counted: np.ndarray | None = None) -> None:
        """Take in one image's tensor, [1, C, H, W], or its cells that are `counted`, bool [H, W].

        Extremes and means are of all values; of a large tensor a Sample is counted. Raises DeployError where it is not
        finite.
        """
        histogram = self.histograms.setdefault(name, Histogram())
        rows = values.reshape(values.shape[1], -1)
        if counted is not None:
            rows = np.compress(counted.ravel(), rows, axis=1)
        sums, step, kept = np.zeros(len(rows)), Sample.step(rows.size), []
        low, high = np.inf, -np.inf
        for part, channels in _parts(rows):
            low, high = np.minimum(low, part.min()), np.maximum(high, part.max())  # a NaN stays one
            # In float32, right to 2e-6 of the values; sum() takes three times as long.
            sums[channels] += np.einsum("ij->i", part)
            kept.append(self._sample.of(part.reshape(-1), step))
        if kept:
            try:
                histogram.see(float(low), float(high))
            except ValueError as error:
                raise DeployError(
                    f"tensor {name}: {error} on a calibration image; the network or its input is broken"
                ) from error
            histogram.count(np.concatenate(kept), step)
        self.means[name] = self.means.get(name, 0) + sums / max(rows.shape[1], 1)

    def next_image(self) -> None:
        """Draw another Sample: the tensors that come now are of another image."""
        self._sample = Sample(len(self.images))

    def channel_mean(self, name: str) -> np.ndarray:
        """Mean per channel over the images."""
        return self.means[name] / max(len(self.images), 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ranges.json: the histograms whole, so that any method can be chosen later."""
        data = {
            "format": "fcn-deploy ranges",
            "version": VERSION,
            "model": self.model,
            "images": self.images,
            "tensors": {
                name: {
                    "low": histogram.low,
                    "high": histogram.high,
                    "limit": histogram.limit,
                    "counts": base64.b64encode(zlib.compress(histogram.counts.tobytes())).decode(),
                    "means": self.means[name].tolist(),
                }
                for name, histogram in self.histograms.items()
            },
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: str) -> "Ranges":
        """Read ranges.json. Raises DeployError where it is damaged, MisuseError where it is another network's."""
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != "fcn-deploy ranges" or data["version"] != VERSION:
                raise ValueError("it is of another format or version")
            ranges = cls(data["model"], images=[str(name) for name in data["images"]])
            for name, entry in data["tensors"].items():
                histogram = ranges.histograms[name] = Histogram()
                histogram.low, histogram.high = float(entry["low"]), float(entry["high"])
                histogram.limit = float(entry["limit"])
                unpacked = zlib.decompressobj().decompress(base64.b64decode(entry["counts"]), BINS * 8 + 1)
                histogram.counts = np.frombuffer(unpacked, np.int64).copy()
                if histogram.counts.shape != (BINS,):
                    raise ValueError(f"{name} has {histogram.counts.size} bins")
                ranges.means[name] = np.asarray(entry["means"], np.float64)
        except FileNotFoundError as error:
            raise MisuseError(f"{path} does not exist; calibrate with --calib") from error
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, OSError) as error:
            raise DeployError(f"{path} holds no ranges that can be read ({error}); calibrate again") from error
        if ranges.model != model:
            raise MisuseError(f"{path} was measured on another network; calibrate this one with --calib")
        return ranges


def collect_histograms(
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    images: Iterable[tuple[str, np.ndarray]],
    model: str,
    prepare: Callable[[np.ndarray], np.ndarray],
) -> Ranges:
    """Ranges of every tensor, in one pass over the images. Memory does not grow with their number.

    Args:
        run: a core input → its tensors by name.
        images: as an ImageStream gives them. Of a MaskedArray what is made of pixels without data alone is not
            counted.
        model: SHA-256 of the network and its preparation.
        prepare: image → core input: the runtime's own.

    Raises:
        DeployError: there was no image that could be read, or a tensor is not finite.
    """
    ranges = Ranges(model)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="histograms") as pool:
        for name, image in images:
            given = prepare(image)
            data = _padded_data(image, given.shape[2:])
            ranges.next_image()
            _add_all(ranges, run(given), data, pool)
            ranges.images.append(name)
    if not ranges.images:
        raise DeployError("no calibration image could be read; INT8 is never calibrated on invented data")
    return ranges


def _parts(rows: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
    """[C, n] in parts of CHUNK values or fewer, which are whole rows where these are shorter; and which rows."""
    if not rows.size:
        return
    high = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), high):
        channels = slice(start, start + high)
        for left in range(0, rows.shape[1], CHUNK):
            yield rows[channels, left : left + CHUNK], channels


def _add_all(
    ranges: Ranges, tensors: Mapping[str, np.ndarray], data: np.ndarray | None, pool: ThreadPoolExecutor
) -> None:
    """Take in one image's tensors, side by side: what of them is made of `data`."""
    for tensor in tensors:  # in their order, whichever is done first
        ranges.histograms.setdefault(tensor, Histogram())

    def add(tensor: str) -> None:
        values = tensors[tensor]
        ranges.add(tensor, values, None if data is None else cells_with_data(data, values.shape[2:]))

    # The largest first, so that no thread is left with one.
    for _ in pool.map(add, sorted(tensors, key=lambda tensor: -tensors[tensor].size)):
        pass


def _padded_data(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray | None:
    """Where an image that is padded right and bottom to this size has data, or its padding: bool; None: everywhere."""
    if not isinstance(image, np.ma.MaskedArray):
        return None
    data = np.ones(size, bool)
    data[: image.shape[0], : image.shape[1]] = ~np.ma.getmaskarray(image).any(axis=2)
    return None if data.all() else data


def cells_with_data(data: np.ndarray, size: tuple[int, ...]) -> np.ndarray | None:
    """Which cells of a map of this size have a pixel with data in them: bool [h, w]; None: it is no map of the image.

    `data` is bool [H, W], of the image as the map was made of it.
    """
    (high, wide), (rows, columns) = data.shape, size
    if rows * wide != columns * high or rows > high:
        return None
    starts = (np.arange(rows) * high // rows, np.arange(columns) * wide // columns)
    return np.logical_or.reduceat(np.logical_or.reduceat(data, starts[0], axis=0), starts[1], axis=1)
