"""serve-engine beside a bare Segmenter, and beside other servers: what docs/results/serving.md tells, in one run.

    python -m benchmarks.serving cam.engine [--seconds 600] [--clients 32] [--litserve] [--triton]

    latency     one client, one image of 480×640 at a time: medians over those of a bare call, in random order
    throughput  --clients clients of mixed sizes for --seconds, in turns with Segmenter.map on the same images; every
                answer is compared with a direct call's labels, byte by byte
    memory      four images of --large pixels at once, under --memory
    refusals    30 requests at once on a queue of 8: how long a refusal takes, and health meanwhile; 20 that go away
    start       until it is ready, and what it holds then

Clients run on the same cores as what they ask. They are as small as clients can be (benchmarks/serving/clients.py), and
what their process takes is told beside each rate. Processor time over that of a bare call or of `map` is told too: it
says what a server costs where other programs keep the cores busy, and times say little.

`--litserve` runs the same Segmenter in LitServe (pip install litserve python-multipart) by the Python that it names,
where this project is installed too, sent as .npy files; `--triton` runs what `export-triton cam.engine` writes, in
the tritonserver that the tests fetch, where an image is a batch of one.
`--long SECONDS` does nothing but let the clients ask by REST for so long in one piece, and then by gRPC, and tells what
was lost or wrong, and the server's memory by the minute: it needs no idle machine.
`--hostile` and `--bulk` run `tests/attacks/test_requests.py` and benchmarks/bulk.py on the engine afterwards.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from fcn_deploy.runtime.pixels.noise_image import natural_noise

from benchmarks.common import RGB, memory, mixed_sizes, spread
from benchmarks.serving.clients import KINDS, processor_seconds
from benchmarks.serving.limits import IDLE, large_images, refusals
from benchmarks.serving.servers import litserve, serve_engine, triton
from benchmarks.serving.turns import Turn, hammer, mapped
from fcn_deploy import Segmenter

LEAST, MOST = (120, 160), (720, 1280)  # of mixed sizes
ROUND, ROUNDS = 10.0, 3  # seconds of one turn at most, and turns at least
OTHERS = ("LitServe", "Triton")
CORES = len(os.sched_getaffinity(0))


def latency(engine: Path, servers: dict[str, str], pids: dict[str, int], runs: int) -> dict[str, dict[str, float]]:
    """Of each: milliseconds, and what they and the processor's time are to those of a bare call, by medians of pairs.

    Processor time is the server's and the client's together.
    """
    image = natural_noise(*IDLE, RGB, 0)
    with Segmenter(engine) as net:
        expected = net(image).tobytes()
        asks: dict[str, Callable[[], bytes]] = {"bare": lambda: net(image).tobytes()}
        for kind, address in servers.items():
            asks[kind] = partial(KINDS[kind].client(address), KINDS[kind].request(image, engine.stem))
        taken: dict[str, list[float]] = {kind: [] for kind in asks}
        processor: dict[str, list[float]] = {kind: [] for kind in asks}
        random = np.random.default_rng(0)
        looked = pids | {"bare": os.getpid()}
        for run in range(runs + 3):
            for kind in random.permutation(list(asks)):
                # Looking at processes takes milliseconds, of this one: for all alike, and outside of what is counted.
                other = processor_seconds(looked[kind])
                own, started = processor_seconds(), time.perf_counter()
                labels = asks[kind]()
                seconds, own = time.perf_counter() - started, processor_seconds() - own
                assert labels == expected, f"{kind} gave other labels"
                if run > 2:
                    taken[kind].append(seconds)
                    processor[kind].append(own + (processor_seconds(pids[kind]) - other if kind in pids else 0.0))
    told = {}
    for kind, each in taken.items():
        # Pair by pair, so that what else runs on the machine counts for both.
        told[kind] = {
            "ms": 1e3 * spread(each)[0],
            "over_bare": float(np.median(np.divide(each, taken["bare"]))),
            "processor_over_bare": float(np.sum(processor[kind]) / np.sum(processor["bare"])),
        }
    return told


def throughput(engine: Path, servers: dict[str, str], pids: dict[str, int], options) -> dict:
    """Megapixels a second of each and of `map`, in turns of random order; what was lost or wrong; the server's memory.

    Of each server, as medians of the rounds:

        over_map            its rate over that of `map` in the same round; so over_Triton and over_LitServe
        processor_over_map  processor time for a pixel over that of `map`, no clients in it; so of the others
        clients             the share of all cores' time that its clients took
        over_map_beside     over_map where the time that the clients took is not counted: what is left of the cores is
    """
    sizes = mixed_sizes(options.images, LEAST, MOST)
    images = [natural_noise(*size, RGB, seed) for seed, size in enumerate(sizes)]
    context, random = multiprocessing.get_context("spawn"), np.random.default_rng(0)
    turns: dict[str, list[Turn]] = {kind: [] for kind in ("map", *servers)}
    resident = []
    rounds = max(ROUNDS, round(options.seconds / ROUND))
    length = options.seconds / rounds
    with Segmenter(engine) as net, tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images):
            Path(folder, str(index)).write_bytes(net(image).tobytes())
        # Each size once, so that memory is that of all sizes from the first turn on.
        for kind, address in servers.items():
            ask = KINDS[kind].client(address)
            for index, image in enumerate(images):
                labels = ask(KINDS[kind].request(image, engine.stem))
                assert labels == Path(folder, str(index)).read_bytes(), f"{kind} gave other labels"
        for _ in range(rounds):
            for kind in random.permutation(list(turns)):
                if kind == "map":
                    turns[kind].append(mapped(net, images, length))
                    continue
                words = kind, servers[kind], engine.stem, sizes, Path(folder), length, options.clients
                with ProcessPoolExecutor(1, context) as worker:
                    before = processor_seconds(pids[kind])
                    turn = worker.submit(hammer, *words).result()
                    turn.server = processor_seconds(pids[kind]) - before
                turns[kind].append(turn)
            resident.append(memory(pids["REST"])["anonymous"])
    return {"rates": {kind: rates(kind, turns) for kind in turns}, "resident": resident}


def long(engine: Path, servers: dict[str, str], pid: int, options) -> None:
    """Tell of --clients clients that ask without a pause: what they got, and the server's memory by the minute."""
    sizes = mixed_sizes(options.images, LEAST, MOST)
    with tempfile.TemporaryDirectory() as folder:
        with Segmenter(engine) as net:
            for index, size in enumerate(sizes):
                Path(folder, str(index)).write_bytes(net(natural_noise(*size, RGB, index)).tobytes())
        for kind, address in servers.items():
            words = kind, address, engine.stem, sizes, Path(folder), options.long, options.clients
            loads, minutes = [os.getloadavg()[0]], []
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
                turn = worker.submit(hammer, *words)
                while not wait([turn], timeout=60)[0]:
                    loads.append(os.getloadavg()[0])
                    minutes.append(f"{memory(pid)['anonymous'] / 1e6:.0f}")
                found = turn.result()
            print(
                f"{kind}: {found.seconds:.0f} s, {found.images} images, {found.lost} lost, {found.wrong} wrong; "
                f"load {min(loads):.1f} to {max(loads):.1f}; anonymous memory by the minute in MB: {' '.join(minutes)}",
                flush=True,
            )


def rates(kind: str, turns: dict[str, list[Turn]]) -> dict[str, float]:
    """What `throughput` tells of a server, or of `map`."""
    own = turns[kind]
    found: dict[str, float] = {"mpixels_per_s": spread([each.pixels / each.seconds / 1e6 for each in own])[0]}
    if kind == "map":
        return found
    for other in ["map", *(name for name in OTHERS if name in turns and kind not in OTHERS)]:
        pairs = list(zip(own, turns[other], strict=True))
        over = [mine.pixels / mine.seconds / (its.pixels / its.seconds) for mine, its in pairs]
        costs = [mine.server / mine.pixels / (its.server / its.pixels) for mine, its in pairs]
        found[f"over_{other}"] = float(np.median(over))
        found[f"processor_over_{other}"] = float(np.median(costs))
        if other == "map":
            share = [each.client / each.seconds / CORES for each in own]
            found["clients"] = float(np.median(share))
            found["over_map_beside"] = float(np.median(np.divide(over, np.subtract(1, share))))
    for name in ("images", "lost", "wrong"):
        found[name] = sum(getattr(each, name) for each in own)
    return found


def figures(told: dict) -> list[tuple[str, float, str, bool]]:
    """What was measured beside what is promised: (what, value, promise, whether it is kept)."""
    found: list[tuple[str, float, str, bool]] = []

    def at_most(what: str, value: float, most: float) -> None:
        found.append((what, value, f"≤ {most:g}", value <= most))

    def at_least(what: str, value: float, least: float) -> None:
        found.append((what, value, f"≥ {least:g}", value >= least))

    rates_ = told["throughput"]["rates"]
    for kind, most in (("REST", 1.12), ("gRPC", 1.08)):
        at_most(f"{kind} over a bare call", told["latency"][kind]["over_bare"], most)
    for kind in ("REST", "gRPC"):
        at_least(f"{kind} over map", rates_[kind]["over_map"], 0.92)
        at_most(f"{kind} requests lost or wrong", rates_[kind]["lost"] + rates_[kind]["wrong"], 0)
        for other in (name for name in OTHERS if name in rates_):
            at_least(f"{kind} over {other}", rates_[kind][f"over_{other}"], 1.0)
            at_most(f"{kind} over {other}, processor time", rates_[kind][f"processor_over_{other}"], 1.0)
    first, last = told["throughput"]["resident"][0], told["throughput"]["resident"][-1]
    at_most("memory after the last turn over the first's", last / first, 1.05)
    large = told["large"]
    at_most("peak of four large images, GB", (large["peak"] - large["results"]) / 1e9, large["memory"])
    at_most("slowest refusal, s", told["refusals"]["slowest_refusal_s"], 0.2)
    at_most("slowest health meanwhile, s", told["refusals"]["slowest_health_s"], 0.1)
    at_most("run of 20 dropped requests", told["refusals"]["run_of_20_dropped"], 0)
    at_most("ready after, s", told["start"]["ready_s"], 2.0)
    at_most("resident when idle, MB", told["start"]["resident"] / 1e6, 250)
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="of throughput, for each server, in several turns")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--images", type=int, default=48, help="of mixed sizes")
    parser.add_argument("--runs", type=int, default=100, help="of latency")
    parser.add_argument("--large", default="2400x3200", help="height x width of the large images")
    parser.add_argument("--memory", type=float, default=1.0, help="GB, for them")
    parser.add_argument(
        "--litserve", nargs="?", const=sys.executable, metavar="PYTHON", help="of an environment that has it [this one]"
    )
    parser.add_argument("--triton", action="store_true")
    parser.add_argument("--long", type=float, default=0, metavar="SECONDS", help="nothing but so long of each protocol")
    parser.add_argument("--hostile", type=int, default=0, metavar="N", help="so many hostile requests, at the end")
    parser.add_argument("--bulk", action="store_true", help="an object store and a Ray cluster, at the end")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the servers, in sessions of their own, would stay
    told: dict = {}
    with ExitStack() as stack:
        words = "--queue", max(64, options.clients), "--warmup", "480x640"
        http, rpc, process, seconds = stack.enter_context(serve_engine(options.engine, *words))
        idle = memory(process.pid)
        told["start"] = {"ready_s": seconds, "resident": idle["anonymous"] + idle["files"]}
        print(f"ready after {seconds:.2f} s, with {told['start']['resident'] / 1e6:.0f} MB")
        servers, pids = {"REST": http, "gRPC": rpc}, {"REST": process.pid, "gRPC": process.pid}
        if options.long:
            return long(options.engine, servers, process.pid, options)
        if options.litserve:
            servers["LitServe"], pids["LitServe"] = stack.enter_context(litserve(options.engine, options.litserve))
        if options.triton:
            servers["Triton"], pids["Triton"] = stack.enter_context(triton(options.engine))
        told["latency"] = latency(options.engine, servers, pids, options.runs)
        for kind, row in told["latency"].items():
            over = f"{row['over_bare']:.3f} of a bare call, {row['processor_over_bare']:.3f} of its processor time"
            print(f"{kind:>9} {row['ms']:8.2f} ms  {over}", flush=True)
        told["throughput"] = throughput(options.engine, servers, pids, options)
        for kind, row in told["throughput"]["rates"].items():
            rest = "".join(f"  {name} {value:.3g}" for name, value in row.items() if name != "mpixels_per_s")
            print(f"{kind:>9} {row['mpixels_per_s']:8.2f} Mpixel/s{rest}", flush=True)
        curve = told["throughput"]["resident"]
        print(f"anonymous memory {curve[0] / 1e6:.0f} MB after the first turn, {curve[-1] / 1e6:.0f} MB after the last")
    told["large"] = large_images(options.engine, tuple(map(int, options.large.split("x"))), options.memory)
    print("four large images: " + json.dumps(told["large"]))
    told["refusals"] = refusals(options.engine)
    print("a full queue: " + json.dumps(told["refusals"]))
    print(f"\n{'':46} {'measured':>9}  promised")
    for what, value, promise, kept in figures(told):
        print(f"{what:46} {value:9.3f}  {promise}{'' if kept else '   MISSED'}")
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))
    python, root = [sys.executable, "-m"], Path(__file__).parents[2]
    if options.hostile:
        words = "tests.attacks.test_requests", options.engine.absolute(), options.hostile
        paths = os.pathsep.join(filter(None, (str(root / "tests"), os.environ.get("PYTHONPATH"))))
        subprocess.run([*python, *map(str, words)], check=True, cwd=root, env=os.environ | {"PYTHONPATH": paths})
    if options.bulk:
        subprocess.run([*python, "benchmarks.bulk", str(options.engine)], check=True)


if __name__ == "__main__":
    main()
