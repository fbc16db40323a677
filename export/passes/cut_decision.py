"""Take off what makes labels of scores at the end of a model: ArgMax, a threshold, and what follows them."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.analysis.decision import Decision, find_decision
from fcn_deploy.export.graph.operators import BEYOND
from fcn_deploy.export.graph.rewrite import Rewrite, constant, declare_type, input_of, label, needed_input
from fcn_deploy.export.passes.as_argmax import as_argmax, negate_input
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto

AXES = {1: "NCHW", -3: "NCHW", 3: "NHWC", -1: "NHWC", 0: "CHW", 2: "HWC"}  # axis of an ArgMax → those that it reads
RESIZE_KINDS = ("coordinate_transformation_mode", "nearest_mode", "mode")


@dataclass(frozen=True)
class WithoutDecision(PassResult):
    """A model of scores.

    Attributes:
        decision: that was cut off; None: it gave scores before.
    """

    decision: Decision | None = None


def cut_decision(model: ModelProto) -> WithoutDecision:
    """The model with its scores as output instead of labels, and what was cut off.

    Args:
        model: of opset 13 or newer, with one output. Scores come out as they are there: of any layout, with or
            without a batch. Where labels were resized or cropped they are [N,K,H,W], and so are the scores then.

    Raises:
        DeployError: labels are resized or cropped in a way that scores cannot be.
    """
    plain = as_argmax(model)
    found = find_decision(plain.model)
    if found is None:
        return WithoutDecision(model, why_not="no ArgMax or threshold is last")
    edit, decision = Rewrite(plain.model), found.decision
    node = edit.producer(found.node.output[0])
    place = next(place for place, value in enumerate(node.inputs) if value is edit.value(found.scores))
    if decision.below:
        decision = replace(decision, threshold=_turn_round(edit, node, place, decision.threshold or 0.0))
    follower = _Follower(edit, node, needed_input(node, place))
    for step in found.after:
        follower.follow(edit.producer(step.output[0]))
    edit.graph.outputs[0] = follower.scores
    declare_type(follower.scores)
    edit.prune()
    times = f" (times {decision.factor:g}, which is left out)" if decision.factor != 1 else ""
    used = "its scores, turned round, are used" if decision.below else "its scores are used"
    note = f"gives labels{times}; they are taken off with node {decision.node}, and {used}"
    return WithoutDecision(edit.model(), (*plain.notes, note), decision=decision)


def _turn_round(edit: Rewrite, node: ir.Node, place: int, threshold: float) -> float:
    """Let the scores that a node compares be above a threshold where they were below theirs; that threshold."""
    before = needed_input(node, place).producer()
    if before is not None and before.op_type == "Sigmoid":  # they stay probabilities
        negate_input(edit, before)
        return 1 - threshold
    negate_input(edit, node, place)
    return 0.0 - threshold  # -0 would be said of 0


class _Follower:
    """Does to scores what a model does to its labels after the decision.

    Attributes:
        scores: as far as they were followed.
        axes: of the labels, as letters; None where they cannot be told, or do not matter.
    """

    def __init__(self, edit: Rewrite, node: ir.Node, scores: ir.Value) -> None:
        self.edit, self.scores = edit, scores
        self._decided_on, self._node = scores, node
        self.axes = self._axes_of_labels() if self._by_argmax else None

    @property
    def _by_argmax(self) -> bool:
        return self._node.op_type in ("ArgMax", "Hardmax")

    def _axes_of_labels(self) -> str | None:
        """The axes of an ArgMax's result; None where the rank is not known from its axis."""
        axes = AXES.get(self._node.attributes.get_int("axis", 0))
        if axes is None or self._node.op_type == "Hardmax" or self._node.attributes.get_int("keepdims", 1) != 0:
            return axes
        return axes.replace("C", "")

    def follow(self, step: ir.Node) -> None:
        """Take one step more. Raises DeployError where scores cannot."""
        if step.op_type in ("Identity", "Cast", "Mul", "Where", "Not"):
            return
        if step.op_type == "Reshape":
            self.axes = None
        elif step.op_type == "OneHot":
            if self.axes is not None:
                place = step.attributes.get_int("axis", -1) % (len(self.axes) + 1)
                self.axes = f"{self.axes[:place]}C{self.axes[place:]}"
        elif step.op_type in ("Squeeze", "Unsqueeze", "Transpose"):
            self.axes = _moved(step, self.axes) if self.axes is not None else None
        elif step.op_type == "Resize" and step.attributes.get_string("mode", "nearest") != "nearest":
            raise DeployError(f"node {label(step)} interpolates labels, which have no values between them")
        elif not self._by_argmax:
            # A threshold's scores have the labels' own axes.
            inputs = [self.scores, *step.inputs[1:]]
            self.scores = self.edit.of_attributes(
                step.op_type, inputs, f"{step.outputs[0].name}/scores", step.attributes
            )
        else:
            axes = self._planes(step)
            self.scores = self._resized(step, axes) if step.op_type == "Resize" else self._sliced(step, axes)

    def _planes(self, step: ir.Node) -> str:
        """The axes of the labels that a step changes; scores are brought to [N,K,H,W]."""
        if self.axes is None or not {"H", "W"} <= set(self.axes):
            raise DeployError(
                f"node {label(step)} changes labels whose axes cannot be told; name an output of scores by --output"
            )
        if self._node.attributes.get_int("axis", 0) in (3, -1) and self.scores is self._decided_on:
            self.scores = self.edit.node("Transpose", [self.scores], f"{self.scores.name}/planes", perm=[0, 3, 1, 2])
        return self.axes

    def _resized(self, step: ir.Node, axes: str) -> ir.Value:
        """A Resize of labels as one of scores [N,K,H,W]."""
        edit, name = self.edit, f"{step.outputs[0].name}/scores"
        # Where the numbers for H and W are in what the Resize reads.
        letters = [axes[axis] for axis in step.attributes.get_ints("axes", range(len(axes)))]
        if not {"H", "W"} <= set(letters):
            raise DeployError(f"node {label(step)} resizes one side of the labels alone")
        scales = input_of(step, 2)
        wanted = edit.constant(f"{name}/sides", np.array([letters.index("H"), letters.index("W")], np.int64))
        sides = edit.node("Gather", [scales if scales is not None else step.inputs[3], wanted], f"{name}/hw")
        if scales is not None:
            first = edit.constant(f"{name}/ones", np.ones(2, np.float32))
        else:
            two = edit.constant(f"{name}/two", np.array([0, 1], np.int64))
            first = edit.node("Gather", [edit.node("Shape", [self.scores], f"{name}/shape"), two], f"{name}/nk")
        target = edit.node("Concat", [first, sides], f"{name}/target", axis=0)
        inputs = [self.scores, None, target] if scales is not None else [self.scores, None, None, target]
        kinds = {key: step.attributes[key] for key in RESIZE_KINDS if key in step.attributes}
        return edit.of_attributes("Resize", inputs, name, kinds)

    def _sliced(self, step: ir.Node, axes: str) -> ir.Value:
        """A Slice of labels as one of scores [N,K,H,W]."""
        which = constant(input_of(step, 3))
        if which is None:
            if (starts := constant(step.inputs[1])) is None:
                raise DeployError(f"node {label(step)} crops labels by axes that are computed")
            which = np.arange(starts.size)
        letters = [axes[int(axis)] for axis in which.reshape(-1)]
        whole = _takes_all(step)
        kept = [place for place in range(len(letters)) if place not in whole]
        if not {letters[place] for place in kept} <= {"H", "W"}:
            raise DeployError(f"node {label(step)} takes a part of the batch")
        if not kept:  # as TensorFlow adds an axis
            return self.scores
        edit, name = self.edit, f"{step.outputs[0].name}/scores"
        planes = edit.constant(f"{name}/axes", np.array(["NCHW".index(letters[place]) for place in kept], np.int64))
        bounds = [needed_input(step, 1), needed_input(step, 2)]
        bounds += [] if (stride := input_of(step, 4)) is None else [stride]
        if whole:
            places = edit.constant(f"{name}/kept", np.array(kept, np.int64))
            bounds = [edit.node("Gather", [bound, places], f"{name}/bound{i}") for i, bound in enumerate(bounds)]
        return edit.node("Slice", [self.scores, *bounds[:2], planes, *bounds[2:]], name)


def _takes_all(step: ir.Node) -> set[int]:
    """Of the axes that a Slice names, the places of those of which it takes everything, whatever their size."""
    starts, ends = (constant(input_of(step, place)) for place in (1, 2))
    steps = constant(input_of(step, 4))
    if starts is None or ends is None or (steps is None and input_of(step, 4) is not None):
        return set()
    strides = np.ones_like(starts) if steps is None else steps
    whole = (starts == 0) & (ends >= BEYOND) & (strides == 1)
    return set(np.flatnonzero(whole).tolist())


def _moved(step: ir.Node, axes: str) -> str | None:
    """Axes after a Squeeze, Unsqueeze or Transpose; None where they cannot be told."""
    if step.op_type == "Transpose":
        order = step.attributes.get_ints("perm", range(len(axes))[::-1])
        return "".join(axes[place] for place in order) if len(order) == len(axes) else None
    which = constant(input_of(step, 1))
    if which is None:
        return None
    if step.op_type == "Squeeze":
        gone = {int(axis) % len(axes) for axis in which.reshape(-1)}
        return "".join(letter for place, letter in enumerate(axes) if place not in gone)
    length, old = len(axes) + which.size, iter(axes)
    new = {int(axis) % length for axis in which.reshape(-1)}
    return "".join("C" if place in new else next(old) for place in range(length))
