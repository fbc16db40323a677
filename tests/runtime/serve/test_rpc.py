"""gRPC: the protocol's messages, by a client that is not ours, and what is refused."""

import contextlib
import json
import threading
import time

import hypothesis
import numpy as np
import pytest
from fcn_deploy.runtime.labelling.rle import decode
from fcn_deploy.runtime.stream import CALLERS
from helpers import needs, photo
from hypothesis import strategies as st
from serving import one_convolution, serving

from fcn_deploy import ModelCard, Segmenter


@pytest.fixture(scope="module")
def client(server):
    with needs("tritonclient.grpc").InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def call(server):
    """A method of the service, by our own messages: (name, request) → answer."""
    grpc = needs("grpc")
    from fcn_deploy.runtime.serve.messages import HEALTH_MESSAGES, MESSAGES, SERVICE

    with grpc.insecure_channel(server.grpc) as channel:

        def call(method, service=SERVICE, messages=MESSAGES, key=None, /, **fields):
            key = key or method
            verb = channel.unary_unary(
                f"/{service}/{method}",
                request_serializer=messages[f"{key}Request"].SerializeToString,
                response_deserializer=messages[f"{key}Response"].FromString,
            )
            return verb(messages[f"{key}Request"](**fields), timeout=60)

        call.health = lambda **of: call("Check", "grpc.health.v1.Health", HEALTH_MESSAGES, "HealthCheck", **of)
        yield call


def refused(call, method="ModelInfer", code="INVALID_ARGUMENT", **fields):
    grpc = needs("grpc")
    with pytest.raises(grpc.RpcError) as error:
        call(method, **fields)
    assert error.value.code().name == code, error.value
    text = error.value.details()
    assert "\n" not in text and len(text) <= 300
    return text


def test_the_messages_are_the_protocols():
    """Field by field, with those that another project generated from the protocol's own file."""
    others = needs("tritonclient.grpc").service_pb2
    from fcn_deploy.runtime.serve.messages import INFERENCE, MESSAGES

    def told(field):
        of = field.message_type
        entry = of is not None and of.GetOptions().map_entry
        kind = [told(each) for each in of.fields] if entry else of.full_name if of else field.type
        return field.name, field.number, field.is_repeated, kind, field.containing_oneof is not None

    for name in INFERENCE:
        theirs = others
        for part in name.split("."):
            theirs = getattr(theirs, part)
        fields = {field.number: told(field) for field in theirs.DESCRIPTOR.fields}
        ours = MESSAGES[name].DESCRIPTOR
        assert ours.full_name == theirs.DESCRIPTOR.full_name
        for field in ours.fields:
            assert told(field) == fields[field.number]
        assert len(ours.fields) == len(fields), name


def read_by_protobuf(sent):
    """A request without its raw inputs, and those; None where protobuf cannot read it."""
    from fcn_deploy.runtime.serve.messages import MESSAGES
    from google.protobuf.message import DecodeError

    try:
        request = MESSAGES["ModelInferRequest"].FromString(sent)
    except DecodeError:
        return None
    raw = list(request.raw_input_contents)
    request.ClearField("raw_input_contents")
    return request, raw


def assert_read_alike(sent):
    from fcn_deploy.runtime.serve.raw import without_raw

    rest, raw = without_raw(sent)
    expected, found = read_by_protobuf(sent), read_by_protobuf(rest)
    if expected is None:
        assert found is None
    else:
        assert found is not None and (found[0], found[1] + list(map(bytes, raw))) == expected


TEXT, RAW = st.text(max_size=20), st.lists(st.binary(max_size=300), max_size=4)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_raw_inputs_are_taken_out_as_protobuf_reads_them(data):
    """Of requests, of those that are cut off or damaged, and with fields that the protocol does not have."""
    from fcn_deploy.runtime.serve.messages import MESSAGES

    parts = []
    for _ in range(data.draw(st.integers(1, 3))):  # of several messages one after the other their fields are joined
        inputs = [{"name": data.draw(TEXT), "shape": data.draw(st.lists(st.integers(-9, 2**40), max_size=3))}]
        request = MESSAGES["ModelInferRequest"](
            id=data.draw(TEXT), inputs=inputs, parameters={data.draw(TEXT): {"int64_param": 5}},
            raw_input_contents=data.draw(RAW),
        )  # fmt: skip
        parts.append(request.SerializeToString())
        parts.append(
            data.draw(st.sampled_from([b"", b"\x40\x05", b"\x45abcd", b"\x41abcdefgh", b"\x42\x01a", b"\x43\x44"]))
        )
    sent = b"".join(parts)
    assert_read_alike(sent)
    assert_read_alike(sent[: data.draw(st.integers(0, len(sent)))])
    damaged = bytearray(sent)
    damaged[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    assert_read_alike(bytes(damaged))


def test_a_request_of_very_many_fields_is_protobufs_to_read():
    from fcn_deploy.runtime.serve.raw import MOST_FIELDS, without_raw

    assert_read_alike(b"\x3a\x01a" * MOST_FIELDS)
    many = b"\x3a\x01a" * 100_000
    assert without_raw(many) == (many, [])


@hypothesis.given(RAW)
def test_raw_outputs_are_written_as_protobuf_reads_them(raw):
    from fcn_deploy.runtime.serve.messages import MESSAGES
    from fcn_deploy.runtime.serve.raw import with_raw

    answer = MESSAGES["ModelInferResponse"](id="7", outputs=[{"name": "labels", "shape": [2**40, 1]}])
    read = answer.FromString(with_raw(answer.SerializeToString(), map(memoryview, raw)))
    assert list(read.raw_output_contents) == raw
    read.ClearField("raw_output_contents")
    assert read == answer


def test_numbers_of_several_bytes_may_begin_at_any_place_of_a_message(tmp_path):
    """They stay where they came, whatever their alignment."""
    card = ModelCard(("a", "b"), dtype="float32", mean=(0.0,) * 3, std=(1.0,) * 3)
    image = np.random.default_rng(0).normal(size=(17, 19, 3)).astype(np.float32)
    with serving(one_convolution(tmp_path, card)) as (server, _), Segmenter(tmp_path / "one.engine", threads=2) as net:
        module = needs("tritonclient.grpc")
        with module.InferenceServerClient(server.grpc) as client:
            asked = module.InferInput("image", image.shape, "FP32")
            asked.set_data_from_numpy(image)
            wanted = [module.InferRequestedOutput(name) for name in ("labels", "values")]
            for length in range(4):
                answer = client.infer("one", [asked], outputs=wanted, request_id="x" * length)
                np.testing.assert_array_equal(answer.as_numpy("labels"), net(image))
                np.testing.assert_array_equal(answer.as_numpy("values"), net.values(image))


def test_results_longer_than_a_message_are_refused(call, monkeypatch):
    from fcn_deploy.runtime.serve import rpc

    monkeypatch.setattr(rpc, "MOST_MESSAGE", rpc.SLACK + 1000)
    image = {"name": "image", "datatype": "UINT8", "shape": [32, 32, 3]}
    text = refused(call, inputs=[image], raw_input_contents=[bytes(3072)])
    assert "1,024 bytes long" in text and "fewer outputs" in text


@pytest.mark.parametrize("size", [(1, 1), (61, 97), (480, 640), (1300, 1301)])
def test_labels_are_those_of_a_call_at_any_size(client, net, size):
    module, image = needs("tritonclient.grpc"), photo(*size)
    given = module.InferInput("image", image.shape, "UINT8")
    given.set_data_from_numpy(image)
    answer = client.infer("narrow", [given], request_id="9")
    assert answer.get_response().id == "9" and answer.get_response().model_name == "narrow"
    np.testing.assert_array_equal(answer.as_numpy("labels"), net(image))


def test_several_outputs_and_run_lengths_come_together(client, net):
    module, image = needs("tritonclient.grpc"), photo(50, 60)
    given = module.InferInput("image", image.shape, "UINT8")
    given.set_data_from_numpy(image)
    wanted = [module.InferRequestedOutput(name) for name in ("probabilities", "scores", "labels")]
    answer = client.infer("narrow", [given], outputs=wanted)
    np.testing.assert_array_equal(answer.as_numpy("probabilities"), net.probabilities(image))
    np.testing.assert_array_equal(answer.as_numpy("scores"), net.heatmap(image))
    np.testing.assert_array_equal(answer.as_numpy("labels"), net(image))


def test_typed_contents_and_files_are_taken(call, net):
    from io import BytesIO

    from PIL import Image

    image, file = photo(12, 13), BytesIO()
    Image.fromarray(image).save(file, "PNG")
    inputs = [
        {"name": "image", "datatype": "UINT8", "shape": image.shape, "contents": {"uint_contents": image.ravel()}},
        {"name": "image", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [file.getvalue()]}},
    ]
    for given in inputs:
        answer = call("ModelInfer", model_name="narrow", inputs=[given])
        labels = np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(answer.outputs[0].shape)
        np.testing.assert_array_equal(labels, net(image))
    two = BytesIO()
    Image.fromarray(image).save(two, "TIFF", save_all=True, append_images=[Image.fromarray(image[::-1])])
    paged = {**inputs[1], "contents": {"bytes_contents": [two.getvalue()]}}
    for parameters in ({}, {"page": {"int64_param": 1}}):
        answer = call("ModelInfer", model_name="narrow", inputs=[{**paged, "parameters": parameters}])
        labels = np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(answer.outputs[0].shape)
        np.testing.assert_array_equal(labels, net(image[::-1] if parameters else image))
        assert answer.parameters["pages"].int64_param == 2
    assert "of an array" in refused(call, inputs=[{**inputs[0], "parameters": {"page": {"int64_param": 1}}}])
    outputs = [{"name": "labels", "parameters": {"format": {"string_param": "rle"}}}]
    answer = call("ModelInfer", inputs=[inputs[1]], outputs=outputs)  # the only model needs no name
    assert answer.outputs[0].datatype == "BYTES"
    for each in json.loads(answer.raw_output_contents[0][4:]):
        np.testing.assert_array_equal(decode(each), net(image) == each["class"])


def test_health_and_what_is_served_are_told(client, call):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("narrow")
    assert call.health().status == call.health(service="inference.GRPCInferenceService").status == 1
    with pytest.raises(needs("grpc").RpcError, match="no service 'other' is served"):
        call.health(service="other")
    assert client.get_server_metadata().extensions[:] == ["binary_tensor_data"]
    told = client.get_model_metadata("narrow")
    assert [each.name for each in told.outputs] == ["labels", "probabilities", "values", "refined", "scores"]
    assert told.inputs[0].shape[:] == [-1, -1, 3] and len(told.versions) == 1


def test_wrong_requests_are_told_what_is_wrong(call):
    image = {"name": "image", "datatype": "UINT8", "shape": [2, 2, 3]}
    assert "no model" in refused(call, "ModelMetadata", "NOT_FOUND", name="other")
    assert "in version" in refused(call, code="NOT_FOUND", model_name="narrow", model_version="1", inputs=[image])
    assert "0 inputs" in refused(call)
    assert "and 3 were sent" in refused(call, inputs=[image], raw_input_contents=[b"abc"])
    assert "12 numbers, and its data 0" in refused(call, inputs=[image])
    assert "2 of them raw" in refused(call, inputs=[image], raw_input_contents=[b"", b""])
    both = image | {"contents": {"uint_contents": [1]}}
    assert "omit one" in refused(call, inputs=[both], raw_input_contents=[bytes(12)])
    assert "takes [height" in refused(call, inputs=[image | {"shape": [2, 6]}], raw_input_contents=[bytes(12)])
    assert "above 0" in refused(call, inputs=[image | {"shape": [-1, 2, 3]}], raw_input_contents=[bytes(12)])
    outputs = [{"name": "depth"}]
    assert "gives labels" in refused(call, inputs=[image], outputs=outputs, raw_input_contents=[bytes(12)])
    large = image | {"shape": [5000, 5000, 3]}
    assert "larger" in refused(call, code="RESOURCE_EXHAUSTED", inputs=[large], raw_input_contents=[bytes(75_000_000)])


def test_a_call_whose_time_is_over_or_that_is_cancelled_is_not_run(exports, monkeypatch):
    from fcn_deploy.runtime.network import Network

    go, inside, runs, true = threading.Event(), threading.Semaphore(0), [], Network.run

    def run(network, *rest):
        runs.append(1)
        inside.release()
        assert go.wait(100)
        return true(network, *rest)

    module = needs("tritonclient.grpc")
    from tritonclient.utils import InferenceServerException

    with serving(exports / "narrow.engine", requests=2) as (server, service):
        monkeypatch.setattr(Network, "run", run)
        client = module.InferenceServerClient(server.grpc)
        given = module.InferInput("image", (8, 8, 3), "UINT8")
        given.set_data_from_numpy(photo(8, 8))
        done = threading.Semaphore(0)
        for _ in range(CALLERS):
            client.async_infer("narrow", [given], lambda result, error: done.release())
            assert inside.acquire(timeout=60)
        with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
            client.infer("narrow", [given], client_timeout=0.2)
        ended = threading.Event()
        call = client.async_infer("narrow", [given], lambda result, error: ended.set())
        while not service.room.waiting:
            pass
        call.cancel()
        assert ended.wait(60)
        while service.room.waiting:
            pass
        for _ in range(2):
            client.async_infer("narrow", [given], lambda result, error: done.release())
        while service.room.waiting < 2:
            pass
        with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*2 requests wait"):
            client.infer("narrow", [given])
        go.set()
        for _ in range(CALLERS + 2):
            assert done.acquire(timeout=60)
        client.close()
        assert len(runs) == CALLERS + 2


def test_calls_that_a_server_which_stops_has_not_taken_up_are_told_so_and_not_cancelled(exports, monkeypatch):
    grpc = needs("grpc")
    from fcn_deploy.runtime.serve import rpc
    from fcn_deploy.runtime.serve.messages import MESSAGES, SERVICE
    from fcn_deploy.runtime.serve.server import Server

    calls, stop = [], Server.stop

    async def held_up(self):
        calls.extend(infer.future(request, timeout=60) for _ in range(6))
        time.sleep(0.3)  # the loop takes nothing up, while gRPC receives
        await stop(self)

    monkeypatch.setattr(Server, "stop", held_up)
    monkeypatch.setattr(rpc, "QUIET_SECONDS", 0.5)
    image = photo(20, 30)
    request = MESSAGES["ModelInferRequest"](
        inputs=[{"name": "image", "datatype": "UINT8", "shape": image.shape}], raw_input_contents=[image.tobytes()]
    ).SerializeToString()
    with contextlib.ExitStack() as stack:
        with serving(exports / "narrow.engine") as (client, _):
            channel = stack.enter_context(grpc.insecure_channel(client.grpc))
            grpc.channel_ready_future(channel).result(60)
            infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        told = {(each.code().name, each.details()) for each in calls}
    assert told == {("UNAVAILABLE", "the server is stopping; send the request to another one")} and len(calls) == 6


def test_messages_come_when_there_is_room_for_them_and_in_a_bounded_time(exports, monkeypatch):
    """Two halves of messages that never end, where one may be on its way: they are cut off, and others are served."""
    grpc = needs("grpc")
    from fcn_deploy.runtime.serve import rpc
    from fcn_deploy.runtime.serve.messages import SERVICE

    monkeypatch.setattr(rpc, "RECEIVE_SECONDS", 0.5)
    module, image = needs("tritonclient.grpc"), photo(8, 9)
    with serving(exports / "narrow.engine", queue=60_000_000, body=50_000_000) as (server, service):
        with grpc.insecure_channel(server.grpc) as channel:
            call = channel.stream_unary(f"/{SERVICE}/ModelInfer")
            stop = threading.Event()

            def never():
                stop.wait(60)
                yield from ()

            halves = [call.future(never(), timeout=60) for _ in range(2)]
            while service.room._entered < 2:
                pass
            given = module.InferInput("image", image.shape, "UINT8")
            given.set_data_from_numpy(image)
            with module.InferenceServerClient(server.grpc) as client:
                assert client.infer("narrow", [given]).as_numpy("labels").shape == (8, 9)
            for half in halves:
                assert half.code().name == "DEADLINE_EXCEEDED" and "within 0 seconds" in half.details()
            stop.set()
            nothing = call.future(iter(()), timeout=60)
            assert nothing.code().name == "INVALID_ARGUMENT" and "no message" in nothing.details()
        assert service.room.held == 0


def test_a_token_is_asked_for_where_there_is_one(exports):
    module = needs("tritonclient.grpc")
    from tritonclient.utils import InferenceServerException

    with serving(exports / "narrow.engine", token="open-sesame") as (server, _):
        client = module.InferenceServerClient(server.grpc)
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            client.get_model_metadata("narrow")
        image = module.InferInput("image", [1, 1, 3], "UINT8")
        image.set_data_from_numpy(np.zeros((1, 1, 3), np.uint8))
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            client.infer("narrow", [image])
        right = {"Authorization": "Bearer open-sesame"}
        counted = server.ask("GET", "/metrics", None, right)[2].decode()
        assert 'fcn_deploy_requests_total{code="UNAUTHENTICATED",model="",protocol="grpc"} 1.0' in counted
        assert client.get_model_metadata("narrow", headers={"authorization": "Bearer open-sesame"}).name == "narrow"
        client.close()
