"""One request, from its first byte to its last: counted, and logged with its trace."""

import json
import logging
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .metrics import Metrics

log = logging.getLogger("fcn_deploy.access")

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")  # W3C Trace Context, level 1


class Exchange:
    """A request and its answer; a context manager that counts and logs them.

    Attributes:
        scope, headers: of ASGI; empty of gRPC.
        model: its name; "" where it is not known.
        code: of the answer: HTTP's status, or gRPC's name of it.
        reason: why it was not run; "" where it was.
        error: what the client was told.
        size: (height, width) of the image.
        pages: images in the file that was sent, of which one is labelled.
        seconds: by part.
    """

    def __init__(self, metrics: Metrics, protocol: str, scope: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self.scope, self.headers = scope, headers
        self.model = self.reason = self.error = ""
        self.code = "500"
        self.size: tuple[int, int] | None = None
        self.pages = 1
        self.seconds: dict[str, float] = {}
        self._metrics, self._protocol, self._started = metrics, protocol, time.perf_counter()

    @property
    def path(self) -> dict[str, str]:
        """Parameters in the address."""
        found: dict[str, str] = self.scope["path_params"]
        return found

    @property
    def told(self) -> dict[str, str]:
        """Headers of the answer: the trace context that came with it, and how many images a file of several has."""
        given = self.headers.get("traceparent", "")
        trace = {"traceparent": given} if TRACEPARENT.fullmatch(given) else {}
        return trace | ({"X-Pages": str(self.pages)} if self.pages > 1 else {})

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.requests.labels(self.model, self._protocol, self.code).inc()
        if self.reason:
            self._metrics.rejected.labels(self.reason).inc()
        if not log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "protocol": self._protocol,
            "model": self.model,
            "code": self.code,
            "ms": round(1e3 * (time.perf_counter() - self._started), 2),
        }
        fields |= {"size": list(self.size)} if self.size else {}
        fields |= {f"{part}_ms": round(1e3 * each, 2) for part, each in self.seconds.items()}
        fields |= {"reason": self.reason} if self.reason else {}
        fields |= {"error": self.error} if self.error else {}
        if match := TRACEPARENT.fullmatch(self.headers.get("traceparent", "")):
            fields |= {"trace_id": match[1], "span_id": match[2]}
        log.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """Log records as JSON, a line each."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
