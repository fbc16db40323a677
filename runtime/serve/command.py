"""serve-engine: networks served over HTTP and gRPC until the process is told to stop."""

import asyncio
import logging
import os
import signal
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command import INTERRUPTED, InputRange, NoData, Threads, fail, log_to_stderr, parse_memory, run
from ..errors import DeployError, MisuseError
from ..extras import need
from ..process_memory import keep_freed

if TYPE_CHECKING:
    from .models import Models
    from .server import Server, Tls
    from .service import Service

log = logging.getLogger(__name__)

MODULES = ("starlette", "uvicorn", "httptools", "grpc", "google.protobuf", "prometheus_client")
DEFAULT_BODY = 256_000_000  # bytes
DEFAULT_PIXELS = 100_000_000
MOST_BODY = 2_000_000_000  # bytes: gRPC counts them in 31 bits


@dataclass
class Listening:
    """Where the server listens, and to whom.

    Attributes:
        host: an address of this machine.
        port: of HTTP.
        grpc_port: of gRPC.
        tls_cert, tls_key: PEM files.
        token_file: a file whose one line requests must bear.
    """

    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen at; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of HTTP; 0: any that is free.")] = 8000
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of gRPC; 0: any that is free.")] = 8001
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Certificate chain, to serve over TLS; needs --tls-key too.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Private key of --tls-cert.")] = None
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with a token that requests must bear (Authorization: Bearer)."),
    ] = None

    def tls(self) -> "Tls | None":
        """Certificate and key, or None. Raises MisuseError."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise MisuseError("--tls-cert and --tls-key belong together; give both, or none")
        if self.tls_cert is None or self.tls_key is None:
            return None
        import ssl

        from .server import Tls

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, lambda: "")
            return Tls(self.tls_cert, self.tls_key)
        except OSError as error:  # ssl's own errors too
            reason = error.strerror or str(error)
            raise MisuseError(
                f"{self.tls_cert} with {self.tls_key}: {reason}; give a PEM certificate and its key"
            ) from error

    def token(self) -> str:
        """The token, or "". Raises MisuseError."""
        if self.token_file is None:
            return ""
        try:
            text = self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MisuseError(
                f"cannot read {self.token_file}: {getattr(error, 'strerror', error)}; name a text file"
            ) from error
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise MisuseError(f"{self.token_file} is not one token of printable ASCII characters; write one into it")
        return text


def serve_engine(
    models: Annotated[
        list[Path],
        typer.Argument(help="Engines (or plain .onnx) to serve; a file's stem is its name.", metavar="ENGINE"),
    ],
    listening: Listening,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_memory,
            metavar="GB",
            help="Memory that the server may take, such as 2GB [default: 80 % of what is free].",
        ),
    ] = None,
    queue_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_memory,
            metavar="GB",
            help="Part of it that bodies, images and results may take [default: a quarter].",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused at once.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, max=MOST_BODY, help="Refuse requests of more bytes.")] = DEFAULT_BODY,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse images of more pixels.")] = DEFAULT_PIXELS,
    warmup: Annotated[
        str | None, typer.Option(metavar="HxW,…", help="Sizes to run once before the server is ready.")
    ] = None,
    drain: Annotated[
        float,
        typer.Option(min=0, max=3600, help="Seconds to go on taking requests after SIGTERM, while it is not ready."),
    ] = 0.0,
    device: Annotated[str, typer.Option(help="auto: what the engine is for; cpu; cuda, or cuda:1.")] = "auto",
    input_range: InputRange = None,
    nodata: NoData = None,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log as JSON: a line for each request.")] = False,
    threads: Threads = None,
) -> int:
    """Serve engines over the Open Inference Protocol (REST and gRPC), with /label, metrics and a page for people."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # or its library speaks on standard error of what we tell ourselves
    for module in MODULES:
        need(module, "serve")
    _log(json_logs)
    keep_freed()
    from ..images.numbers import ReadOptions
    from ..network import Network
    from .models import Memory, Models
    from .room import Room
    from .server import Server, listen
    from .service import Limits, Service

    sizes, options = _sizes(warmup), ReadOptions(input_range=input_range, no_data=nodata)
    tls, token = listening.tls(), listening.token()
    listener = listen(listening.host, listening.port)
    if not ip_address(listener.getsockname()[0]).is_loopback and not token:
        log.warning("anyone who reaches %s may use this server; --token-file asks for a token", listening.host)
    budget = Memory.of(memory, queue_memory)

    def opened(path: Path) -> Network:
        return Network(path, device, threads, budget.total)

    with listener:
        served = Models(models, opened, sizes, budget)
        room = Room(queue, budget.queue, served.rest)
        limits = Limits(min(max_body, budget.queue), max_pixels)
        service = Service(served, room, limits, token, options)
        return asyncio.run(_serve(service, Server(service, listener, listening.host, listening.grpc_port, tls), drain))


def _log(as_json: bool) -> None:
    if not as_json:
        log_to_stderr()
        return
    from .access import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("fcn_deploy.access", __name__):
        logging.getLogger(name).setLevel(logging.INFO)


def _sizes(text: str | None) -> list[tuple[int, int]]:
    """The sizes of --warmup."""
    if text is None:
        return []
    from ..sizes import parse_sizes

    try:
        return parse_sizes(text).examples(most=16)
    except DeployError as error:
        raise type(error)(str(error).replace("--sizes", "--warmup")) from error


async def _serve(service: "Service", server: "Server", drain: float) -> int:
    """Serve until a signal ends it; the exit code."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals: list[int] = []

    def asked(number: int) -> None:
        if number == signal.SIGINT and number in signals:  # whoever presses Ctrl-C again does not want to wait
            os._exit(fail("serve-engine", "interrupted", INTERRUPTED))
        signals.append(number)
        service.stopping = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, _reload, service.models))
    try:
        await server.start()
        _say(f"serving {', '.join(service.models.served)} at {server.address} and, by gRPC, {server.grpc_address}")
        await loop.run_in_executor(None, service.models.warm_up, lambda: not service.stopping)
        if not service.stopping:
            _say("ready")
        await stop.wait()
        await asyncio.sleep(drain)
    finally:
        await server.stop()
    return INTERRUPTED if signal.SIGINT in signals else 0


def _say(text: str) -> None:
    """Tell it on standard output, or in the log where that is JSON."""
    if log.isEnabledFor(logging.INFO):
        log.info(text)
        return
    try:
        print(text, flush=True)
    except OSError:  # its reader has gone, or its disk is full: no reason to answer no requests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reload(models: "Models") -> None:
    for line in models.reload():
        _say(line)


def main() -> None:
    run(serve_engine, "serve-engine")


if __name__ == "__main__":
    main()
