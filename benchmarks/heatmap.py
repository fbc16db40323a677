"""A classifier made fully convolutional, and its heat map of a class in a photograph larger than it was trained on.

    python -m benchmarks.heatmap heatmap.png [--photo PHOTO] [--label 985] [--longer 1280]

EfficientNet-Lite0 with ImageNet's weights (Long, Shelhamer, Darrell, 2015, figure 2). Checked first: at 224×224 it
gives the classifier's own scores. Then each cell of the map, at a stride of 32 pixels, is the probability of the class
in a window of 224×224 there. Without a photo it is scikit-learn's flower.jpg, and its class 985, daisy; without a
label, the class that is most probable anywhere. At several sizes, as the classifier knows things of one size only.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from fcn_deploy.fcn.backbones.efficientnet_lite0 import EfficientNetLite0, published_weights
from fcn_deploy.fcn.convolutionalize import convolutionalize

from benchmarks.common import fitted, pyplot
from benchmarks.patchwise import STRIDE, WINDOW, efficientnet

TOLERANCE = 1e-4  # of the scores' range, at 224×224


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The classifier with ImageNet's weights, and itself as a fully convolutional network."""
    weights, net = published_weights(), efficientnet()
    net[0].backbone.load_classification(weights)
    net[-1].load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
    net.eval()
    return net, convolutionalize(net, (3, WINDOW, WINDOW))


def normalised(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 → [1, 3, H, W], cut to multiples of the stride."""
    height, width = (side // STRIDE * STRIDE for side in image.shape[:2])
    pixels = (image[:height, :width].astype(np.float32) - EfficientNetLite0.mean) / EfficientNetLite0.std
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def probabilities(convolutional: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """[1000, h, w], one window of 224×224 a cell, of an image [H, W, 3] uint8 that is at least so large."""
    with torch.inference_mode():
        return convolutional(normalised(image))[0].softmax(0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--label", type=int, help="one of ImageNet's 1000 classes, counted from 0")
    parser.add_argument("--longer", type=int, default=1280, help="the longer side of the largest size, in pixels")
    options = parser.parse_args()
    if options.label is not None and not 0 <= options.label < 1000:
        parser.error(f"label {options.label}; ImageNet's classes are 0 to 999")
    if options.photo:
        from fcn_deploy.runtime.images.read import read_image

        from benchmarks.common import RGB

        image = read_image(options.photo, RGB)
    else:
        from sklearn.datasets import load_sample_images

        image = load_sample_images().images[1]
    net, convolutional = pair()
    small = normalised(fitted(image, WINDOW, WINDOW))
    with torch.inference_mode():
        own, slid = net(small)[0], convolutional(small)[0].flatten()
    difference = float((own - slid).abs().max() / (own.max() - own.min()))
    best = own.softmax(0).topk(3)
    words = ", ".join(f"{label} ({share:.3f})" for share, label in zip(*map(torch.Tensor.tolist, best), strict=True))
    print(
        f"{WINDOW}×{WINDOW}: most probable {words}; largest difference of the scores, of their range: {difference:.1e}"
    )
    if difference > TOLERANCE:
        sys.exit(
            f"the two networks differ by more than {TOLERANCE} of the scores' range: they are not the same function"
        )
    maps, label = [], options.label
    for share in (0.35, 0.5, 0.7, 1.0):
        scale = share * options.longer / max(image.shape[:2])
        size = [max(WINDOW, round(side * scale)) for side in image.shape[:2]]
        picture = fitted(image, *size)
        maps.append((picture, probabilities(convolutional, picture)))
    if label is None:
        label = 985 if options.photo is None else int(max((m.max(), m.max((1, 2)).argmax()) for _, m in maps)[1])
    for picture, found in maps:
        heat = found[label]
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        middle = (y * STRIDE + WINDOW // 2, x * STRIDE + WINDOW // 2)
        print(
            f"{picture.shape[0]}×{picture.shape[1]}: {heat.shape[0]}×{heat.shape[1]} cells, class {label} at most "
            f"{heat.max():.3f}, around row {middle[0]}, column {middle[1]}"
        )
    draw(maps, label, options.out)


def draw(maps: list[tuple[np.ndarray, np.ndarray]], label: int, out: Path) -> None:
    """Each size's photograph, with the map over the middles of its windows."""
    plt = pyplot()
    highest = max(found[label].max() for _, found in maps)
    figure, axes = plt.subplots(1, len(maps), figsize=(4.5 * len(maps), 4), layout="constrained")
    for axis, (picture, found) in zip(axes, maps, strict=True):
        rows, columns = found.shape[1:]
        half = (WINDOW - STRIDE) // 2  # a cell is drawn in the middle of its window
        axis.imshow(picture)
        shown = axis.imshow(
            found[label], vmin=0, vmax=highest, cmap="inferno", alpha=0.6, interpolation="nearest",
            extent=(half, half + columns * STRIDE, half + rows * STRIDE, half),
        )  # fmt: skip
        axis.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0), xticks=[], yticks=[])
        axis.set_title(f"{picture.shape[0]}×{picture.shape[1]}: {rows}×{columns} cells", fontsize=9)
    figure.colorbar(shown, ax=axes, label=f"probability of class {label}", shrink=0.8)
    figure.savefig(out, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
