"""PyTorch modules from elsewhere, made float32 [N,C,H,W] → [N,K,h,w]."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from fcn_deploy.fcn.decisions import Decisions, are_labels_of, may_be_labels
from fcn_deploy.fcn.exportable import InSingle, without_autocast
from fcn_deploy.fcn.kept_state import KeptState
from fcn_deploy.fcn.programs import refuse_quantised, set_evaluation, uncompiled
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from torch import nn
from torch.nn.parameter import UninitializedParameter

Note = Callable[[str], None]
# Sizes at which a module's layout is found, the first of a quarter of the pixels: multiples of all that are usual.
TRIED = ((64, 96), (128, 192), (512, 768))
GRIDS = (1, 2, 4, 8, 16, 32)  # factors of the image's size to that of maps that are flattened
USUAL_KEYS = ("out", "logits")  # torchvision's, and that of Hugging Face
# What libraries call the size of images that a network is made for, and what can be one.
SIZE_NAMES = ("img_size", "image_size", "input_size", "default_input_size", "crop_size", "img_dim", "in_size")
LEAST_SIDE, LARGEST_SIDE = 16, 2048
# Usual sides of networks of one size.
SQUARES = (224, 256, 384, 512, 518, 192, 128, 96, 64, 640, 448, 336, 320, 160, 1024)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch.compile's wrapper, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module) or (
            type(module).__name__ in ("DataParallel", "DistributedDataParallel")
            and isinstance(inner := module.module, nn.Module)
        ):
            module = inner
        else:
            return module


class ScoresModule(nn.Module):
    """A module from elsewhere as float32 [N,C,H,W] → scores [N,K,h,w].

    Attributes:
        model: the module, in evaluation mode, in float32 on the CPU.
        channels: of the image.
        path: keys, indices and attributes that lead from what it gives to the scores.
        in_last, out_last: whether it takes [N,H,W,C] and gives [N,h,w,K].
        alone: whether what it gives of one image has no axis for several.
        flat: whether it gives [N,h,w], one score without an axis.
        grid: (axis, factor) of what it gives flattened, [N,K,h·w] or [N,h·w,K]: the axis of the h·w cells, which are at
            1/factor of the image; None: it gives maps.
        labels: whether it gives labels; what it takes them of is given instead.
        mutates: whether it writes into its input.
        keyword: of the argument that takes the image; "": the first one.
        entry: of the dictionary that it takes, under which the image is; "": it takes the image itself.
        casts: whether it wanted half precision when it ran last; it runs in float32 all the same.
        mode: entered while it runs.
        kept: what the module and its code kept before it ran.
    """

    def __init__(self, model: nn.Module, channels: int, kept: KeptState) -> None:
        super().__init__()
        self.model, self.channels, self.kept = model, channels, kept
        self.path: tuple[str | int, ...] = ()
        self.in_last = self.out_last = self.flat = self.alone = self.labels = self.mutates = self.casts = False
        self.keyword = self.entry = ""
        self.grid: tuple[int, int] | None = None
        self.mode: AbstractContextManager = nullcontext()

    def train(self, mode: bool = True) -> "ScoresModule":
        self.training = mode
        with suppress(NotImplementedError):  # of an exported program
            self.model.train(mode)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.labels and (scores := self.decided(x)[1]) is not None:
            return scores
        result = self._result(x)
        if isinstance(result, torch.Tensor) and self.alone:
            result = result.unsqueeze(0)
        if isinstance(result, torch.Tensor) and self.flat:
            result = result.unsqueeze(1)
        if isinstance(result, torch.Tensor) and self.grid is not None:
            axis, factor = self.grid
            rows, columns = ((side + factor - 1) // factor for side in x.shape[2:])
            result = result if axis == 2 else result.transpose(1, 2)
            return result.reshape(result.shape[0], result.shape[1], rows, columns)
        return result.permute(0, 3, 1, 2) if isinstance(result, torch.Tensor) and self.out_last else result

    def _result(self, x: torch.Tensor) -> Any:
        """What of the module's outputs is used; of any floats as float32."""
        result = self._given(x)
        for key in self.path:
            result = _at(result, key)
        return result.float() if isinstance(result, torch.Tensor) and result.is_floating_point() else result

    def decided(self, x: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """(what is used, scores [N,K,h,w] that the module took the last labels of; None: it took none)."""
        with Decisions() as decisions:
            result = self._result(x)
        return result, decisions.scores()

    def _given(self, x: torch.Tensor) -> Any:
        """What the module gives, in whatever form."""
        if self.mutates:
            x = x.clone()
        if self.in_last:
            x = x.permute(0, 2, 3, 1)
        with self.mode, without_autocast() as skipped, InSingle() as single:
            given = {self.entry: x} if self.entry else x
            result = self.model(**{self.keyword: given}) if self.keyword else self.model(given)
        self.casts = bool(skipped) or single.casts
        return result

    def beside(self, x: torch.Tensor) -> tuple[str, dict[str, torch.Tensor]]:
        """(key of the scores, the other tensors by theirs) of what the module gives; nothing where it gives one."""
        if not self.path:
            return "", {}
        with torch.inference_mode():
            result, key = self._given(x), ""
        others: dict[str, torch.Tensor] = {}
        for key in map(str, self.path):
            entries = {str(name): value for name, value in _entries(result).items()}
            found = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor) and name != key}
            others, result = others | found, entries[key]
        return key, others


def scores_of(
    model: nn.Module,
    name: str,
    channels: int | None = None,
    output: str | None = None,
    note: Note = lambda line: None,
    sizes: Sequence[tuple[int, int]] = (),
) -> ScoresModule:
    """A module from elsewhere as [N,C,H,W] → [N,K,h,w], its layout and output found by running it.

    Args:
        channels: of the image; None: as its convolutions tell.
        output: a key, field or index of what it gives; None: `out`, `logits`, or the first map.
        note: called with what was found, a line each, where there was a choice.
        sizes: (height, width) of images that it may take, where it does not take those that are tried first.

    Raises:
        MisuseError: no such output, or a choice that is the user's.
        DeployError: parameters without values, or an output that is no map of scores.
    """
    refuse_quantised(model, name)
    model = _settled(uncompiled(unwrapped(model), note, name), name, note)
    tried = [channels] if channels else _channels(model)
    keyword, failures, kept = _keyword(model), [], KeptState(model)
    for size in (*TRIED, *sizes):
        for count in tried:
            for in_last in (False, True):
                made = ScoresModule(model, count, kept).eval()
                made.in_last, made.keyword = in_last, keyword
                torch.manual_seed(0)
                image = torch.rand(1, count, *size)
                before = image.clone()
                try:
                    result = _run(made, image)
                except Exception as error:  # tried: another layout, or the probe says why not
                    failures.append(error)
                    continue
                made.mutates = not torch.equal(image, before)
                if made.casts:
                    note(f"{name} computes in part in half precision, by autocast or casts; it is exported in float32")
                _find(made, result, size, name, output, note)
                _keep_made_weights(made, size)
                return made
    _refuse_other_dimensions(model, name, failures)
    made = ScoresModule(model, tried[0], kept).eval()
    made.keyword = keyword
    return made


def likely_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """(height, width) of images that a network of one size may take: of its attributes or config, or usual."""
    found: dict[tuple[int, int], None] = {}
    for module in nn.Module.modules(model):
        for owner in (module, getattr(module, "config", None)):
            for name in SIZE_NAMES:
                value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
                sides = [value, value] if isinstance(value, int) else value
                if isinstance(sides, tuple | list) and len(sides) in (2, 3) and all(isinstance(s, int) for s in sides):
                    sides = sides[-2:]
                    if all(LEAST_SIDE <= side <= LARGEST_SIDE for side in sides):
                        found[sides[0], sides[1]] = None
    return list(dict.fromkeys([*found, *((side, side) for side in SQUARES)]))


def _run(made: ScoresModule, image: torch.Tensor) -> Any:
    """What a module gives for an image; where it takes a dictionary, the entry that it reads is set."""
    with torch.inference_mode():
        try:
            return made(image)
        except Exception:
            asked = _Asked(image.permute(0, 2, 3, 1) if made.in_last else image)
            with suppress(Exception):
                result = made.model(**{made.keyword: asked}) if made.keyword else made.model(asked)
                if len(set(asked.keys_read)) == 1:
                    made.entry = asked.keys_read[0]
                    return result
            raise


class _Asked(dict):
    """A dictionary that has an image under whatever name it is asked for, and knows which that was."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.image, self.keys_read = image, list[str]()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.keys_read.append(key)
        return self.image


def _keyword(model: nn.Module) -> str:
    """The name of the argument that takes the image, where it is given by name alone; else ""."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD, each.VAR_POSITIONAL) for each in parameters):
        return ""
    named = [each for each in parameters if each.kind == each.KEYWORD_ONLY]
    needed = [each.name for each in named if each.default is each.empty]
    return next(iter([*needed, *(each.name for each in named)]), "")


def _refuse_other_dimensions(model: nn.Module, name: str, failures: list[Exception]) -> None:
    """Raise DeployError where a module that ran for no image is one of volumes or signals."""
    layers = [layer for layer in nn.Module.modules(model) if isinstance(layer, nn.modules.conv._ConvNd)]
    sides = {len(layer.kernel_size) for layer in layers}
    if failures and sides in ({3}, {1}):
        what = "volumes [N,C,D,H,W] (Conv3d)" if sides == {3} else "signals [N,C,L] (Conv1d)"
        raise DeployError(f"{name} works on {what}; only networks of images [N,C,H,W] are taken")


def _find(made: ScoresModule, result: Any, size: tuple[int, int], name: str, output: str | None, note: Note) -> None:
    """Set the path and the layout of a module from what it gave for an image of this size; say what was chosen."""
    while not isinstance(result, torch.Tensor):
        entries = _entries(result)
        if not entries:
            raise DeployError(f"{name} gives {type(result).__name__}; a segmentation network gives scores [N,K,H,W]")
        key = _chosen(entries, result, name, output)
        if len(entries) > 1 and output is None:
            given = ", ".join(map(str, entries))
            note(f"{name} gives several outputs ({given}); {key} is used, and --output takes another")
        made.path, result, output = (*made.path, key), entries[key], None
    if output is not None:
        raise MisuseError(f"{name} gives one tensor; omit --output {output}")
    if may_be_labels(result) and _gives_labels(made, size):
        made.labels = True
        note(f"{name} gives labels {list(result.shape)}; the scores that it takes them of are used")
        return
    if not result.is_floating_point():
        raise DeployError(
            f"{name} gives {str(result.dtype).removeprefix('torch.')} {list(result.shape)}; it must give scores, "
            "before an argmax or a threshold"
        )
    if torch.equal(result, result.round()) and _gives_whole_numbers(made, size):
        raise DeployError(
            f"{name} gives whole numbers alone, {list(result.shape)}, as labels are; it must give scores, before an "
            "argmax or a threshold"
        )
    height, width = size
    if _is_without_batch(result.shape, size):
        made.alone = True
        note(f"{name} gives {list(result.shape)} of one image, without an axis for several")
        result = result[None]
    if result.ndim == 3 and result.shape[1] * width == result.shape[2] * height:
        made.flat = True
        note(f"{name} gives [N,H,W], which is taken for one score [N,1,H,W]")
    elif result.ndim == 3 and (grid := _grid(result.shape, size)) is not None:
        made.grid = grid
        note(f"{name} gives {list(result.shape)}, whose pixels are flattened; they are put into rows and columns again")
    elif result.ndim == 4 and result.shape[2] * width != result.shape[3] * height:
        made.out_last = result.shape[1] * width == result.shape[2] * height
    if made.in_last or made.out_last:
        first, last = ("[N,H,W,C]" if side else "[N,C,H,W]" for side in (made.in_last, made.out_last))
        note(f"{name} takes {first} and gives {last.replace('C', 'K')}; it is exported as [N,C,H,W] → [N,K,H,W]")


def _keep_made_weights(made: ScoresModule, size: tuple[int, int]) -> None:
    """Let what a module keeps of its first run stay, where that is no function of the image, as weights made in it."""
    if not made.kept.restore():
        return
    image, found = torch.rand(1, made.channels, *size), []
    for seed in (1, 2):
        made.kept.restore()
        torch.manual_seed(seed)
        with torch.inference_mode():
            found.append(made(image.clone()))
    if found[0].shape != found[1].shape or not torch.equal(*found):
        made.kept = KeptState(made.model)


def _gives_whole_numbers(made: ScoresModule, size: tuple[int, int]) -> bool:
    """Whether a module gives several whole numbers, and none between them, for noise that is strong."""
    with torch.inference_mode():
        result = made(30.0 * torch.randn(1, made.channels, *size, generator=torch.Generator().manual_seed(1)))
    return bool(result.max() > result.min()) and torch.equal(result, result.round())


def _gives_labels(made: ScoresModule, size: tuple[int, int]) -> bool:
    """Whether a module gives the best of the scores that it took labels of, and nothing else is done to these."""
    random = torch.Generator().manual_seed(1)
    for strength in (1.0, 30.0):
        with torch.inference_mode():
            result, scores = made.decided(strength * torch.randn(1, made.channels, *size, generator=random))
        if scores is None or not are_labels_of(result, scores):
            return False
    return True


def _is_without_batch(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether what a module gives of one image is [h,w], [K,h,w] or [h,w,K]."""
    height, width = size
    places = {2: (0,), 3: (0, 1)}.get(len(shape), ())
    return shape[:1] != (1,) and any(shape[at] * width == shape[at + 1] * height for at in places)


def _grid(shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int] | None:
    """(axis, factor) of flattened maps for an image of this size; None: they are none."""
    for factor in GRIDS:
        cells = math.prod((side + factor - 1) // factor for side in size)
        for axis in (1, 2):
            if shape[axis] == cells and shape[3 - axis] != cells:
                return axis, factor
    return None


def _entries(result: Any) -> dict[str | int, Any]:
    """What a module gives, by key, field or index; what is None is left out."""
    if isinstance(result, Mapping):
        found = dict(result)
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        found = {field: getattr(result, field) for field in result._fields}
    elif isinstance(result, tuple | list):
        found = dict(enumerate(result))
    elif dataclasses.is_dataclass(result):
        found = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    else:
        found = {}
    return {key: value for key, value in found.items() if value is not None}


def _at(result: Any, key: str | int) -> Any:
    return getattr(result, key) if isinstance(key, str) and not isinstance(result, Mapping) else result[key]


def _chosen(entries: dict[str | int, Any], result: Any, name: str, output: str | None) -> str | int:
    if output is not None:
        keys = {str(key): key for key in entries} | {str(index): key for index, key in enumerate(entries)}
        if output not in keys:
            raise MisuseError(f"{name} gives no output {output}; choose one of {', '.join(map(str, entries))}")
        return keys[output]
    for key in USUAL_KEYS:
        if key in entries:
            return key
    maps = [key for key, value in entries.items() if isinstance(value, torch.Tensor) and value.ndim >= 3]
    if len(maps) == 1 or (maps and isinstance(result, tuple | list)):
        return max(maps, key=lambda key: _rank(entries[key]))  # the first of equal ones
    if len(entries) == 1 or isinstance(result, tuple | list):
        return next(iter(entries))
    raise MisuseError(f"{name} gives {', '.join(map(str, entries))}; name the scores with --output")


def _rank(value: torch.Tensor) -> tuple[bool, int, bool, int]:
    """How likely one of several maps is the scores: of several classes, and as fine as any.

    Of what `max` gives, shares and labels of one shape, the labels, which are taken off of the scores.
    """
    several = value.ndim == 4 and min(value.shape[1], value.shape[3]) > 1
    return several, value.ndim, not value.is_floating_point(), math.prod(value.shape[-2:])


def _settled(model: nn.Module, name: str, note: Note) -> nn.Module:
    """The module in evaluation mode, in float32 on the CPU: itself, or a copy where that needs one."""
    tensors = [*nn.Module.parameters(model), *nn.Module.buffers(model)]
    for path, layer in nn.Module.named_modules(model):
        if any(isinstance(each, UninitializedParameter) for each in layer.parameters(recurse=False)):
            raise DeployError(
                f"{name}: {path or 'its layer'} ({type(layer).__name__}) has no weights before its first image; run it "
                "once, and load its weights"
            )
    if any(tensor.is_meta for tensor in tensors):
        raise DeployError(f"{name} has parameters without values (on the meta device); load its weights first")
    for path, layer in nn.Module.named_modules(model):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise DeployError(
                f"{name}: {path or 'its batch norm'} keeps no running statistics, so that an image's scores change "
                "with what else is in its batch; train it with track_running_stats=True, or with InstanceNorm2d"
            )
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {torch.float32}
    devices = {str(tensor.device) for tensor in tensors} - {"cpu"}
    if dtypes or devices:
        what = ", ".join(sorted(devices | {str(dtype).removeprefix("torch.") for dtype in dtypes}))
        note(f"{name} is in {what}; it is exported in float32 from the CPU")
        try:
            model = copy.deepcopy(model).to("cpu", torch.float32)
        except Exception as error:  # it holds a lock, a file, or a tensor that is computed of others
            raise DeployError(
                f"{name} cannot be copied ({one_line(error, 100)}); give it in float32 on the CPU, by .float().cpu()"
            ) from error
    changing = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(isinstance(layer, changing) and layer.training for layer in nn.Module.modules(model)):
        note(f"{name} was in training mode; it is exported in evaluation mode")
    return set_evaluation(model)


def _channels(model: nn.Module) -> list[int]:
    """Of the image, the likeliest first: those of the first convolution, which may be another one's."""
    layers = [layer for layer in nn.Module.modules(model) if isinstance(layer, nn.Conv2d)]
    return list(dict.fromkeys([*(layer.in_channels for layer in layers[:1]), 3, 1, 4]))
