"""import_model: any segmentation ONNX as engines are built from it: float32 [N,C,H,W] in, scores [N,K,H,W] out, a card.

What is guessed or changed on the way is a note. What comes out is compared with the foreign model, run by ONNX Runtime
at its own conventions, before anything is built.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes, only_at, run_quietly
from fcn_deploy.export.analysis.batch_mixing import batch_mixer
from fcn_deploy.export.analysis.quantised import quantised_by
from fcn_deploy.export.analysis.twice_the_size import note_on_twice_the_size
from fcn_deploy.export.dynamic_shapes.compare_with_source import Known, free_and_verify
from fcn_deploy.export.graph.edit import clone, dims, metadata, set_shape
from fcn_deploy.export.importer.card import CardEvidence, card_of
from fcn_deploy.export.importer.fit_images import choose_fit, fit_images, padded_by_choice
from fcn_deploy.export.importer.foreign_model import ForeignModel
from fcn_deploy.export.importer.load import declared_outputs, load_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.importer.score_map import OutputChange
from fcn_deploy.export.importer.standard_form import standard_form
from fcn_deploy.export.passes.add_batch import add_batch
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.tolerances import STANDARD_FORM
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY, ModelCard, check_card
from fcn_deploy.runtime.errors import DeployError, MisuseError
from onnx import ModelProto


@dataclass(frozen=True)
class ImportedModel:
    """A model to build from.

    Attributes:
        model: float32 [N,C,H,W] → scores [N,K,H,W] at every H, W ≥ 1.
        card: its own, or what was said and assumed of it.
        notes: what was assumed of it or changed in it, a line each.
        sizes: that the network in it takes by itself.
        fit: how images of other sizes are fitted to it: one of FITS; "": it takes them all.
        quantised: the first node that quantises in it; "": it is of floats.
        output: name of the output that this is, as the file has it.
        further: of several outputs, the others, of the same sizes.
    """

    model: ModelProto
    card: ModelCard
    notes: tuple[str, ...]
    sizes: AcceptedSizes = AcceptedSizes()  # noqa: RUF009  # it is frozen
    fit: str = ""
    quantised: str = ""
    output: str = ""
    further: tuple["ImportedModel", ...] = ()


def import_model(
    path: str | os.PathLike, options: ImportOptions | None = None, seconds: float = math.inf
) -> ImportedModel:
    """Read an ONNX model, bring it into the standard form, and find or make its card.

    Args:
        path: of a segmentation model: any opset from 7 on, [N,C,H,W] or [N,H,W,C] in and out, of any type of number,
            with scores, probabilities or labels as outputs, of the image's size or smaller.
        options: what the user says of it; None: nothing. Of several outputs, each is a model, in `further`.
        seconds: that the comparison of a freed model with larger images may take; it is left out, with a note, where it
            takes longer.

    Raises:
        MisuseError: no such file or output, or options that contradict the model or its own card.
        DeployError: a model that cannot be taken: its node and the reason; outputs that are of different sizes.
    """
    options = options or ImportOptions()
    if not options.further:
        return _import(path, options, seconds)
    said = (replace(options, further=()), *options.further)
    models = [_import(path, each, seconds) for each in said]
    multiple = math.lcm(*(each.sizes.multiple for each in models))
    smallest = max(each.sizes.smallest for each in models)
    models = [
        each
        if (each.sizes.multiple, each.sizes.smallest) == (multiple, smallest)
        else _import(path, options, seconds, (multiple, smallest))  # what the whole takes, whatever one output does
        for each, options in zip(models, said, strict=True)
    ]
    if len({each.fit for each in models}) > 1:
        raise DeployError(
            f"{path} takes multiples of {multiple} only, and its outputs would have images padded or resized to them; "
            "say --fit pad or --fit resize for all"
        )
    notes = dict.fromkeys(note for each in models for note in each.notes)
    return replace(models[0], notes=tuple(notes), further=tuple(models[1:]))


def _import(
    path: str | os.PathLike, options: ImportOptions, seconds: float, at_least: tuple[int, int] = (1, 1)
) -> ImportedModel:
    """One output of a model, as import_model; `at_least`: the (multiple, smallest size) that the others want."""
    name = str(path)
    batched = add_batch(load_model(path, options.output))
    model = batched.model
    card_text = metadata(model, CARD_KEY)
    if card_text is not None:
        options.refuse_beside_card(name)
    said = card_text is not None or options.activation or "activation" in (options.card or {})
    dropped = declared_outputs(path) if options.output is not None else {}
    foreign = ForeignModel(model, name, kinds=not said, dropped=dropped, only=options.fit_size)
    model, change, notes = standard_form(foreign, options)
    notes = [*batched.said_of(name), *foreign.notes, *notes]
    if options.bgr:
        if foreign.channels != 3:
            raise MisuseError(f"--bgr is for images of 3 channels, and {name} takes {foreign.channels}")
        model = reverse_channels(model).model
        notes.append(f"{name} wants BGR, as --bgr says: its channels are reversed, and the engine takes RGB")
    with _fit_named(foreign, options):
        if options.fit_size is not None:
            model, freed, multiple, scores = _at_one_size(model, foreign)
        else:
            model, freed, multiple, scores = _free(model, foreign, options, seconds, foreign.known(change, options.bgr))
    notes += freed
    foreign.compare(model, change, options.bgr, scores)
    with _fit_named(foreign, options):
        sizes = _accepted_sizes(model, foreign, options.fit_size)
    sizes = replace(
        sizes,
        multiple=math.lcm(sizes.multiple, multiple, at_least[0]),
        smallest=max(sizes.smallest, at_least[1]),
    )
    twice = card_text is None and sizes.only is None
    if twice and (note := _note_on_twice_the_size(model, foreign, sizes)):
        notes.append(note)
    if alone := _alone(model, foreign, sizes):
        notes.append(f"{name} takes one image at a time: in a batch it may give other scores, or none ({alone})")
    sizes = padded_by_choice(model, sizes, options.fit_kind)
    fit = choose_fit(model, sizes, options.fit_kind)
    model, fitted = fit_images(model, sizes, name, options.fit_kind)
    notes += fitted
    if card_text is not None:
        card = ModelCard.from_json(card_text, name)
        check_card(card, foreign.channels, sizes.scores, name)
    else:
        card, assumed = card_of(model, _evidence(foreign, change, sizes), options, name)
        notes += assumed
    card = options.with_range(card, notes.append)
    if quantised := quantised_by(model):
        notes.append(f"{name} is quantised already, by node {quantised}; it is built as it is, INT8")
    return ImportedModel(model, replace(card, alone=alone), tuple(notes), sizes, fit, quantised, foreign.output)


def _evidence(foreign: ForeignModel, change: OutputChange, sizes: AcceptedSizes) -> CardEvidence:
    return CardEvidence(
        foreign.channels,
        sizes.scores,
        foreign.input_type,
        None if change.decision is None else change.decision.threshold,
        (float(foreign.result.min()) / change.factor, float(foreign.result.max()) / change.factor),
        foreign.model.producer_name,
        change.decision is not None or change.labels_only,
        {entry.key: entry.value for entry in foreign.model.metadata_props},
    )


def _free(
    model: ModelProto, foreign: ForeignModel, options: ImportOptions, seconds: float, known: Known | None
) -> tuple[ModelProto, list[str], int, np.ndarray | None]:
    """The model with its batch, height and width free, what was changed, a multiple that its sizes must be of, and its
    scores for the images that are known, if it was run on them.
    """
    if not foreign.static and metadata(foreign.model, CARD_KEY) is not None:
        return model, [], 1, None
    model = clone(model)
    scores = [side for side in dims(model.graph.output[0])[1:] if side is not None]  # the standard form names them all
    height, width = foreign.declared
    set_shape(model.graph.input[0], [foreign.batch or "N", foreign.channels, height or "H", width or "W"])
    freed = free_and_verify(model, foreign.name, foreign.size, options.assume, seconds, known)
    model = freed.model
    if freed.hidden is not None:  # at others it is not what was freed
        foreign.size = freed.hidden
    set_shape(model.graph.input[0], ["N", foreign.channels, "H", "W"])
    set_shape(model.graph.output[0], ["N", *scores])
    return model, list(freed.notes), freed.multiple, freed.scores


@contextmanager
def _fit_named(foreign: ForeignModel, options: ImportOptions) -> Iterator[None]:
    """What is raised of a model that takes one size names the option that gives it images of that."""
    try:
        yield
    except MisuseError:
        raise
    except DeployError as error:
        if options.fit_size is not None or not np.isfinite(foreign.result).all():
            raise
        (height, width), text = foreign.size, str(error)
        join = "," if "; " in text else ";"
        remedy = f"let every image be resized (inexact): --fit {height}x{width}"
        raise DeployError(f"{text}{join} or {remedy}") from error


def _at_one_size(model: ModelProto, foreign: ForeignModel) -> tuple[ModelProto, list[str], int, None]:
    """The model as it is, of the one size that it is run at; as `_free`."""
    model = clone(model)
    set_shape(model.graph.input[0], [foreign.batch or "N", foreign.channels, *foreign.size])
    return model, [], 1, None


def _accepted_sizes(model: ModelProto, foreign: ForeignModel, only: tuple[int, int] | None) -> AcceptedSizes:
    """What sizes a model takes, by running it; `only`: that it is run at no other than this."""
    run = session(model.SerializeToString(), arena=False)
    if only is not None:
        return only_at(lambda *size: run_quietly(run, foreign.images(size, foreign.batch))[0], foreign.name, only)
    return find_accepted_sizes(lambda height, width: run_quietly(run, foreign.images((height, width)))[0], foreign.name)


def _note_on_twice_the_size(model: ModelProto, foreign: ForeignModel, sizes: AcceptedSizes) -> str:
    run = session(model.SerializeToString())
    return note_on_twice_the_size(
        lambda images: run_quietly(run, images)[0], sizes, foreign.channels, foreign.takes_whole_numbers, foreign.name
    )


LOUDER = 8  # by which one image of a batch is multiplied, so that what is taken from both shows
BATCHED = 64  # pixels, at least, of the sides of these images


def _alone(model: ModelProto, foreign: ForeignModel, sizes: AcceptedSizes) -> str:
    """What makes scores depend on what else is in a batch, a node if one is known; "": two images at once are apart."""
    if named := batch_mixer(model):
        return named
    run = session(model.SerializeToString(), arena=False)
    side = -(-max(BATCHED, sizes.smallest) // sizes.multiple) * sizes.multiple
    size = (side, side + sizes.multiple)
    smaller = sizes.only is None and math.prod(size) < math.prod(foreign.size)
    images = foreign.images(size if smaller else foreign.size, count=2)
    images[0] = np.floor(images[0] / LOUDER) if foreign.takes_whole_numbers else images[0] * LOUDER
    alone = np.concatenate([run_quietly(run, images[index : index + 1])[0] for index in range(2)])
    try:
        together = run_quietly(run, images)[0]
    except Exception:  # a batch of one that is baked in
        return "its batch is of one image"
    spread = max(float(np.ptp(alone[1])), 1e-6)
    apart = together.shape == alone.shape and bool(np.abs(together - alone)[1].max() <= STANDARD_FORM * spread)
    return "" if apart else "as two images at once show"
