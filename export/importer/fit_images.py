"""Make a network take images of every size, by padding or by resizing them to sizes that it does take."""

from dataclasses import replace

from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.analysis.receptive_field import global_operator
from fcn_deploy.export.passes.drop_idle import computed_pads, drop_idle
from fcn_deploy.export.passes.pad_and_crop import pad_and_crop
from fcn_deploy.export.passes.resize_by_factor import computed_resizes, resize_by_factor
from fcn_deploy.export.passes.resize_to_multiple import resize_to_multiple, resize_to_size
from fcn_deploy.export.passes.upsample_scores import upsample_scores
from onnx import ModelProto

PADDED_TO = (1, 2, 4, 8, 16, 32, 64)


def choose_fit(model: ModelProto, sizes: AcceptedSizes, fit: str | None) -> str:
    """One of FITS, or "" where the network takes every size by itself; `fit`: what the user wants, None: the default.

    Images are padded, as zeros beside an image change what is near them only. Where the network looks at the whole
    image, they change all of it, and images are resized to the nearest multiple; without multiples, there are no zeros
    but around images smaller than the smallest.
    """
    if sizes.only is not None:
        return "resize"
    if sizes.multiple == 1 and sizes.smallest == 1:
        return ""
    return fit or ("resize" if sizes.multiple > 1 and global_operator(model) else "pad")


def padded_by_choice(model: ModelProto, sizes: AcceptedSizes, fit: str | None) -> AcceptedSizes:
    """The sizes, or where the user wants padding for a network that takes them all, multiples that it tiles at.

    Decoders that go to the size of a skip by linear interpolation stretch odd sizes, and depend on the whole image
    there; those of transposed convolutions pad their maps. At multiples of their strides they go by factors. A user may
    want those, for images that are run in tiles.
    """
    if fit != "pad" or sizes.multiple != 1 or sizes.only is not None:
        return sizes
    left: dict[int, int] = {}
    for multiple in PADDED_TO:
        left[multiple] = _goes_by_size(model, multiple, sizes.smallest)
        if not left[multiple]:
            break
    best = min(left, key=left.__getitem__)  # the least of equally good ones
    return replace(sizes, multiple=best, by_choice=True) if left[best] < left[1] else sizes


def _goes_by_size(model: ModelProto, multiple: int, smallest: int) -> int:
    """How many Resizes and Pads still go to the size of another map at multiples of this."""
    resized = resize_by_factor(model, multiple, smallest).model
    return len(computed_resizes(resized)) + len(computed_pads(drop_idle(resized, multiple, smallest).model))


def fit_images(
    model: ModelProto, sizes: AcceptedSizes, name: str, fit: str | None = None
) -> tuple[ModelProto, list[str]]:
    """A model for every H, W ≥ 1 with full-size scores, and what was done, a line each.

    Args:
        model: float32 [N,C,H,W] → [N,K,⌈H/factor⌉,⌈W/factor⌉], of the sizes that `sizes` tells.
        sizes: found by find_accepted_sizes.
        name: of the model, for the notes.
        fit: one of FITS; None: as choose_fit says.
    """
    notes = list(sizes.notes)
    if sizes.only is not None:
        height, width = sizes.only
        notes.append(
            f"{name} is run at {height}×{width} alone: every image is resized to it bilinearly (half-pixel centres, "
            "not antialiased), and its scores back, which is inexact: small things in large images are lost"
        )
        return resize_to_size(model, height, width).model, notes
    chosen, looks = choose_fit(model, sizes, fit), global_operator(model)
    if fit and not chosen:
        notes.append(f"{name} takes every size by itself; --fit {fit} changes nothing")
    if sizes.factor > 1:
        how = "resized" if chosen == "resize" else "upsampled"
        notes.append(f"{name} gives scores at 1/{sizes.factor} of the image's size; they are {how} bilinearly")
    if chosen == "resize":
        why = f", and {looks} looks at the whole image, where zeros would count" if looks else ""
        notes.append(
            f"{_accepted(sizes, name)}{why}; images are resized bilinearly to the nearest multiple, and their scores "
            "back (--fit pad pads with zeros instead)"
        )
        return resize_to_multiple(model, sizes.multiple, sizes.smallest).model, notes
    if sizes.factor > 1:
        model = upsample_scores(model, sizes.factor, crop=sizes.multiple % sizes.factor != 0).model
    if chosen == "pad":
        why = f", which {looks} sees (--fit resize resizes instead)" if looks else ""
        notes.append(f"{_accepted(sizes, name)}; images are padded to them with zeros{why}")
        model = pad_and_crop(model, sizes.multiple, sizes.smallest).model
    return model, notes


def _accepted(sizes: AcceptedSizes, name: str) -> str:
    """The sizes that a network takes, which are not all, in words."""
    if sizes.by_choice:
        return f"{name} goes from map to map by whole factors at multiples of {sizes.multiple}"
    if sizes.multiple == 1:
        return f"{name} takes no sides below {sizes.smallest}"
    least = f", from {sizes.smallest} on" if sizes.smallest > 1 else ""
    return f"{name} takes multiples of {sizes.multiple} only{least}"
