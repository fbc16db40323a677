"""The engine file: written atomically, verified when it is read.

An engine is one uncompressed zip. Its first member, `manifest.json`, names every other member with its
length and SHA-256, and the zip's comment holds the manifest's own, so a damaged, truncated or edited file is
noticed when it is opened. Checksums are not authenticity: open engines from people you trust only.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import DeployError, MisuseError
from ..files import replacing
from .manifest import REMEDY, Manifest

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest is a few kB, so a larger one is not ours


def write_engine(path: str | os.PathLike[str], manifest: Manifest, members: Mapping[str, bytes]) -> Manifest:
    """Write an engine atomically and return its manifest with the members' checksums filled in.

    Args:
        path: replaced as one step; what was there stays whole if writing fails.
        manifest: its `members` are computed here.
        members: name → content of the stages, golden sample and report.
    """
    digests = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in members.items()
    }
    manifest = replace(manifest, members=digests)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        text = manifest.to_json().encode()
        archive.comment = hashlib.sha256(text).hexdigest().encode()
        for name, content in {MANIFEST: text, **members}.items():
            # A fixed date: the same build gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return manifest


class EngineFile:
    """An engine opened for reading. Every member is checked against the manifest when it is read.

    Raises:
        DeployError: no such file, not an engine, truncated, edited, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
            if magic != b"PK\x03\x04":
                raise DeployError(f"{path} is not an engine (it does not start as one); {REMEDY}")
            self._archive = zipfile.ZipFile(self.path)
        except FileNotFoundError as error:
            raise MisuseError(f"{path} does not exist; check the path, or {REMEDY}") from error
        except OSError as error:
            raise DeployError(f"cannot read {path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # of a version, or names, that are none
            raise DeployError(f"{path} is truncated or damaged ({error}); copy it again or {REMEDY}") from error
        try:
            text = self._read(MANIFEST, MANIFEST_LIMIT)
            self.manifest = Manifest.from_json(text, str(path))
            if self._archive.comment != hashlib.sha256(text).hexdigest().encode():
                raise DeployError(f"{path} is damaged or was edited: its manifest fails its checksum; {REMEDY}")
            for stage in self.manifest.all_stages:
                if stage.file not in self.manifest.members:
                    raise DeployError(f"{path}: the manifest does not list its stage {stage.file}; {REMEDY}")
        except BaseException:
            self.close()
            raise

    def _read(self, name: str, limit: int) -> bytes:
        try:
            info = self._archive.getinfo(name)
            # Stored as is, so a small file cannot unpack into a large one.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                raise DeployError(f"{self.path}: member {name} is packed or too long for an engine; {REMEDY}")
            return self._archive.read(name)
        except KeyError as error:
            raise DeployError(f"{self.path} is not an engine (it has no {name}); {REMEDY}") from error
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise DeployError(
                f"{self.path} is damaged at member {name} ({error}); copy it again or {REMEDY}"
            ) from error

    def read(self, name: str) -> bytes:
        """The content of a member named in the manifest, after its length and SHA-256 were checked."""
        if name not in self.manifest.members:
            raise DeployError(f"{self.path} has no member {name}; {REMEDY}")
        entry = self.manifest.members[name]
        content = self._read(name, entry["bytes"])
        if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DeployError(
                f"{self.path} is damaged or was edited: member {name} does not match its checksum; "
                f"copy it again or {REMEDY}"
            )
        return content

    def verify(self, *wanted: str) -> dict[str, bytes]:
        """Check every member, and give the content of those that are wanted.

        Raises DeployError at the first that differs from the manifest.
        """
        found: dict[str, bytes] = {}
        for name in self.manifest.members:
            content = self.read(name)
            if name in wanted:
                found[name] = content
        return found

    def close(self) -> None:
        self._archive.close()

    def __enter__(self) -> "EngineFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
