"""What the README and the quickstart show works as written."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, command, photo, save_photos
from PIL import Image

README = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text()
QUICK = ["--count", "4", "--epochs", "1", "--crop", "64x64", "--batch", "4"]  # a later option wins


def commands(page):
    return [line[2:] for line in page.splitlines() if line.startswith("$ ")]


def outputs(page):
    """What a page shows of each command's output."""
    return re.findall(r"^\$ [^\n]+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path):
    lines = [shlex.split(line) for line in commands(README)]
    assert [words[0] for words in lines] == ["train-fcn", "export-onnx", "build-engine", "label-images"]
    assert "`python -m runtime.infer`" in README
    folder = tmp_path / "some" / "folder"
    save_photos(folder, [(28, 28), (97, 61)])
    for words, shown in zip(lines, outputs(QUICKSTART), strict=True):
        if words[0] == "train-fcn":
            words += QUICK
        printed = command(*words, cwd=tmp_path).stdout
        for start in re.findall(r"^[a-z]{4,}", shown, re.MULTILINE):
            assert start in printed or start == "some", f"{words[0]} prints no line that begins with {start}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "0.png", "1.png", "0.overlay.png", "1.overlay.png",
    }  # fmt: skip
    others = re.findall(r"`((?:eval-fcn|inspect-model|verify-engine|bench-engine) [^`]+)`", README)
    assert len(others) == 4
    for words in others:
        assert command(*shlex.split(words), cwd=tmp_path).stdout
    # The Python of both pages, on the engine that was just built.
    Image.fromarray(photo(130, 90)).save(tmp_path / "photo.jpg")
    checks = "assert labels.shape == (130, 90)", "assert labels.shape == (100, 37) and heat.shape == (11, 17, 12)"
    for page, check in zip((README, QUICKSTART), checks, strict=True):
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, check=True)


def test_the_quickstart_goes_by_the_same_commands():
    assert commands(QUICKSTART) == commands(README)


def test_the_picture_is_no_larger_than_it_needs_to_be():
    picture = ROOT / "docs" / "digits.jpg"
    assert picture.stat().st_size < 300_000
    assert np.asarray(Image.open(picture)).std() > 10
