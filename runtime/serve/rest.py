"""The way in over HTTP: the Open Inference Protocol in JSON and with binary tensors, /label, metrics and the page."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..arrays import AnyArray
from ..errors import DeployError, MisuseError
from .access import Exchange
from .models import Served
from .openapi import description
from .outputs import EXTENSIONS, metadata, output_of, run_lengths, shares
from .room import RETRY_SECONDS, Done, Held, RefusedError
from .service import Service, problem_of
from .tensors import InferRequest, Wanted, header_length, label_query, page_of, parse_json
from .unpack import PACKED, unpacked

Part = bytes | memoryview
GRACE_SECONDS = 30.0  # in which a body must begin to come, or an answer to be taken, and after them …
SLOWEST = 50_000  # … bytes a second: a client that is slower is cut off
DRAINED = 1 << 30  # bytes of a refused body that are read and thrown away, so that the client gets to read the answer
JOINED = 1 << 20  # bytes of an answer, at most, that are sent in one piece
PARSED_AT_ONCE = 1 << 16  # bytes of JSON: more is parsed in a thread
CURLS_OWN = "application/x-www-form-urlencoded"  # what curl says of any body that it is not told of
LABEL_KINDS = ("labels", "refined", "masks")
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/png.js": ("png.js", "text/javascript"),
    "/rle.js": ("rle.js", "text/javascript"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class GoneError(Exception):
    """The client has gone: there is nobody to answer."""


@dataclass(frozen=True)
class Answer:
    """What is sent: a body in parts, of a media type, with further headers."""

    parts: Sequence[Part]
    media: str
    headers: dict[str, str]


def application(service: Service) -> Starlette:
    """The ASGI application of a server."""
    get = partial(_get, service)
    model = "/v2/models/{name}"
    routes = [
        Route(path + "/infer", _Post(service, "rest", _infer), methods=["POST"])  # first: it is asked for most
        for path in (model, model + "/versions/{version}")
    ]
    routes += [
        Route("/v2", get(_server)),
        Route("/v2/health/live", get(_live, open=True)),
        Route("/v2/health/ready", get(_ready, open=True)),
        Route("/metrics", get(_metrics)),
        Route("/openapi.json", get(_openapi, open=True)),
    ]
    for path in (model, model + "/versions/{version}"):
        routes += [Route(path, get(_model)), Route(path + "/ready", get(_model_ready))]
    routes.append(Route("/label", _Post(service, "label", _label), methods=["POST"]))
    folder = resources.files(__package__) / "page"
    for path, (file, media) in PAGE.items():
        content = (folder / file).read_bytes()
        routes.append(Route(path, partial(_static, content, media)))
    missing = {404: _http_error, 405: _http_error}
    made = Starlette(routes=routes, exception_handlers=missing)
    # A redirection from /label/ would leave curl without an error and without labels, and lead past a proxy's TLS.
    made.router.redirect_slashes = False
    return made


async def _static(content: bytes, media: str, request: Request) -> Response:
    return Response(content, media_type=media, headers=PAGE_HEADERS)


async def _http_error(request: Request, error: Exception) -> Response:
    code = getattr(error, "status_code", 500)
    text = f"no {request.method} of this address; /openapi.json has those that there are"
    return JSONResponse({"error": text}, code, getattr(error, "headers", None))


# What is looked up


Look = Callable[[Service, Request], Awaitable[Response]]


def _get(service: Service, look: Look, open: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint; with the server's token unless it is `open` to all."""

    async def endpoint(request: Request) -> Response:
        try:
            if not open:
                service.check_token(request.headers.get("authorization"))
            return await look(service, request)
        except Exception as error:
            problem = problem_of(error)
            return JSONResponse({"error": problem.text}, problem.http, _extra(problem.http))

    return endpoint


async def _server(service: Service, request: Request) -> Response:
    from ..command import version

    models = [{"name": each.name, "version": each.version} for each in service.models.served.values()]
    return JSONResponse({"name": "fcn-deploy", "version": version(), "extensions": list(EXTENSIONS), "models": models})


async def _live(service: Service, request: Request) -> Response:
    return JSONResponse({"live": True})


async def _ready(service: Service, request: Request) -> Response:
    ready = await service.check_ready()
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _openapi(service: Service, request: Request) -> Response:
    return JSONResponse(description(service.models.served))


def _named(service: Service, request: Request) -> Served:
    return service.models.get(request.path_params["name"], request.path_params.get("version", ""))


async def _model(service: Service, request: Request) -> Response:
    return JSONResponse(metadata(_named(service, request)))


async def _model_ready(service: Service, request: Request) -> Response:
    served = _named(service, request)
    await service.check_ready()
    ready = served.ready and not service.stopping
    return JSONResponse({"name": served.name, "ready": ready}, 200 if ready else 503)


# What is labelled


Work = Callable[[Service, Exchange, Receive, Held], Awaitable[Answer]]


class _Post:
    """An endpoint that takes a body: an ASGI application."""

    def __init__(self, service: Service, protocol: str, work: Work) -> None:
        self._service, self._protocol, self._work = service, protocol, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        exchange = Exchange(self._service.metrics, self._protocol, scope, headers)
        service = self._service
        with exchange, Held(service.room) as held:
            try:
                service.check_token(headers.get("authorization"))
                _check_origin(headers)
                answer = await self._work(service, exchange, receive, held)
                exchange.code = "200"
                await _send(send, 200, answer, exchange)
            except GoneError:
                exchange.code, exchange.reason = "499", "gone"
            except Exception as error:
                problem = problem_of(error)
                exchange.code, exchange.reason, exchange.error = str(problem.http), problem.reason, problem.text
                body = json.dumps({"error": problem.text}).encode()
                extra = _extra(problem.http)
                if int(headers.get("content-length", "0")) > DRAINED:
                    extra["Connection"] = "close"
                await _send(send, problem.http, Answer([body], "application/json", extra), exchange)


def _extra(status: int) -> dict[str, str]:
    """Headers that go with a status."""
    if status == 503:
        return {"Retry-After": str(RETRY_SECONDS)}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


def _check_origin(headers: dict[str, str]) -> None:
    """A page of another site may not use the browser of somebody who reaches this server.

    Behind a proxy the host may be another than the page's: then it counts what the browser says, whom pages cannot make
    say it (https://www.w3.org/TR/fetch-metadata/). To addresses without TLS browsers do not.
    """
    origin = headers.get("origin")
    same = headers.get("sec-fetch-site") == "same-origin"
    if origin is not None and not same and origin.partition("://")[2] != headers.get("host"):
        raise RefusedError(
            "origin",
            f"a page of {origin[:80]} may not send requests here; let its own server send them, or, if it is this "
            "server's, the proxy between hand on Host",
        )


async def _send(send: Send, status: int, answer: Answer, exchange: Exchange) -> None:
    length = sum(len(part) for part in answer.parts)
    fields = {"Content-Type": answer.media, "Content-Length": str(length), **answer.headers, **exchange.told}
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    try:
        async with asyncio.timeout(GRACE_SECONDS + length / SLOWEST):
            await send({"type": "http.response.start", "status": status, "headers": headers})
            parts = [b"".join(answer.parts)] if length <= JOINED else answer.parts
            for index, part in enumerate(parts):
                more = index < len(parts) - 1
                await send({"type": "http.response.body", "body": part, "more_body": more})
    except TimeoutError:
        exchange.code, exchange.reason = "499", "slow"  # the connection is closed


async def _body(service: Service, exchange: Exchange, receive: Receive, held: Held) -> memoryview:
    """A request's body, unpacked. Raises RefusedError before anything is read of what is not taken."""
    encoding = _encoding(exchange.headers)
    body = await _received(service, exchange, receive, held)
    if encoding == "identity":
        return body
    return await service.off_the_loop(lambda: unpacked(body, service.limits.body, held.more))


def _encoding(headers: Mapping[str, str]) -> str:
    """How a body is packed. Raises RefusedError."""
    # x-gzip is another name of gzip: RFC 9110, 8.4.1.3.
    encoding = headers.get("content-encoding", "identity").strip().lower().removeprefix("x-")
    if encoding not in ("identity", *PACKED):
        raise RefusedError(
            "type", f"the body's Content-Encoding is {encoding[:40]!r}; choose {', '.join(PACKED)}, or send it as it is"
        )
    return encoding


async def _received(service: Service, exchange: Exchange, receive: Receive, held: Held) -> memoryview:
    """A request's body as it comes."""
    headers, limit = exchange.headers, service.limits.body
    length = int(headers.get("content-length", "0"))
    if length > limit:
        raise RefusedError(
            "too_large",
            f"the request is {length} bytes long, over the limit of {limit}; send less, or raise --max-body",
        )
    held.enter()
    held.more(length)
    body, place = bytearray(length), 0
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with asyncio.timeout(GRACE_SECONDS) as timeout:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise GoneError
                part = message.get("body", b"")
                if place + len(part) > len(body):  # its length was not told
                    held.more(place + len(part) - len(body))
                    if place + len(part) > limit:
                        raise RefusedError(
                            "too_large", f"the request is longer than the limit of {limit} bytes; raise --max-body"
                        )
                body[place : place + len(part)] = part
                place += len(part)
                if not message.get("more_body", False):
                    return memoryview(body)[:place]
                timeout.reschedule(started + GRACE_SECONDS + place / SLOWEST)
    except TimeoutError as error:
        raise RefusedError("slow", "the request's body came too slowly; send it again on a better line") from error


async def _outcome(
    service: Service,
    exchange: Exchange,
    receive: Receive,
    held: Held,
    served: Served,
    request: InferRequest,
    write: Callable[[tuple[Wanted, ...], tuple[AnyArray, ...]], Any],
) -> Done:
    """What became of a request, unless its client goes before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def labelled() -> Done:
        job = await service.job(served, request, held, write, service.deadline_of(request.timeout))
        exchange.size, exchange.pages = job.size, job.pages
        return await service.outcome(served, job)

    leaving, working = asyncio.ensure_future(gone()), asyncio.ensure_future(labelled())
    try:
        await asyncio.wait({leaving, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        done = working.result()
        exchange.seconds = done.seconds
        return done
    finally:
        leaving.cancel()
        working.cancel()
        held.leave()
        del leaving, working  # or what was raised, this frame and the body would live in a cycle


async def _infer(service: Service, exchange: Exchange, receive: Receive, held: Held) -> Answer:
    name, version = exchange.path["name"], exchange.path.get("version", "")
    with service.models.using(name, version) as served:
        exchange.model = served.name
        header = header_length(exchange.headers.get("inference-header-content-length"))
        body = await _body(service, exchange, receive, held)
        if (len(body) if header is None else header) > PARSED_AT_ONCE:
            request = await service.off_the_loop(lambda: parse_json(body, header))
        else:
            request = parse_json(body, header)

        def write(outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]) -> Answer:
            return _written(served, request, exchange.pages, outputs, results)

        done = await _outcome(service, exchange, receive, held, served, request, write)
    answer: Answer = done.answer
    answer.headers["Server-Timing"] = _timing(done)
    return answer


def _written(
    served: Served, request: InferRequest, pages: int, outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]
) -> Answer:
    """The answer to a request of inference, of a file of so many images."""
    fields: dict[str, Any] = {"model_name": served.name, "model_version": served.version}
    fields |= {"id": request.id} if request.id else {}
    fields |= {"parameters": {"pages": pages}} if pages > 1 else {}
    text = [json.dumps(fields)[:-1].encode(), b', "outputs": [']
    rest: list[Part] = []
    for index, (wanted, result) in enumerate(zip(outputs, results, strict=True)):
        output = output_of(wanted, result, served.card_of(wanted.name))
        parameters = dict(output.parameters)
        if output.binary:
            rest.append(output.raw)
            parameters["binary_data_size"] = len(rest[-1])
        elif output.array is None and not output.text:
            parameters["encoding"] = "base64"
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        entry |= {"parameters": parameters} if parameters else {}
        text.append((b", " if index else b"") + json.dumps(entry)[:-1].encode())
        if not output.binary:
            text += [b', "data": ', *output.json_data()]
        text.append(b"}")
    head = b"".join([*text, b"]}"])
    if not rest:
        return Answer([head], "application/json", {})
    return Answer([head, *rest], "application/octet-stream", {"Inference-Header-Content-Length": str(len(head))})


def _timing(done: Done) -> str:
    """Milliseconds by part, as a Server-Timing header (https://www.w3.org/TR/server-timing/)."""
    return ", ".join(f"{part};dur={1e3 * seconds:.2f}" for part, seconds in done.seconds.items())


async def _label(service: Service, exchange: Exchange, receive: Receive, held: Held) -> Answer:
    query = label_query(exchange.scope["query_string"])
    if exchange.headers.get("content-type", "").startswith("multipart/"):
        raise RefusedError("type", "the body is a form; send the image file itself: curl --data-binary @photo.jpg")
    accept = exchange.headers.get("accept", "")
    format = query.get("format", "json" if "json" in accept and "image/png" not in accept else "png")
    if format not in ("png", "json", "rle"):
        raise MisuseError(f"format {format[:40]!r}; choose png, json or rle")
    page = page_of(query.get("page"))
    with service.models.using(query.get("model", ""), query.get("version", "")) as served:
        exchange.model = served.name
        kind = query.get("output", served.network.kind)
        if kind.rpartition("/")[2] not in LABEL_KINDS:
            raise MisuseError(
                f"output {kind[:40]!r}: /label gives {', '.join(LABEL_KINDS)}; ask /v2/models/{served.name}/infer"
            )
        if format == "png" and kind.rpartition("/")[2] == "masks":
            raise MisuseError("masks overlap, and are no PNG; ask for format=json or format=rle")
        body = await _body(service, exchange, receive, held)
        if not body:
            raise MisuseError("the request has no body; send an image file: curl --data-binary @photo.jpg")
        wanted = Wanted(kind, "" if format == "json" else format)

        def write(outputs: tuple[Wanted, ...], results: tuple[AnyArray, ...]) -> Any:
            if format == "png":
                return output_of(outputs[0], results[0], served.card_of(kind)).element
            found: dict[str, Any] = {"model": served.name, "version": served.version, "output": kind}
            found["size"] = results[0].shape[-2:]
            found["classes"] = shares(results[0], served.card_of(kind))
            return found | ({"rle": run_lengths(results[0])} if format == "rle" else {})

        request = InferRequest(None, body, (wanted,), page=page)
        try:
            done = await _outcome(service, exchange, receive, held, served, request, write)
        except DeployError as error:
            if type(error) is DeployError and exchange.headers.get("content-type") == CURLS_OWN:
                raise DeployError(f"{error}; curl sends files whole by --data-binary alone, not by -d") from None
            raise
    # Headers hold ASCII alone, and a file's name whatever there is.
    headers = {"Server-Timing": _timing(done), "X-Model": quote(served.name), "X-Model-Version": served.version}
    if format == "png":
        return Answer([done.answer], "image/png", headers)
    milliseconds = {part: round(1e3 * seconds, 2) for part, seconds in done.seconds.items()}
    return Answer([json.dumps(done.answer | {"ms": milliseconds}).encode()], "application/json", headers)
