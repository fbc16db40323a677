"""Servers for tests: in this process, where their network can be held up, and as the command that users start."""

import asyncio
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from helpers import needs


class Client:
    """Plain HTTP requests to a server: (status, headers, body)."""

    def __init__(self, address: str, grpc_address: str) -> None:
        self.address, self.grpc = address, grpc_address
        self.host, self.port = re.fullmatch(r"https?://([^:]+):(\d+)", address).groups()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, int(self.port), timeout=120)

    def ask(self, method: str, path: str, body=None, headers=None):
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def json(self, path: str):
        status, _, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)

    def error(self, status: int, method: str, path: str, body=None, headers=None) -> str:
        """The one line that a refused request is answered with."""
        found, _, answer = self.ask(method, path, body, headers)
        assert found == status, (found, answer[:300])
        text = json.loads(answer)["error"]
        assert "\n" not in text and len(text) <= 300, text
        return text

    def infer(self, model: str, image: np.ndarray, *outputs: str, **more):
        """Outputs by name, as binary tensors."""
        status, headers, body = self.ask("POST", f"/v2/models/{model}/infer", *binary(image, *outputs, **more))
        assert status == 200, body[:500]
        return arrays(headers, body)

    def metrics(self) -> dict[str, float]:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


NAMES = {"uint8": "UINT8", "uint16": "UINT16", "int16": "INT16", "float32": "FP32"}
TYPES = {name: dtype for dtype, name in NAMES.items()} | {"BOOL": "bool"}


def binary(image: np.ndarray, *outputs: str, **more):
    """Body and headers of a request by the binary extension."""
    given = {"name": "image", "datatype": NAMES[image.dtype.name], "shape": image.shape}
    given["parameters"] = {"binary_data_size": image.nbytes}
    request = {"inputs": [given], "parameters": {"binary_data_output": True}, **more}
    if outputs:
        request["outputs"] = [{"name": name} for name in outputs]
    head = json.dumps(request).encode()
    return head + image.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def arrays(headers, body) -> dict[str, np.ndarray]:
    length = int({key.lower(): value for key, value in headers.items()}["inference-header-content-length"])
    place, found = length, {}
    for output in json.loads(body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        part = body[place : place + size]
        place += size
        if output["datatype"] == "BYTES":
            found[output["name"]] = part[4:]
        else:
            found[output["name"]] = np.frombuffer(part, TYPES[output["datatype"]]).reshape(output["shape"])
    assert place == len(body)
    return found


def one_convolution(folder: Path, card) -> Path:
    """one.engine: a network of one convolution with random weights, for a card."""
    import onnx
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.importer.import_model import import_model
    from helpers import onnx_model

    weights = np.random.default_rng(0).normal(size=(card.scores, card.channels, 3, 3)).astype(np.float32)
    node = onnx.helper.make_node("Conv", ["image", "w"], ["scores"], pads=[1] * 4)
    model = onnx_model([node], {"w": weights}, takes=("N", card.channels, "H", "W"))
    model.metadata_props.add(key="fcn_deploy.card", value=card.to_json())
    onnx.save(model, folder / "one.onnx")
    build_engine(import_model(folder / "one.onnx"), folder / "one.engine", BuildConfig(latency_sizes=[(8, 8)]))
    return folder / "one.engine"


@contextmanager
def serving(*engines: Path, requests: int = 8, memory: int | None = None, queue: int | None = None, **options):
    """A server in this process: its client, and the service.

    Args:
        memory: of the process; None: 2 GB beyond what other tests have left.
    """
    needs("starlette"), needs("grpc")
    from fcn_deploy.runtime.network import Network
    from fcn_deploy.runtime.process_memory import resident
    from fcn_deploy.runtime.serve.models import Memory, Models
    from fcn_deploy.runtime.serve.room import Room
    from fcn_deploy.runtime.serve.server import Server, listen
    from fcn_deploy.runtime.serve.service import Limits, Service

    budget = Memory.of(memory or (resident() or 0) + 2_000_000_000, queue)
    models = Models(engines, lambda path: Network(path, threads=2), [], budget)
    limits = Limits(options.pop("body", 50_000_000), options.pop("pixels", 20_000_000))
    service = Service(models, Room(requests, budget.queue, models.rest), limits, **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = Server(service, listen("127.0.0.1", 0), "127.0.0.1", 0)

    def wait(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    wait(server.start())
    models.warm_up()
    try:
        yield Client(server.address, server.grpc_address), service
    finally:
        wait(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def command(*words, ready: bool = True):
    """`serve-engine` as a process of its own, on free ports: its client, and the process."""
    needs("starlette"), needs("grpc")
    program = [sys.executable, "-m", "fcn_deploy.runtime.serve.command", "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(
        [*program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        # Where the log is JSON, it has the addresses too.
        said = process.stderr if "--json-logs" in words else process.stdout
        line = said.readline()
        found = re.search(r"at (https?://\S+) and, by gRPC, ([^\s\"]+)", line)
        assert found, (line, process.stderr.read())
        if ready:
            assert "ready" in said.readline()
        yield Client(*found.groups()), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
