"""A few of the combinations that `make engine-matrix` builds all of, by build-engine's whole path."""

import json

import pytest
from helpers import FAMILY, ROOT, benchmark, needs

ONE = "mobilenet-v2-16-learned"  # with skips, learned upsampling and depthwise layers


@pytest.mark.slow
def test_a_network_builds_for_gpus_in_every_precision():
    needs("tensorrt_rtx")
    rows = json.loads(benchmark("engine_matrix", "--json", "--width", 0.125, "--only", ONE))
    assert [(row["network"], row["precision"]) for row in rows] == [
        (ONE, precision) for precision in ("float32", "float16", "bf16", "int8", "fp8")
    ]
    for row in rows:
        assert not row["error"]
        assert row["activation_bytes"][0] > 1 << 20
    whole, half = rows[:2]
    assert half["plan_bytes"] < whole["plan_bytes"]
    assert half["activation_bytes"][0] < 0.8 * whole["activation_bytes"][0]


@pytest.mark.slow
def test_a_combination_that_fails_fails_the_matrix():
    said = benchmark("engine_matrix", "--width", 0.125, "--only", "alexnet-32-fixed", "--target", "sm90", ok=1)
    assert said.count("FAILED: MisuseError: target 'sm90'") == 5 and "0 of 5 built" in said


def test_the_matrix_has_every_network_of_ours(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.engine_matrix import NETWORKS

    assert list(NETWORKS.values()) == FAMILY
