"""REST: the Open Inference Protocol and /label, by plain HTTP and by a client that is not ours; what they refuse."""

import base64
import gzip
import hashlib
import http.client
import io
import json
import socket
import tempfile
import threading
import time
import zlib

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.labelling.rle import decode
from fcn_deploy.runtime.stream import CALLERS
from helpers import needs, photo
from PIL import Image
from serving import arrays, binary, serving

from fcn_deploy import Segmenter


def file_of(image, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (61, 97), (480, 640)])
def test_labels_are_those_of_a_call_at_any_size(server, net, size):
    image = photo(*size)
    np.testing.assert_array_equal(server.infer("narrow", image)["labels"], net(image))


def test_every_output_is_the_segmenters_own_also_several_at_once(server, net, exports):
    image = photo(75, 110)
    found = server.infer("narrow", image, "labels", "probabilities", "values", "scores", "refined")
    with Segmenter(exports / "narrow.engine", threads=2, refine=True) as refining:
        refined = refining(image)
    expected = {
        "labels": net(image), "probabilities": net.probabilities(image), "values": net.values(image),
        "scores": net.heatmap(image), "refined": refined,
    }  # fmt: skip
    assert list(found) == list(expected)
    for name, result in expected.items():
        np.testing.assert_array_equal(found[name], result, err_msg=name)
        np.testing.assert_array_equal(server.infer("narrow", image, name)[name], result, err_msg=name)


def test_json_numbers_come_and_go_as_the_protocol_says(server, net):
    image = photo(9, 14)
    request = {"id": "seven", "inputs": [{"name": "image", "datatype": "UINT8", "shape": image.shape}]}
    for data in (image.tolist(), image.ravel().tolist()):
        request["inputs"][0]["data"] = data
        status, headers, body = server.ask("POST", "/v2/models/narrow/infer", json.dumps(request))
        answer = json.loads(body)
        assert status == 200 and headers["content-type"] == "application/json"
        assert (answer["id"], answer["model_name"], len(answer["model_version"])) == ("seven", "narrow", 12)
        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("labels", "UINT8", [9, 14])
        np.testing.assert_array_equal(np.reshape(output["data"], (9, 14)), net(image))
    nothing = {"id": None, "parameters": None, "outputs": None}
    assert "id" not in json.loads(server.ask("POST", "/v2/models/narrow/infer", json.dumps(request | nothing))[2])
    request["outputs"] = [{"name": "probabilities"}]
    _, _, body = server.ask("POST", "/v2/models/narrow/infer", json.dumps(request))
    (output,) = json.loads(body)["outputs"]
    np.testing.assert_array_equal(np.float32(output["data"]).reshape(output["shape"]), net.probabilities(image))


def test_an_output_says_itself_whether_it_is_binary(server, net):
    image = photo(9, 14)
    outputs = [{"name": "labels", "parameters": {"binary_data": False}}, {"name": "scores"}]
    _, headers, body = server.ask("POST", "/v2/models/narrow/infer", *binary(image, outputs=outputs))
    labels, scores = json.loads(body[: int(headers["inference-header-content-length"])])["outputs"]
    np.testing.assert_array_equal(np.reshape(labels["data"], labels["shape"]), net(image))
    assert scores["parameters"] == {"binary_data_size": net.heatmap(image).nbytes} and "data" not in scores


def test_a_model_may_have_any_name(exports, tmp_path):
    engine = tmp_path / "路 1.engine"
    engine.write_bytes((exports / "narrow.engine").read_bytes())
    with serving(engine) as (client, _):
        status, headers, body = client.ask("POST", "/label", file_of(photo(9, 9)))
        assert (status, headers["x-model"]) == (200, "%E8%B7%AF%201"), body
        assert client.infer("%E8%B7%AF%201", photo(9, 9))["labels"].shape == (9, 9)


def test_a_large_json_answer_is_whole(server, net):
    image = photo(301, 305)
    request = given([1], "BYTES", data=[base64.b64encode(file_of(image)).decode()])
    _, _, body = server.ask("POST", "/v2/models/narrow/infer", json.dumps(request))
    (output,) = json.loads(body)["outputs"]
    np.testing.assert_array_equal(np.reshape(output["data"], output["shape"]), net(image))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "JPEG2000"])
def test_an_encoded_image_is_labelled_as_its_pixels(server, net, format):
    image, file = photo(52, 71), file_of(photo(52, 71), format)
    if format == "JPEG2000":
        image = np.asarray(Image.open(io.BytesIO(file)))
    raw = len(file).to_bytes(4, "little") + file
    request = given([1], "BYTES", parameters={"binary_data_size": len(raw)})
    request["outputs"] = [{"name": "labels"}, {"name": "labels", "parameters": {"format": "png"}}]
    head = json.dumps(request | {"parameters": {"binary_data_output": True}}).encode()
    _, headers, body = server.ask(
        "POST", "/v2/models/narrow/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))}
    )
    png = arrays(headers, body)["labels"]  # the second of that name
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), net(image))
    status, headers, body = server.ask("POST", "/label", file)
    assert (status, headers["content-type"]) == (200, "image/png")
    assert body == png and Image.open(io.BytesIO(body)).mode == "P"


def test_label_gives_areas_and_run_lengths_of_every_class(server, net):
    image = photo(63, 80)
    labels = net(image)
    status, headers, body = server.ask("POST", "/label", file_of(image), {"Accept": "application/json"})
    told = json.loads(body)
    assert (status, told["size"], told["model"]) == (200, [63, 80], "narrow") and "rle" not in told
    counts = {each["class"]: each["pixels"] for each in told["classes"]}
    assert counts == dict(zip(*map(np.ndarray.tolist, np.unique(labels, return_counts=True)), strict=True))
    assert abs(sum(each["share"] for each in told["classes"]) - 1) < 1e-5
    assert {"queue", "read", "infer", "write"} == set(told["ms"]) and "infer;dur=" in headers["server-timing"]
    _, _, body = server.ask("POST", "/label?format=rle&model=narrow&output=labels", file_of(image))
    for each in json.loads(body)["rle"]:
        np.testing.assert_array_equal(decode(each), labels == each["class"])


def test_an_independent_client_agrees(server, net):
    client_module = needs("tritonclient.http")
    client = client_module.InferenceServerClient(server.address.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("narrow")
    assert client.get_server_metadata()["name"] == "fcn-deploy"
    told = client.get_model_metadata("narrow")
    assert told["inputs"][0]["shape"] == [-1, -1, 3] and told["parameters"]["classes"][1] == "class 1"
    image = photo(97, 64)
    tensor = client_module.InferInput("image", image.shape, "UINT8")
    for as_binary in (True, False):
        tensor.set_data_from_numpy(image, binary_data=as_binary)
        wanted = [client_module.InferRequestedOutput(name, binary_data=as_binary) for name in ("labels", "scores")]
        answer = client.infer("narrow", [tensor], model_version=told["versions"][0], outputs=wanted, request_id="4")
        assert answer.get_response()["id"] == "4"
        assert hashlib.sha256(answer.as_numpy("labels")).digest() == hashlib.sha256(net(image)).digest()
        np.testing.assert_array_equal(answer.as_numpy("scores"), net.heatmap(image))


def given(shape=(1, 1, 3), datatype="UINT8", name="image", **more):
    """A request of one input."""
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, **more}]}


def asking(*outputs, **more):
    """A right input, and what is asked of it."""
    return given(data=[1, 2, 3]) | {"outputs": list(outputs)} | more


BAD = [
    ({"inputs": []}, "has 0 inputs"),
    ({}, "not a list of objects"),
    ([], "not a JSON object"),
    (given(name="picture", data=[1, 2, 3]), "called 'picture'"),
    (given([-1, 1, 3], data=[1]), "all above 0"),
    (given([0, 1, 3], data=[]), "all above 0"),
    (given([2**62, 2**62, 3], data=[1]), "all above 0"),
    (given([True, 1, 3], data=[1, 2, 3]), "whole numbers"),
    (given(data=[1, 2]), "3 numbers, and its data 2"),
    (given(data=[1, 2, 256]), "outside uint8"),
    (given(data=[1, 2, 0.5]), "whole numbers"),
    (given(data=[1, [2], 3]), "equal lengths"),
    (given([2, 1, 3], data=[[[1, 2, 3], [4, 5, 6]]]), "lists of shape [1, 2, 3]"),  # an image on its side
    (given(data=["1", "2", "3"]), "not all numbers"),
    (given(data=[True, True, False]), "not all numbers"),
    (given(data=[1, 2.5, 3]), "whole numbers"),
    (given(data=[1, 2, 10**400]), "whole numbers"),
    (given(data=["x" * 100_000] + [""] * 10_000), "not all numbers"),  # 4 GB, where NumPy makes an array of it
    (given([1, 1, 4], data=[1, 2, 3, 4]), "takes [height"),
    (given(datatype="FP32", data=[1, 2, 3]), "takes uint8"),
    (given(datatype="INT64", data=[1, 2, 3]), "choose UINT8"),
    (given([1], "BYTES", data=["?"]), "base64"),
    (given([2], "BYTES", data=["", ""]), "shape [1]"),
    (given(parameters={"binary_data_size": 3}), "0 bytes"),
    (given(parameters={"shared_memory_region": "x"}), "shared memory"),
    (asking({"name": "depth"}), "gives labels, probabilities"),
    (asking({"name": "scores", "parameters": {"format": "png"}}), "only labels are written as PNG"),
    (asking({"name": "labels", "parameters": {"format": "gif"}}), "png or rle"),
    (asking(*[{"name": "labels"}] * 2), "twice"),
    (asking(*[{"name": "labels"}] * 40), "16 at most"),
    (asking(id=7), "id is not a text"),
    (asking(parameters={"timeout": "soon"}), "microseconds"),
    (asking(parameters={"timeout": 10**400}), "timeout 1000"),
    (asking(parameters={"binary_data_output": "true"}), "binary_data_output true; it is true or false"),
    (asking({"name": "labels", "parameters": {"binary_data": 1}}), "binary_data 1; it is"),
    (asking(parameters=[]), "not an object"),
]


@pytest.mark.parametrize("request_, says", BAD, ids=[says for _, says in BAD])
def test_wrong_requests_are_told_what_is_wrong(server, request_, says):
    assert says in server.error(400, "POST", "/v2/models/narrow/infer", json.dumps(request_))


def test_lying_lengths_are_refused(server):
    body, headers = binary(photo(8, 8))
    path, key = "/v2/models/narrow/infer", "Inference-Header-Content-Length"
    for length in ("-1", "0", "1e3", "999999", "9" * 30, "", "ä".encode("latin-1").decode("latin-1")):
        assert "JSON" in server.error(400, "POST", path, body, {key: length})
    assert "not JSON" in server.error(400, "POST", path, body, {key: "5"})
    for changed in (body[:-1], body + b"x"):
        assert "bytes" in server.error(400, "POST", path, changed, headers)


def test_names_and_addresses_that_are_not_there_are_told(server):
    assert "no model 'other' is served; choose narrow" in server.error(404, "GET", "/v2/models/other")
    assert "served in version" in server.error(404, "GET", "/v2/models/narrow/versions/9")
    assert "no model" in server.error(404, "POST", "/v2/models/other/infer", b"{}")
    assert "/openapi.json" in server.error(404, "GET", "/v1")
    assert "/openapi.json" in server.error(404, "POST", "/label/", b"")  # no redirection, which curl would not follow
    assert "/openapi.json" in server.error(405, "GET", "/label")


def test_images_that_are_none_or_over_the_limits_are_refused(server):
    assert "not an image" in server.error(422, "POST", "/label", b"this is no image")
    assert "the image" in server.error(422, "POST", "/label", file_of(photo(64, 64))[:500])
    text = file_of(photo(64, 64)).replace(b"\n", b"").replace(b"\r", b"")  # as curl -d sends it
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert "--data-binary" in server.error(422, "POST", "/label", text, form)
    assert "--data-binary" not in server.error(422, "POST", "/label", text)
    assert "no body" in server.error(400, "POST", "/label", b"")
    huge = Image.new("1", (5000, 5000))
    file = io.BytesIO()
    huge.save(file, "PNG")
    assert "over the limit of 20,000,000" in server.error(413, "POST", "/label", file.getvalue())
    assert "over the limit" in server.error(413, "POST", "/label", b"", {"Content-Length": "50000001"})
    assert "form" in server.error(415, "POST", "/label", b"x", {"Content-Type": "multipart/form-data; boundary=x"})
    assert "choose gzip, deflate" in server.error(415, "POST", "/label", b"x", {"Content-Encoding": "br"})
    assert "choose png" in server.error(400, "POST", "/label?format=gif", b"x")
    assert "/infer" in server.error(400, "POST", "/label?output=values", b"x")
    assert "format=json" in server.error(400, "POST", "/label?output=masks", b"x")
    assert "no parameter 'formt'" in server.error(400, "POST", "/label?formt=json", b"x")
    assert "a second parameter 'format'" in server.error(400, "POST", "/label?format=json&format=png", b"x")
    elsewhere = {"Origin": "https://elsewhere.example"}
    assert "may not send" in server.error(403, "POST", "/label", b"x", elsewhere)
    assert "hand on Host" in server.error(403, "POST", "/label", b"x", elsewhere | {"Sec-Fetch-Site": "same-site"})
    # The page of this server, behind a proxy that names it otherwise.
    assert server.error(422, "POST", "/label", b"x", elsewhere | {"Sec-Fetch-Site": "same-origin"})


@pytest.mark.parametrize(("encoding", "pack"), [("x-gzip", gzip.compress), ("Deflate", zlib.compress)])
def test_a_packed_body_is_unpacked_within_the_limits(server, net, encoding, pack):
    image, packed = photo(300, 400), {"Content-Encoding": encoding}
    body, headers = binary(image)
    status, found, answer = server.ask("POST", "/v2/models/narrow/infer", pack(body), headers | packed)
    assert status == 200, answer
    np.testing.assert_array_equal(arrays(found, answer)["labels"], net(image))
    assert "unpacked" in server.error(413, "POST", "/label", pack(bytes(60_000_000)), packed)  # a bomb of 60 kB
    assert "ends too early" in server.error(400, "POST", "/label", pack(body)[:-20], packed)
    assert "something follows" in server.error(400, "POST", "/label", pack(body) + bytes(200_000), packed)
    assert "Content-Encoding" in server.error(400, "POST", "/label", body, packed)
    assert "ends too early" in server.error(400, "POST", "/label", b"", packed)


def test_of_several_images_in_a_file_the_first_is_labelled_and_their_number_told(server, net):
    images, file = [photo(30, 40, seed) for seed in range(3)], io.BytesIO()
    first, *others = map(Image.fromarray, images)
    first.save(file, "TIFF", save_all=True, append_images=others)
    status, headers, body = server.ask("POST", "/label", file.getvalue())
    assert (status, headers["x-pages"]) == (200, "3")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), net(images[0]))
    assert "x-pages" not in server.ask("POST", "/label", file_of(images[0]))[1]
    for page, image in enumerate(images):
        status, headers, body = server.ask("POST", f"/label?page={page}", file.getvalue())
        assert (status, headers["x-pages"]) == (200, "3")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), net(image))
    assert "holds 3, counted from 0" in server.error(400, "POST", "/label?page=3", file.getvalue())
    assert "a whole number" in server.error(400, "POST", "/label?page=-1", file.getvalue())


def test_a_machine_without_room_for_a_file_says_so_and_does_not_blame_the_image(server, monkeypatch, tmp_path):
    file = file_of(photo(20, 30), "TIFF")
    assert server.ask("POST", "/label", file)[0] == 200
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "TMPDIR" in server.error(503, "POST", "/label", file)


def test_a_file_of_other_values_than_the_networks_is_refused_unless_they_are_told(server, exports):
    from fcn_deploy.runtime.images.numbers import ReadOptions

    file = io.BytesIO()
    wide = np.random.default_rng(0).integers(0, 1000, (30, 40, 3)).astype(np.uint16)
    tifffile.imwrite(file, wide, photometric="rgb")
    said = server.error(400, "POST", "/label", file.getvalue())
    assert "--input-range" in said and "--strict" not in said
    with serving(exports / "narrow.engine", options=ReadOptions(input_range="0,1000")) as (client, _):
        status, _, body = client.ask("POST", "/label", file.getvalue())
        with Segmenter(exports / "narrow.engine", threads=2, input_range=(0, 1000)) as net:
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), net(wide))
        assert status == 200


def test_a_body_whose_length_is_not_told_is_taken_up_to_the_limit(server, net):
    image = photo(40, 50)
    file = file_of(image)
    parts = (file[start : start + 1000] for start in range(0, len(file), 1000))
    status, _, body = server.ask("POST", "/label", parts)
    assert status == 200
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), net(image))
    assert "longer than" in server.error(413, "POST", "/label", (bytes(1 << 20) for _ in range(60)))


@pytest.mark.parametrize("offered", ["h2c", "websocket"])
@pytest.mark.parametrize("length", [7, 100_000])  # of what comes at once
def test_what_a_client_offers_besides_http_1_is_passed_over_and_its_file_labelled(server, net, offered, length):
    image = photo(40, 50)
    file = file_of(image)
    head = (
        f"POST /label HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {offered}\r\n"
        f"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nContent-Length: {len(file)}\r\n\r\n"
    )
    sent = (head.encode() + file) * 2  # one behind the other
    with socket.create_connection((server.host, int(server.port)), 30) as raw:
        for start in range(0, len(sent), length):
            raw.sendall(sent[start : start + length])
        stream = raw.makefile("rb")
        for _ in range(2):
            assert b" 200 " in stream.readline()
            headers = http.client.parse_headers(stream)
            labels = Image.open(io.BytesIO(stream.read(int(headers["content-length"]))))
            np.testing.assert_array_equal(np.asarray(labels), net(image))


def test_headers_without_end_close_the_connection_and_others_are_served(server):
    for line in (b"X: " + b"y" * 70_000 + b"\r\n", b"X: y\r\n" * 200, b"no header\r\n"):
        with socket.create_connection((server.host, int(server.port))) as raw:
            raw.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n")
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            assert answer.status == 400 and "headers" in json.load(answer)["error"]
    assert server.json("/v2")["name"] == "fcn-deploy"


class HeldUp:
    """The networks' runs wait until they are let go, and are counted."""

    def __init__(self, monkeypatch):
        from fcn_deploy.runtime.network import Network

        self.go, self.inside, self.runs, true = threading.Event(), threading.Semaphore(0), 0, Network.run
        self.lock = threading.Lock()

        def run(network, *rest):
            with self.lock:
                self.runs += 1
            self.inside.release()
            assert self.go.wait(100)
            return true(network, *rest)

        monkeypatch.setattr(Network, "run", run)


@pytest.fixture
def crowded(exports, monkeypatch):
    """A server whose lanes are held up, with what holds them: (client, service, held up, its requests' results)."""
    with serving(exports / "narrow.engine", requests=8) as (client, service):
        held_up, results, threads = HeldUp(monkeypatch), [], []

        def send():
            threads.append(threading.Thread(target=lambda: results.append(client.infer("narrow", photo(16, 16)))))
            threads[-1].start()

        for _ in range(CALLERS):
            send()
        for _ in range(CALLERS):
            assert held_up.inside.acquire(timeout=60)
        yield client, service, held_up, send, results
        held_up.go.set()
        for thread in threads:
            thread.join(60)


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_a_full_queue_refuses_at_once_and_the_server_stays_healthy(crowded):
    client, service, held_up, send, results = crowded
    for _ in range(8):
        send()
    until(lambda: service.room.waiting == 8)
    for _ in range(20):
        status, headers, body = client.ask("POST", "/v2/models/narrow/infer", *binary(photo(16, 16)))
        assert status == 503 and headers["retry-after"] == "1" and "8 requests wait" in json.loads(body)["error"]
        assert client.ask("GET", "/v2/health/live")[0] == client.ask("GET", "/v2/health/ready")[0] == 200
    held_up.go.set()
    until(lambda: len(results) == 10)
    found = client.metrics()
    assert found['fcn_deploy_rejected_total{reason="queue"}'] == 20 and found["fcn_deploy_held_bytes"] == 0
    assert found['fcn_deploy_requests_total{code="200",model="narrow",protocol="rest"}'] == 10


def test_requests_whose_clients_go_are_never_run(crowded):
    client, service, held_up, _, _ = crowded
    body, headers = binary(photo(16, 16))
    fields = "".join(f"{key}: {value}\r\n" for key, value in {**headers, "Content-Length": len(body)}.items())
    for _ in range(20):
        with socket.create_connection((client.host, int(client.port))) as raw:
            raw.sendall(f"POST /v2/models/narrow/infer HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode() + body)
            until(lambda: service.room.waiting == 1)
        until(lambda: service.room.waiting == 0)
    held_up.go.set()
    until(lambda: service.room.pending == 0)
    assert held_up.runs == CALLERS
    until(lambda: client.metrics().get('fcn_deploy_rejected_total{reason="gone"}') == 20)
    assert service.room.held == 0


def test_a_request_that_is_late_is_not_run(crowded):
    client, service, held_up, _, _ = crowded
    status, answer = None, None

    def ask():
        nonlocal status, answer
        status, _, answer = client.ask("POST", "/v2/models/narrow/infer", *late)

    late = binary(photo(16, 16), parameters={"binary_data_output": True, "timeout": 1000})
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: service.room.waiting == 1)
    time.sleep(0.01)
    held_up.go.set()
    thread.join(60)
    assert status == 504 and "time was over" in json.loads(answer)["error"] and held_up.runs == CALLERS


def test_what_requests_hold_together_is_bounded(crowded):
    client, service, _, _, _ = crowded
    before = service.room.held
    assert 2000 < before < 5000
    service.room.bytes = 10_000
    assert "hold" in client.error(503, "POST", "/v2/models/narrow/infer", *binary(photo(50, 50)))
    service.room.bytes = 1000
    assert "--queue-memory" in client.error(413, "POST", "/v2/models/narrow/infer", *binary(photo(40, 40)))


def test_a_network_that_fails_makes_the_server_not_ready_until_it_runs_again(exports, monkeypatch):
    from fcn_deploy.runtime.network import Network

    from fcn_deploy import DeployError

    with serving(exports / "narrow.engine") as (client, _):
        monkeypatch.setattr("fcn_deploy.runtime.serve.models.CHECK_SECONDS", 0)

        def broken(*_):
            raise DeployError("the library is out of order")

        with monkeypatch.context() as patch:
            patch.setattr(Network, "run", broken)
            assert "out of order" in client.error(503, "POST", "/v2/models/narrow/infer", *binary(photo(16, 16)))
            assert client.ask("GET", "/v2/health/ready")[0] == 503
            assert client.ask("GET", "/v2/health/live")[0] == 200
        until(lambda: client.ask("GET", "/v2/health/ready")[0] == 200)
        assert client.infer("narrow", photo(16, 16))["labels"].shape == (16, 16)


def test_a_token_is_asked_for_where_there_is_one(exports):
    with serving(exports / "narrow.engine", token="open-sesame") as (client, _):
        assert "bears no token" in client.error(401, "GET", "/v2")
        assert "bears no token" in client.error(401, "POST", "/label", b"x", {"Authorization": "Bearer other"})
        assert client.error(401, "GET", "/metrics") and client.error(401, "GET", "/v2/models/narrow")
        assert client.ask("GET", "/v2/health/ready")[0] == client.ask("GET", "/")[0] == 200
        for scheme in ("Bearer", "bearer"):  # in letters of any case: RFC 9110, 11.1
            right = {"Authorization": f"{scheme} open-sesame"}
            assert client.ask("POST", "/label", file_of(photo(9, 9)), right)[0] == 200
        assert client.error(401, "GET", "/v2", None, {"Authorization": "Basic open-sesame"})


def test_a_trace_is_handed_on(server):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert server.ask("POST", "/label", file_of(photo(9, 9)), {"traceparent": trace})[1]["traceparent"] == trace
    assert "traceparent" not in server.ask("POST", "/label", file_of(photo(9, 9)), {"traceparent": "x"})[1]


def test_metrics_count_what_was_done(server):
    before = server.metrics()
    server.infer("narrow", photo(20, 30))
    after = server.metrics()
    assert (
        after['fcn_deploy_pixels_total{model="narrow"}'] - before.get('fcn_deploy_pixels_total{model="narrow"}', 0)
        == 600
    )
    for name in ("queue", "inference", "decode", "encode"):
        assert after[f'fcn_deploy_{name}_seconds_count{{model="narrow"}}'] >= 1
    assert after["process_resident_memory_bytes"] > 0
    until(lambda: server.metrics()["fcn_deploy_pending_requests"] == 0)  # a client may have its answer a little before
