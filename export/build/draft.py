"""An engine before it is written: what it says of itself, and its members."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fcn_deploy.runtime.engine_format.engine_file import write_engine
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.network import Network


@dataclass(frozen=True)
class Draft:
    """An engine that is not written yet.

    Attributes:
        manifest: what it says of itself.
        members: the other members of the engine file, name → content.
    """

    manifest: Manifest
    members: Mapping[str, bytes]

    @contextmanager
    def opened(self, threads: int | None = None) -> Iterator[Network]:
        """The engine as a user opens it, from a file that is deleted afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "draft.engine"
            write_engine(path, self.manifest, self.members)
            with Network(path, threads=threads) as net:
                yield net

    @property
    def core_bytes(self) -> int:
        """Of all stages."""
        return sum(len(content) for name, content in self.members.items() if name.startswith("stage-"))
