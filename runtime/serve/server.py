"""The two ports of a server, opened and closed together, in one event loop."""

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from ..errors import DeployError, MisuseError, brief
from . import rpc
from .connection import Connection
from .rest import application
from .service import Service

END_SECONDS = 3600.0  # in which requests that were begun may end
KEEP_SECONDS = 30  # that a connection is kept without a request
TELL_SECONDS = 60.0  # between two lines about connections that wait
_told = [float("-inf")]  # when that was told last
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """PEM files of a certificate chain and of its key."""

    cert: Path
    key: Path


def listen(host: str, port: int) -> socket.socket:
    """A socket of HTTP. Raises MisuseError for an address of another machine, DeployError for a port in use."""
    try:
        if host == "*":  # the C library takes it for this machine alone
            raise OSError("it is no address")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = "it is no name of a machine" if isinstance(error, UnicodeError) else error.strerror or error
        raise MisuseError(
            f"--host {brief(host, 100)}: {reason}; name an address of this machine, or 0.0.0.0 for all of them"
        ) from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise MisuseError(f"--host {host} is no address of this machine; name one that is") from error
        raise _cannot_listen(host, port, error.strerror or str(error), "--port") from error
    return made


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _cannot_listen(host: str, port: int, reason: str, option: str) -> DeployError:
    return DeployError(f"cannot listen at port {port} of {host}: {reason}; choose another with {option}")


def _heard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What goes wrong in the loop itself. asyncio would tell a thousand times a second that files have run out."""
    error = context.get("exception")
    if isinstance(error, ValueError) and "_start_serving" in context.get("message", ""):
        return  # a second after they ran out it listens again, as often, also at a socket that was closed meanwhile
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        loop.default_exception_handler(context)
    elif (now := loop.time()) - _told[0] > TELL_SECONDS:
        _told[0] = now
        log.error("connections wait: %s; raise the limit (ulimit -n), or put a proxy before it", error.strerror)


class _Http(uvicorn.Server):
    """uvicorn's server, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """HTTP at a socket, and gRPC at a port of the same host.

    Attributes:
        address: of HTTP, as a URL.
        grpc_address: host and port of gRPC, once it is started.
    """

    def __init__(
        self, service: Service, listener: socket.socket, host: str, grpc_port: int, tls: Tls | None = None
    ) -> None:
        self._service, self._listener, self._grpc_port, self._tls = service, listener, grpc_port, tls
        self._host, self._at = _in_url(host), _in_url(listener.getsockname()[0])
        self.address = f"http{'' if tls is None else 's'}://{self._host}:{listener.getsockname()[1]}"
        self.grpc_address = ""

    async def start(self) -> None:
        """Take requests. Raises DeployError where the port of gRPC cannot be had."""
        asyncio.get_running_loop().set_exception_handler(_heard)
        self._rpcs, self._verbs = rpc.server(self._service)
        # It warns of each request that is none, and whoever likes could fill the log by them.
        # Likewise of files of several images, which is told to the client.
        for name in ("uvicorn.error", "fcn_deploy.runtime.images.stored"):
            logging.getLogger(name).setLevel(logging.ERROR)
        config = uvicorn.Config(
            application(self._service), http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=KEEP_SECONDS,
            ssl_certfile=None if self._tls is None else self._tls.cert,
            ssl_keyfile=None if self._tls is None else self._tls.key,
        )  # fmt: skip
        self._http = _Http(config)
        self._serving: asyncio.Future[None] | None = None
        address = f"{self._at}:{self._grpc_port}"  # gRPC does not know all ways to write one, such as 127.1
        try:
            if self._tls is None:
                port = self._rpcs.add_insecure_port(address)
            else:
                pair = self._tls.key.read_bytes(), self._tls.cert.read_bytes()
                port = self._rpcs.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError:
            port = 0
        if not port:
            raise _cannot_listen(self._host, self._grpc_port, "it is in use, or not ours", "--grpc-port")
        self.grpc_address = f"{self._host}:{port}"
        self._serving = asyncio.ensure_future(self._http.serve(sockets=[self._listener]))
        await self._rpcs.start()

    async def stop(self) -> None:
        """Take no more requests, end those that were taken, and close the networks."""
        self._service.stopping = True
        self._http.should_exit = True
        await self._verbs.refuse()
        await self._rpcs.stop(END_SECONDS)
        if self._serving is not None:
            await self._serving
        await asyncio.get_running_loop().run_in_executor(None, self._service.close)
