"""The engine file: what is written is read back, and nothing else is taken for an engine."""

import hashlib
import json
import math
import re
import zipfile
from dataclasses import replace

import pytest
from fcn_deploy.runtime.engine_file import EngineFile, write_engine
from fcn_deploy.runtime.manifest import Head, Manifest, Stage
from fcn_deploy.runtime.model_card import voc_palette
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_deploy import DeployError, ModelCard

CARD = ModelCard(("road", "sky"), stride=8, size_multiple=32)
MANIFEST = Manifest(CARD, "cpu", "float32", Head("linear", "half_pixel", (8.0, 8.0)), (Stage("a.onnx"),), "test")
MEMBERS = {"a.onnx": bytes(range(256)) * 20, "golden.npz": b"golden", "report.json": b"{}"}


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "m.engine"
    write_engine(path, MANIFEST, MEMBERS)
    return path


def read_all(path):
    with EngineFile(path) as file:
        return file.manifest, {name: file.read(name) for name in file.manifest.members}


def test_everything_comes_back(engine):
    manifest, members = read_all(engine)
    assert members == MEMBERS
    assert replace(manifest, members={}) == MANIFEST
    assert write_engine(engine, MANIFEST, MEMBERS) == manifest


def test_the_same_build_gives_the_same_bytes(engine, tmp_path):
    write_engine(tmp_path / "again.engine", MANIFEST, MEMBERS)
    assert (tmp_path / "again.engine").read_bytes() == engine.read_bytes()


def test_any_zip_tool_opens_it(engine):
    with zipfile.ZipFile(engine) as archive:
        assert archive.namelist()[0] == "manifest.json"
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert json.loads(archive.read("manifest.json"))["format"] == "fcn-deploy engine"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_engine_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "m.engine"
    write_engine(path, MANIFEST, MEMBERS)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DeployError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value) and "m.engine" in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_edited_engine_is_refused_or_unchanged(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("edit") / "m.engine"
    write_engine(path, MANIFEST, MEMBERS)
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        _, members = read_all(path)
    except DeployError as error:
        assert "\n" not in str(error)
    else:  # a date or a comment of the zip, or a letter of the manifest that guards no member
        assert all(MEMBERS.get(name, content) == content for name, content in members.items())


def test_a_directory_edited_anywhere_is_refused_or_unchanged(tmp_path):
    # The zip's own directory: some of its bytes are versions, flags and lengths.
    path = tmp_path / "m.engine"
    write_engine(path, MANIFEST, MEMBERS)
    whole = path.read_bytes()
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        for bits in (1, 64, 128, 255):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
            try:
                _, members = read_all(path)
            except DeployError as error:
                assert "\n" not in str(error)
            else:
                assert all(MEMBERS.get(name, content) == content for name, content in members.items())


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x08\x07" * 500, b"PK\x05\x06" + bytes(18)])
def test_foreign_files_are_not_engines(tmp_path, content):
    path = tmp_path / "m.engine"
    path.write_bytes(content)
    with pytest.raises(DeployError, match=r"not an engine|truncated|damaged"):
        EngineFile(path)


def test_missing_files_and_folders_are_said(tmp_path):
    with pytest.raises(DeployError, match="does not exist"):
        EngineFile(tmp_path / "none.engine")
    with pytest.raises(DeployError, match="cannot read"):
        EngineFile(tmp_path)


def rewritten(engine, change, **zip_options):
    """The engine with its manifest changed, as an attacker would."""
    with zipfile.ZipFile(engine) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents["manifest.json"])
    change(manifest, contents)
    contents["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(engine, "w", **zip_options) as archive:
        archive.comment = hashlib.sha256(contents["manifest.json"]).hexdigest().encode()
        for name, content in contents.items():
            archive.writestr(name, content)
    return engine


def test_an_engine_of_a_newer_version_says_so(engine):
    with pytest.raises(DeployError, match=r"version 99.*upgrade"):
        read_all(rewritten(engine, lambda manifest, _: manifest.update(version=99)))


def test_a_zip_bomb_is_refused_before_it_unpacks(engine):
    def grow(manifest, contents):
        contents["a.onnx"] = bytes(50_000_000)

    with pytest.raises(DeployError, match="packed or too long"):
        read_all(rewritten(engine, grow, compression=zipfile.ZIP_DEFLATED))


def test_a_swapped_member_is_noticed(engine):
    def swap(manifest, contents):
        contents["a.onnx"] = contents["a.onnx"][::-1]

    with pytest.raises(DeployError, match="checksum"):
        read_all(rewritten(engine, swap))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("card"),
        lambda m: m["card"].update(classes=[]),
        lambda m: m["card"].update(std=[0, 0, 0]),
        lambda m: m["card"].update(dtype="complex64"),
        lambda m: m["card"].update(version=3),
        lambda m: m["card"].update(surprise=1),
        lambda m: m.update(stages=[{"file": "../../etc/passwd"}]),
        lambda m: m.update(stages="x"),
        lambda m: m.update(members=[1]),
        lambda m: m.update(head=None),
        lambda m: m.update(format="zip"),
        lambda m: m.update(stages=[{"file": ["a"]}]),
        lambda m: m["head"].update(factor=[0, 0]),
        lambda m: m["head"].update(factor=[4]),
        lambda m: m["head"].update(mode="cubic"),
        lambda m: m["head"].update(rounding="up"),
        lambda m: m["stages"][0].update(bytes_per_pixel="many"),
        lambda m: m["stages"][0].update(cost=float("nan")),
        lambda m: m.update(precision="float64"),
        lambda m: m["card"].update(size_multiple=32.5),
        lambda m: m["card"].update(channels=3.0),
        lambda m: m["card"].update(smallest=-1),
        lambda m: m["card"].update(whole=7),
        lambda m: m["card"].update(threshold=[0.5, 0.5]),
        lambda m: m["card"].update(classes="abcd"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_line(engine, change):
    with pytest.raises(DeployError) as caught:
        read_all(rewritten(engine, lambda manifest, _: change(manifest)))
    assert "\n" not in str(caught.value)


def test_an_edited_manifest_is_noticed(engine):
    content = engine.read_bytes()
    engine.write_bytes(content.replace(b"8.0", b"4.0"))
    with pytest.raises(DeployError, match="damaged"):
        read_all(engine)


def test_deeply_nested_manifests_are_one_line(engine):
    with zipfile.ZipFile(engine, "w") as archive:
        archive.writestr("manifest.json", "[" * 100_000)
    with pytest.raises(DeployError, match="no manifest"):
        read_all(engine)


def test_an_engine_without_a_manifest(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.engine", "w") as archive:
        archive.writestr("photo.txt", "x")
    with pytest.raises(DeployError, match=r"no manifest\.json"):
        EngineFile(tmp_path / "z.engine")


def test_a_card_survives_json_and_says_what_is_wrong():
    card = ModelCard(("a", "b", "c"), channels=4, dtype="uint16", mean=(1, 2, 3, 4), std=(1,) * 4)
    assert ModelCard.from_json(card.to_json(), "here") == card
    assert card.colors == voc_palette(3) and card.label_dtype == "uint8"
    with pytest.raises(ValueError, match="3 means"):
        ModelCard(("a", "b"), channels=4)
    with pytest.raises(ValueError, match="activation"):
        ModelCard(("a", "b"), activation="relu")
    with pytest.raises(ValueError, match="two classes"):
        ModelCard(("a", "b", "c"), activation="sigmoid")
    with pytest.raises(ValueError, match="smallest 0; it must be at least 1"):
        ModelCard(("a", "b"), smallest=0)
    with pytest.raises(ValueError, match=r"smallest 1\.5; it must be a whole number"):
        ModelCard(("a", "b"), smallest=1.5)
    for whole in (None, True, "two\nlines"):
        with pytest.raises(ValueError, match="the name of an operator"):
            ModelCard(("a", "b"), whole=whole)
    with pytest.raises(ValueError, match="finite"):
        ModelCard(("a",), mean=(float("nan"),) * 3)
    for values in ("123", (True, 1, 1), ("1", 1, 1)):
        with pytest.raises(ValueError, match="it is a list of numbers, one per channel"):
            ModelCard(("a",), mean=values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"activation": "sigmoid", "threshold": 1}, "threshold 1; it must be a number between 0 and 1"),
        ({"activation": "probability", "threshold": "0.5"}, "threshold '0.5'; it must be a number"),
        ({"activation": "multilabel", "threshold": (0.5, 0.5, 0.5)}, "3 thresholds for 2 classes"),
        ({"activation": "multilabel", "threshold": (0.5, float("nan"))}, "threshold nan; it must be a number"),
        ({"activation": "multilabel", "threshold": ()}, "0 thresholds for 2 classes"),
        ({"activation": "sigmoid", "threshold": (0.5,)}, "only multilabel takes one per class"),
        ({"activation": "softmax", "threshold": None}, "threshold None; it must be a number"),
    ],
)
def test_a_card_of_thresholds_that_make_no_sense_is_one_line(words, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        ModelCard(("a", "b"), **words)
    assert "\n" not in str(caught.value)


def test_cards_of_masks_and_of_values():
    card = ModelCard(("cat", "dog", "wet"), activation="multilabel", threshold=[0.5, 0.8, 0.2])
    assert ModelCard.from_json(card.to_json(), "here") == card
    assert card.scores == 3 and card.kind == "masks"
    assert card.score_thresholds == pytest.approx((0, math.log(4), -math.log(4)))
    assert ModelCard(("cat",), activation="multilabel", threshold=0.8).score_thresholds == pytest.approx((math.log(4),))
    depth = ModelCard(("depth",), activation="none", smallest=32, whole="GlobalAveragePool pool")
    assert ModelCard.from_json(depth.to_json(), "here") == depth and (depth.scores, depth.kind) == (1, "values")
    one = ModelCard(("no", "yes"), activation="probability", threshold=0.7)
    assert one.score_thresholds == (0.7,) and one.scores == 1 and one.kind == "labels"


def test_cards_of_the_first_version_are_read_and_those_to_come_are_not():
    old = json.loads(CARD.to_json())
    assert old.pop("version") == 2
    for name in ("smallest", "whole"):
        del old[name]
    assert ModelCard.from_json(json.dumps({"version": 1} | old), "here") == CARD
    for version in (3, 0, "2", True, None):
        with pytest.raises(DeployError, match=f"version {version}, and this release reads versions 1 to 2"):
            ModelCard.from_json(json.dumps({"version": version} | old), "here")


def test_the_palette_is_pascal_vocs():
    assert voc_palette(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert len(set(voc_palette(256))) == 256
