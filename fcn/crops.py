"""The crops of an epoch: as many of an image as it has megapixels for, and each file read once for all of its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from fcn_deploy.calibration.datasets import FilePairs, LabelledImages
from fcn_deploy.fcn.augment import augment
from fcn_deploy.fcn.recipes import Recipe
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.images.header import read_header

HELD_BYTES = 1 << 30  # of decoded images at once: crops of these are mixed with each other

Crop = tuple[int, int]  # index of the image, and which of its crops


class Crops:
    """What an epoch is made of.

    Args:
        data: images of any sizes.
        card: of the network.
        recipe: its `crops_per_megapixel`, `batch` and `seed`.
    """

    def __init__(self, data: LabelledImages, card: ModelCard, recipe: Recipe) -> None:
        self.data, self.card, self.recipe = data, card, recipe
        pixels = image_pixels(data)
        self.counts = [max(1, round(each * recipe.crops_per_megapixel / 1e6)) for each in pixels]
        bands = card.channels * np.dtype(card.dtype).itemsize + 1
        self._bytes = [bands * each for each in pixels]

    def __len__(self) -> int:
        """Of an epoch."""
        return sum(self.counts)

    def order(self, epoch: int) -> list[list[Crop]]:
        """The batches of an epoch. Images that give several crops come in groups that are held at once."""
        random = np.random.default_rng((self.recipe.seed, epoch))
        order: list[Crop] = []
        group: list[Crop] = []
        held = 0
        for index in random.permutation(len(self.counts)).tolist():
            size = self._bytes[index] if self.counts[index] > 1 else 0
            if held and held + size > HELD_BYTES:
                order += [group[place] for place in random.permutation(len(group))]
                group, held = [], 0
            group += [(index, number) for number in range(self.counts[index])]
            held += size
        order += [group[place] for place in random.permutation(len(group))] if held else group
        # A last batch of one crop has no statistics to normalise by; fill it from the start.
        missing = -len(order) % self.recipe.batch
        order += [order[place % len(order)] for place in range(missing)]
        return [order[start : start + self.recipe.batch] for start in range(0, len(order), self.recipe.batch)]

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one epoch, each read while the one before is trained on."""
        order = self.order(epoch)
        with closing(_Held(self.data, order)) as held:

            def load(batch: Sequence[Crop]) -> tuple[torch.Tensor, torch.Tensor]:
                samples = [self._sample(held, crop, epoch, place) for place, crop in enumerate(batch)]
                return torch.stack([sample for sample, _ in samples]), torch.stack([target for _, target in samples])

            with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
                ahead = reader.submit(load, order[0])
                for batch in order[1:]:
                    loaded, ahead = ahead.result(), reader.submit(load, batch)
                    yield loaded
                yield ahead.result()

    def _sample(self, held: "_Held", crop: Crop, epoch: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        (index, number), recipe = crop, self.recipe
        random = np.random.default_rng((recipe.seed, epoch, index, place, *([number] if number else [])))
        image, labels = held.take(index)
        try:
            return augment(
                image, labels, self.card, recipe.crop, random,
                scale=recipe.crop_scale, flip=recipe.flip, turn=recipe.turn, brightness=recipe.brightness,
                color=recipe.color, blur=recipe.blur,
            )  # fmt: skip
        finally:
            held.done(index)


class _Held:
    """Images that are open until the last of their crops in an epoch is taken."""

    def __init__(self, data: LabelledImages, order: Sequence[Sequence[Crop]]) -> None:
        self._data = data
        self._left = Counter(index for batch in order for index, _ in batch)
        self._open: dict[int, tuple[Any, np.ndarray, ExitStack]] = {}

    def take(self, index: int) -> tuple[Any, np.ndarray]:
        """(image, labels) of an image: what of the image is asked for is read then, where it is large."""
        if index not in self._open:
            stack = ExitStack()
            with stack:
                if isinstance(self._data, FilePairs):
                    image, labels = stack.enter_context(self._data.source(index))
                else:
                    image, labels = self._data[index]
                self._open[index] = image, labels, stack.pop_all()
        image, labels, _ = self._open[index]
        return image, labels

    def done(self, index: int) -> None:
        """One crop less is wanted of an image."""
        self._left[index] -= 1
        if self._left[index] <= 0 and index in self._open:
            self._open.pop(index)[2].close()

    def close(self) -> None:
        """Close what is open."""
        for _, _, stack in self._open.values():
            stack.close()
        self._open.clear()


def image_pixels(data: LabelledImages) -> list[int]:
    """Pixels of each image, by the headers of files; 0 of those that are drawn."""
    if not isinstance(data, FilePairs):
        return [0] * len(data)
    return [read_header(image).pixels for image, _ in data.pairs]
