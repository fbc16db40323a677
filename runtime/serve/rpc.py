"""The way in over gRPC: the Open Inference Protocol's service, and gRPC's own health check."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..arrays import AnyArray
from ..errors import DeployError, MisuseError, OverBudgetError
from .access import Exchange
from .messages import HEALTH_MESSAGES, MESSAGES, METHODS, NOT_SERVING, SERVICE, SERVING
from .models import Served, UnknownModelError, shown
from .outputs import EXTENSIONS, metadata, output_of
from .raw import with_raw, without_raw
from .room import Held, RefusedError, stopping
from .service import Service, problem_of
from .tensors import DATATYPES, MOST_OUTPUTS, Given, InferRequest, Wanted, request_of, wanted

INFER = "ModelInfer"
SLACK = 1 << 16  # bytes of a message beside its image
MOST_MESSAGE = (1 << 31) - 1  # bytes, which protobuf and gRPC count in 31 bits
PARALLEL = 16  # calls beyond those that may wait
RECEIVED = 16  # messages that are received at once, at most
RECEIVE_SECONDS = 30.0  # in which a message must have come
# Without a call, after which a server ends that was idle, or busy; and the most that it waits for that.
QUIET_SECONDS, BUSY_SECONDS, REFUSING_SECONDS = 0.05, 0.3, 2.0
CONTENTS = {"UINT8": "uint_contents", "UINT16": "uint_contents", "INT16": "int_contents", "FP32": "fp32_contents"}


def server(service: Service) -> "tuple[grpc.aio.Server, Verbs]":
    """A server without a port, and its methods."""
    made = grpc.aio.server(
        maximum_concurrent_rpcs=service.room.requests + PARALLEL,
        options=[
            ("grpc.max_receive_message_length", service.limits.body + SLACK),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # or a second server would get half of the requests
            ("grpc.max_metadata_size", 1 << 14),
        ],
    )
    verbs = Verbs(service)
    methods = {name: _handler(name, verbs, MESSAGES) for name in METHODS}
    health = {"Check": _handler("HealthCheck", verbs, HEALTH_MESSAGES)}
    made.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
        )
    )
    return made, verbs


def _handler(name: str, verbs: "Verbs", messages: Mapping[str, Any]) -> Any:
    """A method's handler; it takes bytes, and inference gives bytes too."""
    verb = verbs.of(name, messages[f"{name}Request"])
    if name == INFER:  # as a stream of one message, which is the same to clients: it is read when there is room for it
        return grpc.stream_unary_rpc_method_handler(verb)
    return grpc.unary_unary_rpc_method_handler(verb, response_serializer=messages[f"{name}Response"].SerializeToString)


class Verbs:
    """The methods, by their names."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # How long a message is, is known when it has come: those on their way are as long as any may be.
        self._receiving = asyncio.Semaphore(min(RECEIVED, max(1, service.room.bytes // service.limits.body)))
        self._refusing = False
        self._called = 0.0  # when inference was last asked for, by the loop's clock

    async def refuse(self) -> None:
        """Tell whoever asks for inference from now on that the server stops; returns when nobody has for a while.

        gRPC cancels the calls that have come and that no method has taken up yet, when its server stops: clients would
        take them for cancelled by themselves, and not ask another server.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        quiet = BUSY_SECONDS if began - self._called < 1 else QUIET_SECONDS
        self._refusing = True
        while loop.time() < min(max(began, self._called) + quiet, began + REFUSING_SECONDS):
            await asyncio.sleep(QUIET_SECONDS / 5)

    def of(self, name: str, message: Any) -> Callable[[Any, Any], Awaitable[Any]]:
        """A method, whose errors become gRPC's statuses; it takes a `message` as bytes, and inference reads it."""
        verb = getattr(self, f"_{name}")
        open = name in ("ServerLive", "ServerReady", "HealthCheck")

        async def answer(sent: Any, context: Any) -> Any:
            given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            exchange = Exchange(self._service.metrics, "grpc", {}, given)
            try:
                if name == INFER:
                    with exchange:
                        return await _counted(exchange, verb(context, exchange))
                if not open:
                    self._service.check_token(given.get("authorization"))
                return await verb(_parsed(message, sent))
            except DeployError as error:
                problem = problem_of(error)
            except (ValueError, ArithmeticError, LookupError, TypeError, OSError, RuntimeError, MemoryError) as error:
                problem = problem_of(error)
            del sent  # what abort raises keeps this frame in a cycle
            await context.abort(getattr(grpc.StatusCode, problem.grpc), problem.text)

        return answer

    async def _ServerLive(self, request: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerLiveResponse"](live=True)

    async def _ServerReady(self, request: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerReadyResponse"](ready=await self._service.check_ready())

    async def _HealthCheck(self, request: Any) -> Any:  # noqa: N802
        if request.service not in ("", SERVICE):
            raise UnknownModelError(f"no service {shown(request.service)} is served; ask for {SERVICE}, or of none")
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

    async def _ModelInfer(self, context: Any, exchange: Exchange) -> bytes:  # noqa: N802
        self._service.check_token(exchange.headers.get("authorization"))
        self._called = asyncio.get_running_loop().time()
        if self._refusing:
            raise stopping()
        with Held(self._service.room) as held:
            held.enter()
            sent = await self._received(context, held)
            rest, raw = without_raw(sent)
            request = _parsed(MESSAGES["ModelInferRequest"], rest)
            raw = raw or [memoryview(each) for each in request.raw_input_contents]
            return await self._inferred(request, raw, held, context, exchange)

    async def _received(self, context: Any, held: Held) -> bytes:
        """The one message of a call. Raises RefusedError, MisuseError."""
        async with self._receiving:
            try:
                async with asyncio.timeout(RECEIVE_SECONDS):
                    # Not by the iterator over messages: it keeps the last one in a cycle, until that is collected.
                    sent: bytes = await context.read()
            except TimeoutError as error:
                raise RefusedError(
                    "slow",
                    f"the request did not come within {RECEIVE_SECONDS:.0f} seconds; send it again on a better line, "
                    "or over HTTP",
                ) from error
            if sent is grpc.aio.EOF:
                raise MisuseError("the call has no message; send one")
            held.more(len(sent))
            return sent

    async def _inferred(
        self, request: Any, raw: Sequence[memoryview], held: Held, context: Any, exchange: Exchange
    ) -> bytes:  # fmt: skip
        service = self._service
        with service.models.using(request.model_name, request.model_version) as served:
            exchange.model = served.name
            asked = _asked(request, raw)
            times = [each for each in (asked.timeout, context.time_remaining()) if each is not None]
            deadline = service.deadline_of(min(times) if times else None)

            def write(outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]) -> bytes:
                return _written(served, asked, exchange.pages, outputs, results)

            job = await service.job(served, asked, held, write, deadline)
            exchange.size, exchange.pages = job.size, job.pages
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


def _written(
    served: Served, asked: InferRequest, pages: int, outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]
) -> bytes:
    """The answer to a request of inference, of a file of so many images, as bytes.

    Raises OverBudgetError where no message is as long.
    """
    answer = MESSAGES["ModelInferResponse"](model_name=served.name, model_version=served.version, id=asked.id)
    if pages > 1:
        answer.parameters["pages"].int64_param = pages
    raw = []
    for each, result in zip(outputs, results, strict=True):
        output = output_of(each, result, served.card_of(each.name))
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
