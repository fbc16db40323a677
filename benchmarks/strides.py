"""FCN-32s, FCN-16s and FCN-8s, trained alike: what each skip brings (Long, Shelhamer, Darrell, 2015, section 4.2).

    python -m benchmarks.strides --data ../shared/camvid --work build/strides [--plot strides.png] [--json strides.json]

Trains each stride with each seed by `train-fcn --recipe camvid-short`, checkpoints WORK/fcn32s-0.safetensors and so
on, and evaluates them on val. What is trained already is taken as it is, and a run that was stopped is gone on with, so
it may be run in pieces: `--most 1` trains one network at most and shows the table of those that are there. Printed:
mIoU of each stride with half the range of its seeds, IoU by class, thinnest first, and what 16s and 8s gain. Drawn:
photographs with the true labels and those of 32s, 16s and 8s, of large, middling and small gain (with --predictions
their labels alone, for where photographs may not be shown). A class's thickness
is twice its pixels over those at its border.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.datasets import LabelledImages, load_dataset
from fcn_deploy.calibration.metrics import IGNORE, Metrics, confusion_matrix
from fcn_deploy.fcn.evaluate import open_model

from benchmarks.common import draw_labels
from benchmarks.refine import inner_border

STRIDES = (32, 16, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--work", type=Path, default=Path("build/strides"))
    parser.add_argument("--recipe", default="camvid-short")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--most", type=int, help="networks to train now; the others another time")
    parser.add_argument("--options", default="", help="more options of train-fcn, the same for all, in one string")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--predictions", action="store_true", help="draw no photographs and no true labels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    left = options.most
    # Seed by seed: a first comparison is there after three runs.
    runs = [(stride, seed) for seed in range(options.seeds) for stride in STRIDES]
    for stride, seed in runs:
        out = checkpoint(options.work, stride, seed)
        if not complete(out) and left != 0:
            train(out, stride, seed, options)
            left = left and left - 1
    done = [run for run in runs if complete(checkpoint(options.work, *run))]
    if waiting := [checkpoint(options.work, *run).name for run in runs if run not in done]:
        print(f"not trained yet: {', '.join(waiting)}")
    if not done:
        return
    check_alike([checkpoint(options.work, *run) for run in done], done)
    data = load_dataset(options.data, "val")
    labels = {run: predicted(checkpoint(options.work, *run), data, options.threads) for run in done}
    result = compared(data, labels) | {"data": options.data, "recipe": options.recipe}
    for line in table(result):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        if missing := [f"FCN-{stride}s" for stride in STRIDES if (stride, 0) not in labels]:
            sys.exit(f"no picture without {', '.join(missing)}, seed 0")
        drawn = {f"FCN-{stride}s": labels[stride, 0] for stride in STRIDES}
        draw_labels(data, drawn, options.plot, options.predictions)


def checkpoint(work: Path, stride: int, seed: int) -> Path:
    return work / f"fcn{stride}s-{seed}.safetensors"


def complete(out: Path) -> bool:
    """Whether a run has come to its end: its state lies beside it until then."""
    return out.exists() and not out.with_name(out.name + ".state").exists()


def train(out: Path, stride: int, seed: int, options: argparse.Namespace) -> None:
    """train-fcn, going on with a run that was stopped."""
    words = ["--data", options.data, "--recipe", options.recipe, "--stride", stride, "--seed", seed, "-o", out]
    words += ["--threads", options.threads, *options.options.split()]
    # Stopped before its first epoch ended, it has left its log and nothing else.
    words.append("--resume" if out.with_name(out.name + ".state").exists() else "--force")
    print(f"$ train-fcn {' '.join(map(str, words))}", flush=True)
    program = [sys.executable, "-c", "from fcn_deploy.fcn.cli.train_fcn import main; main()"]
    if code := subprocess.run([*program, *map(str, words)]).returncode:
        sys.exit(code if code > 0 else 130)


def check_alike(files: list[Path], runs: list[tuple[int, int]]) -> None:
    """Leave where checkpoints differ in more than stride and seed: they would be no comparison."""
    from fcn_deploy.fcn.checkpoint import load_checkpoint

    first = None
    for file, (stride, _) in zip(files, runs, strict=True):
        loaded = load_checkpoint(file)
        if loaded.model.architecture.stride != stride:
            sys.exit(f"{file} holds an FCN-{loaded.model.architecture.stride}s; its name says {stride}s")
        recipe = dict(loaded.training.get("recipe", {}))
        recipe.pop("seed", None)
        others = {**loaded.model.architecture.to_dict(), "recipe": recipe, "data": loaded.training.get("data")}
        others.pop("stride")
        if (first := first or others) != others:
            different = [key for key in others if others[key] != first[key]]
            sys.exit(
                f"{file} and {files[0]} differ in their {', '.join(different)}: train them alike, in another --work"
            )


def predicted(file: Path, data: LabelledImages, threads: int) -> list[np.ndarray]:
    """A checkpoint's labels of each image, kept beside it: a table of six networks is made again in seconds."""
    kept = file.with_suffix(".val.npz")
    if kept.exists() and kept.stat().st_mtime > file.stat().st_mtime:
        with np.load(kept) as stored:
            if len(stored.files) == len(data):
                return [stored[str(index)] for index in range(len(data))]
    predict = open_model(file, threads).predict
    labels = [predict(data[index][0]) for index in range(len(data))]
    np.savez_compressed(kept, **{str(index): array for index, array in enumerate(labels)})
    return labels


def compared(data: LabelledImages, labels: dict[tuple[int, int], list[np.ndarray]]) -> dict:
    """mIoU and IoU by class for each (stride, seed), and the thickness of each class."""
    names = list(data.classes)
    confusions = {run: np.zeros((len(names), len(names)), np.int64) for run in labels}
    areas, edges = np.zeros(len(names)), np.zeros(len(names))
    for index in range(len(data)):
        reference = data[index][1]
        for run, arrays in labels.items():
            confusions[run] += confusion_matrix(reference, arrays[index], len(names))
        for number in np.unique(reference[reference != IGNORE]):
            # The image's own edge is no border of the thing that it cuts.
            mask = np.pad(reference == number, 1, mode="edge")
            areas[number] += mask[1:-1, 1:-1].sum()
            edges[number] += inner_border(mask, 1)[1:-1, 1:-1].sum()
    runs = []
    for (stride, seed), confusion in confusions.items():
        metrics = Metrics.of(confusion)
        iou = [None if np.isnan(value) else value for value in metrics.class_iou]
        runs.append({"stride": stride, "seed": seed, "miou": metrics.mean_iou, "class_iou": iou})
    thick = [2 * area / max(edge, 1) if area else None for area, edge in zip(areas, edges, strict=True)]
    return {"classes": names, "thickness": thick, "images": len(data), "runs": runs}


def table(result: dict) -> list[str]:
    """Markdown: a row for mIoU and one for each class, thinnest first; mean of the seeds, and half their range."""
    strides = [stride for stride in STRIDES if any(run["stride"] == stride for run in result["runs"])]
    of = {stride: [run for run in result["runs"] if run["stride"] == stride] for stride in strides}
    steps = list(pairwise(strides))
    heads = [*(f"FCN-{stride}s" for stride in strides), *(f"{fine}s − {coarse}s" for coarse, fine in steps)]
    lines = [f"| | thickness | {' | '.join(heads)} |", "|---|" + "---|" * (1 + len(heads))]

    def row(name: str, thick: float | None, values: dict[int, list[float]]) -> str:
        words = [f"{100 * np.mean(values[stride]):.1f} ± {50 * np.ptp(values[stride]):.1f}" for stride in strides]
        words += [f"{100 * (np.mean(values[fine]) - np.mean(values[coarse])):+.1f}" for coarse, fine in steps]
        return f"| {name} | {'' if thick is None else f'{thick:.0f}'} | {' | '.join(words)} |"

    mious = {stride: [run["miou"] for run in of[stride]] for stride in strides}
    lines.append(row("mIoU", None, mious))
    present = [index for index, thick in enumerate(result["thickness"]) if thick is not None]
    for index in sorted(present, key=lambda index: result["thickness"][index]):
        values = {stride: [run["class_iou"][index] for run in of[stride]] for stride in strides}
        lines.append(row(result["classes"][index], result["thickness"][index], values))
    lines.append("")
    for coarse, fine in steps:
        apart = 100 * (min(mious[fine]) - max(mious[coarse]))
        how = f"{abs(apart):.1f} points {'above' if apart > 0 else 'below'} the best {coarse}s"
        lines.append(f"the worst {fine}s is {how} ({len(of[coarse])} and {len(of[fine])} seeds)")
    if absent := [name for name, thick in zip(result["classes"], result["thickness"], strict=True) if thick is None]:
        lines.append(f"mIoU is over the {len(present)} classes present; val has no {', '.join(absent)}")
    return lines


if __name__ == "__main__":
    main()
