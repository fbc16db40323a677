"""What an engine says of itself, and what it gives at several sizes, for `inspect-model`.

A runtime is all that this needs: where the onnx package is absent, the operators in the engine are not counted.
"""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.report.engine_report import report_of
from fcn_deploy.export.inspect.record import card_entries, tried_sizes
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.segmenter import Segmenter


def inspect_engine(path: Path, memory: int, thorough: bool = False) -> dict[str, Any]:
    """What is known of an engine, and found by running it where this machine can; see inspect_file."""
    with EngineFile(path) as file:
        file.verify()
        manifest = file.manifest
        report = report_of(file)
        networks = [file.read(stage.file) for stage in manifest.stages if stage.file.endswith(".onnx")]
    agreement = None if report is None else report.agreement
    record = _manifest_entries(manifest) | {
        "agreement": None if agreement is None else asdict(agreement),
        "notes": [] if report is None else list(report.notes),
        "plan_layers": [] if report is None or report.builder is None else [asdict(x) for x in report.builder.layers],
    }
    if networks and find_spec("onnx") is not None:
        import onnx
        from fcn_deploy.export.inspect.operators import operator_entries

        record |= operator_entries(*map(onnx.load_from_string, networks)) | {"precision": manifest.precision}
    card = manifest.card
    record |= card_entries(card, manifest.upsampling, card.size_multiple, card.smallest, "pad")
    record["runs"], record["not_run"] = _runs(path, memory, manifest.target == "cpu", thorough)
    return record | {"ok": not any(run["problem"] for run in record["runs"])}


def _manifest_entries(manifest: Manifest) -> dict[str, Any]:
    record: dict[str, Any] = {
        "created_by": manifest.created_by,
        "target": manifest.target,
        "precision": manifest.precision,
        "backend": manifest.backend if manifest.gpu is None else manifest.gpu.library,
        "members": {name: entry["bytes"] for name, entry in manifest.members.items()},
        "card_is_its_own": True,
        "heads": {head.name: head.card(manifest.card).kind for head in manifest.heads},
        "problem": None,
        "stages": [
            {
                "file": stage.file,
                "bytes": manifest.members[stage.file]["bytes"],
                "halo": stage.halo,
                "period": stage.period,
                "whole": stage.whole if stage.halo is None else "",
                "bytes_fixed": stage.bytes_fixed,
                "bytes_per_pixel": round(stage.bytes_per_pixel, 1),
                "bytes_per_pixel_squared": stage.bytes_per_pixel_squared,
            }
            for stage in manifest.stages
        ],
        "gpu": None,
    }
    if manifest.gpu is not None:
        record["gpu"] = {
            "library": f"{manifest.gpu.library} {manifest.gpu.version}",
            "targets": manifest.gpu.targets,
            "platform": manifest.gpu.platform or None,
            "profiles": [
                {"min": profile.min, "opt": profile.opt, "max": profile.max, "batch": profile.batch}
                for profile in manifest.gpu.profiles
            ],
        }
    return record


def _runs(path: Path, memory: int, for_cpu: bool, thorough: bool) -> tuple[list[dict[str, Any]], str]:
    """What the engine gives for images of several sizes, and why it is not run here where it is not."""
    runs: list[dict[str, Any]] = []
    try:
        net = Segmenter(path, memory=memory)
    except MisuseError:
        raise
    except DeployError as error:
        return ([{"size": (0, 0), "problem": str(error)}], "") if for_cpu else ([], str(error))
    with net:
        runs += [
            {"size": size, "problem": _problem_at(net, size)}
            for size in tried_sizes(memory, net.network.working_memory, thorough)
        ]
    return runs, ""


def _problem_at(net: Segmenter, size: tuple[int, int]) -> str:
    """What is wrong with an engine's result for an image of (height, width); "": nothing."""
    image = natural_noise(*size, net.card, 0)
    try:
        result = net.network.result(image, "values" if net.card.activation in ("multilabel", "none") else "labels")
    except DeployError as error:
        return str(error)
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        return "it gives what is no number"
    return "" if result.shape[-2:] == size else f"it gives {list(result.shape)}"
