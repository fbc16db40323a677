"""Files that lie elsewhere, behind any address that fsspec knows: found, fetched whole and put whole."""

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from ..errors import DeployError, MisuseError, one_line
from ..extras import need
from ..files import WriteError, replacing
from ..images.addresses import LIVE_SCHEMES, SUFFIXES
from ..images.find import IMAGE_SUFFIXES, find_placed

CALLS = 16  # that ask what is there, at once
PARALLEL = ("file", "memory")  # that threads may use at once, besides all that are asynchronous
TRIES = 3  # to fetch or put an object, at most, …
PATIENCE = 10.0  # … none begun later
CONNECTED, SILENT = 10.0, 15.0  # seconds that a connection may take, and that a store may be silent amid an answer
ALIASES = {name: group for group in (("s3", "s3a"), ("gs", "gcs")) for name in group}  # in fsspec's configuration
BLOCK = 4 << 20  # bytes of a range
# Archives and FTP have one place that they read at: of two threads one would silently get what is the other's.
_TURN = threading.Lock()
RESULT_SUFFIXES = (".png", ".tif", ".mkv")  # of what a network gives; put last, so that it tells that all is there


@dataclass(frozen=True)
class Object:
    """A file somewhere.

    Attributes:
        store: that it is in.
        path: in the store.
        name: of its results, without suffix: where it lies below the folder, prefix or pattern that named it.
        size: bytes, where the store tells.
    """

    store: "Store"
    path: str
    name: str
    size: int | None

    @property
    def suffix(self) -> str:
        return PurePosixPath(_plain(self.path)).suffix

    def __str__(self) -> str:
        return self.store.address(self.path)


class Store:
    """A folder, bucket or prefix at an address, by fsspec.

    Args:
        address: `s3://bucket/prefix`, `memory://x`, … or a path of this machine.

    Raises:
        MisuseError: an address that fsspec does not know.
        DeployError: a package of the extra `cloud` is missing, or the address cannot be reached.
    """

    def __init__(self, address: str) -> None:
        self.local = not is_address(address)
        fsspec = need("fsspec", "cloud")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
        with reaching(address):
            if self.local:
                self.fs, path = fsspec.core.url_to_fs(str(Path(address).absolute()))
            else:
                self.fs, path = fsspec.core.url_to_fs(address, **_limits(address))
                _try_little(self.fs)
        self.root = path.rstrip("/")
        self._around = None if self.local else _around(address, self.fs, self.root)
        # Whether threads may use it at once, and read parts of its files.
        names = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        self.parallel = _is_asynchronous(self.fs) or any(name in names for name in PARALLEL)
        self._turn: AbstractContextManager[Any] = nullcontext() if self.parallel else _TURN

    def address(self, path: str) -> str:
        """As a user writes it."""
        if self._around is not None:
            return path.join(self._around)
        return path if self.local else str(self.fs.unstrip_protocol(path))

    def join(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self) -> set[str]:
        """Of all files below the folder, relative to it. Raises DeployError."""
        with reaching(self.address(self.root)):
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.root)
            except FileNotFoundError:
                return set()
        return {_below(path, self.root) for path in found}

    def present(self, names: Sequence[str]) -> set[str]:
        """Which results, of names without suffix, are there. Raises DeployError."""
        found = [name + suffix for name in names for suffix in RESULT_SUFFIXES]
        with reaching(self.address(self.root)), ThreadPoolExecutor(CALLS if self.parallel else 1) as pool:
            self.fs.invalidate_cache()
            there = pool.map(self.fs.exists, map(self.join, found))
            return {name for name, exists in zip(found, there, strict=True) if exists}

    def fetch(self, item: Object, target: Path) -> None:
        """Copy an object to a file of this machine. Raises DeployError where it does not come whole."""
        with reaching(str(item)), self._turn:
            _tried(lambda: self.fs.get_file(item.path, str(target)))
        came = target.stat().st_size
        if item.size is not None and came != item.size:
            raise DeployError(f"{item} came as {came} of its {item.size} bytes; run again with --resume")

    def put(self, file: Path, name: str) -> None:
        """Put a file of this machine under a name below the folder: whole, or not at all. Raises WriteError."""
        path = self.join(name)
        if self.local:
            with replacing(path) as temporary:
                temporary.write_bytes(file.read_bytes())
            return
        try:
            with reaching(self.address(path), "written"), self._turn:
                self._put(file, path)
        except DeployError as error:
            raise WriteError(f"{error}; what is written is whole, and --resume goes on") from error

    def put_bytes(self, content: bytes, name: str) -> None:
        """Put bytes under a name below the folder: whole, or not at all. Raises WriteError."""
        with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
            file = Path(folder, "content")
            file.write_bytes(content)
            self.put(file, name)

    def listed(self) -> set[str]:
        """Names of what lies in the folder itself. Raises DeployError."""
        with reaching(self.address(self.root)):
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.root, detail=False)
            except FileNotFoundError:
                return set()
        return {PurePosixPath(path).name for path in found}

    def _put(self, file: Path, path: str) -> None:
        # Object stores publish what is put when all of it is there. Others have folders and show what is half-written.
        at_once = _is_asynchronous(self.fs) or "memory" in self.fs.protocol

        def put() -> None:
            if at_once:
                self.fs.put_file(str(file), path)
            else:
                parent, _, last = path.rpartition("/")
                partial = f"{parent}/.{last}.partial"
                self.fs.makedirs(parent, exist_ok=True)
                try:
                    self.fs.put_file(str(file), partial)
                    self.fs.mv(partial, path)
                except BaseException:
                    with suppress(Exception):  # it may not have begun
                        self.fs.rm_file(partial)
                    raise

        _tried(put)


def _is_asynchronous(fs: Any) -> bool:
    from fsspec.asyn import AsyncFileSystem

    return isinstance(fs, AsyncFileSystem)


def _below(path: str, root: str) -> str:
    """Where a file is, from a folder on. In archives the outermost folder is empty, and names have no slash before."""
    return path[len(root) :].removeprefix("/")


def _around(address: str, fs: Any, root: str) -> tuple[str, str] | None:
    """What stands before and behind a path in an address of which fsspec itself keeps the path alone: archives in a
    file (`zip://…::s3://…`), hosts (`sftp://host/…`), repositories; None: there is nothing else."""
    links = address.split("::")
    place = next(place for place, link in enumerate(links) if "://" in link)
    given = links[place].rstrip("/") if root else links[place]
    if not given.endswith(root) or (len(links) == 1 and not fs._get_kwargs_from_urls(address)):
        return None
    before = "".join(f"{link}::" for link in links[:place]) + given[: len(given) - len(root)]
    return before, "".join(f"::{link}" for link in links[place + 1 :])


def _limits(address: str) -> dict[str, Any]:
    """Options for fsspec, unless its configuration has them: none waits for ever, and trying again is ours.

    By their own, gcsfs and s3fs would try for minutes to get an answer that breaks off, and most of them wait for five
    on one that stops half-way.
    """
    from fsspec.config import conf

    first, *behind = address.split("::")
    if behind:  # of a chain (`zip://…::s3://…`) each link has its own, by its scheme
        of_links = {link.partition("://")[0]: _limits(link) for link in behind if "://" in link}
        return _limits(first) | {scheme: options for scheme, options in of_links.items() if options}
    scheme = address.partition("://")[0].lower()
    limits: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        # s3fs tries again on what botocore gives up.
        limits["config_kwargs"] = {"connect_timeout": CONNECTED, "read_timeout": SILENT, "retries": {"max_attempts": 0}}
    elif scheme in ("gs", "gcs", "http", "https"):
        aiohttp = need("aiohttp", "cloud")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECTED, sock_read=SILENT)
        limits = {"client_kwargs": {"timeout": timeout}}
        if scheme in ("gs", "gcs"):
            limits = {"requests_timeout": timeout}
            # Of each bucket gcsfs would ask by gRPC what it is, which no emulator answers, and try again as often as by
            # its own. Buckets of one zone need it: it is kept where it is set.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    known = set().union(*(conf.get(name, ()) for name in ALIASES.get(scheme, (scheme,))))
    return {name: value for name, value in limits.items() if name not in known}


def _try_little(fs: Any) -> None:
    """Have a store's library try again once where it would five times, with longer and longer pauses."""
    if "s3" in fs.protocol:
        fs.retries = min(fs.retries, 2)
    if "gs" in fs.protocol:
        from gcsfs.retry import retry_request

        # The last of them calls the others, and so multiplies their tries.
        for name, tries in (("_request", 2), ("_get_file_request", 2), ("_get_file_concurrent", 1)):
            once = getattr(getattr(type(fs), name, None), "__wrapped__", None)
            if once is not None:
                setattr(fs, name, retry_request(retries=tries)(once).__get__(fs))


def _tried(work: Callable[[], None]) -> None:
    """Do it, and again where it may do better. Raises what the last try raises."""
    last_begins = time.monotonic() + PATIENCE
    for attempt in range(TRIES):
        try:
            work()
            return
        except Exception as error:
            if attempt == TRIES - 1 or _is_final(error) or time.monotonic() > last_begins:
                raise
            time.sleep(0.2 * 4**attempt)


def parted(address: str) -> tuple[Store, str]:
    """The folder of a file, at an address or of this machine, and the file's name in it."""
    if not is_address(address):
        return Store(str(Path(address).parent)), Path(address).name
    folder, _, name = address.rpartition("/")
    return Store(folder), name


@contextmanager
def replacing_at(place: str | Path) -> Iterator[Path]:
    """`replacing`, of a file at an address too: it is written here, and put whole when the block ends well."""
    if not is_address(str(place)):
        with replacing(place) as temporary:
            yield temporary
        return
    store, name = parted(str(place))
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
        with replacing(Path(folder, name)) as temporary:
            yield temporary
        store.put(Path(folder, name), name)


def is_address(given: str) -> bool:
    """Whether a word names files elsewhere: `s3://…`, `memory://…`, and what looks like an image at `https://…`."""
    scheme, found, rest = given.partition("://")
    if not found or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.:*-]*", scheme) or scheme.lower() in LIVE_SCHEMES:
        return False
    # What else is at http:// is a video that is read as it comes.
    suffix = PurePosixPath(rest.partition("?")[0]).suffix.lower()
    return scheme.lower() not in ("http", "https") or suffix in IMAGE_SUFFIXES


@contextmanager
def reaching(address: str, done: str = "read") -> Iterator[None]:
    """What goes wrong with an address in the block is raised as one line."""
    try:
        yield
    except DeployError:
        raise
    except FileNotFoundError as error:
        if done == "written":
            raise DeployError(f"{address} cannot be written: there is no such bucket or folder; make it") from error
        raise MisuseError(f"{address} does not exist; name an object, a prefix or a pattern") from error
    except ImportError as error:
        said = one_line(error, 120)
        raise DeployError(f"{address}: {said}; run: pip install 'fcn-deploy[cloud]'") from error
    except Exception as error:
        said = f"no answer within {SILENT:.0f} seconds" if _is_late(error) else one_line(error, 160)
        if isinstance(error, ValueError) and "Protocol not known" in said:
            raise MisuseError(
                f"{address} is of a kind that fsspec does not know; take s3://, gs://, https://"
            ) from error
        remedy = (
            "give credentials, as its own tools take them, that allow it"
            if _untrusted(error)
            else "check it and run again"
        )
        raise DeployError(f"{address} cannot be {done}: {said}; {remedy}") from error


def _is_late(error: Exception) -> bool:
    """Whether it is a time that was over, of which libraries say nothing else."""
    return isinstance(error, TimeoutError) or type(error).__name__ in ("FSTimeoutError", "ReadTimeoutError")


_UNTRUSTED = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError")


def _untrusted(error: Exception) -> bool:
    """Whether credentials are missing, or do not allow it."""
    if isinstance(error, PermissionError) or type(error).__name__ in _UNTRUSTED or str(error).startswith("Forbidden:"):
        return True  # the last is gcsfs's OSError of a status 403
    # gcsfs and aiohttp have other statuses of HTTP, the one sometimes as text.
    return str(getattr(error, "code", None) or getattr(error, "status", None)) in ("401", "403")


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    return isinstance(error, FileNotFoundError | ImportError) or _untrusted(error)


def find_objects(words: Sequence[str]) -> list[Object]:
    """Images and videos for a user's words, in order of names.

    Args:
        words: addresses of files, of folders or prefixes (not descended into), and patterns (`**` descends); images,
            folders and patterns of this machine.

    Raises:
        MisuseError: a word that names nothing; files whose results would have one name.
        DeployError: an address that cannot be reached.
    """
    found: dict[str, Object] = {}
    for word in words:
        for item in _behind(word) if is_address(word) else _here(word):
            found.setdefault(str(item), item)
    items = list(found.values())
    stems = Counter(item.name for item in items)
    repeated = {name for name, count in stems.items() if count > 1}
    named = [_whole(item) if item.name in repeated else item for item in items]
    again = [name for name, count in Counter(item.name for item in named).items() if count > 1]
    if again:
        raise MisuseError(f"{again[0]} is the name of several images, whose results would overwrite each other")
    return named


def _whole(item: Object) -> Object:
    return Object(item.store, item.path, item.name + item.suffix, item.size)


def _here(word: str) -> list[Object]:
    store = Store(".")
    return [
        Object(store, str(path.absolute()), str(folder / path.stem), path.stat().st_size)
        for path, folder in find_placed([word], SUFFIXES).items()
    ]


def _behind(word: str) -> list[Object]:
    store = Store(word)
    fs, path = store.fs, store.root
    with reaching(word):
        fs.invalidate_cache()
        magic = None if _is_http(path) else re.search(r"[*?\[]", path)
        if magic:
            root = path[: magic.start()].rpartition("/")[0]
            details: dict[str, Any] = fs.glob(path, detail=True)
        else:
            about = fs.info(path)
            single = about["type"] == "file"
            root = path.rpartition("/")[0] if single else path
            listed = [about] if single else fs.ls(path, detail=True)
            details = {each["name"]: each for each in listed}
    files = [name for name, about in details.items() if about["type"] == "file"]
    if magic or len(files) != 1 or files[0] != path:
        files = [name for name in files if PurePosixPath(_plain(name)).suffix.lower() in SUFFIXES]
    if not files:
        raise MisuseError(f"{word} holds no images; name an object, a prefix or a pattern with some")
    return [
        Object(store, name, _result_name(_below(_plain(name), root), word), details[name].get("size"))
        for name in sorted(files)
    ]


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _plain(path: str) -> str:
    """A path without what a web address has beside it."""
    return unquote(re.split(r"[?#]", path)[0]) if _is_http(path) else path


def _result_name(name: str, word: str) -> str:
    """Of an object's results, without suffix. Raises MisuseError where it would lead out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise MisuseError(f"{word} has an object called {name!r}, whose results would lie outside -o; rename it")
    return str(path.with_suffix(""))


def share_of(names: Sequence[str], shard: tuple[int, int] | None) -> list[int]:
    """Which of the files are of a shard (i of n, from 1): by their names, so that other files do not matter."""
    if shard is None:
        return list(range(len(names)))
    return [place for place, name in enumerate(names) if _number(name) % shard[1] == shard[0] - 1]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`. Raises MisuseError."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise MisuseError(f"--shard {text!r}; write i/n, from 1/n to n/n, such as 3/16")
    return int(match[1]), int(match[2])
