"""HTTP connections with limits: uvicorn's protocol takes headers of any length, at any speed."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_BYTES = 1 << 16  # of a request's line and headers together
HEADER_COUNT = 100
HEADER_SECONDS = 15.0  # in which they must come


class Connection(HttpToolsProtocol):
    """A connection that is closed where a request's headers are too many, too long or too slow.

    What a callback of the parser raises is answered by 400.
    """

    _left = HEADER_BYTES
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._left = HEADER_BYTES
        self._arm()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)
        if len(self.headers) > HEADER_COUNT:
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def _count(self, length: int) -> None:
        self._left -= length
        if self._left < 0:
            raise ValueError("headers too long")

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
