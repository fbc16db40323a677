"""Labels that a PyTorch module gives, as numbers or one-hot: the scores that it takes them of."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

DECISIONS = (torch.argmax, torch.Tensor.argmax, torch.max, torch.Tensor.max)


class Decisions(TorchFunctionMode):
    """While it is entered, what the best of several is taken of is collected: `seen`, (tensor, axis), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        axis = given.get("dim", given.get("axis", args[1] if len(args) > 1 else None))
        if func in DECISIONS and type(axis) is int and args and args[0].is_floating_point() and args[0].ndim == 4:
            self.seen.append((args[0], axis))
        return func(*args, **given)

    def scores(self) -> torch.Tensor | None:
        """[N,K,h,w], of which the last labels were taken; None: none were."""
        return self.seen[-1][0].movedim(self.seen[-1][1], 1) if self.seen else None


def are_labels_of(result: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether what a module gives is the best of scores [N,K,h,w]: a number each, or a plane for each class."""
    count, labels = scores.shape[1], scores.argmax(1)
    planes = F.one_hot(labels, count)
    forms = (labels, labels.unsqueeze(1), labels.unsqueeze(-1), planes, planes.movedim(-1, 1))
    return count > 1 and any(result.shape == form.shape and torch.equal(result.long(), form) for form in forms)


def may_be_labels(result: torch.Tensor) -> bool:
    """Whether what a module gives are whole numbers, or zeros and ones."""
    return not result.is_floating_point() or bool(((result == 0) | (result == 1)).all())
