"""The way in over gRPC: the Open Inference Protocol's service, and gRPC's own health check."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..arrays import AnyArray
from ..errors import DeployError, MisuseError, OverBudgetError
from .access import Exchange
from .messages import HEALTH_MESSAGES, MESSAGES, METHODS, NOT_SERVING, SERVICE, SERVING
from .models import Served
from .outputs import EXTENSIONS, metadata, output_of
from .raw import with_raw, without_raw
from .room import Held
from .service import Service, problem_of
from .tensors import DATATYPES, MOST_OUTPUTS, Given, InferRequest, Wanted, request_of, wanted

INFER = "ModelInfer"
SLACK = 1 << 16  # bytes of a message beside its image
MOST_MESSAGE = (1 << 31) - 1  # bytes, which protobuf and gRPC count in 31 bits
PARALLEL = 16  # messages that are received at once beyond those that may wait
CONTENTS = {"UINT8": "uint_contents", "UINT16": "uint_contents", "INT16": "int_contents", "FP32": "fp32_contents"}


def server(service: Service) -> "grpc.aio.Server":
    """A server without a port."""
    made = grpc.aio.server(
        maximum_concurrent_rpcs=service.room.requests + PARALLEL,
        options=[
            ("grpc.max_receive_message_length", service.limits.body + SLACK),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # or a second server would get half of the requests
            ("grpc.max_metadata_size", 1 << 14),
        ],
    )
    verbs = _Verbs(service)
    methods = {name: _handler(name, verbs, MESSAGES) for name in METHODS}
    health = {"Check": _handler("HealthCheck", verbs, HEALTH_MESSAGES)}
    made.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
        )
    )
    return made


def _handler(name: str, verbs: "_Verbs", messages: Mapping[str, Any]) -> Any:
    """A method's handler; it takes bytes, and inference gives bytes too."""
    serializer = None if name == INFER else messages[f"{name}Response"].SerializeToString
    return grpc.unary_unary_rpc_method_handler(
        verbs.of(name, messages[f"{name}Request"]), response_serializer=serializer
    )


class _Verbs:
    """The methods, by their names."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def of(self, name: str, message: Any) -> Callable[[bytes, Any], Awaitable[Any]]:
        """A method, whose errors become gRPC's statuses; it takes the bytes of a `message`."""
        verb = getattr(self, f"_{name}")
        open = name in ("ServerLive", "ServerReady", "HealthCheck")

        async def answer(sent: bytes, context: Any) -> Any:
            given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            exchange = Exchange(self._service.metrics, "grpc", {}, given)
            try:
                if not open:
                    self._service.check_token(given.get("authorization"))
                if name != INFER:
                    return await verb(_parsed(message, sent))
                with exchange:
                    return await _counted(exchange, verb(sent, context, exchange))
            except DeployError as error:
                problem = problem_of(error)
            except (ValueError, ArithmeticError, LookupError, TypeError, OSError, RuntimeError, MemoryError) as error:
                problem = problem_of(error)
            await context.abort(getattr(grpc.StatusCode, problem.grpc), problem.text)

        return answer

    async def _ServerLive(self, request: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerLiveResponse"](live=True)

    async def _ServerReady(self, request: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerReadyResponse"](ready=await self._service.check_ready())

    async def _HealthCheck(self, request: Any) -> Any:  # noqa: N802
        ready = await self._service.check_ready()
        return HEALTH_MESSAGES["HealthCheckResponse"](status=SERVING if ready else NOT_SERVING)

    async def _ModelReady(self, request: Any) -> Any:  # noqa: N802
        served = self._service.models.get(request.name, request.version)
        await self._service.check_ready()
        return MESSAGES["ModelReadyResponse"](ready=served.ready and not self._service.stopping)

    async def _ServerMetadata(self, request: Any) -> Any:  # noqa: N802
        from ..command import version

        return MESSAGES["ServerMetadataResponse"](name="fcn-deploy", version=version(), extensions=EXTENSIONS)

    async def _ModelMetadata(self, request: Any) -> Any:  # noqa: N802
        told = metadata(self._service.models.get(request.name, request.version))
        tensors = {
            key: [{name: each[name] for name in ("name", "datatype", "shape")} for each in told[key]]
            for key in ("inputs", "outputs")
        }
        return MESSAGES["ModelMetadataResponse"](
            name=told["name"], versions=told["versions"], platform=told["platform"], **tensors
        )

    async def _ModelInfer(self, sent: bytes, context: Any, exchange: Exchange) -> bytes:  # noqa: N802
        service = self._service
        rest, raw = without_raw(sent)
        request = _parsed(MESSAGES["ModelInferRequest"], rest)
        raw = raw or [memoryview(each) for each in request.raw_input_contents]
        with service.models.using(request.model_name, request.model_version) as served, Held(service.room) as held:
            exchange.model = served.name
            held.enter()
            held.more(len(sent))
            asked = _asked(request, raw)
            times = [each for each in (asked.timeout, context.time_remaining()) if each is not None]
            deadline = service.deadline_of(min(times) if times else None)

            def write(outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]) -> bytes:
                return _written(served, asked, outputs, results)

            job = await service.job(served, asked, held, write, deadline)
            exchange.size = job.size
            done = await service.outcome(served, job)
            held.leave()
            exchange.seconds = done.seconds
            answer: bytes = done.answer
            return answer


def _parsed(message: Any, sent: bytes) -> Any:
    """A message from its bytes; gRPC's own way would log a traceback where they are none. Raises MisuseError."""
    try:
        return message.FromString(sent)
    except DecodeError as error:
        raise MisuseError(f"the request is no {message.DESCRIPTOR.full_name}; send that message") from error


async def _counted(exchange: Exchange, answer: Awaitable[Any]) -> Any:
    """The answer; what comes of it is noted."""
    try:
        found = await answer
    except Exception as error:
        problem = problem_of(error)
        exchange.code, exchange.reason, exchange.error = problem.grpc, problem.reason, problem.text
        raise
    except BaseException:  # the client has cancelled it, or its time is over
        exchange.code, exchange.reason = "CANCELLED", "gone"
        raise
    exchange.code = "OK"
    return found


def _asked(request: Any, raws: Sequence[memoryview]) -> InferRequest:
    """A message, and its raw inputs, as a request. Raises MisuseError."""
    if len(request.inputs) != 1 or len(raws) > 1 or len(request.outputs) > MOST_OUTPUTS:
        raise MisuseError(
            f"the request has {len(request.inputs)} inputs, {len(raws)} of them raw, and "
            f"{len(request.outputs)} outputs; this server takes one input, and {MOST_OUTPUTS} outputs at most"
        )
    tensor = request.inputs[0]
    raw, data = None, None
    if raws:
        if tensor.HasField("contents"):
            raise MisuseError("the input has raw contents and others; omit one of them")
        raw = raws[0]
    elif tensor.datatype == "BYTES":
        data = list(tensor.contents.bytes_contents)
    elif tensor.datatype in DATATYPES:
        data = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
    given = Given(tensor.name, tensor.datatype, tuple(tensor.shape), raw, data, _parameters(tensor.parameters))
    outputs = tuple(wanted(each.name, _parameters(each.parameters), True) for each in request.outputs)
    return request_of(given, outputs, request.id, _parameters(request.parameters))


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """A map of InferParameter as plain values."""
    return {key: getattr(each, each.WhichOneof("parameter_choice") or "int64_param") for key, each in given.items()}


def _written(served: Served, asked: InferRequest, outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]) -> bytes:
    """The answer to a request of inference, as bytes. Raises OverBudgetError where no message is as long."""
    answer = MESSAGES["ModelInferResponse"](model_name=served.name, model_version=served.version, id=asked.id)
    raw = []
    for each, result in zip(outputs, results, strict=True):
        output = output_of(each, result, served.card_of(each.name), binary=True)
        tensor = answer.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        for key, value in output.parameters.items():
            tensor.parameters[key].string_param = value
        raw.append(output.raw)
    length = sum(map(len, raw))
    if length > MOST_MESSAGE - SLACK:
        raise OverBudgetError(
            f"the results are {length:,} bytes long, over the {MOST_MESSAGE:,} of a gRPC message; ask for fewer "
            "outputs, send a smaller image, or ask over HTTP"
        )
    return with_raw(answer.SerializeToString(), raw)
