"""The whole way, with trained weights: labels through the engine are the PyTorch network's, at any size."""

import json

import numpy as np
import pytest
import torch
from fcn_deploy.export.build.parity import decided
from fcn_deploy.export.tolerances import DECISION_MARGIN
from fcn_deploy.fcn.checkpoint import load_checkpoint
from fcn_deploy.runtime.images.read import read_image
from fcn_deploy.runtime.pixels.prepare import normalise
from helpers import command, needs_shared
from PIL import Image
from sklearn.datasets import load_sample_images

from fcn_deploy import Segmenter

pytestmark = pytest.mark.slow
# Of most of many sizes: their padding and borders are what differs, and a large one takes the time of twenty.
LONGEST, MOST_PIXELS = 700, 40_000


def pytorch_logits(model, card, image):
    x = np.empty((1, 3, *image.shape[:2]), np.float32)
    normalise(image, card, x[0])
    with torch.inference_mode():
        return model(torch.from_numpy(x))[0].numpy()


def random_sizes(count):
    """(height, width) in 1…LONGEST, of MOST_PIXELS at most but for each twentieth."""
    random = np.random.default_rng(7)
    for index in range(count):
        long = int(random.integers(1, LONGEST + 1))
        most = LONGEST if index % 20 == 0 else min(LONGEST, MOST_PIXELS // long)
        short = int(random.integers(1, most + 1))
        yield (long, short) if index % 2 else (short, long)


def test_labels_equal_pytorchs_at_100_random_sizes(trained):
    """On every pixel whose two best scores differ by more than 1e-4 of the range; at most 0.1 % are exempt."""
    assert DECISION_MARGIN == 1e-4
    files = sorted((needs_shared("camvid") / "val").glob("*.jpg"))
    checkpoint = load_checkpoint(trained / "camvid.safetensors")
    wrong = exempt = pixels = 0
    with Segmenter(trained / "camvid.engine") as net:
        for index, (height, width) in enumerate(random_sizes(100)):
            photo = Image.open(files[index]).resize((LONGEST, LONGEST), Image.Resampling.BILINEAR)
            left, top = (LONGEST - width) // 2, (LONGEST - height) // 2
            image = np.asarray(photo.crop((left, top, left + width, top + height)))
            logits = pytorch_logits(checkpoint.model, checkpoint.card, image)
            labels = net(image)
            assert labels.shape == (height, width)
            clear = decided(logits, net.card)
            wrong += int((labels != logits.argmax(0))[clear].sum())
            exempt += int((~clear).sum())
            pixels += labels.size
    assert wrong == 0
    assert exempt <= 0.001 * pixels, f"{exempt / pixels:.3%} of pixels are near a tie"


def test_mean_iou_is_the_same_in_pytorch_onnx_and_engine(trained):
    data = needs_shared("camvid")
    scores = []
    for name in ("camvid.safetensors", "camvid.onnx", "camvid.engine"):
        done = command("eval-fcn", trained / name, "--data", data, "--split", "val", "--count", "24", "--json")
        scores.append(json.loads(done.stdout)["mean_iou"])
    assert max(scores) - min(scores) < 1e-4
    assert scores[0] > 0.6


def same_where_decided(checkpoint, net, image):
    logits = pytorch_logits(checkpoint.model, checkpoint.card, image)
    labels = net(image)
    assert labels.shape == image.shape[:2]
    assert not (labels != logits.argmax(0))[decided(logits, net.card)].any()


def test_the_photographs_that_scikit_learn_ships_at_their_own_sizes(trained):
    checkpoint = load_checkpoint(trained / "camvid.safetensors")
    with Segmenter(trained / "camvid.engine") as net:
        for image in load_sample_images().images:
            assert image.shape == (427, 640, 3)
            same_where_decided(checkpoint, net, image)


def test_microscopy_of_eight_sizes_goes_through_one_engine(trained):
    files = sorted((needs_shared("nuclei") / "train").glob("*.png"))
    checkpoint = load_checkpoint(trained / "camvid.safetensors")
    seen = set()
    with Segmenter(trained / "camvid.engine") as net:
        for path in files:
            image = read_image(path, net.card)
            if image.shape not in seen:
                seen.add(image.shape)
                same_where_decided(checkpoint, net, image)
    assert len(seen) >= 7
