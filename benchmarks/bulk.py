"""Many files: an object store whose runs are killed and go on, and a Ray cluster whose actors are killed.

    python -m benchmarks.bulk demo/digits.engine [--objects 500] [--images 2000] [--workers 2]

Objects: images of mixed sizes in moto's S3 server, labelled into it by label-images, which is killed (SIGKILL) after a
third and after two thirds and resumed. Every version of every object is kept there: none may be broken, and none may
have two.

Ray: images of mixed sizes in a folder, labelled by as many processes of label-images as there are actors, each with its
shard; by `label-images --ray local` with so many actors; and once more, with one of them killed twice, which costs the
start of an actor each time, however long the run is. Images a second from the first result to the last, of each. Every
image must have its labels, equal in all.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
from fcn_deploy.runtime.labelling.cluster import BATCH
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from PIL import Image

from benchmarks.common import RGB, mixed_sizes

LABEL = [sys.executable, "-m", "runtime.infer"]
BURST = 0.2  # seconds
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2, help="how often an actor is killed")
    parser.add_argument("--most", type=int, default=640, help="longest side of an image, in pixels")
    options = parser.parse_args()
    if options.kills and 0 < options.images < 4 * BATCH * options.workers:
        parser.error(
            f"--images {options.images}: done before an actor can be killed; give {4 * BATCH * options.workers}"
        )
    sizes = mixed_sizes(max(options.objects, options.images), (32, 32), (options.most * 3 // 4, options.most))
    with tempfile.TemporaryDirectory() as folder:
        if options.objects:
            objects(options.engine, sizes[: options.objects])
        if options.images:
            cluster(options.engine, sizes[: options.images], options.workers, Path(folder), options.kills)


def encoded(size: tuple[int, int], seed: int) -> bytes:
    """A picture as PNG; a few pictures, of many sizes."""
    buffer = io.BytesIO()
    Image.fromarray(natural_noise(*size, RGB, seed % 16)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """moto's server in a process of its own, known to s3fs here and in what is started."""
    server = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import ThreadedMotoServer as S; import threading; "
         "s = S('127.0.0.1', 0, verbose=False); s.start(); print(s.get_host_and_port()[1], flush=True); "
         "threading.Event().wait()"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
        yield fsspec.filesystem("s3")
    finally:
        server.kill()


def objects(engine: Path, sizes: list[tuple[int, int]]) -> None:
    """Label objects; killed twice and resumed."""
    count = len(sizes)
    with store() as s3:
        for bucket in ("photos", "labels"):
            s3.mkdir(bucket)
        s3.call_s3("put_bucket_versioning", Bucket="labels", VersioningConfiguration={"Status": "Enabled"})
        for i, size in enumerate(sizes):
            s3.pipe(f"photos/{i % 7}/{i}.png", encoded(size, i))
        words = [*LABEL, engine, "s3://photos/**/*.png", "-o", "s3://labels/x", "--json"]
        started = time.perf_counter()
        for part in (count // 3, count // 3, None):
            run = subprocess.Popen([*map(str, words), *(["--resume"] if s3.find("labels") else [])],
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
            assert run.stdout is not None
            done = 0
            while done != part and (line := run.stdout.readline()):
                done += "size" in json.loads(line)
            run.send_signal(signal.SIGKILL if part else signal.SIGCONT)
            run.wait()
            s3.invalidate_cache()
            print(f"{'killed' if part else 'ended'} with {len(s3.find('labels'))} of {count} results there")
        seconds = time.perf_counter() - started
        versions = Counter(key for key in all_versions(s3, "labels"))
        broken = sum(not whole(s3.cat_file(name)) for name in s3.find("labels"))
        twice = sum(number > 1 for number in versions.values())
        print(
            f"{len(versions)} of {count} results, {broken} broken, {twice} put twice, {seconds:.1f} s with three starts"
        )
        assert (len(versions), broken, twice) == (count, 0, 0)


def all_versions(s3: fsspec.AbstractFileSystem, bucket: str) -> Iterator[str]:
    """The key of each version of each object."""
    more: dict[str, str] = {}
    while True:
        found = s3.call_s3("list_object_versions", Bucket=bucket, **more)
        yield from (version["Key"] for version in found["Versions"])
        if not found["IsTruncated"]:
            return
        more = {"KeyMarker": found["NextKeyMarker"], "VersionIdMarker": found["NextVersionIdMarker"]}


def whole(content: bytes) -> bool:
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        return False
    return True


def cluster(engine: Path, sizes: list[tuple[int, int]], workers: int, folder: Path, kills: int) -> None:
    """Label a folder by processes and by actors."""
    (folder / "in").mkdir()
    for i, size in enumerate(sizes):
        (folder / "in" / f"{i}.png").write_bytes(encoded(size, i))
    words = [*map(str, [*LABEL, engine, folder / "in", "--json", "--threads", "1"])]
    shards = [[*words, "-o", str(folder / "processes"), "--shard", f"{i + 1}/{workers}"] for i in range(workers)]
    processes = rate([subprocess.Popen(shard, stdout=subprocess.PIPE, text=True) for shard in shards])
    told = f"{len(sizes)} images: {processes:.1f}/s by {workers} processes"
    runs = {"actors": 0, "killed": kills} if kills else {"actors": 0}
    for kind, kill in runs.items():
        out = ["-o", str(folder / kind), "--ray", "local", "--actors", str(workers)]
        actors = rate([subprocess.Popen([*words, *out], stdout=subprocess.PIPE, text=True)], kill, len(sizes))
        told += f", {actors:.1f}/s by {workers} actors: {actors / processes:.2f}"
        told += f" (one killed {kill} times)" if kill else ""
    print(told)
    different = sum(
        not np.array_equal(*(np.asarray(Image.open(folder / name / f"{i}.png")) for name in ("processes", kind)))
        for i in range(len(sizes))
        for kind in runs
    )
    print(f"labels that differ, or are not there: {different}")
    assert not different


def rate(runs: list[subprocess.Popen[str]], kill: int = 0, count: int = 0) -> float:
    """Images a second of several runs, after the first results to the last; `kill` an actor so often meanwhile.

    Actors give results in bursts: those of the first are what the time before it went into.
    """
    seen, burst, first, last = 0, 0, 0.0, 0.0
    marks = [count * (i + 1) // (kill + 1) for i in range(kill)]
    streams = {run.stdout for run in runs}
    import selectors

    with selectors.DefaultSelector() as selector:
        for stream in streams:
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                lines = key.fileobj.readlines()  # type: ignore[union-attr]
                if not lines:
                    selector.unregister(key.fileobj)
                for line in lines:
                    if '"size"' in line or '"skipped"' in line:
                        seen, last = seen + 1, time.perf_counter()
                        first = first or last
                        burst += last < first + BURST
                if kill and seen >= marks[-kill]:
                    kill -= os.kill(actor_of(runs[0].pid), signal.SIGKILL) is None
    for run in runs:
        assert run.wait() == 0, run.args
    return (seen - burst) / (last - first)


def actor_of(pid: int) -> int:
    """An actor of the run of that process: its descendant, by Ray's name for it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below, found = {pid}, True
    while found:
        found = {child for child, parent in parents.items() if parent in below} - below
        below |= found
    for each in below:
        name = Path(f"/proc/{each}/cmdline").read_bytes()
        if name.startswith(b"ray::_ObjectLabeler"):
            return each
    raise LookupError(f"no actor below process {pid}")


if __name__ == "__main__":
    main()
