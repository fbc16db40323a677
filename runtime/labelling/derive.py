"""Polygons, statistics and instances of label files, made once these are written.

All of it is made of the files, so that a run that goes on where another stopped has that of all images.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing

from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError
from ..extras import need
from ..files import WriteError
from ..images.results import open_result
from ..images.write import no_data_tag, write_maps
from ..stream import said
from .gathered import Gathered, check_gathered, gathering
from .ground import ground_of
from .instances import Instances, write_table
from .jobs import Job, Record
from .products import Products


def check_products(products: Products, card: ModelCard, jobs: Sequence[Job], replace: bool) -> None:
    """Before any work: whether all of it can be made.

    Args:
        products: that are wanted.
        card: of the network.
        jobs: of the run.
        replace: files that exist.

    Raises:
        MisuseError: it was asked for wrongly.
        DeployError: a package is missing, or a folder cannot be written.
    """
    if products.cog:
        need("rasterio", "gdal")
    if not products.derived:
        return
    asked = next(name for name in ("polygons", "stats", "instances") if getattr(products, name) is not None)
    if card.kind == "values":
        raise MisuseError(f"--{asked}: this model gives values, no classes; omit it")
    if (video := next((job.source for job in jobs if job.is_video), None)) is not None:
        raise MisuseError(f"--{asked}: {video} is a video, of which labels alone are written; omit it")
    products.classes(card)
    if products.connectivity not in (4, 8):
        raise MisuseError(f"--connectivity {products.connectivity}; write 4 (by sides) or 8 (by corners too)")
    if products.instances:
        need("scipy.ndimage", "instances")
    taken = {str(path.resolve()) for job in jobs for path in (job.source, *job.targets)}
    check_gathered(products, card, taken, replace)


def with_products(
    records: Generator[Record, None, None], jobs: Iterable[Job], card: ModelCard, products: Products
) -> Generator[Record, None, None]:
    """The records, each after what is made of its labels; files of all images get their names at the end.

    Yields:
        Records of `label_files`; with instances they have `instances` and `instances_table`, paths, and
        `instance_counts`, by name of class. What cannot be made of an image is its `error`.

    Raises:
        WriteError: a result cannot be written.
    """
    with closing(records), gathering(products, card) as gathered:
        for job, record in zip(jobs, records, strict=True):
            if card.kind in record:
                try:
                    record |= _made(job, card, products, gathered)
                except WriteError:
                    raise
                except DeployError as error:
                    record["error"] = said(error, job.source)
            yield record


def _made(job: Job, card: ModelCard, products: Products, gathered: Gathered) -> Record:
    """Make all of it of one image's labels; what its record says."""
    told: Record = {}
    path, classes, image = job.results[card.kind], products.classes(card), job.image
    with open_result(path) as result:
        ground = ground_of(result)
        counts: dict[int, int] = {}
        if classes:
            target, table = job.beside["instances"], job.beside["instances_table"]
            instances = Instances(result, ground, card, classes, products.connectivity)
            write_table(table, image, instances, classes, ground, card)
            tags = [*result.tags, no_data_tag(0)]
            write_maps(target, instances, ("instances",), tiled=True, tags=tags, cog="NEAREST" if job.cog else None)
            counts = {index: len(each.first) for index, each in zip(classes, instances.components, strict=True)}
            told |= {"instances": str(target), "instances_table": str(table)}
            told["instance_counts"] = {card.classes[index]: count for index, count in counts.items()}
        gathered.add(image, result, ground, counts)
    return told
