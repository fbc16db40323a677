"""Requests that are damaged, mutated or made to harm: no 500, no crash, nothing held, and others are served.

`python -m tests.attacks.test_requests 10000` sends so many to a server in a process of its own; CI sends some hundreds.
"""

import copy
import gc
import io
import json
import random
import socket
import sys
import time
from collections import Counter

import numpy as np
import pytest
from helpers import needs, photo
from PIL import Image
from serving import arrays, binary, one_convolution, serving

COUNT = 400
INFER = "/v2/models/narrow/infer"
ODD = [
    *(-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 1e308, 0.5, float("inf")),
    *(True, None, "", "x" * 300, "\0", "💥", [], {}, [[[]]], {"a": {"b": 1}}),
]
STATUSES = {200, 400, 401, 403, 404, 405, 408, 411, 413, 415, 422, 431, 499, 503, 504}


def mutated_json(random_):
    """A right request with some of its values replaced, left out or doubled."""
    data = [random_.randrange(256) for _ in range(12)]
    request = {
        "id": "1",
        "parameters": {"timeout": 10_000_000, "binary_data_output": random_.random() < 0.5},
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "parameters": {}, "data": data}],
        "outputs": [{"name": "labels", "parameters": {"binary_data": False}}],
    }
    for _ in range(random_.randrange(1, 4)):
        place = request
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = random_.choice(list(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and random_.random() < 0.7:
                place = inner
                continue
            kind = random_.randrange(4)
            if kind == 0 and isinstance(place, dict):
                del place[key]
            elif kind == 1 and isinstance(place, list) and len(place) < 50:
                place.append(copy.deepcopy(inner))
            else:
                place[key] = copy.deepcopy(random_.choice(ODD))
            break
    return json.dumps(request).encode(), {}


def mutated_binary(random_):
    """A right binary request with bytes changed, cut off or added, or another length of its header."""
    body, headers = binary(photo(random_.randrange(1, 9), random_.randrange(1, 9)))
    body, key = bytearray(body), "Inference-Header-Content-Length"
    for _ in range(random_.randrange(0, 6)):
        body[random_.randrange(min(len(body), 220))] = random_.randrange(256)
    if random_.random() < 0.3:
        body = body[: random_.randrange(len(body) + 1)]
    if random_.random() < 0.2:
        body += bytes(random_.randrange(100))
    if random_.random() < 0.4:
        headers[key] = random_.choice(["-1", "0", "7", str(len(body)), "9" * 25, "0x10", "1.5", " 12", "NaN", "12, 13"])
    return bytes(body), headers


def lying_header(random_):
    """A header that promises more, or less, than there is."""
    given = {"name": "image", "datatype": random_.choice(["UINT8", "FP32", "BYTES", "BOOL", "uint8", ""])}
    given["shape"] = [random_.choice([1, 2, 8, -1, 0, 2**31 - 1, 2**40, 2**62]) for _ in range(random_.randrange(6))]
    given["parameters"] = {"binary_data_size": random_.choice([0, 1, 12, 192, 2**31, 2**63, -5, 10**30])}
    head = json.dumps({"inputs": [given] * random_.choice([1, 1, 1, 0, 2, 50])}).encode()
    return head + bytes(random_.choice([0, 1, 12, 192])), {"Inference-Header-Content-Length": str(len(head))}


def broken_file(random_):
    """An image file, damaged."""
    file = io.BytesIO()
    image = Image.fromarray(photo(random_.randrange(1, 30), random_.randrange(1, 30)))
    image.save(file, random_.choice(["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"]))
    body = bytearray(file.getvalue())
    for _ in range(random_.randrange(0, 12)):
        body[random_.randrange(len(body))] = random_.randrange(256)
    return bytes(body[: random_.randrange(1, len(body) + 1)] if random_.random() < 0.4 else body), {}


def deep_json(random_):
    """Brackets without end."""
    bracket = random_.choice(["[", '{"a":', "[[", '{"inputs":[', "9", '"'])
    return (bracket * random_.randrange(1, 20_000)).encode(), {}


KINDS = [
    (INFER, mutated_json), (INFER, mutated_binary), (INFER, lying_header), ("/label", broken_file), (INFER, deep_json),
]  # fmt: skip


def attack(client, count: int, seed: int = 0) -> Counter:
    """Send so many hostile requests, and count the answers by status."""
    random_, found = random.Random(seed), Counter()
    connection = client.connect()
    for _ in range(count):
        path, make = random_.choice(KINDS)
        body, headers = make(random_)
        if path == "/label":
            path += random_.choice(["", "?format=json", "?format=rle", "?format=%00", "?output=refined", "?model=x"])
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
        except OSError:
            connection.close()
            found["closed"] += 1
            continue
        found[answer.status] += 1
        assert answer.status in STATUSES, (answer.status, text, path, body[:300], headers)
        if answer.status != 200:
            told = json.loads(text)["error"]
            assert len(told) <= 300 and "\n" not in told, told
    connection.close()
    return found


def attack_raw(client, count: int, seed: int = 0) -> None:
    """Broken HTTP: lengths that lie, bodies that are cut off, lines that are none."""
    random_ = random.Random(seed)
    body, headers = binary(photo(6, 7))
    for _ in range(count):
        length = random_.choice([len(body), len(body) + 50, 5, 0, 10**9, 10**30])
        fields = {"Host": "x", "Content-Length": length, **headers}
        if random_.random() < 0.3:
            fields["Transfer-Encoding"] = random_.choice(["chunked", "gzip, chunked", "chunked, chunked", "x"])
        lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
        request = bytearray(f"POST {INFER} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        for _ in range(random_.choice([0, 0, 1, 4, 20])):
            request[random_.randrange(len(request))] = random_.randrange(256)
        with socket.create_connection((client.host, int(client.port)), timeout=60) as raw:
            sent = bytes(request[: random_.randrange(1, len(request) + 1)])
            raw.sendall(sent)
            if random_.random() < 0.5:
                raw.shutdown(socket.SHUT_WR)
                try:
                    answer = raw.recv(100)
                except TimeoutError as error:
                    raise AssertionError(f"no answer, and no end, to {sent!r}") from error
                assert not answer or int(answer.split()[1]) in STATUSES, answer


def served_as_before(client, service=None) -> None:
    """A right request is answered, and nothing is held any more."""
    image = photo(20, 30)
    assert client.infer("narrow", image)["labels"].shape == (20, 30)
    if service is not None:
        for _ in range(1000):  # the last ones end yet
            if not service.room.held and not service.room.pending:
                break
            time.sleep(0.01)
        assert service.room.held == service.room.pending == 0


@pytest.fixture(scope="module")
def server(exports):
    with serving(exports / "narrow.engine", body=2_000_000, pixels=1_000_000) as found:
        yield found


def test_hostile_requests_are_answered_by_one_line_and_never_by_500(server):
    client, service = server
    found = attack(client, COUNT)
    assert found[200] and found[400] > COUNT / 4 and found[422]
    served_as_before(client, service)


def test_broken_http_ends_its_own_connection_alone(server):
    client, service = server
    attack_raw(client, COUNT // 4)
    served_as_before(client, service)


def test_hostile_messages_of_grpc_are_refused(server):
    grpc, (client, service) = needs("grpc"), server
    from fcn_deploy.runtime.serve.messages import MESSAGES, SERVICE

    random_ = random.Random(1)
    given = {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3]}
    right = MESSAGES["ModelInferRequest"](model_name="narrow", inputs=[given], raw_input_contents=[bytes(12)])
    found = Counter()
    with grpc.insecure_channel(client.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for _ in range(COUNT // 2):
            message = bytearray(right.SerializeToString())
            for _ in range(random_.randrange(0, 5)):
                message[random_.randrange(len(message))] = random_.randrange(256)
            try:
                call(bytes(message[: random_.randrange(len(message) + 1)] if random_.random() < 0.3 else message))
                found["OK"] += 1
            except grpc.RpcError as error:
                found[error.code().name] += 1
                assert error.code().name in ("INVALID_ARGUMENT", "NOT_FOUND"), error
    assert found["OK"] and found["INVALID_ARGUMENT"]
    served_as_before(client, service)


LENGTH = 1_234_567  # bytes of a body, which nothing else has


def answers(client):
    """Send a body that is labelled, and some that are refused for one reason each; what they were answered."""
    grpc = needs("grpc")
    from fcn_deploy.runtime.serve.messages import SERVICE

    file = io.BytesIO()
    Image.fromarray(photo(300, 300)).save(file, "PNG")
    right, broken = (part.ljust(LENGTH, b"\0") for part in (file.getvalue(), file.getvalue()[:5000]))
    head = json.dumps(
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [9, 9, 3], "parameters": {}}]}
    ).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    asked = [(INFER, bytes(LENGTH), {}), (INFER, head.ljust(LENGTH), length), ("/label", bytes(LENGTH), {})]
    asked += [("/label", right, {}), ("/label", broken, {}), (INFER.replace("narrow", "other"), bytes(LENGTH), {})]
    found = [client.ask("POST", *each)[0] for each in asked]
    with grpc.insecure_channel(client.grpc) as channel:
        for method in ("ModelInfer", "ModelMetadata"):
            try:
                channel.unary_unary(f"/{SERVICE}/{method}")(bytes(LENGTH), timeout=60)
            except grpc.RpcError as error:  # which keeps what was sent, as long as it has its name
                found.append(error.code().name)
    return found


def test_nothing_of_a_request_stays(server):
    """Without Python's collector of cycles, which may not run for thousands of requests: they would fill the memory."""
    client, service = server
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert answers(client) == [400, 400, 422, 200, 422, 404, "INVALID_ARGUMENT", "INVALID_ARGUMENT"]
        served_as_before(client, service)
        kept = [
            each
            for each in gc.get_objects()
            for held in gc.get_referents(each)
            if type(held) in (bytes, bytearray) and len(held) == LENGTH
        ]
        assert not kept
    finally:
        gc.enable()


def test_values_that_are_no_numbers_are_answered_or_refused(tmp_path):
    """Every pixel NaN: labels of no data, and the network stays in service."""
    from fcn_deploy import ModelCard

    engine = one_convolution(tmp_path, ModelCard(("a", "b"), dtype="float32", mean=(0.0,) * 3, std=(1.0,) * 3))
    with serving(engine) as (client, _):
        image = np.full((5, 6, 3), np.nan, np.float32)
        assert (client.infer("one", image)["labels"] == 255).all()
        image = np.full((5, 6, 3), 3e38, np.float32)
        status, headers, body = client.ask("POST", "/v2/models/one/infer", *binary(image))
        assert status in (200, 422), body
        assert status == 422 or arrays(headers, body)["labels"].shape == (5, 6)
        assert client.ask("GET", "/v2/health/ready")[0] == 200


@pytest.mark.slow
def test_schemathesis_finds_nothing_wrong_with_the_description(server):
    schemathesis = needs("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    client, service = server
    schema = schemathesis.openapi.from_url(f"{client.address}/openapi.json")
    # Every answer is one that the description names, of the type that it names.
    checks = [not_a_server_error, schemathesis.checks.CHECKS.get_one("status_code_conformance")]
    checks += [
        schemathesis.checks.CHECKS.get_one(name) for name in ("content_type_conformance", "response_schema_conformance")
    ]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 11
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=8, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case):
            case.call_and_validate(base_url=client.address, checks=checks)

        check()
    served_as_before(client, service)


def main() -> None:
    """A long attack on a server of its own process."""
    import tempfile
    from pathlib import Path

    from serving import command

    count, limits = int(sys.argv[2]), ("--max-body", "2000000", "--memory", "2GB")
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder, "narrow.engine")  # as the requests name it
        engine.write_bytes(Path(sys.argv[1]).read_bytes())
        with command(engine, *limits) as (client, process):
            attack(client, count // 10, seed=99)  # what is taken once, and kept
            before = client.metrics()["process_resident_memory_bytes"]
            found = attack(client, count)
            attack_raw(client, count // 10)
            served_as_before(client)
            after = client.metrics()
            assert process.poll() is None and after["fcn_deploy_held_bytes"] == 0
            print(dict(found))
            print(f"resident {before / 1e6:.0f} MB before, {after['process_resident_memory_bytes'] / 1e6:.0f} MB after")


if __name__ == "__main__":
    main()
