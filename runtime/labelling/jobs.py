"""What is to be labelled and where its results go, settled before any work."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DeployError, MisuseError
from ..images.addresses import Address
from ..images.header import read_header
from ..images.regions import by_regions
from ..images.video import is_video
from .products import SCREEN, Products

Record = dict[str, Any]  # of a file, see docs/reference/json.md
Source = Path | Address  # an image or video, or the address of one
NOTHING = Products()


@dataclass(frozen=True)
class Wanted:
    """What is written of each file.

    Attributes:
        kinds: of results: what the network gives, and `probabilities` where they are wanted too.
        overlay: a picture.
        products: how, and what besides.
        names: the class names, beside label TIFFs.
        page: of files of several images, or `all` of them; None: the first.
    """

    kinds: Sequence[str]
    overlay: bool = False
    products: Products = NOTHING
    names: bool = False
    page: int | str | None = None


@dataclass(frozen=True)
class Job:
    """A file to label, and where its results and their picture go.

    Attributes:
        source: the file; of an address, its name.
        results: kind → path: what the network gives, first; `probabilities` where they are wanted too.
        overlay: the picture.
        by_regions: read and written region by region.
        cog: TIFFs are Cloud-Optimized GeoTIFFs.
        side: of the picture, in pixels, at most.
        beside: what is written beside them: class names, instances and their table.
        page: of a file of several images; None: the first.
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
    cog: bool = False
    side: int = SCREEN
    beside: Mapping[str, Path] = field(default_factory=dict)
    page: int | None = None

    @property
    def is_video(self) -> bool:
        return self.address is not None or is_video(self.source)

    @property
    def image(self) -> str:
        """What tables and polygons call it."""
        return str(self.source) if self.page is None else f"{self.source} page {self.page}"

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
        page: Record = {} if self.page is None else {"page": self.page}
        return {"record": "video" if self.is_video else "image", "file": str(self.address or self.source)} | page

    @property
    def written(self) -> Record:
        """Where its results are, for its record."""
        paths: Record = {kind: str(path) for kind, path in self.results.items()}
        return paths | {"overlay": str(self.overlay) if self.overlay else None}


def jobs_for(sources: Mapping[Source, Path], out: Path, wanted: Wanted, keep: bool) -> list[Job]:
    """A job for each file, checked against each other and against what exists.

    Args:
        sources: what is labelled, and what its results are called, as of `names_of`.
        out: folder of the results.
        wanted: what is written of each.
        keep: refuse outputs that exist.

    Raises:
        MisuseError: outputs that would overwrite an input, each other or, with `keep`, what is there.
    """
    inputs = frozenset(source.resolve() for source in sources if isinstance(source, Path))
    jobs = [
        _job(source, out / f"{name}{suffix}", wanted, inputs, not keep, page)
        for source, name in sources.items()
        for page, suffix in _pages(source, wanted.page)
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


def names_of(sources: Sequence[tuple[Source, Path]]) -> dict[Source, Path]:
    """What each file's results are called, below -o and without suffix.

    It is the file's stem, or its whole name where stems of a folder repeat.

    Args:
        sources: what is labelled, and the folder of its results, below -o: as of `find_placed`.

    Raises:
        MisuseError: two that would have one name.
    """
    named = [
        (folder / (source.stem if isinstance(source, Path) else source.name), folder / source.name)
        for source, folder in sources
    ]
    stems = Counter(stem for stem, _ in named)
    names = [stem if stems[stem] == 1 else name for stem, name in named]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise MisuseError(
            f"{repeated[0]} is the name of several images, whose labels would overwrite each other; name the folder "
            "above theirs as 'FOLDER/**', which keeps its folders, or give each its own -o"
        )
    return {source: name for (source, _), name in zip(sources, names, strict=True)}


def _pages(source: Path | Address, page: int | str | None) -> list[tuple[int | None, str]]:
    """The pages of a source that are labelled, and what their results' names have for them."""
    if isinstance(page, int) or page is None:
        return [(page, "")]
    try:
        header = None if isinstance(source, Address) else read_header(source, sys.maxsize)
    except DeployError:
        header = None  # whoever reads the file says what is wrong
    if header is None or len(header.own) == 1:
        return [(None, "")]
    return [(number, f".page{number:0{len(str(header.pages - 1))}d}") for number in header.own]


def _job(
    source: Path | Address, name: Path, wanted: Wanted, inputs: frozenset[Path], replace: bool, page: int | None
) -> Job:
    address, kinds = source if isinstance(source, Address) else None, wanted.kinds
    path = source if isinstance(source, Path) else Path(source.name)
    video = address is not None or is_video(path)
    first, picture = (".mkv", ".overlay.mp4") if video else (".png", ".overlay.png")
    regions = not video and (wanted.products.cog or by_regions(path))
    if regions or kinds[0] != "labels":
        first = ".tif"
    suffixes = (first, ".probabilities.tif")
    results = {kind: Path(f"{name}{suffix}") for kind, suffix in zip(kinds, suffixes, strict=False)}
    beside = {}
    if regions and wanted.names and kinds[0] == "labels":
        beside["names"] = Path(f"{name}.tif.aux.xml")
    if wanted.products.instances:
        beside |= {"instances": Path(f"{name}.instances.tif"), "instances_table": Path(f"{name}.instances.csv")}
    overlay = Path(f"{name}{picture}") if wanted.overlay else None
    return Job(
        path,
        results,
        overlay,
        regions,
        address,
        inputs,
        replace,
        cog=wanted.products.cog,
        side=wanted.products.overlay_side,
        beside=beside,
        page=page,
    )
