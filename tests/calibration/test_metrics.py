"""The paper's four metrics from a confusion matrix."""

import math

import numpy as np
import pytest
from fcn_deploy.calibration.metrics import Metrics, confusion_matrix


def test_a_worked_example():
    # Of 10 pixels of class 0, 8 are right; of 5 of class 1, 4; class 2 never occurs but is predicted once.
    confusion = np.array([[8, 1, 1], [1, 4, 0], [0, 0, 0]])
    metrics = Metrics.of(confusion)
    assert metrics.pixel_accuracy == pytest.approx(12 / 15)
    assert metrics.mean_accuracy == pytest.approx((8 / 10 + 4 / 5) / 2)
    assert metrics.mean_iou == pytest.approx((8 / 11 + 4 / 6) / 2)
    assert metrics.frequency_weighted_iou == pytest.approx((10 * 8 / 11 + 5 * 4 / 6) / 15)
    assert metrics.absent == [2] and math.isnan(metrics.class_iou[2])


def test_confusion_counts_by_reference_and_prediction_and_leaves_ignored_pixels_out():
    reference = np.array([[0, 0, 1, 255]], np.uint8)
    predicted = np.array([[0, 1, 1, 7]], np.uint8)
    np.testing.assert_array_equal(confusion_matrix(reference, predicted, 2), [[1, 1], [0, 1]])


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="label 3 with 2 classes"):
        confusion_matrix(np.array([3]), np.array([0]), 2)
    with pytest.raises(ValueError, match="label 2 with 2 classes"):
        confusion_matrix(np.array([0]), np.array([2]), 2)
    with pytest.raises(ValueError, match="shape"):
        confusion_matrix(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)


def test_nothing_counted_is_nan_and_not_zero():
    metrics = Metrics.of(np.zeros((2, 2), np.int64))
    assert all(map(math.isnan, (metrics.pixel_accuracy, metrics.mean_iou, metrics.frequency_weighted_iou)))
