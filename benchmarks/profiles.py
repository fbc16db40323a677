"""Optimisation profiles planned for the sizes of a photo collection, for one profile to six.

    python -m benchmarks.profiles [--sizes photos/] [--budget-mib 3000] [--json]

Without --sizes: 200 sizes drawn, seeded, as a collection's would be: cameras and phones at their native sizes, upright
and across, crops of them, copies made for the web, thumbnails.
"""

import argparse
import json
import time
from collections import Counter

import numpy as np
from fcn_deploy.export.build.report_parts import profile_reports, show_profiles
from fcn_deploy.export.build.targets.tensorrt.profiles import plan_profiles
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.sizes import Sizes, parse_sizes

NATIVE = ((3000, 4000), (3024, 4032), (4000, 6000), (3456, 5184), (2160, 3840), (3648, 5472), (2448, 3264))
WEB = ((1080, 1920), (720, 1280), (683, 1024), (1200, 1600), (768, 1024), (600, 800), (1365, 2048))
THUMBNAILS = ((120, 160), (240, 320), (150, 200), (256, 256))
BYTES_PER_PIXEL = 70  # a quarter-width EfficientNet-Lite0 FCN-8s, float32: its build logs 2329548800 at 4×2176×3840


def photo_collection(count: int = 200, seed: int = 0) -> Counter:
    """How many of `count` images have each size, (height, width) in pixels."""
    random = np.random.default_rng(seed)
    sizes: Counter = Counter()
    for _ in range(count):
        kind = random.choice(["native", "crop", "web", "thumbnail"], p=[0.35, 0.25, 0.25, 0.15])
        pool = {"web": WEB, "thumbnail": THUMBNAILS}.get(str(kind), NATIVE)
        height, width = pool[random.integers(len(pool))]
        if kind == "crop":
            height, width = (int(side * random.uniform(0.3, 1.0)) for side in (height, width))
        if random.random() < 0.4:
            height, width = width, height
        sizes[height, width] += 1
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="as build-engine takes them")
    parser.add_argument("--budget-mib", type=int, default=3000, help="of all profiles' activations together")
    parser.add_argument("--multiple", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = parse_sizes(options.sizes) if options.sizes else Sizes(photo_collection(seed=options.seed))
    card = ModelCard(("all",), size_multiple=options.multiple)
    budget, results = options.budget_mib * 2**20, []
    for k in range(1, 7):
        start = time.perf_counter()
        profiles = plan_profiles(sizes, card, k, budget, lambda pixels: BYTES_PER_PIXEL * pixels)
        results.append(
            {
                "k": k,
                "profiles": len(profiles),
                "objective": sum(profile.objective for profile in profiles),
                "ratio": None,
                "bytes": sum(BYTES_PER_PIXEL * profile.pixels for profile in profiles),
                "unheld": sum(
                    not any(
                        p.holds(tuple(-(-side // options.multiple) * options.multiple for side in s)) for p in profiles
                    )
                    for s in sizes.counts
                ),
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        results[-1]["ratio"] = results[-1]["objective"] / results[0]["objective"]
        if k == 4 and not options.json:
            memory = [BYTES_PER_PIXEL * profile.pixels for profile in profiles]
            print(show_profiles(profile_reports(profiles, memory)))
    if options.json:
        print(json.dumps({"budget": budget, "plans": results}))
        return
    for row in results:
        print(
            f"K = {row['k']}: {row['profiles']} profiles, objective {row['objective']:.1f} "
            f"({row['ratio']:.3f} of K = 1), "
            f"{row['bytes'] / 2**20:,.0f} of {options.budget_mib:,} MiB, {row['seconds']:.2f} s"
        )


if __name__ == "__main__":
    main()
