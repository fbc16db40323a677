"""What a class loses in low precision, and that the gate sees a class that few pixels have."""

import numpy as np
import pytest
from fcn_deploy.calibration.stream import ImageStream
from fcn_deploy.export.quantization.class_drops import against_labels, against_results
from fcn_deploy.export.quantization.gate import AccuracyGate
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.engine_format.stage import Upsampling
from helpers import onnx_model
from onnx import helper

from fcn_deploy import MisuseError, ModelCard

CARD = ModelCard(classes=("ground", "road", "mark"), mean=(0,) * 3, std=(1,) * 3)
DATA = np.ones((128, 128), bool)


def scene():
    labels = np.zeros((128, 128), np.uint8)
    labels[:, 64:] = 1
    labels[20:32, 20:32] = 2
    return labels


def test_a_class_that_vanishes_is_lost_and_a_border_that_moves_is_not():
    before, moved, gone = scene(), scene(), scene()
    moved[:, 64] = 0
    gone[gone == 2] = 0
    lost, beyond = against_results([before], [moved], [DATA], 3, 1)
    assert 1 < lost[1] < 2 and beyond == {0: 0, 1: 0, 2: 0}
    lost, beyond = against_results([before], [gone], [DATA], 3, 1)
    assert lost[2] == beyond[2] == 100 and beyond[1] == 0


def test_classes_of_too_few_pixels_are_not_judged():
    before = scene()
    before[before == 2] = 0
    before[0, :10] = 2
    after = np.where(before == 2, 0, before)
    assert set(against_results([before], [after], [DATA], 3, 1)[0]) == {0, 1}
    confusion = np.diag([1000, 1000, 10])
    assert set(against_labels(confusion, confusion)) == {0, 1}


def test_masks_are_judged_each_by_itself():
    before = np.stack([scene() == index for index in range(3)])
    after = before.copy()
    after[2] = False
    lost, _ = against_results([before], [after], [DATA], 3, 1)
    assert lost == {0: 0, 1: 0, 2: 100}


def core(mark):
    """Scores of three classes, of which `mark` weighs the last."""
    weight = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    weight[2, 2] = mark
    return onnx_model([helper.make_node("Conv", ["image", "w"], ["scores"])], {"w": weight}, gives=("N", 3, "h", "w"))


def test_the_gate_names_the_class_that_is_lost_though_the_mean_holds():
    image = np.eye(3, dtype=np.uint8)[scene()] * 200
    stream = ImageStream(["a.png"], lambda name: image)
    options = {"max_drop": 2.0, "max_class_drop": 2.0, "kernels_exact": False}
    gate = AccuracyGate(core(1), Upsampling(), CARD, stream, None, **options)
    whole, without = gate.measure(core(1)), gate.measure(core(-1))
    assert gate.holds(whole) and gate.class_drops(whole) == {}
    assert gate.drop(without.value) < 2 and not gate.holds(without)
    assert gate.class_drops(without) == {"mark": 100.0}
    assert gate.lost(without).startswith("class mark loses 100.0 points of IoU, 2 allowed")


def test_what_a_class_may_lose_follows_the_mean_where_it_is_not_said():
    given = {"int8": True, "calib": "images"}
    assert QuantizationOptions(**given).class_drop == 2
    assert QuantizationOptions(**given, max_drop=100).class_drop == 100
    assert QuantizationOptions(**given, max_class_drop=0.5).class_drop == 0.5
    with pytest.raises(MisuseError, match=r"--max-class-drop -1; give points of 0 or more"):
        QuantizationOptions(**given, max_class_drop=-1)
    with pytest.raises(MisuseError, match=r"--max-class-drop is for low precision"):
        QuantizationOptions(max_class_drop=1)
