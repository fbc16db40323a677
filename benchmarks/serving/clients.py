"""Clients for benchmarks/serving that take as little as clients can: they share the cores with what is measured.

A request is written down before any clock runs, and is the same bytes each time. Connections are kept. An answer's
labels are compared where they lie in it, and nothing of it is decoded but its lengths.
"""

import io
import json
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from fcn_deploy.runtime.serve.messages import MESSAGES, SERVICE

SECONDS = 600  # that an answer may take
HEADER = 1 << 16  # bytes of an answer's headers, at most
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")


@dataclass(frozen=True)
class Request:
    """A request as it is sent.

    Attributes:
        sent: its bytes; of HTTP with the headers.
        labels: bytes of the labels, in which its answer ends.
    """

    sent: bytes
    labels: int


Ask = Callable[[Request], bytes]  # gives the labels' bytes; raises OSError or grpc.RpcError where there are none


def _post(path: str, body: bytes, **headers: object) -> bytes:
    fields = {"Host": "benchmark", "Content-Length": len(body)} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def rest_request(image: np.ndarray, model: str, batch: bool = False) -> Request:
    """By the binary extension; of a server whose images come in batches where `batch`."""
    given = {
        "name": "image", "datatype": "UINT8", "shape": (1, *image.shape) if batch else image.shape,
        "parameters": {"binary_data_size": image.nbytes},
    }  # fmt: skip
    wanted = [{"name": "labels", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [given], "outputs": wanted}).encode()
    length = {"Inference_Header_Content_Length": len(head)}
    return Request(_post(f"/v2/models/{model}/infer", head + image.tobytes(), **length), image.size // 3)


def rpc_request(image: np.ndarray, model: str) -> Request:
    """A message of gRPC."""
    given = {"name": "image", "datatype": "UINT8", "shape": image.shape}
    request = MESSAGES["ModelInferRequest"](
        model_name=model, inputs=[given], outputs=[{"name": "labels"}], raw_input_contents=[image.tobytes()]
    )
    return Request(request.SerializeToString(), image.size // 3)


def lit_request(image: np.ndarray, model: str) -> Request:
    """A form for benchmarks/serving/litserve_segmenter.py."""
    file = io.BytesIO()
    np.save(file, image)
    start = b'--x\r\nContent-Disposition: form-data; name="request"; filename="image.npy"\r\n\r\n'
    body = start + file.getvalue() + b"\r\n--x--\r\n"
    return Request(_post("/predict", body, Content_Type="multipart/form-data; boundary=x"), image.size // 3)


def http_client(address: str) -> Ask:
    """A client with a connection of its own."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(HEADER)

    def ask(request: Request) -> bytes:
        nonlocal buffer
        connection.sendall(request.sent)
        if len(buffer) < HEADER + request.labels:
            buffer = bytearray(HEADER + request.labels)
        view, place, end = memoryview(buffer), 0, -1
        while end < 0:
            count = connection.recv_into(view[place:])
            if not count:
                raise ConnectionError("the server closed the connection")
            place += count
            end = buffer.find(b"\r\n\r\n", 0, place)
        length = LENGTH.search(buffer, 0, end + 2)
        if length is None:
            raise OSError(f"an answer without a length: {bytes(buffer[:200])!r}")
        whole = end + 4 + int(length[1])
        if whole > len(buffer):
            raise OSError(f"an answer of {whole} bytes, where {request.labels} are labels")
        while place < whole:
            count = connection.recv_into(view[place:whole])
            if not count:
                raise ConnectionError("the server closed the connection")
            place += count
        status = int(buffer[9:12])
        if status != 200:
            raise OSError(f"{status} {bytes(buffer[end + 4 : end + 204])!r}")
        return bytes(view[whole - request.labels : whole])

    return ask


def rpc_client(address: str) -> Ask:
    """A client with a connection of its own, whose messages are bytes already."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    call = grpc.insecure_channel(address, options).unary_unary(f"/{SERVICE}/ModelInfer")

    def ask(request: Request) -> bytes:
        # Raw outputs are the last field of a message.
        return call(request.sent, timeout=SECONDS)[-request.labels :]

    return ask


@dataclass(frozen=True)
class Kind:
    """How a server is asked.

    Attributes:
        request: writes one, of an image and a model's name.
        client: connects to an address.
    """

    request: Callable[[np.ndarray, str], Request]
    client: Callable[[str], Ask]


KINDS = {
    "REST": Kind(rest_request, http_client),
    "gRPC": Kind(rpc_request, rpc_client),
    "LitServe": Kind(lit_request, http_client),
    "Triton": Kind(lambda image, model: rest_request(image, model, batch=True), http_client),
}


def processor_seconds(pid: int = 0) -> float:
    """Processor time that a process and all that it has started have taken; 0: this process alone. Linux."""
    found = 0.0
    for each in family(pid) if pid else [os.getpid()]:
        with suppress(OSError):  # it has ended meanwhile
            # The clock of another process, as clock_getcpuclockid(3) makes its number.
            found += time.clock_gettime((~each << 3) | 2)
    return found


def family(pid: int) -> list[int]:
    """A process and its descendants. Linux."""
    children = defaultdict(list)
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(status.read_text().rpartition(")")[2].split()[1])].append(int(status.parent.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found
