"""What is to be labelled and where its results go, settled before any work."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MisuseError
from ..images.regions import by_regions
from ..images.video import is_video

Record = dict[str, Any]  # of a file, see docs/reference/json.md


@dataclass(frozen=True)
class Job:
    """A file to label, and where its results and their picture go.

    Attributes:
        source: the file.
        results: kind → path: what the network gives, first; `probabilities` where they are wanted too.
        overlay: the picture.
        by_regions: read and written region by region.
    """

    source: Path
    results: Mapping[str, Path]
    overlay: Path | None
    by_regions: bool

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
        return {"record": "video" if is_video(self.source) else "image", "file": str(self.source)}

    @property
    def written(self) -> Record:
        """Where its results are, for its record."""
        paths: Record = {kind: str(path) for kind, path in self.results.items()}
        return paths | {"overlay": str(self.overlay) if self.overlay else None}


def jobs_for(sources: Sequence[Path], out: Path, kinds: Sequence[str], overlay: bool, keep: bool) -> list[Job]:
    """A job for each file, checked against each other and against what exists.

    Args:
        sources: images and videos.
        out: folder of the results.
        kinds: of results: what the network gives, and `probabilities` where they are wanted too.
        overlay: whether pictures are wanted.
        keep: refuse outputs that exist.

    Raises:
        MisuseError: outputs that would overwrite an input, each other or, with `keep`, what is there.
    """
    names = _output_names(sources)
    jobs = [_job(source, out / name, kinds, overlay) for source, name in zip(sources, names, strict=True)]
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


def _job(source: Path, name: Path, kinds: Sequence[str], overlay: bool) -> Job:
    first, picture = (".mkv", ".overlay.mp4") if is_video(source) else (".png", ".overlay.png")
    regions = by_regions(source)
    if regions or kinds[0] != "labels":
        first = ".tif"
    suffixes = (first, ".probabilities.tif")
    results = {kind: Path(f"{name}{suffix}") for kind, suffix in zip(kinds, suffixes, strict=False)}
    return Job(source, results, Path(f"{name}{picture}") if overlay else None, regions)
