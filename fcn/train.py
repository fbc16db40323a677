"""Training: one loop, images of mixed sizes, best checkpoint by validation mIoU, resumable and seeded."""

import io
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fcn_deploy.calibration.datasets import LabelledImages, class_pixels
from fcn_deploy.calibration.metrics import IGNORE, Metrics
from fcn_deploy.fcn.architecture import AnySize
from fcn_deploy.fcn.checkpoint import Checkpoint, save_checkpoint
from fcn_deploy.fcn.crops import Crops, image_pixels
from fcn_deploy.fcn.evaluate import evaluate
from fcn_deploy.fcn.quantization import fake_quantized
from fcn_deploy.fcn.recipes import Recipe
from fcn_deploy.fcn.staged import TorchPredictor
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from torch import nn

POWER = 0.9  # of the schedule `poly`
LARGE = 8_000_000  # pixels of validation images
WARM_UP = 0.05  # of all steps, before `cosine` and `poly`


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
    """Train a network; its best weights by validation mIoU are in `out` after every validated epoch.

    A run that stops midway leaves `out`.state beside `out`; with `resume` it goes on from its last epoch
    and ends as the uninterrupted run would have. The log (`log_path`) is there after every epoch too, and stays.

    Args:
        checkpoint: the network to start from, and its card.
        data, validation: labelled images of any sizes. Validation is of whole images.
        recipe: how to train.
        out: checkpoint to write.
        resume: continue from `out`.state.
        on_step: called with (step, steps per epoch, loss).
        on_epoch: called with the epoch's record.

    Raises:
        MisuseError: nothing to resume, or it was begun with another recipe.
        DeployError: the loss is no longer finite, or a file cannot be written.
    """
    run = _Run(checkpoint, data, validation, recipe, out)
    if resume:
        run.restore()
    checkpoint.training |= {"recipe": asdict(recipe)}
    write_log(out, run.identity, run.progress)
    while run.progress.epoch < recipe.epochs and not run.out_of_patience():
        on_epoch(run.epoch(on_step))
    run.state_path.unlink(missing_ok=True)
    return run.progress


class _Run:
    """A training under way: the network, what changes its weights, and where it is.

    Attributes:
        progress: so far.
        identity: what a run must have in common with the one that it resumes.
        average: the moving average of the weights, by name; None where the recipe wants none.
    """

    def __init__(
        self, checkpoint: Checkpoint, data: LabelledImages, validation: LabelledImages, recipe: Recipe, out: Path
    ) -> None:
        self.checkpoint, self.model, self.card = checkpoint, checkpoint.model, checkpoint.card
        self.data, self.validation, self.recipe, self.out = data, validation, recipe, out
        self.crops = Crops(data, self.card, recipe)
        self.steps = math.ceil(len(self.crops) / recipe.batch)  # of an epoch
        # What exporting the network for it takes is worth a few megapixels.
        self.large = sum(image_pixels(validation)) > LARGE
        self.optimizer, self.schedule = _optimizer(self.model, recipe, self.steps)
        self.average = _copied(self.model) if recipe.ema else None
        self.progress = Progress()
        self.state_path = out.with_name(out.name + ".state")
        self.identity: dict[str, Any] = {
            "recipe": asdict(recipe), "architecture": self.model.architecture.to_dict(),
            "card": json.loads(self.card.to_json()), "images": len(data), "files": _names_and_sizes(data, validation),
        }  # fmt: skip
        self.model.channels_last()

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        return _class_weights(self.data, len(self.card.classes), self.recipe.class_weights)

    def out_of_patience(self) -> bool:
        progress = self.progress
        judged = bool(progress.history) and progress.history[-1]["val_miou"] is not None
        return judged and 0 < self.recipe.patience <= progress.epoch - progress.best_epoch

    def epoch(self, on_step: Callable[[int, int, float], None]) -> dict[str, Any]:
        """Train on crops of every image, validate where the recipe says so, save all; the epoch's record."""
        epoch, started = self.progress.epoch, time.perf_counter()
        # All that is random follows from the seed and the epoch: a resumed run repeats it.
        torch.manual_seed(self.recipe.seed * 100_003 + epoch)
        # Anew in each epoch: a resumed run starts from the same ranges.
        with fake_quantized(self.model) if self.recipe.qat else nullcontext():
            losses, rate = self._steps(epoch, on_step)
            validating = time.perf_counter()
            metrics = self._validate(epoch) if self.recipe.validates(epoch + 1) else None
        self.progress.epoch = epoch + 1
        record = {
            "epoch": self.progress.epoch,
            "loss": round(float(np.mean(losses)), 5),
            "rate": rate,
            "val_miou": metrics and round(metrics.mean_iou, 5),
            "val_pixel_accuracy": metrics and round(metrics.pixel_accuracy, 5),
            "val_class_iou": metrics and _by_class(self.card.classes, metrics.class_iou),
            "seconds": round(time.perf_counter() - started, 1),
            "val_seconds": round(time.perf_counter() - validating, 1),
            "best": self.progress.best_epoch == self.progress.epoch,
        }
        self.progress.history.append(record)
        save_state(self.state_path, self._state())
        write_log(self.out, self.identity, self.progress)
        return record

    def _steps(self, epoch: int, on_step: Callable[[int, int, float], None]) -> tuple[list[float], float]:
        """The loss of each step, and the last learning rate."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        losses: list[float] = []
        self.model.train()
        for step, (images, labels) in enumerate(self.crops.batches(epoch)):
            logits = self.model(images.to(memory_format=torch.channels_last))
            loss = segmentation_loss(logits, labels, self.recipe, self.class_weights)
            if not torch.isfinite(loss):
                raise DeployError(
                    f"the loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}; lower --rate, or check "
                    "the images for NaN"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 5.0)
            rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.schedule.step()
            if self.average is not None:
                _follow(self.average, self.model, self.recipe.ema, epoch * self.steps + step)
            losses.append(loss.item())
            on_step(step + 1, self.steps, float(np.mean(losses[-20:])))
        return losses, rate

    def _validate(self, epoch: int) -> Metrics:
        """Metrics of the averaged weights, which are written where they are the best so far."""
        progress = self.progress
        self.model.eval()
        with _holding(self.model, self.average):
            predict = TorchPredictor(self.model, self.card, exported=self.large)
            confusion = evaluate(predict, self.validation, len(self.card.classes), where=predict.where)
            metrics = Metrics.of(confusion)
            if math.isnan(metrics.mean_iou):
                raise DeployError("the validation labels hold no counted pixel, so no epoch can be chosen; mend them")
            if metrics.mean_iou > progress.best_miou:
                progress.best_miou, progress.best_epoch = metrics.mean_iou, epoch + 1
                self.checkpoint.training |= {"epoch": epoch + 1, "val_miou": round(metrics.mean_iou, 5)}
                save_checkpoint(self.out, self.checkpoint)
        return metrics

    def _state(self) -> dict[str, Any]:
        """All that a resumed run starts from."""
        return {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average,
        }

    def restore(self) -> None:
        """Go on from the state that a run left."""
        path = self.state_path
        if not path.is_file():
            raise MisuseError(f"there is no {path} to resume from; start without --resume")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            begun = state["identity"]
        except Exception as error:
            raise DeployError(f"cannot resume from {path}: it is damaged; delete it and start again") from error
        names = {"images": "number of images", "files": "set of images", "card": "meaning of images and classes"}
        for part, wanted in self.identity.items():
            if (had := begun.get(part)) != wanted:
                both = isinstance(wanted, dict) and isinstance(had, dict)
                different = [key for key in wanted if had.get(key) != wanted[key]] if both else []
                how = f": its {', '.join(different)} differ" if different else ""
                raise MisuseError(
                    f"{path} was begun with another {names.get(part, part)}{how}; resume with the options it was "
                    "begun with"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.update(state["average"])
        self.progress = Progress(**state["progress"])
        if not self.out.exists():
            self.progress.best_miou = -1.0  # the best weights are gone: the next epoch is the best there is


def _names_and_sizes(*splits: LabelledImages) -> int:
    """A checksum of what the images are called and of their pixels, in order; folders may be moved."""
    found = [[(data.name(index), pixels) for index, pixels in enumerate(image_pixels(data))] for data in splits]
    return zlib.crc32(json.dumps(found).encode())


def save_state(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        # Into memory first: torch's own writer fails on a full disk with an error of its own kind.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        temporary.write_bytes(buffer.getbuffer())


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _optimizer(
    model: AnySize, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a rate of its own for the backbone, and the schedule of both."""
    backbone = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    known = set(map(id, backbone))
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in known]
    rates = [recipe.rate, recipe.rate * recipe.backbone_rate]
    groups = [
        {"params": parameters, "lr": rate} for parameters, rate in zip((others, backbone), rates, strict=True)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, weight_decay=recipe.weight_decay)
    total = recipe.epochs * steps
    if recipe.schedule == "one-cycle":
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.2)
    warm = max(1, round(total * WARM_UP))

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        left = max(0.0, 1 - (step - warm) / max(total - warm, 1))
        return left**POWER if recipe.schedule == "poly" else (1 - math.cos(math.pi * left)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def segmentation_loss(
    logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy over the counted pixels, or the hardest of them, and the soft Jaccard loss beside it.

    Args:
        logits: [N, K, H, W].
        labels: int64 [N, H, W]; 255 is not counted. 0 where no pixel is.
        recipe: its `hardest` and `jaccard`.
        weights: of the classes, [K].
    """
    counted = labels != IGNORE
    if recipe.hardest < 1:
        losses = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORE, reduction="none")[counted]
        kept = max(1, round(recipe.hardest * losses.numel()))
        losses, chosen = losses.topk(min(kept, losses.numel()))
        loss = losses.sum()
        total = weights[labels[counted][chosen]].sum() if weights is not None else torch.tensor(losses.numel())
    else:
        loss = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORE, reduction="sum")
        # By hand: cross_entropy's mean is NaN on a batch without a counted pixel.
        total = weights[labels[counted]].sum() if weights is not None else counted.sum()
    loss = loss / total.clamp(min=1)
    return loss + recipe.jaccard * soft_jaccard_loss(logits, labels) if recipe.jaccard else loss


def soft_jaccard_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 − the mean IoU of probabilities over the classes in the batch (Rahman and Wang, 2016); 0 where there are none.

    `logits` and `labels` are those of `segmentation_loss`.
    """
    counted = labels != IGNORE
    target = torch.where(counted, labels, 0)
    probabilities = logits.softmax(1) * counted[:, None]
    classes = logits.shape[1]
    # The probability of a pixel's own class, summed by class: a one-hot mask would take as much memory as the logits.
    own = probabilities.gather(1, target[:, None])[:, 0]
    hits = own.new_zeros(classes).index_add(0, target.flatten(), own.flatten())
    present = torch.bincount(target[counted], minlength=classes)
    union = probabilities.sum((0, 2, 3)) + present - hits
    seen = present > 0
    return (1 - hits[seen] / union[seen]).sum() / seen.sum().clamp(min=1)


def _follow(average: dict[str, torch.Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights, and towards batch norm's statistics with them.

    Both lag alike, so that the averaged statistics are those of the averaged weights. The first steps count more
    (TensorFlow's ExponentialMovingAverage): the average forgets the weights that training began with.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, share)
        else:
            average[name].copy_(tensor)


@contextmanager
def _holding(model: nn.Module, average: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Within the block the model has the averaged weights; afterwards, its own again."""
    if average is None:
        yield
        return
    own = _copied(model)
    model.load_state_dict(average)
    try:
        yield
    finally:
        model.load_state_dict(own)


def log_path(out: Path) -> Path:
    """The log of a run beside its checkpoint: x.safetensors → x.log.jsonl."""
    return out.with_suffix(".log.jsonl")


def write_log(out: Path, identity: dict[str, Any], progress: Progress) -> None:
    """One JSON line that says what is trained and how, and one for each epoch.

    Written anew from the history that is resumed, so no epoch is there twice, and none is cut in half.
    """
    with replacing(log_path(out)) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (identity, *progress.history)))


def _by_class(classes: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    """IoU by the name of the class; None where the labels hold none of it."""
    return {name: None if math.isnan(iou) else round(iou, 5) for name, iou in zip(classes, values, strict=True)}


def _class_weights(data: LabelledImages, classes: int, kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    counts = class_pixels(data)
    share = counts / max(counts.sum(), 1)
    present = share > 0
    weights = np.ones(classes)
    weights[present] = np.median(share[present]) / share[present]
    if kind == "sqrt":
        weights = np.sqrt(weights)
    return torch.from_numpy(np.clip(weights, 0.05, 20).astype(np.float32))
