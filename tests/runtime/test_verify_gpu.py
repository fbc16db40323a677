"""verify-engine on GPUs: a library that is wrong at one shape only is found."""

import numpy as np
from fcn_deploy.runtime.backends.tensorrt.cuda_graphs import Graph
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.verify import _by_size, verify

from fcn_deploy import Segmenter


def test_every_profile_is_verified_at_its_smallest_best_and_largest_size(gpu_engine):
    report = verify(gpu_engine, sizes=[(64, 64)])
    with Network(gpu_engine) as net:
        profiles = net.manifest.gpu.profiles
    sizes = [tuple(row["size"]) for row in report["sizes"]]
    assert {size for profile in profiles for size in (profile.min, profile.opt, profile.max)} <= set(sizes)
    # And at an odd size of each, whose rows and columns are resized otherwise.
    assert sum(height % 2 == width % 2 == 1 and height != width for height, width in sizes[1:]) == len(profiles)
    assert report["passed"] and all(row["difference"] <= report["tolerance"] for row in report["sizes"])


def test_an_engine_that_is_wrong_at_one_size_fails(rtx_engine, monkeypatch):
    real, wrong_size = Network.scores, (256, 256)

    def scores(self, image):
        found = real(self, image)
        return np.roll(found, 1, axis=-1) if image.shape[:2] == wrong_size else found

    monkeypatch.setattr(Network, "scores", scores)
    report = verify(rtx_engine, sizes=[(64, 64)])
    assert not report["passed"]
    wrong = [tuple(row["size"]) for row in report["sizes"] if not row["difference"] <= report["tolerance"]]
    assert wrong == [wrong_size] and "WRONG at 256×256" in _by_size(report["sizes"], report["tolerance"])


def test_labels_of_calls_are_compared_with_what_the_scores_say(rtx_engine, monkeypatch, capsys):
    from fcn_deploy.runtime import verify as module
    from fcn_deploy.runtime.backends.tensorrt.lane import Lane

    assert verify(rtx_engine, sizes=[(64, 64)])["calls_equal"] == 1
    real, calls = Lane.taken, []

    def taken(self, batch, index, size, dtype):
        found = real(self, batch, index, size, dtype)
        calls.append(batch.count)
        return found if batch.count == 1 else np.roll(found, 1)

    monkeypatch.setattr(Lane, "taken", taken)
    report = verify(rtx_engine, sizes=[(64, 64)])
    assert {1, 4, 8} == set(calls) and report["difference"] <= report["tolerance"]
    assert report["calls_equal"] < 0.99 and not report["passed"]
    assert module.verify_engine(rtx_engine) == 1
    assert "calls, alone and in batches: at least" in capsys.readouterr().out


def test_warming_up_without_sizes_runs_the_best_of_each_profile(rtx_engine, exports, gpu):
    with Segmenter(rtx_engine) as net:
        net.warmup()
        lanes, profiles = net.network.backend.lanes, net.network.manifest.gpu.profiles
        for lane in lanes:
            assert [batch.padded for batch in lane.graphs] == [profile.opt for profile in reversed(profiles)]
            assert all(isinstance(graph, Graph) for graph in lane.graphs.values())
    with Segmenter(exports / "narrow.engine") as net:
        net.warmup()  # of the CPU: nothing


def test_a_size_that_memory_does_not_hold_is_said_and_does_not_fail():
    rows = [{"size": [64, 64], "difference": 0.0}, {"size": [999, 999], "difference": None}]
    assert (
        _by_size(rows, 1e-3) == "at MIN, OPT, MAX and odd sizes of the profiles: 64×64; not run for lack of memory: 1"
    )


def test_a_golden_sample_of_large_profiles_stays_small():
    from fcn_deploy.export.build.golden import LARGEST_CHECKED, LARGEST_ODD, _ends
    from fcn_deploy.runtime.engine_format.manifest import GpuPlan, Profile

    plan = GpuPlan("tensorrt_rtx", "1.7", ("sm89",), (Profile((64, 64), (512, 512), (2176, 3840)),))
    sizes = _ends(plan, (61, 83))
    assert sizes[:2] == [(64, 64), (512, 512)] and 0.95 < sizes[2][0] * sizes[2][1] / LARGEST_CHECKED <= 1
    height, width = sizes[3]
    assert len(sizes) == 4 and height % 2 == width % 2 == 1 and 0.9 < height * width / LARGEST_ODD <= 1
    fixed = GpuPlan("tensorrt", "11", ("sm90",), (Profile((64, 96), (64, 96), (64, 96)),))
    assert _ends(fixed, (61, 83)) == [(64, 96)]  # there is no other
    assert (
        _ends(GpuPlan("tensorrt", "11", ("sm90",), (Profile((4096, 4096), (4096, 4096), (4096, 4096)),)), (1, 1)) == []
    )
