"""What the GPU extras install: every shared library that a wheel of theirs needs, and who provides it.

    python -m benchmarks.wheels [--folder DIR] [EXTRA ...]     (make wheels: all of them, some gigabytes)

It fetches the wheels of each extra, reads the ELF headers of the libraries in them, and prints a row for each library
that one needs: provided by a wheel of the same extra, by NVIDIA's driver, by the system, or missing (exit code 1).
"""

import io
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from fcn_deploy.runtime.command import run

ROOT = Path(__file__).resolve().parents[1]
GPU_EXTRAS = ("rtx", "tensorrt", "tensorrt-cu12", "ort-cuda", "ort-tensorrt", "ort-rtx")
DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1", "libnvcuvid.so.1")
SYSTEM = re.compile(r"(ld-linux|libc|libm|libdl|libpthread|librt|libutil|libgcc_s|libstdc\+\+|libz)[-.]")
# Its wheel of libraries is a script that fetches the true one from NVIDIA's index while it installs.
TENSORRT_LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


@dataclass(frozen=True)
class Need:
    """A library that a wheel's libraries need, and who has it; `provider` empty: nobody."""

    wheel: str
    library: str
    provider: str


def requirements(extra: str) -> list[str]:
    """What an extra of pyproject.toml asks for, but for other extras of the project."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [item for item in extras[extra] if not item.startswith("fcn-deploy[")]


def of_wheels(extra: str) -> list[str]:
    """`requirements`, with TensorRT's bindings in its place: the same versions, and wheels. It is a script itself."""
    return [re.sub(r"^(tensorrt-cu\d+)(?!-)", r"\1-bindings", item) for item in requirements(extra)]


def libraries(files: Mapping[str, bytes]) -> tuple[set[str], set[str]]:
    """Names that shared libraries have or are loaded by, and names that they need, of the content of some files."""
    provided, needed = set(), set()
    for name, content in files.items():
        try:
            elf = ELFFile(io.BytesIO(content))
        except ELFError:
            continue
        provided.add(Path(name).name)
        dynamic = elf.get_section_by_name(".dynamic")
        for tag in dynamic.iter_tags() if dynamic is not None else ():
            if tag.entry.d_tag == "DT_SONAME":
                provided.add(tag.soname)
            elif tag.entry.d_tag == "DT_NEEDED":
                needed.add(tag.needed)
    return provided, needed


def in_wheel(wheel: Path) -> dict[str, bytes]:
    """The shared libraries of a wheel, by name."""
    with zipfile.ZipFile(wheel) as members:
        names = [name for name in members.namelist() if re.search(r"\.so(\.|$)", name)]
        return {name: members.read(name) for name in names}


def used(extra: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The libraries that an extra uses: onnxruntime-gpu's provider for TensorRT is not ort-cuda's."""
    left_out = "onnxruntime_providers_tensorrt" if extra == "ort-cuda" else None
    return {name: content for name, content in files.items() if left_out is None or left_out not in name}


def needs(wheels: Mapping[str, tuple[set[str], set[str]]]) -> list[Need]:
    """Who provides what wheels need, among each other: name of a wheel → what `libraries` gives."""
    found = []
    for wheel, (own, wanted) in wheels.items():
        for library in sorted(wanted - own):
            others = [other for other, (provided, _) in wheels.items() if library in provided]
            if library in DRIVER:
                others = ["NVIDIA's driver"]
            elif SYSTEM.match(library):
                others = ["the system"]
            found.append(Need(wheel, library, others[0] if others else ""))
    return found


def contradictions(packages: Iterable[str]) -> list[str]:
    """What is wrong with packages being installed together."""
    names = {name.lower().replace("_", "-") for name in packages}
    found = []
    if all(any(name.endswith(f"-{cuda}") for name in names) for cuda in ("cu12", "cu13")):
        found.append("CUDA 12 and 13 at once")
    if {"onnxruntime", "onnxruntime-gpu"} <= names:
        found.append("onnxruntime and onnxruntime-gpu overwrite each other")
    return found


def fetch(extra: str, folder: Path) -> list[Path]:
    """The wheels of an extra, and of all that these ask for; of TensorRT its bindings alone."""
    wheels, plain = [], []
    for requirement in of_wheels(extra):
        if requirement.startswith(("tensorrt-cu12-bindings", "tensorrt-cu13-bindings")):
            wheels += _downloaded(folder / extra, "--no-deps", requirement)
        else:
            plain.append(requirement)
    return wheels + _downloaded(folder / extra, *plain)


def _downloaded(folder: Path, *words: str) -> list[Path]:
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "-d", str(folder)]
    subprocess.run([*command, *words], check=True)
    return sorted(set(folder.glob("*.whl")) - before)


def tensorrt_of(names: Iterable[str]) -> dict[str, tuple[set[str], set[str]]]:
    """What the wheel of TensorRT's libraries has, which its bindings name the version of."""
    for name in names:
        if match := re.match(r"tensorrt_cu(\d+)_bindings-(\d+)", name):
            provided = {f"{library}.so.{match[2]}" for library in TENSORRT_LIBRARIES}
            return {f"tensorrt_cu{match[1]}_libs (by its name; from NVIDIA's index)": (provided, set())}
    return {}


def main(
    extras: Annotated[list[str] | None, typer.Argument(metavar="EXTRA", help="Extras to look at; none: all.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder that keeps what is fetched.")] = None,
) -> int:
    """Print who provides each shared library that the wheels of the GPU extras need."""
    missing = 0
    with tempfile.TemporaryDirectory() as temporary:
        for extra in extras or GPU_EXTRAS:
            paths = fetch(extra, folder or Path(temporary))
            wheels = {path.name.split("-")[0] + "-" + path.name.split("-")[1]: path for path in paths}
            contents = {name: libraries(used(extra, in_wheel(path))) for name, path in wheels.items()}
            for problem in contradictions(path.name.split("-")[0] for path in paths):
                print(f"| {extra} | | | **{problem}** |", flush=True)
                missing += 1
            for need in needs(contents | tensorrt_of(path.name for path in paths)):
                if need.provider != "the system":
                    print(f"| {extra} | {need.wheel} | {need.library} | {need.provider or '**missing**'} |", flush=True)
                missing += not need.provider
    return int(missing > 0)


if __name__ == "__main__":
    run(main, "benchmarks.wheels")
