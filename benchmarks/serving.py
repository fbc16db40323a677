"""serve-engine beside a bare Segmenter, and beside other servers: latency, throughput, memory, refusals, start.

    python -m benchmarks.serving cam.engine [--seconds 600] [--clients 32] [--litserve] [--triton HOST:PORT]

    latency     one client, one image of 480×640 at a time: medians over those of a bare call, in random order
    throughput  --clients clients of mixed sizes for --seconds, in turns with Segmenter.map on the same images; every
                answer is compared with a direct call's labels, by SHA-256
    memory      four images of --large pixels at once, under --memory
    refusals    30 requests at once on a queue of 8: how long a refusal takes, and health meanwhile; 20 that go away
    start       until it is ready, and what it holds then

`--litserve` runs the same Segmenter in LitServe (pip install litserve python-multipart), sent as .npy files. `--triton`
names the HTTP address of a tritonserver that runs what `export-triton cam.engine` wrote; an image is a batch of one.
"""

import argparse
import http.client
import io
import json
import multiprocessing
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import grpc
import numpy as np
from fcn_deploy.runtime.noise_image import natural_noise
from fcn_deploy.runtime.serve.messages import MESSAGES, SERVICE

from benchmarks.common import memory, mixed_sizes, spread
from fcn_deploy import ModelCard, Segmenter

IDLE = (480, 640)
LEAST, MOST = (120, 160), (720, 1280)  # of mixed sizes
ROUND = 10.0  # seconds of one turn
RGB = ModelCard(("a", "b"))
Ask = Callable[[np.ndarray], bytes]  # an image → its labels' bytes


def rest(address: str, model: str, batch: bool = False) -> Ask:
    """A client by the binary extension; of a server whose images come in batches where `batch`."""
    connection = http.client.HTTPConnection(address, timeout=600)

    def ask(image: np.ndarray) -> bytes:
        shape = (1, *image.shape) if batch else image.shape
        size = {"binary_data_size": image.nbytes}
        given = {"name": "image", "datatype": "UINT8", "shape": shape, "parameters": size}
        wanted = [{"name": "labels", "parameters": {"binary_data": True}}]
        head = json.dumps({"inputs": [given], "outputs": wanted}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Length": str(len(head) + image.nbytes)}
        connection.request("POST", f"/v2/models/{model}/infer", iter((head, image.data)), headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise OSError(f"{answer.status} {body[:200]!r}")
        return body[int(answer.headers["Inference-Header-Content-Length"]) :]

    return ask


def rpc(address: str, model: str) -> Ask:
    """A client by gRPC."""
    channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
    call = channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        MESSAGES["ModelInferRequest"].SerializeToString,
        MESSAGES["ModelInferResponse"].FromString,
    )

    def ask(image: np.ndarray) -> bytes:
        given = {"name": "image", "datatype": "UINT8", "shape": image.shape}
        request = MESSAGES["ModelInferRequest"](
            model_name=model, inputs=[given], outputs=[{"name": "labels"}], raw_input_contents=[image.tobytes()]
        )
        return call(request, timeout=600).raw_output_contents[0]

    return ask


def lit(address: str, model: str) -> Ask:
    """A client of benchmarks/litserve_segmenter.py."""
    connection = http.client.HTTPConnection(address, timeout=600)

    def ask(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, image)
        start = b'--x\r\nContent-Disposition: form-data; name="request"; filename="image.npy"\r\n\r\n'
        body = start + file.getvalue() + b"\r\n--x--\r\n"
        connection.request("POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=x"})
        answer = connection.getresponse()
        found = answer.read()
        if answer.status != 200:
            raise OSError(f"{answer.status} {found[:200]!r}")
        return found

    return ask


CLIENTS: dict[str, Callable[..., Ask]] = {
    "REST": rest, "gRPC": rpc, "LitServe": lit, "Triton": lambda address, model: rest(address, model, batch=True),
}  # fmt: skip


@contextmanager
def serve_engine(engine: Path, *words: object):
    """The server: (HTTP address, gRPC address, process, seconds until it was ready)."""
    started = time.perf_counter()
    program = [sys.executable, "-m", "fcn_deploy.runtime.serve.command", engine, "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen([*map(str, program), *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://(\S+) and, by gRPC, (\S+)", process.stdout.readline())
        assert found, "the server did not start"
        assert process.stdout.readline() == "ready\n"
        yield found[1], found[2], process, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(600)


@contextmanager
def litserve(engine: Path):
    """LitServe's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "benchmarks.litserve_segmenter", engine, port]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it leaves its workers behind otherwise
        process.wait()


def latency(engine: Path, servers: dict[str, str], runs: int) -> dict[str, dict[str, float]]:
    """Medians of each, and over that of a bare call."""
    image = natural_noise(*IDLE, RGB, 0)
    with Segmenter(engine) as net:
        expected = net(image).tobytes()
        asks: dict[str, Ask] = {"bare": lambda image: net(image).tobytes()}
        asks |= {kind: CLIENTS[kind](address, engine.stem) for kind, address in servers.items()}
        taken: dict[str, list[float]] = {kind: [] for kind in asks}
        random = np.random.default_rng(0)
        for run in range(runs + 3):
            for kind in random.permutation(list(asks)):
                started = time.perf_counter()
                labels = asks[kind](image)
                if run > 2:
                    taken[kind].append(time.perf_counter() - started)
                assert labels == expected, f"{kind} gave other labels"
    bare = spread(taken["bare"])[0]
    # Pair by pair, so that what else runs on the machine counts for both.
    ratios = {kind: float(np.median(np.divide(each, taken["bare"]))) for kind, each in taken.items()}
    return {kind: {"ms": 1e3 * spread(each)[0], "over_bare": ratios[kind]} for kind, each in taken.items() if bare}


def hammer(kind, address, model, sizes, digests, seconds, clients, results) -> None:
    """In a process of its own: so many clients that ask for so long; (pixels, images, lost, wrong) and the seconds."""
    images = [natural_noise(*size, RGB, seed) for seed, size in enumerate(sizes)]
    counts = np.zeros((clients, 4), np.int64)
    asks = [CLIENTS[kind](address, model) for _ in range(clients)]
    started = time.perf_counter()

    def work(client: int) -> None:
        random = np.random.default_rng(client)
        while time.perf_counter() - started < seconds:
            index = int(random.integers(len(images)))
            try:
                labels = asks[client](images[index])
            except (OSError, http.client.HTTPException, grpc.RpcError):
                counts[client, 2] += 1
                asks[client] = CLIENTS[kind](address, model)
                continue
            counts[client] += (images[index].size // 3, 1, 0, sha256(labels).hexdigest() != digests[index])

    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((counts.sum(0).tolist(), time.perf_counter() - started))


def mapped(net: Segmenter, images: list[np.ndarray], seconds: float) -> tuple[int, float]:
    """Pixels that `map` labels of the images, drawn likewise, and the seconds."""
    random, pixels, started = np.random.default_rng(0), 0, time.perf_counter()

    def drawn():
        while time.perf_counter() - started < seconds:
            yield images[int(random.integers(len(images)))]

    for labels in net.map(drawn()):
        pixels += labels.size
    return pixels, time.perf_counter() - started


def throughput(engine: Path, servers: dict[str, str], process, options) -> dict:
    """Megapixels a second of each, in turns, over those of `map`; what was lost or wrong; the server's memory."""
    sizes = mixed_sizes(options.images, LEAST, MOST)
    images = [natural_noise(*size, RGB, seed) for seed, size in enumerate(sizes)]
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {kind: [] for kind in ("map", *servers)}
    told = {kind: {"images": 0, "lost": 0, "wrong": 0} for kind in servers}
    resident = []
    turn = min(ROUND, options.seconds)
    with Segmenter(engine) as net:
        digests = [sha256(net(image).tobytes()).hexdigest() for image in images]
        for _ in range(max(1, round(options.seconds / turn))):
            pixels, seconds = mapped(net, images, turn)
            rates["map"].append(pixels / seconds / 1e6)
            for kind, address in servers.items():
                results = context.Queue()
                words = kind, address, engine.stem, sizes, digests, turn, options.clients, results
                worker = context.Process(target=hammer, args=words)
                worker.start()
                (pixels, count, lost, wrong), seconds = results.get()
                worker.join()
                rates[kind].append(pixels / seconds / 1e6)
                for name, value in (("images", count), ("lost", lost), ("wrong", wrong)):
                    told[kind][name] += value
            resident.append(memory(process.pid)["anonymous"])
    found = {kind: {"mpixels_per_s": spread(each)[0]} for kind, each in rates.items()}
    for kind in servers:
        ratio = np.median(np.divide(rates[kind], rates["map"]))
        found[kind] |= {"over_map": float(ratio), **told[kind]}
    return {"rates": found, "resident": resident}


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
    image = natural_noise(*side, RGB, 0)
    with serve_engine(engine, "--memory", gigabytes) as (address, _, process, _):
        before = memory(process.pid)
        results = at_once([lambda: len(rest(address, engine.stem)(image))] * 4)
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
    image = natural_noise(*IDLE, RGB, 0)
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
                rest(address, engine.stem)(image)
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
        busy = [threading.Thread(target=ask) for _ in range(2)]  # so that what follows has to wait
        for each in busy:
            each.start()
        time.sleep(0.05)
        for _ in range(4):  # fewer at once than the queue takes
            gone = [_begun(address, engine.stem, image) for _ in range(5)]
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
        "run_of_20_dropped": run_after - run_before - 2,
    }


def _begun(address: str, model: str, image: np.ndarray) -> socket.socket:
    """A connection that has sent a request, and waits."""
    given = {
        "name": "image",
        "datatype": "UINT8",
        "shape": image.shape,
        "parameters": {"binary_data_size": image.nbytes},
    }
    head = json.dumps({"inputs": [given]}).encode()
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(head) + image.nbytes}\r\n\r\n".encode()
    )
    connection.sendall(head)
    connection.sendall(image.data)
    return connection


def _counted(address: str) -> int:
    """Images that the server has run."""
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode()
    return round(sum(float(count) for count in re.findall(r"^fcn_deploy_inference_seconds_count.* (\S+)$", text, re.M)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="of throughput, for each server")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--images", type=int, default=48, help="of mixed sizes")
    parser.add_argument("--runs", type=int, default=100, help="of latency")
    parser.add_argument("--large", default="2400x3200", help="height x width of the large images")
    parser.add_argument("--memory", type=float, default=1.0, help="GB, for them")
    parser.add_argument("--litserve", action="store_true")
    parser.add_argument("--triton", metavar="HOST:PORT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    told: dict = {}
    with ExitStack() as stack:
        words = "--queue", max(64, options.clients), "--warmup", "480x640"
        http_, grpc_, process, seconds = stack.enter_context(serve_engine(options.engine, *words))
        idle = memory(process.pid)
        told["start"] = {"ready_s": seconds, "resident": idle["anonymous"] + idle["files"]}
        print(f"ready after {seconds:.2f} s, with {told['start']['resident'] / 1e6:.0f} MB")
        servers = {"REST": http_, "gRPC": grpc_}
        if options.litserve:
            servers["LitServe"] = stack.enter_context(litserve(options.engine))
        if options.triton:
            servers["Triton"] = options.triton
        told["latency"] = latency(options.engine, servers, options.runs)
        for kind, row in told["latency"].items():
            print(f"{kind:>9} {row['ms']:8.2f} ms  {row['over_bare']:.3f} of a bare call", flush=True)
        told["throughput"] = throughput(options.engine, servers, process, options)
        for kind, row in told["throughput"]["rates"].items():
            rest_ = "".join(f"  {name} {value:.3g}" for name, value in row.items() if name != "mpixels_per_s")
            print(f"{kind:>9} {row['mpixels_per_s']:8.2f} Mpixel/s{rest_}", flush=True)
        curve = told["throughput"]["resident"]
        print(f"anonymous memory {curve[0] / 1e6:.0f} MB after the first turn, {curve[-1] / 1e6:.0f} MB after the last")
    told["large"] = large_images(options.engine, tuple(map(int, options.large.split("x"))), options.memory)
    print("four large images: " + json.dumps(told["large"]))
    told["refusals"] = refusals(options.engine)
    print("a full queue: " + json.dumps(told["refusals"]))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
