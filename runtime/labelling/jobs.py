"""What is to be labelled and where its results go, settled before any work."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MisuseError
from ..images.regions import by_regions
from ..images.video import is_video
from .products import SCREEN

Record = dict[str, Any]  # of a file, see docs/reference/json.md


@dataclass(frozen=True)
class Wanted:
    """What is written of each file.

    Attributes:
        kinds: of results: what the network gives, and `probabilities` where they are wanted too.
        overlay: a picture.
        side: of it, in pixels, at most.
        cog: TIFFs, Cloud-Optimized, whatever the file is.
        names: the class names, beside label TIFFs.
        instances: numbered objects, and their table.
    """

    kinds: Sequence[str]
    overlay: bool = False
    side: int = SCREEN
    cog: bool = False
    names: bool = False
    instances: bool = False


@dataclass(frozen=True)
class Job:
    """A file to label, and where its results and their picture go.

    Attributes:
        source: the file.
        results: kind → path: what the network gives, first; `probabilities` where they are wanted too.
        overlay: the picture.
        by_regions: read and written region by region.
        cog: TIFFs are Cloud-Optimized GeoTIFFs.
        side: of the picture, in pixels, at most.
        beside: what is written beside them: class names, instances and their table.
    """

    source: Path
    results: Mapping[str, Path]
    overlay: Path | None
    by_regions: bool
    cog: bool = False
    side: int = SCREEN
    beside: Mapping[str, Path] = field(default_factory=dict)

    @property
    def targets(self) -> list[Path]:
        return [*self.results.values(), *self.beside.values(), *([self.overlay] if self.overlay else [])]

    @property
    def done(self) -> bool:
        """Whether an earlier run has written all that the network gives: a file appears under its name when it is
        complete. What is beside it is made of it."""
        return all(path.exists() for path in (*self.results.values(), *([self.overlay] if self.overlay else [])))

    @property
    def record(self) -> Record:
        """How its record begins."""
        return {"record": "video" if is_video(self.source) else "image", "file": str(self.source)}

    @property
    def written(self) -> Record:
        """Where its results are, for its record."""
        paths: Record = {kind: str(path) for kind, path in self.results.items()}
        return paths | {"overlay": str(self.overlay) if self.overlay else None}


def jobs_for(sources: Sequence[Path], out: Path, wanted: Wanted, keep: bool) -> list[Job]:
    """A job for each file, checked against each other and against what exists.

    Args:
        sources: images and videos.
        out: folder of the results.
        wanted: what is written of each.
        keep: refuse outputs that exist.

    Raises:
        MisuseError: outputs that would overwrite an input, each other or, with `keep`, what is there.
    """
    names = _output_names(sources)
    jobs = [_job(source, out / name, wanted) for source, name in zip(sources, names, strict=True)]
    inputs = {source.resolve() for source in sources}
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


def _output_names(sources: Sequence[Path]) -> list[str]:
    """A name for each file's labels, without suffix: its stem, or its whole name where stems repeat."""
    stems = Counter(source.stem for source in sources)
    names = [source.stem if stems[source.stem] == 1 else source.name for source in sources]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise MisuseError(
            f"{repeated[0]} is the name of several images, whose labels would overwrite each other; "
            "run one folder at a time, or give each its own -o"
        )
    return names


def _job(source: Path, name: Path, wanted: Wanted) -> Job:
    video, kinds = is_video(source), wanted.kinds
    first, picture = (".mkv", ".overlay.mp4") if video else (".png", ".overlay.png")
    regions = not video and (wanted.cog or by_regions(source))
    if regions or kinds[0] != "labels":
        first = ".tif"
    suffixes = (first, ".probabilities.tif")
    results = {kind: Path(f"{name}{suffix}") for kind, suffix in zip(kinds, suffixes, strict=False)}
    beside = {}
    if regions and wanted.names and kinds[0] == "labels":
        beside["names"] = Path(f"{name}.tif.aux.xml")
    if wanted.instances:
        beside |= {"instances": Path(f"{name}.instances.tif"), "instances_table": Path(f"{name}.instances.csv")}
    overlay = Path(f"{name}{picture}") if wanted.overlay else None
    return Job(source, results, overlay, regions, wanted.cog, wanted.side, beside)
