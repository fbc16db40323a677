"""label-images from and to addresses: S3 by moto's server, memory, the web; shards, resuming, the manifest."""

import errno
import http.server
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.files import WriteError
from fcn_deploy.runtime.images import regions
from fcn_deploy.runtime.labelling import bulk, objects
from fcn_deploy.runtime.labelling.bulk import label_objects
from fcn_deploy.runtime.labelling.cluster import _object, _text
from fcn_deploy.runtime.labelling.files import label_files
from fcn_deploy.runtime.labelling.manifest import Manifest, class_shares
from fcn_deploy.runtime.labelling.objects import Store, find_objects, is_address, parse_shard, share_of
from fcn_deploy.runtime.network import Network
from helpers import BIN, command, label_records, needs, one_error, photo, save_photos
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def net(exports):
    with Network(exports / "narrow.engine", threads=1) as net:
        yield net


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    fs = needs("fsspec").filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


@pytest.fixture(scope="module")
def s3():
    """moto's server, and an s3fs that speaks to it; so do commands that are run."""
    needs("s3fs")
    server = needs("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    named = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        yield needs("fsspec").filesystem("s3", skip_instance_cache=True)
    server.stop()


def label(net, words, out, **options):
    """The records of labelling addresses."""

    def files(sources, folder):
        return label_files(net, sources, folder)

    return list(label_objects(find_objects(words), Store(out), options.pop("label", files), **options))


def labels_at(fs, path):
    return np.asarray(Image.open(io.BytesIO(fs.cat_file(path))))


@pytest.mark.slow
def test_a_tree_of_objects_is_labelled_and_keeps_its_shape(net, memory):
    images = {"/in/a/1.png": photo(37, 53), "/in/b/1.png": photo(20, 31), "/in/b/c/2.png": photo(1, 1)}
    for path, image in images.items():
        memory.pipe(path, png(image))
    memory.pipe("/in/b/broken.png", b"no picture")
    memory.pipe("/in/b/readme.txt", b"no picture either")
    records = label(net, ["memory://in/**/*.png"], "memory://out")
    assert sorted(memory.find("/out")) == ["/out/a/1.png", "/out/b/1.png", "/out/b/c/2.png"]
    for path, image in images.items():
        assert np.array_equal(labels_at(memory, path.replace("/in", "/out")), net.result(image))
    wrong = [record for record in records if "error" in record]
    assert [record["file"] for record in wrong] == ["memory:///in/b/broken.png"]
    assert "memory:///in/b/broken.png is not an image" in wrong[0]["error"]
    assert {record["labels"] for record in records if "size" in record} >= {"memory:///out/a/1.png"}


@pytest.mark.slow
def test_what_is_put_last_tells_that_all_of_it_is_there(net, memory, monkeypatch):
    memory.pipe("/in/1.png", png(photo(30, 40)))
    put = []
    monkeypatch.setattr(Store, "put", lambda self, file, name: put.append(name))
    label(net, ["memory://in"], "memory://out", label=lambda s, o: label_files(net, s, o, overlay=True))
    assert put == ["1.overlay.png", "1.png"]


@pytest.mark.slow
def test_results_that_exist_are_kept_unless_force_or_resume_say_otherwise(net, memory):
    memory.pipe({"/in/1.png": png(photo(30, 40)), "/in/2.png": png(photo(31, 40)), "/out/1.png": b"mine"})
    with pytest.raises(MisuseError, match=r"memory:///out/1\.png exists already"):
        label(net, ["memory://in"], "memory://out")
    first, second = label(net, ["memory://in"], "memory://out", resume=True)
    assert first["skipped"] and "size" in second and memory.cat_file("/out/1.png") == b"mine"
    label(net, ["memory://in"], "memory://out", force=True)
    assert labels_at(memory, "/out/1.png").shape == (30, 40)


@pytest.mark.parametrize("how", [{}, {"force": True}, {"resume": True}])
def test_results_never_take_the_place_of_images(net, memory, tmp_path, how):
    """Nor are images taken for results that are there: with resume nothing would be labelled."""
    memory.pipe({"/in/1.png": png(photo(30, 40)), "/in/2.jpg": b"mine"})
    with pytest.raises(
        MisuseError, match=r"^memory:///in/1\.png is an input and would be replaced by labels; [^\n]*-o$"
    ):
        label(net, ["memory://in"], "memory://in", **how)
    save_photos(tmp_path / "in", [(20, 30)])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(MisuseError, match=r"in/0\.png is an input"):
        label(net, [str(tmp_path / "in")], str(tmp_path / "link"), **how)
    assert len(memory.find("/in")) == 2 and memory.cat_file("/in/2.jpg") == b"mine"


def test_what_lies_beside_files_of_this_machine_counts_wherever_their_results_go(net, memory, tmp_path):
    """A world file here: the labels are those of a folder's run, with their place on earth."""
    tifffile.imwrite(tmp_path / "a.tif", photo(30, 40), photometric="rgb")
    (tmp_path / "a.tfw").write_text("2\n0\n0\n-2\n500000\n4000000\n")
    (record,) = label_files(net, [tmp_path / "a.tif"], tmp_path / "here")
    label(net, [str(tmp_path / "a.tif")], "memory://out")
    assert "ModelPixelScaleTag" in tifffile.TiffFile(record["labels"]).pages[0].tags
    assert memory.cat_file("/out/a.tif") == (tmp_path / "here" / "a.tif").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tfw", "a.tif", "here"]


@pytest.mark.slow
def test_from_an_address_to_a_folder_and_back(net, memory, tmp_path):
    save_photos(tmp_path / "in", [(20, 30), (40, 21)])
    label(net, [str(tmp_path / "in")], "memory://out")
    assert labels_at(memory, "/out/1.png").shape == (40, 21)
    memory.pipe("/in/x.png", png(photo(22, 33)))
    label(net, ["memory://in/x.png"], str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "x.png")), net.result(photo(22, 33)))


def test_results_are_put_while_the_next_images_are_labelled(net, memory, monkeypatch):
    """Nothing waits for a slow store but what is put there; all is there at the end, and records keep their order."""
    for index in range(6):
        memory.pipe(f"/in/{index}.png", png(photo(20 + index, 30)))
    go, labelled, put = threading.Event(), [], memory.put_file

    def files(sources, folder):
        labelled.append(len(sources))
        if len(labelled) == 2:
            go.set()  # only now do the results of the first group go
        yield from label_files(net, sources, folder)

    def slow(source, target, **rest):
        assert go.wait(60)
        return put(source, target, **rest)

    monkeypatch.setattr(memory, "put_file", slow)
    records = label(net, ["memory://in"], "memory://out", label=files, together=2)
    assert labelled == [2, 2, 2] and [each["size"][0] for each in records] == [20, 21, 22, 23, 24, 25]
    for index in range(6):
        expected = net.result(photo(20 + index, 30))
        np.testing.assert_array_equal(labels_at(memory, f"/out/{index}.png"), expected)


@pytest.mark.slow
def test_a_full_disk_on_the_other_side_ends_the_run_and_loses_nothing(net, memory, monkeypatch):
    memory.pipe({f"/in/{i}.png": png(photo(20, 20 + i)) for i in range(9)})
    put_file, room = type(memory).put_file, [4]

    def full(self, *words, **options):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return put_file(self, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", full)
        patch.setattr(objects.time, "sleep", lambda seconds: None)
        with pytest.raises(WriteError, match=r"No space left on device.*--resume goes on") as error:
            label(net, ["memory://in"], "memory://out")
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    whole = memory.find("/out")
    assert len(whole) == 4
    records = label(net, ["memory://in"], "memory://out", resume=True)
    assert sum("skipped" in record for record in records) == 4
    for i in range(9):
        assert np.array_equal(labels_at(memory, f"/out/{i}.png"), net.result(photo(20, 20 + i)))


class Half(http.server.BaseHTTPRequestHandler):
    """Sends the half of what it promises, of anything but whole.png."""

    def do_HEAD(self):
        self.answer(0)

    def do_GET(self):
        self.answer(len(CONTENT) if "whole" in self.path else len(CONTENT) // 2)

    def answer(self, count):
        self.send_response(404 if "none" in self.path else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:count])

    def log_message(self, *words): ...


CONTENT = png(photo(60, 70))


@pytest.mark.slow
def test_an_address_that_answers_half_is_one_files_error(net, memory, monkeypatch):
    needs("aiohttp")
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        half, whole = label(net, [f"{base}/half.png?key=1", f"{base}/whole.png"], "memory://out")
        with pytest.raises(MisuseError, match=r"none\.png does not exist"):
            find_objects([f"{base}/none.png"])
        server.shutdown()
    assert f"{base}/half.png?key=1 cannot be read: " in half["error"] and "\n" not in half["error"]
    assert len(half["error"]) < 300
    assert whole["size"] == [60, 70] and memory.find("/out") == ["/out/whole.png"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("abc://x/y", "of a kind that fsspec does not know"),
        ("memory://nothing/here", "does not exist"),
        ("memory://empty", "holds no images"),
        ("memory://in/*.tif", "holds no images"),
    ],
)
def test_an_address_that_names_nothing_is_refused_in_one_line(memory, address, said):
    memory.pipe({"/in/1.png": b"", "/empty/note.txt": b""})
    with pytest.raises(MisuseError, match=said) as error:
        find_objects([address])
    assert "\n" not in str(error.value) and address in str(error.value)


def test_objects_of_one_name_are_told_apart_and_none_leads_out_of_the_folder(memory, monkeypatch):
    memory.pipe({"/in/1.png": b"", "/in/1.jpg": b"", "/in/2.jpg": b"", "/other/2.jpg": b""})
    assert [item.name for item in find_objects(["memory://in"])] == ["1.jpg", "1.png", "2"]
    with pytest.raises(MisuseError, match=r"2\.jpg is the name of several images"):
        find_objects(["memory://in", "memory://other"])
    with pytest.raises(MisuseError, match="outside -o"):
        objects._result_name("../../etc/x.png", "memory://in")


def archive(path, files):
    """A zip, or a tar that is packed or not, of files by name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as made:
            for name, content in files.items():
                made.writestr(name, content)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as made:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            made.addfile(about, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_images_in_archives_come_out_as_they_went_in(tmp_path, kind):
    """Several threads fetch them, of which tarfile knows nothing: of equal sizes it would mix up the contents."""
    needs("fsspec")
    random = np.random.default_rng(0)
    files = {f"{place:03d}.bmp": random.bytes(60_000) for place in range(100)} | {"deep/000.bmp": random.bytes(9)}
    archive(tmp_path / f"a.{kind}", files)
    address = f"{kind[:3]}://**::{tmp_path}/a.{kind}"
    items = find_objects([address])
    assert {f"{item.name}.bmp" for item in items} == set(files)
    # As the actors of a cluster are told of them.
    assert str(items[0]) == f"{kind[:3]}://000.bmp::{tmp_path}/a.{kind}" == str(_object(json.loads(_text(items[0]))))
    with ThreadPoolExecutor(bulk.FETCHERS) as pool:
        staged = list(pool.map(lambda each: bulk._fetch(each[1], tmp_path, f"{each[0]}"), enumerate(items)))
    assert [each.path.read_bytes() for each in staged] == [files[item.path.lstrip("/")] for item in items]


def test_of_two_archives_neither_takes_the_others_place(tmp_path):
    needs("fsspec")
    for name in ("a.zip", "b.zip"):
        archive(tmp_path / name, {"1.png": b""})
    words = [f"zip://::{tmp_path}/{name}" for name in ("a.zip", "b.zip")]
    assert [item.name for item in find_objects(words[:1])] == ["1"]
    with pytest.raises(MisuseError, match=r"1\.png is the name of several images"):
        find_objects(words)


@pytest.mark.parametrize(
    ("address", "path", "said"),
    [
        ("github://owner:name@main/photos", "photos/1.png", "github://owner:name@main/photos/1.png"),
        ("ftp://host/photos/", "/photos/1.png", "ftp://host/photos/1.png"),
        ("simplecache::zip://*.png::s3://b/a.zip", "1.png", "simplecache::zip://1.png::s3://b/a.zip"),
        ("s3://b/photos", "b/photos/1.png", None),  # fsspec writes it itself
    ],
)
def test_hosts_and_archives_stay_in_addresses(address, path, said):
    link = next(link for link in address.split("::") if "://" in link)
    kind = needs("fsspec").get_filesystem_class(link.partition("://")[0])
    found = objects._around(address, kind, kind._strip_protocol(link).rstrip("/"))
    assert (found and path.join(found)) == said


def test_what_is_an_address_of_files():
    assert all(map(is_address, ("s3://b/c", "gs://b", "memory://x", "https://h/a.png?k=1", "file:///a", "S3://x")))
    assert not any(map(is_address, ("a.png", "/a/b", "rtsp://camera", "https://h/live", "C:\\a.png", "http://h/a.mp4")))


def test_shards_are_disjoint_and_whole_and_do_not_move_when_files_are_added():
    names = [f"a/{i}" for i in range(500)]
    shards = [set(share_of(names, (i, 7))) for i in range(1, 8)]
    assert sorted(place for shard in shards for place in shard) == list(range(500))
    assert min(map(len, shards)) > 40
    more = [*names, *(f"b/{i}" for i in range(100))]
    assert all({p for p in share_of(more, (i, 7)) if p < 500} == shards[i - 1] for i in range(1, 8))
    for wrong in ("0/3", "4/3", "3", "1/x", "-1/2"):
        with pytest.raises(MisuseError, match="write i/n"):
            parse_shard(wrong)


@pytest.mark.slow
def test_the_manifest_tells_of_every_file_however_the_run_ends(net, memory):
    pq = needs("pyarrow.parquet")
    images = [photo(20 + i, 33) for i in range(4)]
    memory.pipe({f"/in/{i}.png": png(image) for i, image in enumerate(images)} | {"/in/broken.png": b"?"})

    def rows():
        table = pq.read_table(io.BytesIO(memory.cat_file("/out/m.parquet")))
        return {row["file"]: row for row in table.to_pylist()}, table.schema.metadata

    def manifest(keep=False):
        return Manifest("memory://out/m.parquet", net, None, keep)

    label(net, ["memory://in/0.png", "memory://in/broken.png"], "memory://out", manifest=manifest())
    found, about = rows()
    assert set(found) == {"memory:///in/0.png", "memory:///in/broken.png"}
    assert json.loads(about[b"fcn_deploy.card"]) == json.loads(net.card.to_json())
    run = label_objects(find_objects(["memory://in"]), Store("memory://out"), lambda s, o: label_files(net, s, o),
                        resume=True, manifest=manifest(keep=True))  # fmt: skip
    assert next(run)["skipped"]
    next(run)
    run.close()  # as an interrupt does
    assert 2 <= len(rows()[0]) <= 5
    memory.rm_file("/out/m.parquet")  # as of a run that was killed: what is there is looked up
    label(net, ["memory://in"], "memory://out", resume=True, manifest=manifest(keep=True))
    found, _ = rows()
    assert len(found) == 5
    broken = found.pop("memory:///in/broken.png")
    assert broken["error"] and broken["shares"] is None
    for i, image in enumerate(images):
        row, counts = found[f"memory:///in/{i}.png"], np.bincount(net.result(image).reshape(-1), minlength=5)
        shares = dict(row["shares"])
        expected = {f"class {k}": count / image[:, :, 0].size for k, count in enumerate(counts) if count}
        assert shares == pytest.approx(expected) and row["result"] == f"memory:///out/{i}.png"
        assert (row["height"], row["width"]) == image.shape[:2]


def test_shares_are_of_the_pixels_that_are_data(tmp_path):
    card = ModelCard(("road", "sky"))
    labels = np.zeros((30, 700), np.uint8)
    labels[:, 100:200], labels[:, 200:] = 1, card.no_data
    for name, write in (
        ("a.png", lambda path: Image.fromarray(labels).save(path)),
        ("a.tif", lambda path: tifffile.imwrite(path, labels, tile=(512, 512))),
    ):
        write(tmp_path / name)
        assert class_shares(tmp_path / name, "labels", card) == {"road": 0.5, "sky": 0.5}
    masks = np.zeros((2, 30, 40), bool)
    masks[0, :15], masks[1] = True, True
    tifffile.imwrite(tmp_path / "m.tif", masks, planarconfig="separate", photometric="minisblack")
    assert class_shares(tmp_path / "m.tif", "masks", card) == {"road": 0.5, "sky": 1.0}
    assert class_shares(tmp_path / "m.tif", "values", card) is None


@pytest.mark.slow
def test_files_of_this_machine_have_shards_and_a_manifest_too(exports, tmp_path):
    pq = needs("pyarrow.parquet")
    save_photos(tmp_path / "in", [(20, 30)] * 3)
    words = ["infer", exports / "narrow.engine", tmp_path / "in", "-o", tmp_path / "out"]
    files = []
    for shard in ("1/3", "2/3", "3/3"):
        done = command(*words, "--shard", shard, "--manifest", tmp_path / "m.parquet", "--json")
        files += [record["file"] for record in label_records(done)]
    assert len(files) == len(set(files)) == 3 == len(list((tmp_path / "out").iterdir()))
    tables = [pq.read_table(path).to_pylist() for path in sorted(tmp_path.glob("m-0000*-of-00003.parquet"))]
    assert sorted(row["file"] for table in tables for row in table) == sorted(files)
    assert "ends in .parquet" in one_error(command(*words, "--manifest", "m.csv", ok=2))


@pytest.mark.slow
def test_large_tiffs_are_read_by_ranges_and_come_out_as_when_they_are_here(net, s3, tmp_path, monkeypatch):
    from s3fs.core import S3File

    monkeypatch.setattr(bulk, "RANGED_BYTES", 1 << 20)
    monkeypatch.setattr(bulk, "BLOCK", 64 << 10)
    monkeypatch.setattr(regions, "REGION_PIXELS", 1 << 18)
    image, fetched, ranges = photo(900, 700), [], []
    tifffile.imwrite(tmp_path / "scene.tif", image, tile=(128, 128), photometric="rgb")
    s3.mkdir("scenes")
    s3.put_file(str(tmp_path / "scene.tif"), "scenes/scene.tif")
    fetch_range = S3File._fetch_range
    monkeypatch.setattr(Store, "fetch", lambda self, item, target: fetched.append(item))
    monkeypatch.setattr(S3File, "_fetch_range", lambda self, a, b: (ranges.append(b - a), fetch_range(self, a, b))[1])
    (record,) = label(net, ["s3://scenes/scene.tif"], "s3://scenes/labels")
    assert record["labels"] == "s3://scenes/labels/scene.tif" and record["size"] == [900, 700]
    assert not fetched and len(ranges) > 10 and max(ranges) <= 1 << 20
    found = tifffile.imread(io.BytesIO(s3.cat_file("scenes/labels/scene.tif")))
    assert np.array_equal(found, net.result(image))


@pytest.mark.slow
def test_tiffs_that_cannot_be_read_in_parts_come_whole(net, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "RANGED_BYTES", 1000)
    monkeypatch.setattr("fcn_deploy.runtime.images.tiff.WHOLE_PIXELS", 1 << 12)
    tifffile.imwrite(tmp_path / "a.tif", photo(60, 90), photometric="rgb", rowsperstrip=60)
    memory.put_file(str(tmp_path / "a.tif"), "/in/a.tif")
    (record,) = label(net, ["memory://in"], "memory://out")
    assert np.array_equal(labels_at(memory, "/out/a.png"), net.result(photo(60, 90))), record


@pytest.mark.slow
def test_credentials_that_are_missing_are_one_line(exports, tmp_path):
    needs("s3fs")
    env = {
        "AWS_CONFIG_FILE": str(tmp_path),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path),
        "AWS_EC2_METADATA_DISABLED": "1",
    }
    env |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    done = command("infer", exports / "narrow.engine", "s3://b/a.png", "-o", tmp_path / "out", ok=1, env=env)
    assert "s3://b/a.png cannot be read: " in one_error(done) and "give credentials" in one_error(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_nothing_partial_and_nothing_twice(exports, s3):
    """Every put of an object makes a version of it here."""
    count = 60
    for bucket in ("photos", "labels"):
        s3.mkdir(bucket)
    s3.call_s3("put_bucket_versioning", Bucket="labels", VersioningConfiguration={"Status": "Enabled"})
    s3.pipe({f"photos/{i % 5}/{i}.png": png(photo(40 + i % 30, 60, i % 9)) for i in range(count)})
    words = [BIN / "label-images", exports / "narrow.engine", "s3://photos/**/*.png", "-o", "s3://labels/x"]
    run = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True, env=os.environ)
    for _ in range(count // 4):
        assert "→" in run.stdout.readline()
    run.send_signal(signal.SIGKILL)
    run.wait()
    s3.invalidate_cache()
    before = s3.find("labels")
    assert count // 4 <= len(before) < count
    for name in before:
        assert labels_at(s3, name).shape[1] == 60
    done = command("label-images", *words[1:], "--resume", "--json", "--manifest", "s3://labels/m.parquet")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["labelled"], summary["skipped"]) == (count - len(before), len(before))
    versions = s3.call_s3("list_object_versions", Bucket="labels", Prefix="x/")["Versions"]
    assert len(versions) == len({version["Key"] for version in versions}) == count
    rows = needs("pyarrow.parquet").read_table(io.BytesIO(s3.cat_file("labels/m.parquet"))).to_pylist()
    assert len(rows) == count and all(sum(dict(row["shares"]).values()) == pytest.approx(1) for row in rows)


def test_an_address_of_a_missing_package_says_what_to_install(monkeypatch):
    def missing(address, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(needs("fsspec").core, "url_to_fs", missing)
    with pytest.raises(DeployError, match=r"gs://b: Please install gcsfs.*pip install 'fcn-deploy\[cloud\]'"):
        Store("gs://b")


@pytest.fixture
def scenes(tmp_path):
    """A folder with three images, one of which is broken, and what label-images makes of it on this machine."""
    save_photos(tmp_path / "in", [(20, 30), (25, 31)])
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    return tmp_path


def rows_of(text: str, folder: str) -> list[str]:
    return sorted(line.replace(folder, "") for line in text.splitlines())


@pytest.mark.slow
def test_statistics_and_polygons_at_addresses_are_those_of_a_folder(exports, s3, scenes):
    """Of images in a bucket into files in it; of what an earlier run has labelled, too."""
    needs("rasterio"), needs("pyogrio")
    s3.mkdir("gathered")
    for file in sorted((scenes / "in").iterdir()):
        s3.put_file(str(file), f"gathered/in/{file.name}")
    words = "infer", exports / "narrow.engine"
    made = "--stats", scenes / "s.csv", "--polygons", scenes / "p.geojson"
    command(*words, scenes / "in", "-o", scenes / "out", *made, ok=1)
    expected = rows_of((scenes / "s.csv").read_text(), f"{scenes}/in/")
    shapes = json.loads((scenes / "p.geojson").read_text())["features"]
    assert len(expected) == 1 + 2 * 5 and shapes

    def shown(features):
        return sorted(json.dumps(each["geometry"]) + each["properties"]["name"] for each in features)

    there = "--stats", "s3://gathered/all/s.csv", "--polygons", "s3://gathered/all/p.geojson"
    for again in ((), ("--resume",)):  # which labels nothing, and makes both of what is there
        done = command(*words, "s3://gathered/in", "-o", "s3://gathered/out", *there, *again, "--json", ok=1)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert sum("skipped" in each for each in records[:-1]) == (2 if again else 0)
        s3.invalidate_cache()
        assert rows_of(s3.cat_file("gathered/all/s.csv").decode(), "s3://gathered/in/") == expected
        assert shown(json.loads(s3.cat_file("gathered/all/p.geojson"))["features"]) == shown(shapes)
    assert "exists already" in one_error(command(*words, "s3://gathered/in", "-o", "s3://gathered/new", *there, ok=2))
    assert not s3.exists("gathered/new")


def test_images_of_this_machine_have_statistics_at_an_address(exports, memory, scenes):
    from fcn_deploy.runtime.labelling.products import Products

    products = Products(stats="memory://b/s.csv")
    with Network(exports / "narrow.engine", threads=1) as net:
        list(label_files(net, [scenes / "in" / "0.png"], scenes / "out", products=products))
        with pytest.raises(MisuseError, match=r"memory://b/s\.csv exists already"):
            list(label_files(net, [scenes / "in" / "1.png"], scenes / "out", products=products))
    assert memory.cat_file("/b/s.csv").decode().count("\n") == 6


@pytest.mark.parametrize(("patience", "tries"), [(10.0, 3), (-1.0, 1)])
def test_what_has_failed_for_long_is_not_tried_again(memory, tmp_path, monkeypatch, patience, tries):
    memory.pipe("/in/a.png", b"x")
    asked = []

    def half(path, target, **rest):
        asked.append(path)
        raise OSError("half an answer")

    (item,) = objects.find_objects(["memory://in/a.png"])
    monkeypatch.setattr(memory, "get_file", half)
    monkeypatch.setattr(objects, "PATIENCE", patience)
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: None)
    with pytest.raises(DeployError, match="half an answer; check it and run again"):
        item.store.fetch(item, tmp_path / "a.png")
    assert len(asked) == tries


def test_statistics_that_cannot_be_put_are_one_line_and_labels_stay(net, memory, monkeypatch):
    from fcn_deploy.runtime.labelling.gathered import gathering
    from fcn_deploy.runtime.labelling.products import Products

    def refuse(source, target, **rest):
        if target.endswith(".csv"):
            raise OSError("no space left")
        return put(source, target, **rest)

    memory.pipe("/in/a.png", png(photo(20, 30)))
    put = memory.put_file
    monkeypatch.setattr(memory, "put_file", refuse)
    monkeypatch.setattr(objects, "TRIES", 1)
    with pytest.raises(WriteError, match=r"memory:///all/s\.csv cannot be written: no space left"):
        label(net, ["memory://in"], "memory://out", gather=gathering(Products(stats="memory://all/s.csv"), net.card))
    assert memory.exists("/out/a.png") and not memory.exists("/all/s.csv")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--page", "all"], "--page all is of images and results of this machine"),
        (["--stats", "memory://x/s.txt"], "name a file that ends in .csv"),
        (["--stats", "memory://out/0.instances.csv"], "is an image or a result of this run"),
        (["--stats", "s.csv", "--ray", "local"], "run it with --resume and without --ray afterwards"),
        (["--stats", "s.csv", "--instances", "b", "--resume"], "would not be counted"),
        (["--stats", "nosuch://x/s.csv"], "of a kind that fsspec does not know"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_made_of_objects_together_is_said_before_the_work(exports, tmp_path, words, said):
    save_photos(tmp_path / "in", [(20, 30)])
    done = command(
        "infer", exports / "narrow.engine", tmp_path / "in", "-o", "memory://out", *words, ok=2, cwd=tmp_path
    )
    assert said in one_error(done) and not (tmp_path / "s.csv").exists()


@pytest.fixture
def gcs(monkeypatch):
    """A server of Google's JSON API: gives the objects of `.found`, and takes into `.put` unless there is `.refuse`."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # or it asks a service that no emulator has
    needs("gcsfs")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            path, _, query = self.path.partition("?")
            name = unquote(path.rpartition("/o/")[2])
            entries = [
                {"name": key, "size": str(len(found)), "bucket": "photos"} for key, found in server.found.items()
            ]
            if path.endswith("/o"):
                prefix = parse_qs(query).get("prefix", [""])[0]
                kept = [entry for entry in entries if "/b/photos/" in path and entry["name"].startswith(prefix)]
                self.answer(json.dumps({"items": kept}).encode())
            elif name not in server.found or "/b/photos/" not in path:
                self.answer(b'{"error": {"message": "no such object"}}', 404)
            elif "alt=media" in query:
                self.answer(server.found[name])
            else:
                self.answer(json.dumps(next(entry for entry in entries if entry["name"] == name)).encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if server.refuse:
                self.answer(json.dumps({"error": {"message": server.refuse, "code": 403}}).encode(), 403)
                return
            content = body.split(b"\n\n", 2)[2]
            name = re.search(rb'"name": *"([^"]+)"', body)[1].decode()
            server.put[name] = content.rpartition(b"\n--")[0]
            self.answer(json.dumps({"name": name, "bucket": "labels", "size": str(len(server.put[name]))}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.found, server.put, server.refuse = {}, {}, ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    fsspec = needs("fsspec")
    fsspec.config.conf["gcs"] = {"token": "anon", "skip_instance_cache": True}
    yield server
    del fsspec.config.conf["gcs"]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("address", ["gs://b/a.png", "s3://b/a.png", "http://{}/a.png"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_store_that_answers_half_or_falls_silent_is_told_soon(monkeypatch, tmp_path, address, silent):
    """By their own, gcsfs tries again for half a minute an operation, and aiohttp waits for five minutes."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for module in ("aiohttp", "gcsfs", "s3fs"):
        needs(module)
    fsspec = needs("fsspec")
    over = threading.Event()

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self):
            known = json.dumps({"name": "a.png", "size": "100", "bucket": "b"}).encode()
            metadata = address.startswith("gs") and "alt=media" not in self.path and "/download/" not in self.path
            self.send_response(200)
            self.send_header("Content-Length", str(len(known) if metadata else 100))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(known if metadata else bytes(50))
                if not metadata and silent:
                    over.wait(60)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    monkeypatch.setattr(objects, "SILENT", 0.5)
    monkeypatch.setattr(objects, "PATIENCE", 0.1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{place}")
        keys = {"key": "a", "secret": "b", "endpoint_url": f"http://{place}"}
        found = {"gcs": {"token": "anon"}, "s3": keys, "http": {}}
        for name, options in found.items():
            monkeypatch.setitem(fsspec.config.conf, name, options | {"skip_instance_cache": True})
        started = time.monotonic()
        with pytest.raises(DeployError, match="within 0 seconds" if silent else "payload|Connection") as error:
            (item,) = find_objects([address.format(place)])
            item.store.fetch(item, tmp_path / "a.png")
        over.set()
        server.shutdown()
    assert time.monotonic() - started < 10 and "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_objects_of_google_are_labelled_and_what_it_refuses_is_told(gcs, net):
    gcs.found = {f"a/{name}.png": png(photo(20, 30)) for name in "12"}
    done = label(net, ["gs://photos/a"], "gs://labels/x")
    assert len(done) == 2 and not any("error" in record for record in done), done
    assert {name: Image.open(io.BytesIO(content)).size for name, content in gcs.put.items()} == {
        "x/1.png": (30, 20), "x/2.png": (30, 20)
    }  # fmt: skip
    gcs.refuse = "the quota of the bucket is used up"
    with pytest.raises(DeployError, match=r"gs://labels/y/\d.png cannot be written: .*quota.*give credentials"):
        label(net, ["gs://photos/a"], "gs://labels/y")


def test_a_full_disk_behind_an_address_leaves_nothing_partial(tmp_path, monkeypatch):
    store = Store(f"file://{tmp_path / 'out'}")
    (tmp_path / "labels.png").write_bytes(b"labels")

    def full(source, target):
        Path(target).write_bytes(b"lab")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.fs, "put_file", full)
    with pytest.raises(DeployError, match="No space left on device"):
        store.put(tmp_path / "labels.png", "labels.png")
    assert not any((tmp_path / "out").iterdir())
