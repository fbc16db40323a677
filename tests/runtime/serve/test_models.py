"""Several networks in one server, replaced while they run; and how its memory is shared out."""

import hashlib
import shutil
import threading
import time

import numpy as np
import pytest
from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.process_memory import resident
from fcn_deploy.runtime.serve.models import Memory, Models, Served, UnknownModelError
from helpers import photo
from serving import serving

from fcn_deploy import MisuseError, Segmenter


def renamed(engine, to, by="another build"):
    """A copy of an engine that differs in a name, and so in its digest."""
    from dataclasses import replace

    with EngineFile(engine) as file:
        members = {name: file.read(name) for name in file.manifest.members}
        write_engine(to, replace(file.manifest, created_by=by), members)
    return to


def opened(path):
    return Network(path, threads=1)


def test_models_are_told_apart_by_name_and_version(exports, tmp_path):
    other = renamed(exports / "narrow.engine", tmp_path / "other.engine")
    with serving(exports / "narrow.engine", other) as (client, service):
        names = {each["name"]: each["version"] for each in client.json("/v2")["models"]}
        assert list(names) == ["narrow", "other"] and len(set(names.values())) == 2
        for name, version in names.items():
            assert client.json(f"/v2/models/{name}/versions/{version}")["versions"] == [version]
            assert client.json(f"/v2/models/{name}/versions/{version}/ready")["ready"]
        assert "name one of narrow, other" in client.error(404, "POST", "/label", b"x")
        with pytest.raises(UnknownModelError):
            service.models.get("narrow", names["other"])


def test_a_plain_onnx_is_served_too(exports):
    image = photo(40, 50)
    with serving(exports / "narrow.onnx") as (client, _), Segmenter(exports / "narrow.onnx", threads=2) as net:
        np.testing.assert_array_equal(client.infer("narrow", image)["labels"], net(image))
        assert "scores" not in [each["name"] for each in client.json("/v2/models/narrow")["outputs"]]


def test_a_model_is_replaced_without_a_lost_request(exports, tmp_path):
    engine = tmp_path / "m.engine"
    shutil.copy(exports / "narrow.engine", engine)
    image, versions, stop = photo(32, 48), [], threading.Event()
    with serving(engine, requests=64) as (client, service):
        first = service.models.get("m")
        expected = client.infer("m", image)["labels"]

        def ask():
            while not stop.is_set():
                np.testing.assert_array_equal(client.infer("m", image)["labels"], expected)
                versions.append(client.json("/v2/models/m")["versions"][0])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert service.models.reload() == ["m is unchanged"]
        renamed(exports / "narrow.engine", engine)
        (said,) = service.models.reload()
        second = service.models.get("m")
        assert said == f"m is version {second.version} now" and second.version != first.version
        count = len(versions)
        while len(versions) < count + 8:
            assert any(thread.is_alive() for thread in threads)
        engine.write_bytes(b"no engine")
        assert service.models.reload() == [f"m stays at version {second.version}"]
        assert client.infer("m", image)["labels"].shape == (32, 48)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert set(versions) == {first.version, second.version}
        assert versions == sorted(versions, key=[first.version, second.version].index) or len(threads) > 1
        with pytest.raises(MisuseError, match="closed"):
            _ = first.network.backend


def test_of_two_reloads_at_once_the_newer_file_is_served_afterwards(exports, tmp_path, monkeypatch):
    engine = tmp_path / "m.engine"
    shutil.copy(exports / "narrow.engine", engine)
    models = Models([engine], opened, [(8, 8)], Memory(resident() + 10**9, 10**8))
    begun, go_on, warmed = threading.Event(), threading.Event(), []

    def warm_up(served, sizes):
        warmed.append(served)
        begun.set()
        assert len(warmed) > 1 or go_on.wait(60)

    monkeypatch.setattr(Served, "warm_up", warm_up)
    reloads = [threading.Thread(target=models.reload) for _ in range(2)]
    renamed(exports / "narrow.engine", engine)
    reloads[0].start()
    assert begun.wait(60)
    renamed(exports / "narrow.engine", engine, "a third build")
    reloads[1].start()
    reloads[1].join(0.5)
    go_on.set()
    for thread in reloads:
        thread.join(60)
    older, newer = warmed
    assert models.get("m") is newer and newer.version == hashlib.sha256(engine.read_bytes()).hexdigest()[:12]
    with pytest.raises(MisuseError, match="closed"):
        _ = older.network.backend
    models.close()


def test_two_of_one_name_and_files_that_are_none_are_refused(exports, tmp_path):
    memory = Memory(10**9, 10**8)
    shutil.copy(exports / "narrow.engine", tmp_path / "narrow.engine")
    with pytest.raises(MisuseError, match="both called narrow"):
        Models([exports / "narrow.engine", tmp_path / "narrow.engine"], opened, [], memory)
    with pytest.raises(MisuseError, match="does not exist"):
        Models([tmp_path / "none.engine"], opened, [], memory)
    with pytest.raises(MisuseError, match="leaves nothing for networks"):
        Models([exports / "narrow.engine"], opened, [], Memory(2_000_000, 1_000_000))


def test_a_servers_memory_is_shared_out_among_its_networks(exports, tmp_path):
    other = renamed(exports / "narrow.engine", tmp_path / "other.engine")
    memory = Memory(4 * 10**9, 10**9)
    alone = Models([exports / "narrow.engine"], opened, [], memory)
    both = Models([exports / "narrow.engine", other], opened, [], memory)
    budget = alone.get("narrow").network.memory
    assert 0 < budget < 3 * 10**9
    for name in ("narrow", "other"):
        assert 0.9 < 2 * both.get(name).network.memory / budget <= 1.1
    alone.close(), both.close()
    assert Memory.of(8 * 10**9, None) == Memory(8 * 10**9, 2 * 10**9) and Memory.of(None, None).total > 10**8


def test_images_together_stay_within_the_memory(exports):
    """Plans of what runs at once, of images that take most of it each."""
    images = [photo(700, 900, seed) for seed in range(4)]
    memory = (resident() or 0) + 500_000_000
    with serving(exports / "narrow.engine", memory=memory, queue=100_000_000) as (client, service):
        served, working, most = service.models.get("narrow"), [], []
        budget, true = served.network.memory, served.network.run

        def run(image, plan, kinds):
            working.append(plan.bytes)
            most.append(sum(working))
            try:
                return true(image, plan, kinds)
            finally:
                working.remove(plan.bytes)

        served.network.run = run
        found = [None] * 4
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, client.infer("narrow", images[i])["labels"]))
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(most) == 4 and max(most) <= budget
    with Segmenter(exports / "narrow.engine", threads=2) as net:
        for image, labels in zip(images, found, strict=True):
            np.testing.assert_array_equal(labels, net(image))


def test_a_server_at_rest_gives_back_what_its_networks_kept(exports, monkeypatch):
    monkeypatch.setattr("fcn_deploy.runtime.serve.room.REST_SECONDS", 0.3)
    image = photo(200, 300)
    with serving(exports / "narrow.engine") as (client, service):
        (served,) = service.models.served.values()
        labels = client.infer("narrow", image)["labels"]
        deadline = time.monotonic() + 30
        while served.network._working.held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not served.network._working.held
        np.testing.assert_array_equal(client.infer("narrow", image)["labels"], labels)
        # A network whose memory cannot be had back takes no lane with it.
        monkeypatch.setattr(type(served.network), "rest", lambda network: 1 / 0)
        time.sleep(0.5)
        np.testing.assert_array_equal(client.infer("narrow", image)["labels"], labels)
