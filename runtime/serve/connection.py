"""HTTP connections with limits: uvicorn's protocol takes headers of any length, at any speed."""

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_BYTES = 1 << 16  # of a request's line and headers together
HEADER_COUNT = 100
HEADER_SECONDS = 15.0  # in which they must come
NO_HTTP = (
    f"the request is no HTTP/1.1, its address is not ASCII (ü is %C3%BC there), or its headers are more than "
    f"{HEADER_COUNT} or longer than {HEADER_BYTES} bytes; mend it"
)


class Connection(HttpToolsProtocol):
    """A connection that is closed where a request's headers are too many, too long or too slow.

    What a callback of the parser raises is answered by 400. A client's offer of another protocol (`Upgrade: h2c`, which
    Java's makes by itself) is not taken up, and its request is answered as if it had made none (RFC 9110, section 7.8;
    uvicorn leaves out its body: https://github.com/Kludex/uvicorn/issues/2722).
    """

    _left = HEADER_BYTES
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as offer:
                    rest = rest[offer.args[0] :]
                    self._begin_again()
        except httptools.HttpParserError:
            self.send_400_response(NO_HTTP)

    def _begin_again(self) -> None:
        """Read a request's headers anew, without its offer of another protocol: httptools would skip its body."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        kept = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(kept)))

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": msg}).encode()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        self.transport.close()

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
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("no proxy")
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

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
