"""Heads: the outputs of an engine that has several, each some channels of the core's scores with its own meaning."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import Floats, Labels
from ..engine_format.manifest import Head
from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Upsampling
from ..errors import MisuseError
from ..pixels.no_data import usable
from ..pixels.prepare import padded_size
from .score_window import ScoreWindow
from .upsampling import KINDS, labels_from_scores


@dataclass(frozen=True)
class View:
    """What a result is made of.

    Attributes:
        kind: of the result: one of `upsampling.KINDS`, `refined` or `scores`.
        card: of the head.
        upsampling: of its scores.
        channels: of the core's scores, that are its own; None: all.
    """

    kind: str
    card: ModelCard
    upsampling: Upsampling
    channels: slice | None = None

    def own(self, window: ScoreWindow) -> ScoreWindow:
        """The window with this head's scores alone."""
        return window if self.channels is None else window.holding(window.scores[self.channels])


class Heads:
    """The heads of a network by name, and what the names of results mean.

    `labels` is of the head that was chosen (the first, unless somebody said), `depth/values` of the one called `depth`.

    Args:
        card, upsampling: of the network.
        heads: as the manifest has them; none where the network has one output.
        chosen: name of the head that results without a name are of; None: the first.
        source: names the file in errors.

    Attributes:
        chosen: the name of the chosen one; "" where there is one output.

    Raises:
        MisuseError: there is none of that name.
    """

    def __init__(
        self, card: ModelCard, upsampling: Upsampling, heads: Sequence[Head], chosen: str | None, source: str
    ) -> None:
        self._source, self._views = source, dict(views_of(card, upsampling, heads))
        if chosen is not None and (not chosen or chosen not in self._views):
            has = f"it has {', '.join(self._views)}" if heads else "it has one, without a name; omit it"
            raise MisuseError(f"output {chosen[:40]!r} of {source}: {has}")
        self.chosen: str = next(iter(self._views)) if chosen is None else chosen
        self._own = self._views[self.chosen]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the heads, in the order of their channels; none where there is one output."""
        return tuple(name for name in self._views if name)

    @property
    def card(self) -> ModelCard:
        """Of the chosen head."""
        return self._own.card

    @property
    def upsampling(self) -> Upsampling:
        """Of the chosen head."""
        return self._own.upsampling

    def card_of(self, name: str) -> ModelCard:
        """Of the head of one of `names`."""
        return self._views[name].card

    def view(self, kind: str) -> View:
        """What a result of this name is made of: `labels`, or `depth/values`. Raises MisuseError."""
        name, slash, plain = kind.rpartition("/")
        if not slash:
            return self._own if kind == self._own.kind else replace(self._own, kind=kind)
        if not name or name not in self._views:
            has = f"it has {', '.join(self.names)}" if self.names else "it has one output, without a name"
            raise MisuseError(f"output {name[:40]!r} of {self._source}: {has}")
        return replace(self._views[name], kind=plain)

    def check_kinds(self, *kinds: str) -> tuple[str, ...]:
        """Return them, or raise MisuseError where this network does not give one of them."""
        calls = {"labels": "call the Segmenter", "masks": "call masks()", "values": "call values()"}
        for name in kinds:
            view = self.view(name)
            kind, own, prefix = view.kind, view.card.kind, name[: name.rfind("/") + 1]
            if kind not in KINDS:
                raise MisuseError(f"kind {name!r}; choose {', '.join(KINDS)}")
            wrong = own == "values" if kind == "probabilities" else kind != "values"
            if wrong and kind != own:
                raise MisuseError(
                    f"{self._source} gives {prefix}{own} ({view.card.activation}), not {name}; "
                    f"{'call results()' if prefix else calls[own]}, or pass kind={prefix + own!r}"
                )
        return kinds

    def labels(self, scores: Floats, sizes: Sequence[tuple[int, int]]) -> list[Labels]:
        """The chosen head's labels [H, W] of images of these sizes, which are of one padded size and were run whole.

        Args:
            scores: of the core, [N, K, h, w].
            sizes: (height, width) of each.
        """
        padded, own = padded_size(*sizes[0], self.card), self.view("labels").own
        windows = (ScoreWindow.whole(each, padded, size) for each, size in zip(scores, sizes, strict=True))
        return [labels_from_scores(own(window), self.upsampling, self.card) for window in windows]

    def usable(self, scores: Floats, interpolated: bool) -> Floats:
        """Scores of all heads, [..., K, h, w], of which results can be made: see `no_data.usable`."""
        if not self.names:
            return usable(scores, self._own.card, interpolated)
        parts = [
            usable(scores[..., view.channels, :, :], view.card, interpolated)
            for view in self._views.values()
            if view.channels is not None
        ]
        if all(np.may_share_memory(part, scores) for part in parts):
            return scores
        whole: Floats = np.concatenate(parts, axis=-3)
        return whole


def views_of(card: ModelCard, upsampling: Upsampling, heads: Sequence[Head]) -> Iterable[tuple[str, View]]:
    """The heads by name, in the order of their channels; "": the one of a network of one output."""
    if not heads:
        yield "", View(card.kind, card, upsampling)
    first = 0
    for head in heads:
        own = head.card(card)
        yield (
            head.name,
            View(own.kind, own, replace(upsampling, activated=head.activated), slice(first, first + own.scores)),
        )
        first += own.scores
