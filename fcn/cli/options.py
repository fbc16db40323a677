"""Options that train-fcn and eval-fcn share."""

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
