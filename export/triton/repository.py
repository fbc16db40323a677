"""Writes a Triton model repository of an engine: config.pbtxt, and a version with model.py and the engine."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.files import check_writable, replacing, write_error

TYPES = {"uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "int16": "TYPE_INT16", "float32": "TYPE_FP32"}


@dataclass(frozen=True)
class TritonConfig:
    """How the server runs an engine.

    Attributes:
        name: of the model; None: the engine file's.
        version: of it, from 1 on.
        outputs: of `labels`, `masks`, `values`, `probabilities`, `scores`; none: what the network gives.
        instances: processes that each open the engine.
        max_batch: images that the server hands over together.
        queue: requests that wait at most; more are refused. 0: without end.
        timeout: seconds that a request waits at most; None: without end.
        warmup: (height, width) run before the model is ready.
        threads, memory, refine: as of Segmenter.
        site_packages: folder of Python packages, for servers whose Python does not see ours.
    """

    name: str | None = None
    version: int = 1
    outputs: tuple[str, ...] = ()
    instances: int = 1
    max_batch: int = 8
    queue: int = 64
    timeout: float | None = None
    warmup: tuple[tuple[int, int], ...] = ()
    threads: int | None = None
    memory: int | None = None
    refine: bool = False
    site_packages: Path | None = None


def write_repository(engine: Path, out: Path, config: TritonConfig, force: bool = False) -> Path:
    """Write `out`/NAME/config.pbtxt and `out`/NAME/VERSION/ with model.py and model.engine.

    The version appears whole, under its name; config.pbtxt, which makes the model one, is written last.

    Args:
        engine: verified whole before anything is written.
        out: folder of the repository; other models and versions in it stay as they are.
        config: how the server is to run it.
        force: replace the version, and a config.pbtxt that says something else.

    Returns:
        The model's folder.

    Raises:
        MisuseError: outputs that the network does not give, a name that is none, or what exists and no `force`.
        DeployError: no engine, a damaged one, or nothing can be written.
    """
    with EngineFile(engine) as file:
        manifest = file.manifest
        for member in manifest.members:
            file.read(member)
    text = config_text(engine, manifest, config)
    model = out / model_name(engine, config)
    version, settings = model / str(config.version), model / "config.pbtxt"
    if version.exists() and not force:
        raise MisuseError(f"{version} exists already; choose another --model-version, or pass --force to replace it")
    # Its comments name the engine, which is another one in each version.
    if settings.exists() and not force and _without_comments(settings.read_text()) != _without_comments(text):
        raise MisuseError(f"{settings} exists and says something else; pass --force to replace it, or choose a --name")
    check_writable(settings)
    try:
        # Hidden, so that a server that watches the folder sees no half of it.
        with tempfile.TemporaryDirectory(dir=model, prefix=".new-") as temporary:
            made = Path(temporary, "version")
            made.mkdir()
            shutil.copyfile(engine, made / "model.engine")
            (made / "model.py").write_text(_model_code(config))
            before = Path(temporary, "old")
            if version.exists():
                version.rename(before)
            try:
                made.rename(version)
            except OSError:
                if before.exists():
                    before.rename(version)
                raise
    except OSError as error:
        raise write_error(version, error) from error
    with replacing(settings) as path:
        path.write_text(text)
    return model


def _without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def _model_code(config: TritonConfig) -> str:
    """The text of model.py."""
    code = Path(__file__).with_name("model.py").read_text()
    where = config.site_packages and str(config.site_packages.absolute())
    return code.replace("SITE_PACKAGES = None", f"SITE_PACKAGES = {where!r}", 1)


def model_name(engine: Path, config: TritonConfig) -> str:
    """The model's name. Raises MisuseError where it cannot be a folder's and an address's."""
    name = engine.stem if config.name is None else config.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise MisuseError(f"{name!r} as a model's name; choose one of letters, digits, _, - and . by --name")
    return name


def config_text(engine: Path, manifest: Manifest, config: TritonConfig) -> str:
    """The text of config.pbtxt. Raises MisuseError for outputs that the network does not give."""
    card = manifest.card
    if manifest.heads:
        raise MisuseError(
            f"{engine} has {len(manifest.heads)} outputs, and Triton's model.py gives those of one; build an engine of "
            "one --output for it"
        )
    outputs = config.outputs or (card.kind,)
    digest = hashlib.sha256("".join(str(each["sha256"]) for each in manifest.members.values()).encode()).hexdigest()
    shapes = ",\n".join(_output(name, card) for name in outputs)
    return "\n\n".join([
        f"# {engine.name} ({digest[:16]}), for Triton's Python backend. Written by export-triton.",
        f'name: "{model_name(engine, config)}"\nbackend: "python"\nmax_batch_size: {config.max_batch}',
        "# Images of any height and width, [N, H, W, C]. Requests of different sizes are handed to the model together\n"
        "# (ragged) and never padded to each other, which would change labels. A request holds images of one size.\n"
        f'input [ {{ name: "image", data_type: {TYPES[card.dtype]}, dims: [ -1, -1, {card.channels} ], '
        "allow_ragged_batch: true } ]",
        "# Of each request those outputs are computed that it names; all of them if it names none.\n"
        f"output [\n{shapes}\n]",
        _instances(manifest, config),
        _queue(config),
        "# Answers to images that were sent before, from memory. true needs a server started with\n"
        "# --cache-config local,size=BYTES; of no use for images that come once.\n"
        "response_cache { enable: false }",
        *_warmup(card, config),
        _parameters(card, config),
    ]) + "\n"  # fmt: skip


def _output(name: str, card: ModelCard) -> str:
    kinds = [card.kind, "scores", *dict.fromkeys(["values", *([] if card.kind == "values" else ["probabilities"])])]
    if name not in kinds:
        raise MisuseError(f"output {name!r} of a network of {card.kind}; choose of {', '.join(dict.fromkeys(kinds))}")
    dtype = {"labels": TYPES[str(card.label_dtype)], "masks": "TYPE_BOOL"}.get(name, "TYPE_FP32")
    dims = [-1, -1] if name == "labels" else [len(card.score_names), -1, -1]
    return f'  {{ name: "{name}", data_type: {dtype}, dims: [ {", ".join(map(str, dims))} ] }}'


def _instances(manifest: Manifest, config: TritonConfig) -> str:
    kind = "KIND_CPU" if manifest.target == "cpu" else "KIND_GPU"
    where = (
        "with threads of its own: several help where images are\n# small and cores many"
        if kind == "KIND_CPU"
        else "so many on each GPU of the server; name\n# some by gpus: [ 0, 1 ]"
    )
    return (
        f"# Processes that each open the engine and hold a network, {where}.\n"
        f"instance_group [ {{ count: {config.instances}, kind: {kind} }} ]"
    )


def _queue(config: TritonConfig) -> str:
    micros = 0 if config.timeout is None else round(config.timeout * 1e6)
    return (
        "# No delay: a free instance takes what waits. max_queue_size: requests that wait at most, others are refused\n"
        "# at once (0: without end). default_timeout_microseconds: what has waited longer is refused, never run (0:\n"
        "# never); a request may ask for less by its own timeout.\n"
        "dynamic_batching {\n  max_queue_delay_microseconds: 0\n  default_queue_policy {\n"
        f"    timeout_action: REJECT\n    default_timeout_microseconds: {micros}\n    allow_timeout_override: true\n"
        f"    max_queue_size: {config.queue}\n  }}\n}}"
    )


def _warmup(card: ModelCard, config: TritonConfig) -> list[str]:
    if not config.warmup:
        return []
    samples = ",\n".join(
        f'  {{ name: "{height}x{width}", batch_size: 1, inputs {{ key: "image", value: {{ '
        f"data_type: {TYPES[card.dtype]}, dims: [ {height}, {width}, {card.channels} ], zero_data: true }} }} }}"
        for height, width in config.warmup
    )
    return [f"# Run once before the model is ready.\nmodel_warmup [\n{samples}\n]"]


def _parameters(card: ModelCard, config: TritonConfig) -> str:
    given: dict[str, object | None] = {
        "card": card.to_json(),
        "threads": config.threads,
        "memory": config.memory,
        "refine": "true" if config.refine else None,
    }
    return (
        "# card: classes, colours and what the image must be, for clients. threads, memory (bytes), refine: as of\n"
        "# Segmenter.\n"
        + "\n".join(
            f'parameters {{ key: "{key}", value: {{ string_value: "{_escaped(str(value))}" }} }}'
            for key, value in given.items()
            if value is not None
        )
    )


def _escaped(text: str) -> str:
    """As protobuf's text format has it: what is not plain ASCII in octal."""
    plain = set(range(32, 127)) - {ord('"'), ord("\\")}
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode())


def parse_outputs(text: str | None) -> Sequence[str]:
    """Names in `--outputs`."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
