"""Engine files that are damaged, edited or made to harm: refused in one line, or read as they were written."""

import zipfile

import pytest
from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import MANIFEST, MEMBERS, read_all, rewritten

from fcn_deploy import DeployError


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "m.engine"
    write_engine(path, MANIFEST, MEMBERS)
    return path


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
        lambda m: m["card"].update(version=99),
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
