"""Ray Data: the Labeler for map_batches, and label-images on a cluster of this machine alone."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.files import WriteError
from fcn_deploy.runtime.labelling import bulk, cluster
from fcn_deploy.runtime.labelling.cluster import BATCH, LEAST, Cluster, Labeler, label_on_cluster
from fcn_deploy.runtime.labelling.objects import Store, find_objects
from fcn_deploy.runtime.network import Network
from helpers import command, needs, one_error, photo, save_photos
from PIL import Image

from fcn_deploy import Segmenter


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, for the module; two actors of a CPU each fit."""
    ray = needs("ray.data") and needs("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def test_a_labeler_gives_what_label_images_writes_and_a_broken_image_is_a_row(exports):
    """As Ray calls it, without Ray."""
    images = [photo(30, 41), photo(17, 60)]
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "PNG")
    rows = Labeler((exports / "narrow.engine").read_bytes(), threads=1)(
        {"bytes": [buffer.getvalue(), b"no image"], "path": ["s3://b/a.png", "s3://b/b.png"], "key": [1, 2]}
    )
    assert list(rows) == ["path", "key", "labels", "height", "width", "error"] and rows["key"] == [1, 2]
    with Segmenter(exports / "narrow.engine") as net:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(rows["labels"][0]))), net(images[0]))
        arrays = Labeler(exports / "narrow.engine", column="image")({"image": images})
        for image, found in zip(images, arrays["labels"], strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(found))), net(image))
    assert rows["labels"][1] is None and rows["error"][0] is None
    assert rows["error"][1].startswith("s3://b/b.png is not an image")


@pytest.mark.slow
def test_a_cluster_labels_files_and_scenes_as_one_machine_does(ray, exports, tmp_path, monkeypatch):
    from fcn_deploy.runtime.images import regions
    from fcn_deploy.runtime.labelling.regions import label_regions

    monkeypatch.setattr(bulk, "RANGED_BYTES", 1 << 20)
    monkeypatch.setattr(cluster, "REGION_PIXELS", 1 << 18)
    monkeypatch.setattr(regions, "REGION_PIXELS", 1 << 18)
    monkeypatch.setattr(cluster, "BAND_PIXELS", 1)  # in bands of BAND_ROWS
    source = tmp_path / "in"
    save_photos(source, [(20 + i, 30) for i in range(6)])
    (source / "broken.png").write_bytes(b"no image")
    tifffile.imwrite(source / "scene.tif", photo(900, 700), tile=(128, 128), photometric="rgb")
    out = tmp_path / "out"
    with Network(exports / "narrow.engine", threads=1) as net:
        run = label_on_cluster(Cluster("local", actors=2, threads=1), net, find_objects([str(source)]), Store(str(out)))
        records = {Path(record["file"]).name: record for record in run}
        label_regions(net, source / "scene.tif", tmp_path / "whole.tif")
        Path(tmp_path, "file").touch()  # no folder: what an actor cannot write is one line of the run
        run = label_on_cluster(Cluster("local"), net, find_objects([str(source)]), Store(str(tmp_path / "file" / "x")))
        with pytest.raises(WriteError, match=r"^cannot write [^\n]*: Not a directory; [^\n]*$"):
            list(run)
        assert len(records) == 8
        assert "broken.png is not an image" in records["broken.png"]["error"]
        for i in range(6):
            labels = np.asarray(Image.open(out / f"{i}.png"))
            assert np.array_equal(labels, net.result(np.asarray(Image.open(source / f"{i}.png"))))
    assert records["scene.tif"]["size"] == [900, 700] and records["scene.tif"]["labels"] == str(out / "scene.tif")
    assert (out / "scene.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_actors_are_of_a_cluster(exports, tmp_path):
    words = "infer", exports / "narrow.engine", tmp_path, "-o", tmp_path / "out", "--actors", "2"
    assert "name it by --ray" in one_error(command(*words, ok=2))


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_one_line(exports, tmp_path):
    needs("ray.data")
    save_photos(tmp_path / "in", [(20, 30)])
    words = "infer", exports / "narrow.engine", tmp_path / "in", "-o", tmp_path / "out", "--ray", "ray://127.0.0.1:1"
    assert "--ray ray://127.0.0.1:1: [Errno 111] Connection refused; start a cluster" in one_error(
        command(*words, ok=1)
    )


def test_what_a_lost_actor_had_done_is_kept_and_is_of_its_engine(exports, tmp_path):
    """Its batch is done again by the next; results of this machine go to their places at once."""
    save_photos(tmp_path / "in" / "a", [(20, 30), (40, 21)])
    items = find_objects([str(tmp_path / "in" / "**" / "*.png")])
    batch = [cluster._text(item) for item in items]
    with Network(exports / "narrow.engine", threads=1) as net:
        actor = cluster._ObjectLabeler(Cluster("local"), "0123", str(tmp_path / "out"), False)
        actor.network = net
        actor.label_batch([], batch[:1])
        first = tmp_path / "out" / "a" / "0.png"
        written = first.stat()
        (done, row), (new, other) = actor.label_batch([], batch)
        assert np.array_equal(np.asarray(Image.open(new["labels"])), net.result(np.asarray(Image.open(items[1].path))))
    assert done["skipped"] and done["labels"] == str(first) and first.stat() == written
    assert row["engine"] == other["engine"] == "0123" and (row["height"], row["width"]) == (20, 30)
    assert sum(share for _, share in row["shares"]) == pytest.approx(1)


def test_actors_are_given_smaller_and_smaller_parts(exports, tmp_path):
    save_photos(tmp_path, [(2, 3)])
    (item,) = find_objects([str(tmp_path / "0.png")])
    for count in (0, 1, LEAST, 3 * BATCH, 2000):
        sizes = [len(batch) for batch in cluster._batches([item] * count, actors=2)]
        assert sum(sizes) == count and sizes == sorted(sizes, reverse=True) and max(sizes, default=0) <= BATCH
        assert count < LEAST or sizes[-1] <= LEAST
