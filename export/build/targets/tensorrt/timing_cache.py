"""A file of the timings that TensorRT takes of kernels while it builds, so that the next build need not."""

import hashlib
from pathlib import Path
from types import ModuleType

from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.files import replacing

CACHE_MAGIC = b"fcn-deploy timing cache 1\n"


class TimingCache:
    """A file of timings. Its header tells what it is of: TensorRT replaces what does not fit by nothing, silently."""

    def __init__(self, path: Path, owner: str) -> None:
        self.path, self.owner, self.foreign = path, owner, False

    def attach(self, trt: ModuleType, config) -> list[str]:
        """Give the timings to `config`; returns notes."""
        data, notes = self._read()
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, False):
            notes.append(f"{self.path} does not fit this TensorRT or GPU; its timings are ignored")
            config.set_timing_cache(config.create_timing_cache(b""), False)
        if trt.__name__ == "tensorrt_rtx":
            notes.append("TensorRT for RTX times nothing while it builds, so its timing cache stays empty")
        return notes

    def _read(self) -> tuple[bytes, list[str]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b"", []
        except OSError as error:
            return b"", [f"{self.path} cannot be read ({error.strerror}); built without its timings"]
        if CACHE_MAGIC.startswith(content):  # empty, or cut off early
            return b"", []
        if not content.startswith(CACHE_MAGIC):
            self.foreign = True
            return b"", [f"{self.path} is no timing cache of build-engine; it is ignored, and left as it is"]
        owner, _, rest = content[len(CACHE_MAGIC) :].partition(b"\n")
        if hashlib.sha256(rest[32:]).digest() != rest[:32]:
            return b"", [f"{self.path} is damaged; its timings are ignored, and it is written anew"]
        if owner.decode(errors="replace") != self.owner:
            found = owner.decode(errors="replace")
            return b"", [
                f"{self.path} is of {found}, not {self.owner}; its timings are ignored, and it is written anew"
            ]
        return rest[32:], []

    def save(self, config) -> list[str]:
        """Write the timings that the build has added; returns notes."""
        if self.foreign:
            return []
        cache = config.get_timing_cache()
        if cache is None:
            return [f"TensorRT gave no timings to keep; {self.path} is not written"]
        data = bytes(cache.serialize())
        try:
            with replacing(self.path) as temporary:
                header = CACHE_MAGIC + self.owner.encode() + b"\n"
                temporary.write_bytes(header + hashlib.sha256(data).digest() + data)
        except DeployError as error:
            # A build of an hour is worth more than its timings.
            return [f"the timings are not kept: {error}"]
        return []
