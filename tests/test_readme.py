"""What the README shows works as written."""

import re
import shlex
import subprocess
import sys

import numpy as np
from helpers import ROOT, command, photo, save_photos
from PIL import Image

README = (ROOT / "README.md").read_text()
QUICK = ["--count", "4", "--epochs", "1", "--crop", "64x64", "--batch", "4"]  # a later option wins


def test_the_commands_run_one_after_the_other(tmp_path):
    lines = [shlex.split(line[2:]) for line in README.splitlines() if line.startswith("$ ")]
    assert [words[0] for words in lines] == ["train-fcn", "export-onnx", "build-engine", "python"]
    folder = tmp_path / "some" / "folder"
    save_photos(folder, [(28, 28), (97, 61)])
    for words in lines:
        if words[0] == "train-fcn":
            words += QUICK
        if words[:3] == ["python", "-m", "runtime.infer"]:
            words[:3] = ["infer"]
        command(*words, cwd=tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "0.png", "1.png", "0.overlay.png", "1.overlay.png",
    }  # fmt: skip
    for words in re.findall(r"`((?:eval-fcn|verify-engine|bench-engine) [^`]+)`", README):
        assert command(*shlex.split(words), cwd=tmp_path).stdout
    # Its Python, on the engine that was just built.
    Image.fromarray(photo(130, 90)).save(tmp_path / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "\nassert labels.shape == (100, 37) and heat.shape == (11, 17, 12), (labels.shape, heat.shape)"
    subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, check=True)


def test_links_and_pictures_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_the_docs_name_exists():
    named = {
        option
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for option in re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", page.read_text())
    }
    helps = "".join(
        command(name, "--help").stdout
        for name in (
            "train-fcn",
            "eval-fcn",
            "export-onnx",
            "build-engine",
            "inspect-model",
            "verify-engine",
            "bench-engine",
            "infer",
        )
    )
    assert named - set(re.findall(r"--[a-z][a-z-]+", helps)) <= {"--index-url"}


def test_the_picture_is_no_larger_than_it_needs_to_be():
    picture = ROOT / "docs" / "digits.jpg"
    assert picture.stat().st_size < 300_000
    assert np.asarray(Image.open(picture)).std() > 10
