"""What is to be labelled and where its results go, settled before any work."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MisuseError
from ..images.addresses import Address
from ..images.regions import by_regions
from ..images.video import is_video

Record = dict[str, Any]  # of a file, see docs/reference/json.md


@dataclass(frozen=True)
class Job:
    """A file to label, and where its results and their picture go.

    Attributes:
        source: the file; of an address, its name.
        results: kind → path: what the network gives, first; `probabilities` where they are wanted too.
        overlay: the picture.
        by_regions: read and written region by region.
        address: of a video that is no file.
        inputs: of the whole run, which no output may replace.
        replace: further outputs, which show while it is read, may replace what exists.
    """

    source: Path
    results: Mapping[str, Path]
    overlay: Path | None
    by_regions: bool
    address: Address | None = None
    inputs: frozenset[Path] = frozenset()
    replace: bool = False

    @property
    def is_video(self) -> bool:
        return self.address is not None or is_video(self.source)

    @property
    def targets(self) -> list[Path]:
        return [*self.results.values(), *([self.overlay] if self.overlay else [])]

    @property
    def done(self) -> bool:
        """Whether an earlier run has written all of it: a file appears under its name when it is complete."""
        return all(path.exists() for path in self.targets)

    @property
    def record(self) -> Record:
        """How its record begins."""
        return {"record": "video" if self.is_video else "image", "file": str(self.address or self.source)}

    @property
    def written(self) -> Record:
        """Where its results are, for its record."""
        paths: Record = {kind: str(path) for kind, path in self.results.items()}
        return paths | {"overlay": str(self.overlay) if self.overlay else None}


def jobs_for(
    sources: Sequence[Path | Address], out: Path, kinds: Sequence[str], overlay: bool, keep: bool
) -> list[Job]:
    """A job for each file, checked against each other and against what exists.

    Args:
        sources: images and videos, and addresses of videos.
        out: folder of the results.
        kinds: of results: what the network gives, and `probabilities` where they are wanted too.
        overlay: whether pictures are wanted.
        keep: refuse outputs that exist.

    Raises:
        MisuseError: outputs that would overwrite an input, each other or, with `keep`, what is there.
    """
    names = _output_names(sources)
    inputs = frozenset(source.resolve() for source in sources if isinstance(source, Path))
    jobs = [
        _job(source, out / name, kinds, overlay, inputs, not keep) for source, name in zip(sources, names, strict=True)
    ]
    for target, count in Counter(path for job in jobs for path in job.targets).items():
        if count > 1:
            raise MisuseError(f"{target} would be written for {count} of the images; give each its own -o")
        if target.resolve() in inputs:
            raise MisuseError(f"{target} is an input and would be replaced by its labels; choose another -o")
        if keep and target.exists():
            raise MisuseError(
                f"{target} exists already; choose another -o, or pass --force to replace it, or --resume to go on with "
                "the others"
            )
    return jobs


def _output_names(sources: Sequence[Path | Address]) -> list[str]:
    """A name for each file's labels, without suffix: its stem, or its whole name where stems repeat."""
    named = [(source.stem if isinstance(source, Path) else source.name, source.name) for source in sources]
    stems = Counter(stem for stem, _ in named)
    names = [stem if stems[stem] == 1 else name for stem, name in named]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise MisuseError(
            f"{repeated[0]} is the name of several images, whose labels would overwrite each other; "
            "run one folder at a time, or give each its own -o"
        )
    return names


def _job(
    source: Path | Address, name: Path, kinds: Sequence[str], overlay: bool, inputs: frozenset[Path], replace: bool
) -> Job:
    address = source if isinstance(source, Address) else None
    path = source if isinstance(source, Path) else Path(source.name)
    first, picture = (".mkv", ".overlay.mp4") if address or is_video(path) else (".png", ".overlay.png")
    regions = address is None and by_regions(path)
    if regions or kinds[0] != "labels":
        first = ".tif"
    suffixes = (first, ".probabilities.tif")
    results = {kind: Path(f"{name}{suffix}") for kind, suffix in zip(kinds, suffixes, strict=False)}
    return Job(path, results, Path(f"{name}{picture}") if overlay else None, regions, address, inputs, replace)
