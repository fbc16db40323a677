"""verify-engine on GPUs: a library that is wrong at one shape only is found."""

import numpy as np
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.verify import _by_size, verify


def test_every_profile_is_verified_at_its_smallest_best_and_largest_size(gpu_engine):
    report = verify(gpu_engine, sizes=[(64, 64)])
    with Network(gpu_engine) as net:
        profiles = net.manifest.gpu.profiles
    sizes = [tuple(row["size"]) for row in report["sizes"]]
    assert {size for profile in profiles for size in (profile.min, profile.opt, profile.max)} <= set(sizes)
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


def test_a_size_that_memory_does_not_hold_is_said_and_does_not_fail():
    rows = [{"size": [64, 64], "difference": 0.0}, {"size": [999, 999], "difference": None}]
    assert _by_size(rows, 1e-3) == "at MIN, OPT and MAX of the profiles: 64×64; not run for lack of memory: 1"


def test_a_golden_sample_of_large_profiles_stays_small():
    from fcn_deploy.export.build.golden import LARGEST_CHECKED, _ends
    from fcn_deploy.runtime.manifest import GpuPlan, Profile

    plan = GpuPlan("tensorrt_rtx", "1.7", ("sm89",), (Profile((64, 64), (512, 512), (2176, 3840)),))
    sizes = _ends(plan, (61, 83))
    assert sizes[:2] == [(64, 64), (512, 512)] and 0.95 < sizes[2][0] * sizes[2][1] / LARGEST_CHECKED <= 1
    assert (
        _ends(GpuPlan("tensorrt", "11", ("sm90",), (Profile((4096, 4096), (4096, 4096), (4096, 4096)),)), (1, 1)) == []
    )
