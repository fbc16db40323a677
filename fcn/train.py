"""Training: one loop, images of mixed sizes, best checkpoint by validation mIoU, resumable and seeded."""

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fcn_deploy.calibration.datasets import LabelledImages, class_pixels
from fcn_deploy.calibration.metrics import IGNORE, Metrics
from fcn_deploy.fcn.augment import augment
from fcn_deploy.fcn.checkpoint import Checkpoint, save_checkpoint
from fcn_deploy.fcn.evaluate import evaluate, torch_predictor
from fcn_deploy.fcn.quantization import fake_quantised
from fcn_deploy.fcn.recipes import Recipe
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing

POWER = 0.9  # of the schedule `poly`
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
    optimizer, schedule = _optimizer(model, recipe, steps)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()} if recipe.ema else None
    progress = Progress()
    state_path = out.with_name(out.name + ".state")
    identity = {
        "recipe": asdict(recipe), "architecture": model.architecture.to_dict(), "images": len(data),
    }  # fmt: skip
    if resume:
        progress = _restore(state_path, identity, model, optimizer, schedule, average)
        if not out.exists():
            progress.best_miou = -1.0  # the best weights are gone: the next epoch is the best there is
    weights = _class_weights(data, len(card.classes), recipe.class_weights)
    checkpoint.training |= {"recipe": asdict(recipe)}
    # Twice as fast on CPUs as PyTorch's default layout.
    model.to(memory_format=torch.channels_last)
    write_log(out, identity, progress)

    while progress.epoch < recipe.epochs:
        judged = bool(progress.history) and progress.history[-1]["val_miou"] is not None
        if recipe.patience and judged and progress.epoch - progress.best_epoch >= recipe.patience:
            break
        epoch, started, losses = progress.epoch, time.perf_counter(), []
        metrics = None
        # All that is random follows from the seed and the epoch: a resumed run repeats it.
        torch.manual_seed(recipe.seed * 100_003 + epoch)
        # Anew in each epoch: a resumed run starts from the same ranges.
        with fake_quantised(model) if recipe.qat else nullcontext():
            model.train()
            for step, (images, labels) in enumerate(_batches(data, card, recipe, epoch)):
                logits = model(images.to(memory_format=torch.channels_last))
                loss = segmentation_loss(logits, labels, recipe, weights)
                if not torch.isfinite(loss):
                    raise DeployError(
                        f"the loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}; lower --rate, or check "
                        "the images for NaN"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 5.0)
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                if average is not None:
                    _follow(average, model, recipe.ema, epoch * steps + step)
                losses.append(loss.item())
                on_step(step + 1, steps, float(np.mean(losses[-20:])))
            validating = time.perf_counter()
            if recipe.validates(epoch + 1):
                model.eval()
                with _holding(model, average):
                    metrics = Metrics.of(evaluate(torch_predictor(model, card), validation, len(card.classes)))
                    if math.isnan(metrics.mean_iou):
                        raise DeployError(
                            "the validation labels hold no counted pixel, so no epoch can be chosen; mend them"
                        )
                    if metrics.mean_iou > progress.best_miou:
                        progress.best_miou, progress.best_epoch = metrics.mean_iou, epoch + 1
                        checkpoint.training |= {"epoch": epoch + 1, "val_miou": round(metrics.mean_iou, 5)}
                        save_checkpoint(out, checkpoint)
        progress.epoch = epoch + 1
        record = {
            "epoch": progress.epoch,
            "loss": round(float(np.mean(losses)), 5),
            "rate": rate,
            "val_miou": metrics and round(metrics.mean_iou, 5),
            "val_pixel_accuracy": metrics and round(metrics.pixel_accuracy, 5),
            "val_class_iou": metrics and _by_class(card.classes, metrics.class_iou),
            "seconds": round(time.perf_counter() - started, 1),
            "val_seconds": round(time.perf_counter() - validating, 1),
            "best": progress.best_epoch == progress.epoch,
        }
        progress.history.append(record)
        _save(state_path, identity, progress, model, optimizer, schedule, average)
        write_log(out, identity, progress)
        on_epoch(record)
    state_path.unlink(missing_ok=True)
    return progress


def _optimizer(model, recipe: Recipe, steps: int):
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


def _follow(average: dict[str, torch.Tensor], model, decay: float, step: int) -> None:
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
def _holding(model, average: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Within the block the model has the averaged weights; afterwards, its own again."""
    if average is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(average)
    try:
        yield
    finally:
        model.load_state_dict(own)


def log_path(out: Path) -> Path:
    """The log of a run beside its checkpoint: x.safetensors → x.log.jsonl."""
    return out.with_suffix(".log.jsonl")


def write_log(out: Path, identity: dict, progress: Progress) -> None:
    """One JSON line that says what is trained and how, and one for each epoch.

    Written anew from the history that is resumed, so no epoch is there twice, and none is cut in half.
    """
    with replacing(log_path(out)) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (identity, *progress.history)))


def _by_class(classes, values) -> dict[str, float | None]:
    """IoU by the name of the class; None where the labels hold none of it."""
    return {name: None if math.isnan(iou) else round(iou, 5) for name, iou in zip(classes, values, strict=True)}


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
                    scale=recipe.scale, flip=recipe.flip, turn=recipe.turn, brightness=recipe.brightness,
                    color=recipe.color, blur=recipe.blur,
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
    counts = class_pixels(data, classes)
    share = counts / max(counts.sum(), 1)
    present = share > 0
    weights = np.ones(classes)
    weights[present] = np.median(share[present]) / share[present]
    if kind == "sqrt":
        weights = np.sqrt(weights)
    return torch.from_numpy(np.clip(weights, 0.05, 20).astype(np.float32))


def _save(path: Path, identity: dict, progress: Progress, model, optimizer, schedule, average) -> None:
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
                "average": average,
            },
            buffer,
        )
        temporary.write_bytes(buffer.getbuffer())


def _restore(path: Path, identity: dict, model, optimizer, schedule, average) -> Progress:
    if not path.is_file():
        raise MisuseError(f"there is no {path} to resume from; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        begun = state["identity"]
    except Exception as error:
        raise DeployError(f"cannot resume from {path}: it is damaged; delete it and start again") from error
    names = {"images": "number of images"}
    for part, wanted in identity.items():
        if begun[part] != wanted:
            different = [key for key in wanted if begun[part].get(key) != wanted[key]] if part != "images" else []
            how = f": its {', '.join(different)} differ" if different else ""
            raise MisuseError(
                f"{path} was begun with another {names.get(part, part)}{how}; resume with the options it was begun with"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if average is not None:
        average.update(state["average"])
    return Progress(**state["progress"])
