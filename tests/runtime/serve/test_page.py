"""The page at /, in a real browser: a photograph labelled, read by pointer and keys, saved; errors shown in words."""

import io
import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from browser import Browser, find
from fcn_deploy.runtime.images.write import write_labels
from helpers import ROOT, photo
from PIL import Image
from serving import one_convolution, serving

from fcn_deploy import ModelCard, Segmenter

PAGE = ROOT / "runtime" / "serve" / "page"


@pytest.fixture(scope="module")
def server(exports):
    find()
    with serving(exports / "narrow.engine", pixels=1_000_000) as (client, _):
        yield client


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a street.png"
    Image.fromarray(photo(90, 130)).save(path)
    return path


WAIT = """new Promise((done) => { const look = () => {
    const ready = document.querySelector('#status').textContent.includes('labelled')
        || !document.querySelector('#error').hidden;
    ready ? done(true) : setTimeout(look, 20); }; look(); })"""


def text(browser, selector):
    return browser.value(f"document.querySelector('{selector}').textContent")


def saved(browser, selector, folder, name):
    """The bytes of the file that a click on a link saves."""
    browser.ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.value(f"document.querySelector('{selector}').click()")
    for _ in range(3000):
        if (folder / name).exists():
            return (folder / name).read_bytes()
        time.sleep(0.01)
    raise AssertionError([path.name for path in folder.iterdir()])


@pytest.mark.parametrize("width", [1280, 390])
def test_a_photograph_is_labelled_and_shown(server, browser, picture, exports, tmp_path, width):
    browser.open(server.address + "/", width)
    browser.choose("#file", picture)
    browser.value(WAIT)
    with Segmenter(exports / "narrow.engine", threads=2) as net:
        labels = net(np.asarray(Image.open(picture)))
    assert "130 × 90 pixels, labelled by narrow" in text(browser, "#status")
    # The very file that /label gives, and its classes.
    png = saved(browser, "#save-png", tmp_path, "a street.labels.png")
    assert png == server.ask("POST", "/label", picture.read_bytes())[2]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), labels)
    told = json.loads(saved(browser, "#save-json", tmp_path, "a street.labels.json"))
    assert told["size"] == [90, 130] and told["model"] == "narrow"
    counts = {each["class"]: each["pixels"] for each in told["classes"]}
    assert counts == dict(zip(*map(np.ndarray.tolist, np.unique(labels, return_counts=True)), strict=True))
    shown = browser.value("[...document.querySelectorAll('#classes tr')].map((row) => row.innerText)")
    assert len(shown) == len(counts) and f"class {told['classes'][0]['class']}" in shown[0]
    assert browser.value("document.querySelectorAll('#times tr').length") == 6
    # What is under the pointer, at four places.
    for x, y in ((0, 0), (129, 89), (64, 45), (100, 3)):
        browser.value(
            f"""(() => {{ const box = document.querySelector('#view').getBoundingClientRect();
            const scale = Math.min(box.width / 130, box.height / 90);
            const left = box.left + (box.width - 130 * scale) / 2, top = box.top + (box.height - 90 * scale) / 2;
            document.querySelector('#view').dispatchEvent(new PointerEvent('pointermove',
                {{clientX: left + ({x} + 0.5) * scale, clientY: top + ({y} + 0.5) * scale}})); }})()"""
        )
        assert text(browser, "#here").startswith(f"class {labels[y, x]}, at {x}, {y} ")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    assert not browser.complaints()
    assert all(url.startswith((server.address, "blob:", "data:")) for url in browser.requests())


def test_the_overlay_has_the_colours_of_the_labels_at_the_opacity_that_is_chosen(server, browser, picture, exports):
    browser.open(server.address + "/")
    browser.choose("#file", picture)
    browser.value(WAIT)
    pixels = """(() => { const slider = document.querySelector('#opacity'); slider.value = %d;
        slider.dispatchEvent(new Event('input')); const canvas = document.querySelector('#view');
        return Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data); })()"""
    image = np.asarray(Image.open(picture))
    with Segmenter(exports / "narrow.engine", threads=2) as net:
        colours = np.asarray(net.card.colors)[net(image)]
    for opacity in (0, 100):
        shown = np.reshape(browser.value(pixels % opacity), (90, 130, 4))[:, :, :3]
        np.testing.assert_array_equal(shown, colours if opacity else image)


def test_it_is_worked_by_keys_alone(server, browser, picture):
    browser.open(server.address + "/")
    browser.choose("#file", picture)
    browser.value(WAIT)
    reached = []
    browser.value("document.activeElement.blur()")
    for _ in range(8):
        browser.press("Tab")
        reached.append(browser.value("document.activeElement.id"))
    assert {"refine", "file", "view", "opacity", "save-png", "save-json"} <= set(reached)
    browser.value("document.querySelector('#view').focus()")
    for key, place in (
        ("ArrowRight", "68, 45"),
        ("ArrowDown", "68, 48"),
        ("ArrowLeft", "65, 48"),
        ("ArrowUp", "65, 45"),
    ):
        browser.press(key)
        assert f"at {place} " in text(browser, "#here")


def test_masks_that_overlap_are_shown_and_named_together(browser, picture, tmp_path):
    engine = one_convolution(tmp_path, ModelCard(("road", "car", "tree"), activation="multilabel"))
    with serving(engine) as (client, _), Segmenter(engine, threads=2) as net:
        browser.open(client.address + "/")
        browser.choose("#file", picture)
        browser.value(WAIT)
        masks = net.masks(np.asarray(Image.open(picture)))
        assert 0 < masks.sum() < masks.size and masks.sum(0).max() > 1
        rows = browser.value("[...document.querySelectorAll('#classes tr')].map((row) => row.innerText)")
        shown = {name: int(count.replace(",", "")) for name, count, _ in (row.split("\t") for row in rows)}
        assert shown == {
            name: int(mask.sum()) for name, mask in zip(net.card.classes, masks, strict=True) if mask.any()
        }
        browser.value("document.querySelector('#view').focus()")
        browser.press("ArrowRight"), browser.press("ArrowLeft")
        names = [name for name, mask in zip(net.card.classes, masks, strict=True) if mask[45, 65]]
        assert text(browser, "#here").startswith(f"{' and '.join(names) or 'no class'}, at 65, 45")
        assert browser.value("document.querySelector('#save-png').hidden") and not browser.complaints()


def test_borders_are_refined_on_request(server, browser, picture, tmp_path):
    browser.open(server.address + "/")
    browser.value("new Promise((done) => setTimeout(done, 200))")
    browser.value("document.querySelector('#refine').checked = true")
    browser.choose("#file", picture)
    browser.value(WAIT)
    refined = server.ask("POST", "/label?output=refined", picture.read_bytes())[2]
    assert saved(browser, "#save-png", tmp_path, "a street.labels.png") == refined


def test_a_picture_that_is_pasted_is_labelled(server, browser, picture):
    browser.open(server.address + "/")
    content = list(picture.read_bytes())
    browser.value(
        f"""(() => {{ const data = new DataTransfer();
        data.items.add(new File([new Uint8Array({content})], 'pasted.png', {{type: 'image/png'}}));
        document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: data}})); }})()"""
    )
    browser.value(WAIT)
    assert text(browser, "#status").startswith("pasted.png: 130 × 90")


@pytest.mark.parametrize("names", [("a.png", "b.png", "c.png"), ("a.txt", "b.png")])
def test_of_files_that_are_dropped_together_the_first_is_labelled_and_that_is_said(server, browser, picture, names):
    browser.open(server.address + "/")
    content = list(picture.read_bytes())
    browser.value(
        f"""(() => {{ const data = new DataTransfer();
        for (const name of {list(names)})
            data.items.add(new File([new Uint8Array(name.endsWith('txt') ? [1, 2] : {content})], name));
        document.dispatchEvent(new DragEvent('drop', {{dataTransfer: data}})); }})()"""
    )
    browser.value(WAIT)
    assert f"Of {len(names)} files the first was taken" in text(browser, "#status")
    assert "a." in text(browser, "#error" if names[0] == "a.txt" else "#status")
    browser.choose("#file", picture)
    browser.value("new Promise((done) => setTimeout(done, 300))")
    browser.value(WAIT)
    assert "files" not in text(browser, "#status")


def test_errors_are_shown_in_words(server, browser, picture, tmp_path):
    browser.open(server.address + "/")
    browser.value("new Promise((done) => setTimeout(done, 200))")
    assert text(browser, "#status").startswith("narrow knows class 0, class 1, ")
    (tmp_path / "notes.txt").write_text("no picture")
    browser.choose("#file", tmp_path / "notes.txt")
    browser.value(WAIT)
    assert "the image is not an image of a known format" in text(browser, "#error")
    Image.new("RGB", (1001, 1000)).save(tmp_path / "large.png")
    browser.choose("#file", tmp_path / "large.png")
    browser.value("new Promise((done) => setTimeout(done, 300))")
    browser.value(WAIT)
    assert "over the limit of 1,000,000" in text(browser, "#error")
    for _ in range(2):  # the same file again is sent again
        before = len(browser.requests())
        browser.choose("#file", picture)
        browser.value("new Promise((done) => setTimeout(done, 300))")
        browser.value(WAIT)
        assert browser.value("document.querySelector('#error').hidden")
        assert any("/label" in url for url in browser.requests()[before:])
    # An error is told with the file's name, and no other file's labels stand below it.
    browser.choose("#file", tmp_path / "notes.txt")
    browser.value("new Promise((done) => setTimeout(done, 300))")
    browser.value(WAIT)
    assert text(browser, "#error").startswith("notes.txt: ")
    assert browser.value("document.querySelector('#result').hidden")


def test_a_token_is_asked_for_where_the_server_wants_one(exports, browser, picture):
    find()
    with serving(exports / "narrow.engine", token="open-sesame") as (client, _):
        browser.open(client.address + "/")
        browser.value("new Promise((done) => setTimeout(done, 500))")
        assert "bears no token" in text(browser, "#error")
        browser.value(
            """(() => { const field = document.querySelector('#token'); field.value = 'open-sesame';
            field.dispatchEvent(new Event('change')); })()"""
        )
        browser.value("new Promise((done) => setTimeout(done, 500))")
        assert browser.value("document.querySelector('#error').hidden")
        browser.choose("#file", picture)
        browser.value(WAIT)
        assert "labelled by narrow" in text(browser, "#status")


@pytest.mark.parametrize("labels", ["1 bit", "4 bits", "8 bits", "16 bits", "noise"])
def test_the_pages_reader_of_pngs_gives_the_labels(tmp_path, labels):
    """In Node, with every filter that PNG has."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed; on Debian: apt-get install nodejs")
    random = np.random.default_rng(3)
    array = random.integers(0, 3, (37, 53)).cumsum(0).astype(np.uint8)
    if labels == "noise":
        array = random.integers(0, 256, (37, 53)).astype(np.uint8)
    elif labels == "16 bits":
        array = array.astype(np.uint16) * 300
    elif labels != "8 bits":
        array %= 2 if labels == "1 bit" else 16
    write_labels(tmp_path / "labels.png", array, ModelCard(tuple(map(str, range(int(array.max()) + 1)))))
    shutil.copy(PAGE / "png.js", tmp_path / "png.mjs")
    (tmp_path / "read.mjs").write_text(
        """import { readFile } from "node:fs/promises";
        import { readLabels } from "./png.mjs";
        const file = await readFile(process.argv[2]);
        const found = await readLabels(file.buffer.slice(file.byteOffset, file.byteOffset + file.length));
        console.log(JSON.stringify([found.height, found.width, Array.from(found.labels)]));"""
    )
    done = subprocess.run(
        [node, tmp_path / "read.mjs", tmp_path / "labels.png"], capture_output=True, text=True, check=True
    )
    height, width, found = json.loads(done.stdout)
    np.testing.assert_array_equal(np.reshape(found, (height, width)), array)
