"""Calibration images: any source, any size, broken ones skipped and counted."""

import numpy as np
import pytest
from fcn_deploy.calibration.stream import divide, open_stream
from helpers import save_photos
from PIL import Image

from fcn_deploy import MisuseError, ModelCard

CARD = ModelCard(("a", "b"))


@pytest.fixture
def folder(tmp_path):
    save_photos(tmp_path, [(20 + index, 40 - index) for index in range(12)], "{:02}.png")
    return tmp_path


def test_images_come_at_their_own_sizes(folder):
    stream = open_stream(str(folder), CARD)
    assert [image.shape[:2] for _, image in stream] == [(20 + i, 40 - i) for i in range(12)]


def test_globs_lists_and_data_sets(folder, tmp_path):
    assert len(open_stream(f"{folder}/0*.png", CARD)) == 10
    (folder / "list.txt").write_text("03.png\n# a comment\n\n01.png\n")
    assert [image.shape[0] for _, image in open_stream(str(folder / "list.txt"), CARD)] == [23, 21]
    (folder / "empty.txt").write_text("\n")
    with pytest.raises(MisuseError, match="lists no images"):
        open_stream(str(folder / "empty.txt"), CARD)
    digits = open_stream("digits", ModelCard(tuple(map(str, range(11)))))
    assert len(digits) == 960 and next(iter(digits))[1].ndim == 3
    with pytest.raises(MisuseError, match="does not exist"):
        open_stream(str(tmp_path / "none"), CARD)


def test_a_broken_image_is_skipped_counted_and_said(folder, caplog):
    (folder / "05.png").write_bytes(b"junk")
    stream = open_stream(str(folder), CARD)
    assert len(list(stream)) == 11 and len(list(stream)) == 11
    assert list(stream.skipped) == [str(folder / "05.png")]
    assert len(caplog.records) == 1 and "skipped" in caplog.text


def test_the_sample_is_seeded_bounded_and_apart_from_what_is_judged(folder):
    stream = open_stream(str(folder), CARD)
    calibration, judged = divide(stream, 5, 40, seed=3)
    assert len(calibration) == 5 and len(judged) == 2 and not set(calibration.names) & set(judged.names)
    assert divide(stream, 5, 40, seed=3)[0].names == calibration.names
    assert divide(stream, 5, 40, seed=4)[0].names != calibration.names
    for name, image in calibration:
        np.testing.assert_array_equal(image, np.asarray(Image.open(name)))


def test_a_single_image_is_used_for_both(folder):
    one = open_stream(str(folder / "00.png"), CARD)
    calibration, judged = divide(one, 100, 40)
    assert calibration.names == judged.names == one.names
