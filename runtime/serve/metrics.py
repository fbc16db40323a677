"""What was done, by Prometheus's conventions: seconds, bytes, and counters that end in _total."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from .models import Models, Served
from .room import Done, Job, Room

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        requests: by model, protocol (`rest`, `grpc`, `label`) and status.
        rejected: by reason.
    """

    def __init__(self, models: Models, room: Room) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_Now(models, room))
        self.requests = self._counter("requests", "Requests answered.", "model", "protocol", "code")
        self.rejected = self._counter("rejected", "Requests that were not run.", "reason")
        self._pixels = self._counter("pixels", "Pixels of images labelled.", "model")
        self._seconds = {
            part: Histogram(
                f"fcn_deploy_{name}_seconds", help_, ["model"], buckets=SECONDS, registry=self.registry
            )
            for part, name, help_ in (
                ("queue", "queue", "Time from a request's arrival until its image was in the network."),
                ("read", "decode", "Time to read an image file."),
                ("infer", "inference", "Time in the network, preparation and upsampling included."),
                ("write", "encode", "Time to write the results down."),
            )
        }  # fmt: skip

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(f"fcn_deploy_{name}", help_, labels, registry=self.registry)

    def labelled(self, served: Served, job: Job, done: Done) -> None:
        """Count an image."""
        self._pixels.labels(served.name).inc(job.size[0] * job.size[1])
        for part, seconds in done.seconds.items():
            self._seconds[part].labels(served.name).observe(seconds)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What holds at the moment it is asked for."""

    def __init__(self, models: Models, room: Room) -> None:
        self._models, self._room = models, room

    def collect(self) -> Iterable[Metric]:
        room = self._room
        for name, help_, value in (
            ("pending_requests", "Requests that wait or are in work.", room.pending),
            ("waiting_requests", "Requests that no lane has taken.", room.waiting),
            ("queue_limit_requests", "Requests that may wait.", room.requests),
            ("held_bytes", "Bytes that requests hold: bodies, images, results.", room.held),
            ("held_limit_bytes", "Bytes that requests may hold.", room.bytes),
        ):
            yield GaugeMetricFamily(f"fcn_deploy_{name}", help_, value)
        info = GaugeMetricFamily("fcn_deploy_model_ready", "Whether a model runs.", labels=["model", "version"])
        for each in self._models.served.values():
            info.add_metric([each.name, each.version], float(each.ready))
        yield info
