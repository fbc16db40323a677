"""The networks that are served, by name and version; opened, warmed up, looked after, and replaced while they run."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError, one_line
from ..network import Network
from ..process_memory import available_memory, give_back_freed, resident
from ..stream import Stream

log = logging.getLogger(__name__)

VERSION_DIGITS = 12  # of the digest: what a version is called
OWN_CHECK = (64, 64)  # (height, width) that a network is tried at where --warmup names none
CHECK_SECONDS = 1.0  # between two tries of a network that has failed
FREE_SHARE = 0.8  # of the memory that is free at the start, for a server that is told of none
QUEUE_SHARE = 1 / 4  # of the server's memory, for what requests hold


class UnknownModelError(MisuseError):
    """No network of this name and version is served."""


@dataclass
class Served:
    """A network that is served.

    Attributes:
        name: the file's stem.
        version: the beginning of the file's SHA-256.
        network: opened.
        stream: that runs it.
        ready: whether it has been warmed up, and its last run was not the network's own failure.
    """

    name: str
    version: str
    network: Network
    stream: Stream
    ready: bool = False
    _users: int = 0
    _retired: bool = False
    _checked: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def card(self) -> ModelCard:
        return self.network.card

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The results that can be asked for: `labels`, and of further heads `depth/values`."""
        heads = self.network.heads
        found = []
        for prefix in ("", *(f"{name}/" for name in heads.names if name != heads.chosen)):
            for kind in ("labels", "probabilities", "masks", "values", "refined", "scores"):
                try:
                    self.network.check_outputs(prefix + kind)
                except MisuseError:
                    continue
                found.append(prefix + kind)
        return tuple(found)

    def card_of(self, kind: str) -> ModelCard:
        """Of the head that a result of one of `kinds` is of."""
        return self.network.heads.view(kind).card

    def take(self) -> bool:
        """Count a user more; False where it has been replaced, and may be closed already."""
        with self._lock:
            if self._retired:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Count a user less. The last one of a network that was replaced closes it."""
        with self._lock:
            self._users -= 1
            last = self._retired and not self._users
        if last:
            self.network.close()

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        with self._lock:
            self._retired = True
            unused = not self._users
        if unused:
            self.network.close()

    @property
    def _own_check(self) -> tuple[int, int]:
        """(height, width) that it is tried at where nobody says; one of a profile, of an engine that has them."""
        manifest = self.network.manifest
        return OWN_CHECK if manifest is None or manifest.gpu is None else manifest.gpu.profiles[0].opt

    def warm_up(self, sizes: Sequence[tuple[int, int]], wanted: Callable[[], bool] = lambda: True) -> None:
        """Run it once at each (height, width), after which it is ready; not to the end where that is not `wanted`.

        Raises what a run raises.
        """
        for size in sizes or [self._own_check]:
            if not wanted():
                return
            image = np.zeros((*size, self.card.channels), self.card.dtype)
            (done,) = self.stream.label([image])
            if isinstance(done.outcome, Exception):
                raise done.outcome
        self.ready = True

    def check(self, sizes: Sequence[tuple[int, int]] = ()) -> bool:
        """Whether it runs: after a failure it is tried on an image of zeros, once a second at most."""
        with self._lock:
            if time.monotonic() - self._checked < CHECK_SECONDS:
                return self.ready
            self._checked = time.monotonic()
        try:
            self.warm_up(sizes[:1])
        except Exception as error:
            self.ready = False
            log.error("%s does not run: %s", self.name, one_line(error, 300))
        return self.ready


@dataclass(frozen=True)
class Memory:
    """How a server's memory is shared out.

    Attributes:
        total: bytes, of the whole process.
        queue: that requests may hold: bodies, images, results.
    """

    total: int
    queue: int

    @classmethod
    def of(cls, total: int | None, queue: int | None) -> "Memory":
        """As it was told; None: most of what is free, and a quarter of it."""
        total = total or int(FREE_SHARE * available_memory())
        return cls(total, queue or int(total * QUEUE_SHARE))

    def share(self, models: int) -> int:
        """Bytes for the runs of each of so many networks, which are opened already.

        Raises MisuseError where nothing is left for them.
        """
        taken = resident() or 0  # not told: counts as nothing
        share = (self.total - self.queue - taken) // models
        if share < 1_000_000:
            raise MisuseError(
                f"--memory {self.total / 1e9:.2f} GB: the server itself takes {taken / 1e9:.2f} GB and requests may "
                f"hold {self.queue / 1e9:.2f} GB, which leaves nothing for networks; raise it"
            )
        return share


class Models:
    """All that is served.

    Args:
        paths: of engines (or plain ONNX models); a file's stem is its name.
        opened: opens one.
        warmup: (height, width) that each is run at before it is ready.
        memory: of the server.

    Raises:
        MisuseError: two of one name, a file that does not exist, or too little memory.
        DeployError: a file that is damaged, or for another device.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        opened: Callable[[Path], Network],
        warmup: Sequence[tuple[int, int]],
        memory: Memory,
    ) -> None:
        self._paths: dict[str, Path] = {}
        for path in paths:
            if self._paths.setdefault(path.stem, path) is not path:
                raise MisuseError(
                    f"{self._paths[path.stem]} and {path} are both called {path.stem}; rename one of them"
                )
        self._open, self._warmup, self._memory = opened, tuple(warmup), memory
        self._reloading = threading.Lock()
        networks = {name: _opened(path, opened) for name, path in self._paths.items()}
        self._share = memory.share(len(networks))
        self._served: dict[str, Served] = {
            name: self._serving(name, version, network) for name, (version, network) in networks.items()
        }

    def _serving(self, name: str, version: str, network: Network) -> Served:
        network.memory = self._share
        return Served(name, version, network, Stream(network, (network.kind,)))

    @property
    def served(self) -> Mapping[str, Served]:
        """By name."""
        return self._served

    @property
    def ready(self) -> bool:
        """Whether all of them are."""
        return all(each.ready for each in self._served.values())

    def warm_up(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Run each at the sizes of the warm-up, while that is `wanted`. Raises DeployError."""
        for each in self._served.values():
            each.warm_up(self._warmup, wanted)

    def rest(self) -> None:
        """Give back to the system what the networks keep for the next image, and what the process has freed."""
        for each in self._served.values():
            if each.take():  # it may be replaced meanwhile
                try:
                    each.network.rest()
                except Exception as error:
                    log.error("%s keeps its memory: %s", each.name, one_line(error, 300))
                finally:
                    each.release()
        give_back_freed()

    def check(self) -> None:
        """Try again what has failed."""
        for each in self._served.values():
            if not each.ready:
                each.check(self._warmup)

    def get(self, name: str, version: str = "") -> Served:
        """The network of a name, and of a version where one is given. Raises UnknownModelError."""
        names = ", ".join(self._served)
        if not name and len(self._served) > 1:
            raise UnknownModelError(f"several models are served; name one of {names}")
        found = self._served.get(name or next(iter(self._served)))
        if found is None:
            raise UnknownModelError(f"no model {shown(name)} is served; choose {names}")
        if version and version != found.version:
            raise UnknownModelError(
                f"{found.name} is served in version {found.version}, not {shown(version)}; ask for that, or omit it"
            )
        return found

    @contextmanager
    def using(self, name: str, version: str = "") -> Iterator[Served]:
        """`get`, for a while in which it is not closed."""
        while not (found := self.get(name, version)).take():
            continue  # replaced between the two
        try:
            yield found
        finally:
            found.release()

    def reload(self) -> list[str]:
        """Open the files that have changed, warm them up, and serve them in place of what was; what was done, in lines.

        A file that cannot be opened or run leaves its name to the network that was served before. One at a time: of two
        at once, the one that ends last would put back what it had opened before the other.
        """
        with self._reloading:
            return self._reload()

    def _reload(self) -> list[str]:
        """`reload`, by the one thread that does it."""
        said = []
        for name, path in self._paths.items():
            old = self._served[name]
            try:
                if _digest(path) == old.version:
                    said.append(f"{name} is unchanged")
                    continue
                version, network = _opened(path, self._open)
                new = self._serving(name, version, network)
                try:
                    new.warm_up(self._warmup)
                except Exception:
                    network.close()
                    raise
            except Exception as error:
                log.error("%s stays at version %s: %s", name, old.version, one_line(error, 300))
                said.append(f"{name} stays at version {old.version}")
                continue
            self._served[name] = new
            old.retire()
            said.append(f"{name} is version {version} now")
        return said

    def close(self) -> None:
        """Close them all."""
        for each in self._served.values():
            each.retire()


def _opened(path: Path, opened: Callable[[Path], Network]) -> tuple[str, Network]:
    """A file's version, and its network: of one file, even where it is replaced meanwhile."""
    while True:
        before = _digest(path)
        network = opened(path)
        if _digest(path) == before:
            return before, network
        network.close()


def _digest(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, and a device read for ever
            raise IsADirectoryError
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:VERSION_DIGITS]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MisuseError(f"{path} does not exist or is not a file; name an .engine or an .onnx") from error
    except OSError as error:
        raise DeployError(f"cannot read {path}: {error.strerror or error}") from error


def shown(name: str) -> str:
    """A name that a client gave, for an error: short, on one line."""
    return repr(name if len(name) <= 40 else f"{name[:40]}…")
