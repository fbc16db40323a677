"""Results of a network's scores: of each kind that is wanted, with refined borders, and marked where no data is."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .arrays import AnyArray, Floats, ImageSource
from .head.heads import Heads, View
from .head.refine import refined_labels
from .head.score_window import ScoreWindow
from .head.upsampling import result_from_scores
from .onnx_model import with_activation
from .pixels.no_data import Invalid, marked
from .planning.plan import Plan


class ResultMaker:
    """Makes results of scores.

    Args:
        heads: of the model.
        cell: pixels between coarse scores.
        refine: whether borders of labels follow those of the image.
        settled: whether it is known if scores are activated; of an ONNX model it is not before they are there.
    """

    def __init__(self, heads: Heads, cell: int, refine: bool, settled: bool) -> None:
        self._heads, self._cell, self._refine, self._settled = heads, cell, refine, settled

    def of_scores(self, image: ImageSource, scores: Floats, plan: Plan, views: Sequence[View]) -> tuple[AnyArray, ...]:
        """Results of a whole image's uncropped scores."""
        views, window = self.as_found(scores, views), ScoreWindow.whole(scores, plan.padded, plan.size)
        if len(views) == 1 and views[0].kind in ("values", "probabilities") and views[0].channels is None:
            full = views[0].upsampling.mode == "none" and scores.shape[1:] == plan.size
            if full and scores.dtype == np.float32 and scores.flags.writeable:
                return (self.of_window(views[0], image, window, out=scores),)  # in place: no second copy
        return tuple(
            cropped(view.own(window).scores, plan) if view.kind == "scores" else self.of_window(view, image, window)
            for view in views
        )

    def of_window(self, view: View, image: ImageSource, window: ScoreWindow, out: AnyArray | None = None) -> AnyArray:
        """A result of the window's rows, refined where it is of labels and that is wanted."""
        window = view.own(window)
        if view.kind == "refined" or (view.kind == "labels" and self._refine):
            return refined_labels(window, view.upsampling, view.card, self._cell, image, out)
        return result_from_scores(view.kind, window, view.upsampling, view.card, out)

    def as_found(self, scores: Floats, views: Sequence[View]) -> list[View]:
        """What is to be done to a whole image's scores; of an ONNX model after a look at what it gives."""
        if self._settled or not any(view.kind == "probabilities" for view in views):
            return list(views)
        upsampling = with_activation(self._heads.upsampling, self._heads.card, scores)
        return [replace(view, upsampling=upsampling) for view in views]

    def marked(
        self, results: Sequence[AnyArray], kinds: Sequence[str], invalid: Invalid | None
    ) -> tuple[AnyArray, ...]:
        """Results with no data where the image has none."""
        views = map(self._heads.view, kinds)
        return tuple(
            marked((result,), (view.kind,), invalid, view.card)[0] for result, view in zip(results, views, strict=True)
        )


def cropped(scores: Floats, plan: Plan) -> Floats:
    """Uncropped scores, [K, h, w], without the cells that lie in the padding alone; a copy."""
    # Cells per padded pixel, from what came out: right for networks whose scores are full-size too.
    height, width = (-(-plan.size[axis] * scores.shape[1 + axis] // plan.padded[axis]) for axis in (0, 1))
    return scores[:, :height, :width].copy()
