"""What a server does at its limits, for benchmarks/serving: large images, a full queue, clients that go."""

import math
import queue
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from fcn_deploy.runtime.pixels.noise_image import natural_noise

from benchmarks.common import RGB, memory
from benchmarks.serving.clients import Request, http_client, rest_request
from benchmarks.serving.servers import serve_engine

IDLE = (480, 640)  # of the images of all but `large_images`
BUSY_SECONDS = 0.6  # that an image takes which keeps a lane at work, of this many times the rows at most
MOST_TIMES = 60


def at_once(works: list[Callable[[], object]]) -> list:
    """What each gives, all begun together."""
    found: list = [None] * len(works)

    def run(index: int) -> None:
        found[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def large_images(engine: Path, side: tuple[int, int], gigabytes: float) -> dict:
    """Peak memory of the server with four large images at once."""
    request = rest_request(natural_noise(*side, RGB, 0), engine.stem)
    with serve_engine(engine, "--memory", gigabytes) as (address, _, process, _):
        before = memory(process.pid)
        results = at_once([lambda: len(http_client(address)(request))] * 4)
        peak = memory(process.pid)["peak"]
    return {
        "size": side,
        "memory": gigabytes,
        "idle": before["anonymous"] + before["files"],
        "peak": peak,
        "results": sum(results),
    }


def refusals(engine: Path) -> dict:
    """30 requests at once on a queue of 8, with health asked for meanwhile; and 20 requests that go away."""
    request = rest_request(natural_noise(*IDLE, RGB, 0), engine.stem)
    with serve_engine(engine, "--queue", 8, "--warmup", "480x640") as (address, _, _, _):
        health, over = queue.SimpleQueue(), threading.Event()

        def ask_health() -> None:
            while not over.is_set():
                started = time.perf_counter()
                urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=60).close()
                health.put(time.perf_counter() - started)
                time.sleep(0.01)

        def ask() -> tuple[bool, float]:
            started = time.perf_counter()
            try:
                http_client(address)(request)
            except OSError as error:
                assert str(error).startswith("503"), error
                return False, time.perf_counter() - started
            return True, time.perf_counter() - started

        watcher = threading.Thread(target=ask_health)
        watcher.start()
        answers = at_once([ask] * 30)
        over.set()
        watcher.join()
        run_before = _counted(address)
        # So that what follows has to wait: images that keep both lanes at work for the time that it takes.
        taken = min(seconds for labelled, seconds in [ask() for _ in range(3)] if labelled)
        rows = IDLE[0] * min(math.ceil(BUSY_SECONDS / taken), MOST_TIMES)
        large = rest_request(natural_noise(rows, IDLE[1], RGB, 0), engine.stem)
        busy = [threading.Thread(target=http_client(address), args=(large,)) for _ in range(2)]
        for each in busy:
            each.start()
        while _gauge(address, "pending_requests") - _gauge(address, "waiting_requests") < 2:
            assert all(each.is_alive() for each in busy), "the lanes were free before clients could go away"
        for _ in range(4):  # fewer at once than the queue takes
            gone = [_begun(address, request) for _ in range(5)]
            time.sleep(0.02)
            for connection in gone:
                connection.close()
        for each in busy:
            each.join()
        time.sleep(0.2)
        run_after = _counted(address)
        waits = [health.get() for _ in range(health.qsize())]
    refused = [seconds for labelled, seconds in answers if not labelled]
    return {
        "labelled": len(answers) - len(refused),
        "refused": len(refused),
        "slowest_refusal_s": max(refused, default=0.0),
        "slowest_health_s": max(waits, default=0.0),
        "run_of_20_dropped": run_after - run_before - 3 - len(busy),
    }


def _begun(address: str, request: Request) -> socket.socket:
    """A connection that has sent a request, and waits."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(request.sent)
    return connection


def _counted(address: str) -> int:
    """Images that the server has run."""
    return _gauge(address, "inference_seconds_count")


def _gauge(address: str, name: str) -> int:
    """What the server's metrics say now, the sum over its models."""
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode()
    return round(sum(float(value) for value in re.findall(rf"^fcn_deploy_{name}\b.* (\S+)$", text, re.M)))
