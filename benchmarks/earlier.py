"""An earlier checkout among the peers: its own interpreter, benchmarks/peers.py and engines, answering the same pipe.

Run as a program, this file is what that interpreter runs, in the checkout's folder: it imports nothing of today's.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PYTHON = ".venv/bin/python"
CARD_KEY = "fcn_deploy.card"


@dataclass(frozen=True)
class Earlier:
    """A checkout that has an environment of its own.

    Attributes:
        commit: what it is at; the folder of what it prepares, and with a slash behind what its candidates begin with.
    """

    checkout: Path
    commit: str

    @classmethod
    def at(cls, checkout: Path) -> "Earlier":
        """Raises ValueError where it cannot be one."""
        if missing := [name for name in ("benchmarks/peers.py", PYTHON) if not (checkout / name).exists()]:
            raise ValueError(f"{checkout} has no {missing[0]}; name a checkout in which `make .venv/.dev` was run")
        words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{checkout} is at no commit that git knows: {done.stderr.strip()}")
        return cls(checkout.absolute(), done.stdout.strip())

    def candidates(self, today: Mapping[str, Any]) -> dict[str, Any]:
        """Today's candidates as the checkout has them, by keys of its own."""
        found = {}
        for key, ours in today.items():
            needs = tuple(name if name == "calibration" else f"{self.commit}/{name}" for name in ours.needs)
            name = f"{ours.name} of {self.commit}"
            found[f"{self.commit}/{key}"] = replace(ours, name=name, kind="earlier", needs=needs)
        return found

    def become(self, function: str, key: str, job: Any, pipe: Connection) -> None:
        """Have this process be the checkout's interpreter, which calls `function` of its own benchmarks.peers."""
        work = job.file(self.commit).absolute()
        work.mkdir(exist_ok=True)
        if not (link := work / "calibration").is_symlink():  # INT8 is given the same photographs
            link.symlink_to(Path("..") / link.name)
        given = asdict(job) | {"work": str(work)}
        for name in ("checkpoint", "model", "data"):
            given[name] = str(path.absolute()) if (path := Path(given[name])).exists() else given[name]
        name = key.removeprefix(f"{self.commit}/")
        words = [PYTHON, __file__, function, name, json.dumps(given), str(pipe.fileno())]
        os.set_inheritable(pipe.fileno(), True)
        os.chdir(self.checkout)
        os.execv(words[0], words)


def with_card_of(kind: Any, model: Path, copy: Path) -> str:
    """The path of a model whose card this checkout reads: a copy in its own version, where that can say the same."""
    import onnx

    loaded, reads = onnx.load(model), json.loads(kind(("a", "b")).to_json())
    (entry,) = (entry for entry in loaded.metadata_props if entry.key == CARD_KEY)
    card = json.loads(entry.value)
    if card["version"] <= reads["version"]:
        return str(model)
    if unknown := [name for name, value in card.items() if name not in reads and value]:
        raise ValueError(f"this checkout reads no {unknown[0]} in a model's card")
    entry.value = json.dumps(
        {name: value for name, value in card.items() if name in reads} | {"version": reads["version"]}
    )
    onnx.save(loaded, copy)
    return str(copy)


def main() -> None:
    sys.path[0] = str(Path.cwd())
    function, name, text, handle = sys.argv[1:]
    pipe, given = Connection(int(handle)), json.loads(text)
    try:
        runtime = "fcn_deploy.runtime" if importlib.util.find_spec("fcn_deploy") else "runtime"
        found = Path(importlib.util.find_spec(runtime).origin)
        if not found.is_relative_to(Path.cwd()):
            raise ImportError(f"the environment of this checkout runs {found}, which is not its own")
        # That checkout's own, by name: imported in the usual way, today's would import each other.
        candidates, peers = (importlib.import_module(f"benchmarks.{each}") for each in ("candidates", "peers"))
        # Before it was an option, the image of one size was of a fixed one.
        if (fixed := getattr(candidates, "FIXED", None)) not in (None, tuple(given["fixed"])):
            raise ValueError(f"this checkout measures no other image of one size than {'x'.join(map(str, fixed))}")
        given["model"] = with_card_of(candidates.ModelCard, Path(given["model"]), Path(given["work"]) / "model.onnx")
        known = {field.name: given[field.name] for field in fields(candidates.Job)}
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
    else:
        getattr(peers, function)(name, candidates.Job(**known), pipe)


if __name__ == "__main__":
    main()
