"""Training: one loop, images of mixed sizes, best checkpoint by validation mIoU, resumable and seeded."""

import io
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from calibration.datasets import LabelledImages
from calibration.metrics import IGNORE, Metrics
from fcn.augment import augment
from fcn.checkpoint import Checkpoint, save_checkpoint
from fcn.evaluate import evaluate, torch_predictor
from fcn.quantization import fake_quantised
from runtime.errors import DeployError, MisuseError
from runtime.files import replacing

CLASS_WEIGHTS = ("none", "sqrt", "median")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        batch: crops per step.
        crop: (height, width) in pixels.
        rate: highest learning rate, of one cycle (Smith, 2018), with AdamW.
        weight_decay: of AdamW.
        scale, flip, brightness: see `fcn.augment.augment`.
        class_weights: `none`; `median` (median frequency over a class's own, as Eigen and Fergus, 2015);
            `sqrt` (its square root).
        patience: stop after so many epochs without a better validation mIoU; 0: never.
        seed: of everything random.
        qat: round weights and activations as INT8 does (fcn.quantization), in training and validation.
    """

    epochs: int = 25
    batch: int = 8
    crop: tuple[int, int] = (224, 224)
    rate: float = 3e-3
    weight_decay: float = 1e-2
    scale: tuple[float, float] = (0.7, 1.5)
    flip: bool = True
    brightness: float = 0.25
    class_weights: str = "none"
    patience: int = 0
    seed: int = 0
    qat: bool = False

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch", 2), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise MisuseError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if min(self.crop) < 32:
            raise MisuseError(f"crop {self.crop[0]}x{self.crop[1]}; both sides must be at least 32 pixels")
        if not self.rate > 0:
            raise MisuseError(f"rate is {self.rate}; it must be above 0")
        if self.class_weights not in CLASS_WEIGHTS:
            raise MisuseError(f"class weights {self.class_weights!r}; choose one of {', '.join(CLASS_WEIGHTS)}")


@dataclass
class Progress:
    """Where a training is: what is reported after each epoch and what a resumed run starts from."""

    epoch: int = 0
    best_miou: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    checkpoint: Checkpoint,
    data: LabelledImages,
    validation: LabelledImages,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Progress:
    """Train a network; its best weights by validation mIoU are in `out` after every epoch.

    A run that stops midway leaves `out`.state beside `out`; with `resume` it goes on from its last epoch
    and ends as the uninterrupted run would have.

    Args:
        checkpoint: the network to start from, and its card.
        data, validation: labelled images of any sizes. Validation sees them whole.
        recipe: how to train.
        out: checkpoint to write.
        resume: continue from `out`.state.
        on_step: called with (step, steps per epoch, loss).
        on_epoch: called with the epoch's record.

    Raises:
        MisuseError: nothing to resume, or it was begun with another recipe.
        DeployError: the loss is no longer finite, or a file cannot be written.
    """
    model, card = checkpoint.model, checkpoint.card
    steps = math.ceil(len(data) / recipe.batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * steps, pct_start=0.2
    )
    progress = Progress()
    state_path = out.with_name(out.name + ".state")
    identity = {
        "recipe": asdict(recipe), "architecture": model.architecture.to_dict(), "images": len(data),
    }  # fmt: skip
    if resume:
        progress = _restore(state_path, identity, model, optimizer, schedule)
        if not out.exists():
            progress.best_miou = -1.0  # the best weights are gone: the next epoch is the best there is
    weights = _class_weights(data, len(card.classes), recipe.class_weights)
    # Twice as fast on CPUs as PyTorch's default layout.
    model.to(memory_format=torch.channels_last)

    while progress.epoch < recipe.epochs:
        if recipe.patience and progress.epoch - progress.best_epoch >= recipe.patience:
            break
        epoch, started, losses = progress.epoch, time.perf_counter(), []
        # All that is random follows from the seed and the epoch: a resumed run repeats it.
        torch.manual_seed(recipe.seed * 100_003 + epoch)
        # Anew in each epoch: a resumed run starts from the same ranges.
        with fake_quantised(model) if recipe.qat else nullcontext():
            model.train()
            for step, (images, labels) in enumerate(_batches(data, card, recipe, epoch)):
                logits = model(images.to(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORE, reduction="sum")
                counted = labels != IGNORE
                # By hand: cross_entropy's mean is NaN on a batch without a counted pixel.
                total = weights[labels[counted]].sum() if weights is not None else counted.sum()
                loss = loss / total.clamp(min=1)
                if not torch.isfinite(loss):
                    raise DeployError(
                        f"the loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}; lower --rate, or check "
                        "the images for NaN"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 5.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                on_step(step + 1, steps, float(np.mean(losses[-20:])))
            model.eval()
            metrics = Metrics.of(evaluate(torch_predictor(model, card), validation, len(card.classes)))
        if math.isnan(metrics.mean_iou):
            raise DeployError("the validation labels hold no counted pixel, so no epoch can be chosen; mend them")
        progress.epoch = epoch + 1
        record = {
            "epoch": progress.epoch,
            "loss": round(float(np.mean(losses)), 5),
            "val_miou": round(metrics.mean_iou, 5),
            "val_pixel_accuracy": round(metrics.pixel_accuracy, 5),
            "seconds": round(time.perf_counter() - started, 1),
        }
        if metrics.mean_iou > progress.best_miou:
            progress.best_miou, progress.best_epoch = metrics.mean_iou, progress.epoch
            checkpoint.training |= {"epoch": progress.epoch, "val_miou": record["val_miou"]}
            save_checkpoint(out, checkpoint)
        record["best"] = progress.best_epoch == progress.epoch
        progress.history.append(record)
        _save(state_path, identity, progress, model, optimizer, schedule)
        on_epoch(record)
    state_path.unlink(missing_ok=True)
    return progress


def _batches(data: LabelledImages, card, recipe: Recipe, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch, each read while the one before is trained on."""
    order = np.random.default_rng((recipe.seed, epoch)).permutation(len(data))
    # A last batch of one crop has no statistics to normalise by; fill it from the start.
    order = np.concatenate([order, np.resize(order, -len(order) % recipe.batch)])

    def load(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        samples = []
        for place, index in enumerate(indices):
            rng = np.random.default_rng((recipe.seed, epoch, int(index), place))
            image, labels = data[int(index)]
            samples.append(
                augment(
                    image, labels, card, recipe.crop, rng,
                    scale=recipe.scale, flip=recipe.flip, brightness=recipe.brightness,
                )
            )  # fmt: skip
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels)

    groups = order.reshape(-1, recipe.batch)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        ahead = reader.submit(load, groups[0])
        for group in groups[1:]:
            batch, ahead = ahead.result(), reader.submit(load, group)
            yield batch
        yield ahead.result()


def _class_weights(data: LabelledImages, classes: int, kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    counts = np.zeros(classes, np.int64)
    for index in range(len(data)):
        labels = data[index][1]
        counts += np.bincount(labels[labels != IGNORE].ravel(), minlength=classes)[:classes]
    share = counts / max(counts.sum(), 1)
    present = share > 0
    weights = np.ones(classes)
    weights[present] = np.median(share[present]) / share[present]
    if kind == "sqrt":
        weights = np.sqrt(weights)
    return torch.from_numpy(np.clip(weights, 0.05, 20).astype(np.float32))


def _save(path: Path, identity: dict, progress: Progress, model, optimizer, schedule) -> None:
    with replacing(path) as temporary:
        # Into memory first: torch's own writer fails on a full disk with an error of its own kind.
        buffer = io.BytesIO()
        torch.save(
            {
                "identity": identity,
                "progress": asdict(progress),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            },
            buffer,
        )
        temporary.write_bytes(buffer.getbuffer())


def _restore(path: Path, identity: dict, model, optimizer, schedule) -> Progress:
    if not path.is_file():
        raise MisuseError(f"there is no {path} to resume from; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        begun = state["identity"]
    except Exception as error:
        raise DeployError(f"cannot resume from {path}: it is damaged; delete it and start again") from error
    for part, wanted in identity.items():
        if begun[part] != wanted:
            different = (
                [name for name in wanted if begun[part].get(name) != wanted[name]]
                if isinstance(wanted, dict)
                else [part]
            )
            raise MisuseError(
                f"{path} was begun with another {different[0]}; resume with the options it was begun with"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return Progress(**state["progress"])
