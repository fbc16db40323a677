"""Options that train-fcn and eval-fcn share."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str,
    typer.Option(
        metavar="FOLDER",
        help="Labelled images: `digits`, which are drawn, or a folder with train/ + trainannot/, images/ + labels/, or "
        "the layout of VOC.",
    ),
]

MaskValues = Annotated[
    str | None,
    typer.Option(
        metavar="VALUES",
        help="What values of label files mean, where they are no class indices: 0,255, or 1=road,2=water,0=void.",
    ),
]

MaskColors = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What colours of label files mean: `NAME R G B` a line."),
]
