"""The documentation: its links, the options, files and errors that it names, and that its code runs."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import urllib.request
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import preloaded
import pytest
from fetched import debian_package, fetched_folder, unpacked
from helpers import BIN, ROOT, command, needs, photo
from PIL import Image

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


@cache
def anchors(page: Path) -> set[str]:
    """What may follow # in links to a page: GitHub's and the site's names of its headings."""
    names = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        names.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", words)))
    return names


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings_that_exist(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name} links to {target}"
        if page.is_relative_to(DOCS):
            assert file.is_relative_to(DOCS), f"{name} links to {target}, which the site does not have"
        if anchor:
            assert anchor in anchors(file), f"{name} links to {target}"


def test_every_page_is_in_the_sites_navigation_once():
    linked = re.findall(r'= "([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(linked) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def generator():
    """docs/commands.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("docs_commands", DOCS / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_the_commands_is_what_they_say():
    assert (DOCS / "reference" / "commands.md").read_text() == generator().page(), "run `make docs`"


@pytest.mark.slow
def test_every_option_that_is_named_exists():
    option = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
    known = {"--help", *option.findall(generator().page())}
    known |= {
        "--find-links",
        "--index-url",
        "--target",
        "--no-deps",
        "--model-repository",
        "--query-gpu",
        "--format",
    }  # of pip, tritonserver, nvidia-smi
    for file in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(option.findall(file.read_text()))
    for page in PAGES:
        if page.name in ("CONTRIBUTING.md", "CHANGELOG.md"):
            continue  # of other programs, and of the past
        named = {name for code in re.findall(r"`[^`\n]+`", prose(page)) for name in option.findall(code)}
        for code in blocks(page, ""):
            lines = code.replace("\\\n", " ").splitlines()
            named |= {name for line in lines if not line.startswith("note:") for name in option.findall(line)}
        assert named <= known, f"{page.name} names {sorted(named - known)}"


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    floors = "runtime|calibration|fcn|export|tests|docs|benchmarks|shim|fcn_deploy"
    files = re.findall(rf"(?<![\w./])((?:{floors})/(?:[\w/.]*[\w/])?)", (ROOT / name).read_text())
    assert len(files) > 5
    for file in files:
        assert "NAME" in file or (ROOT / file).exists(), f"{name} names {file}"


@pytest.mark.parametrize("name", NAMES)
def test_dotted_names_exist(name):
    for dotted in re.findall(r"`(fcn_deploy(?:\.\w+)+)", prose(ROOT / name)):
        module, _, attribute = dotted.rpartition(".")
        if dotted in ("fcn_deploy.card", "fcn_deploy.activated"):  # keys of metadata
            continue
        owner = importlib.import_module(module)
        if not hasattr(owner, attribute):
            assert hasattr(owner, "__path__") and importlib.util.find_spec(dotted), f"{name} names {dotted}"


def test_every_public_name_is_in_the_reference():
    import fcn_deploy

    listed = re.findall(r"^::: fcn_deploy\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fcn_deploy.__all__)


@cache
def error_texts() -> set[str]:
    """All texts of the packages, values in them replaced by …."""
    texts = set()
    for floor in ("runtime", "calibration", "fcn", "export"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    texts.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value)
    return texts


def quoted_errors() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return [error for row in rows for error in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("error", quoted_errors())
def test_errors_of_the_troubleshooting_page_are_those_of_the_code(error):
    parts = [part.strip(" ;:") for part in error.split("…")]
    assert any(parts)
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    near = [text for text in error_texts() if all(part in text for part in parts)]  # few, as patterns are slow
    assert any(pattern.search(text) for text in near), f"no error says {error!r}"


@pytest.fixture(scope="module")
def desk(exports, tmp_path_factory):
    """A folder with what the pages' code reads: d.engine, d.onnx, photographs, and a large array."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(exports / "narrow.engine", folder / "d.engine")
    shutil.copy(exports / "narrow.onnx", folder / "d.onnx")
    for name, size in (("photo.jpg", (130, 90)), ("a.jpg", (48, 64)), ("b.jpg", (97, 61))):
        Image.fromarray(photo(*size)).save(folder / name)
    np.save(folder / "huge.npy", photo(300, 200))
    return folder


def python_blocks() -> list:
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{index}")
        for page in PAGES
        if page != ROOT / "README.md"  # tests/test_readme.py
        for index, code in enumerate(blocks(page, "python"))
    ]


def run(folder: Path, program: str, *words: object) -> str:
    done = preloaded.run([str(folder / program), *map(str, words)], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", python_blocks())
def test_python_runs(code, desk):
    compile(code, "page", "exec")
    name = re.match(r"# ([\w/]+\.py)\n", code)
    if name is None:
        (desk / "block.py").write_text(code)
        printed = run(desk, "block.py")
        assert printed or "print(" not in code
        return
    # A file of its own, which the tests below run as its page says.
    (desk / name[1]).parent.mkdir(exist_ok=True)
    (desk / name[1]).write_text(code)


@pytest.mark.slow
def test_the_module_of_the_page_on_pytorch_is_exported(desk):
    (code,) = blocks(DOCS / "howto" / "pytorch.md", "python")
    (desk / "package").mkdir(exist_ok=True)
    (desk / "package" / "module.py").write_text(code)
    words = "package.module:factory", "--classes", "road,car,tree,sky", "-o", "seg.onnx"
    assert "4 classes" in command("export-onnx", *words, cwd=desk).stdout


@pytest.mark.slow
def test_the_triton_configuration_is_that_of_the_standalone_model(desk):
    command("build-engine", "d.onnx", "--standalone", "-o", "labels.onnx", "--force", cwd=desk)
    session = onnxruntime.InferenceSession(desk / "labels.onnx")
    config = next(code for code in blocks(DOCS / "howto" / "triton.md", "") if "onnxruntime_onnx" in code)
    said = re.findall(r'name: "(\w+)", data_type: TYPE_(\w+), dims: \[ ([-\d, ]+) \]', config)
    assert said == [
        (
            each.name,
            each.type[len("tensor(") : -1].upper(),
            ", ".join(str(d if isinstance(d, int) else -1) for d in each.shape),
        )
        for each in (*session.get_inputs(), *session.get_outputs())
    ]


def headers_of_onnxruntime() -> Path:
    """A folder with onnxruntime_cxx_api.h: named by ONNXRUNTIME_INCLUDE, installed, or of Debian's package (85 kB)."""
    for folder in (os.environ.get("ONNXRUNTIME_INCLUDE"), "/usr/include/onnxruntime"):
        if folder is not None and Path(folder, "onnxruntime_cxx_api.h").exists():
            return Path(folder)
    return debian_package("libonnxruntime-dev", "trixie") / "usr" / "include" / "onnxruntime"


@pytest.mark.slow
def test_the_cpp_program_gives_the_labels_of_the_engine(desk):
    """Compiled and linked with the library of onnxruntime's wheel, at sizes that nobody has told it."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed; run: apt-get install g++")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"), None)
    if library is None:
        pytest.skip("onnxruntime's wheel has no libonnxruntime.so on this system")
    include = headers_of_onnxruntime()
    asked = re.search(r"#define ORT_API_VERSION (\d+)", (include / "onnxruntime_c_api.h").read_text())
    assert asked and int(asked[1]) <= int(onnxruntime.__version__.split(".")[1]), "headers newer than the library"
    (code,) = blocks(DOCS / "howto" / "embed.md", "cpp")
    (desk / "label.cpp").write_text(code)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (desk / name).unlink(missing_ok=True)
        (desk / name).symlink_to(library)
    words = (
        "-std=c++17",
        "-O1",
        "-Wall",
        "label.cpp",
        f"-I{include}",
        "-L.",
        "-lonnxruntime",
        "-Wl,-rpath,.",
        "-o",
        "label",
    )
    subprocess.run(["g++", *words], cwd=desk, check=True)
    command("build-engine", "d.onnx", "--standalone", "-o", "labels.onnx", "--force", cwd=desk)
    from fcn_deploy import Segmenter

    with Segmenter(desk / "d.engine") as net:
        for size in (1, 1), (37, 53), (130, 90):
            image = photo(*size)
            Image.fromarray(image).save(desk / "photo.ppm")
            subprocess.run(["./label", "labels.onnx", "photo.ppm", "labels.pgm"], cwd=desk, check=True)
            assert np.array_equal(np.asarray(Image.open(desk / "labels.pgm")), net(image))
    wrong = subprocess.run(["./label", "labels.onnx", "d.onnx", "no.pgm"], cwd=desk, capture_output=True, text=True)
    assert wrong.returncode == 1 and "no PPM" in wrong.stderr and not (desk / "no.pgm").exists()
    (desk / "short.ppm").write_bytes((desk / "photo.ppm").read_bytes()[:-1])
    wrong = subprocess.run(["./label", "labels.onnx", "short.ppm", "no.pgm"], cwd=desk, capture_output=True, text=True)
    assert wrong.returncode == 1 and "ends early" in wrong.stderr and not (desk / "no.pgm").exists()


@pytest.mark.slow
def test_the_page_gives_the_labels_of_the_engine_by_onnxruntime_web(desk):
    """In Node, by the WebAssembly that a browser runs; npm fetches it once (139 MB) into the tests' cache."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node and npm are not installed; run: apt-get install nodejs npm")
    folder = fetched_folder() / "onnxruntime-web-1.30.0"
    if not (folder / "node_modules" / "onnxruntime-web").exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "onnxruntime-web@1.30.0"]
        done = subprocess.run([*words, "--prefix", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm does not fetch onnxruntime-web here: {done.stderr.strip()[-200:]}")
    command("build-engine", "d.onnx", "--standalone", "-o", "labels.onnx", "--force", cwd=desk)
    (code,) = blocks(DOCS / "howto" / "embed.md", "js")
    (desk / "label.mjs").write_text(code)
    (desk / "node_modules").unlink(missing_ok=True)
    (desk / "node_modules").symlink_to(folder / "node_modules")
    (desk / "run.mjs").write_text("""
        import * as ort from "onnxruntime-web";
        import { readFileSync, writeFileSync } from "node:fs";
        import { label } from "./label.mjs";
        const session = await ort.InferenceSession.create(readFileSync("labels.onnx"));
        for (const size of process.argv.slice(2)) {
          const [height, width] = size.split("x").map(Number);
          writeFileSync(`${size}.labels`, await label(session, ort, readFileSync(`${size}.rgba`), height, width));
        }
    """)
    sizes = (1, 1), (37, 53), (130, 90)
    for height, width in sizes:
        rgba = np.dstack([photo(height, width), np.full((height, width), 255, np.uint8)])
        rgba.tofile(desk / f"{height}x{width}.rgba")
    subprocess.run(["node", "run.mjs", *(f"{h}x{w}" for h, w in sizes)], cwd=desk, check=True)
    from fcn_deploy import Segmenter

    with Segmenter(desk / "d.engine") as net:
        for height, width in sizes:
            found = np.fromfile(desk / f"{height}x{width}.labels", np.uint8).reshape(height, width)
            assert np.array_equal(found, net(photo(height, width)))


def named_block(page: str, name: str) -> str:
    return next(code for code in blocks(DOCS / "howto" / page, "python") if code.startswith(f"# {name}\n"))


@pytest.mark.slow
def test_the_coco_file_of_the_page_on_annotation_has_the_labels_of_the_engine(desk):
    coco = needs("pycocotools.coco")
    code = next(code for code in blocks(DOCS / "howto" / "annotate.md", "python") if "annotations.json" in code)
    (desk / "coco.py").write_text(code)
    run(desk, "coco.py")
    found = coco.COCO(desk / "annotations.json")
    from fcn_deploy import Segmenter

    with Segmenter(desk / "d.engine") as net:
        for about in found.loadImgs(found.getImgIds()):
            labels = net(np.asarray(Image.open(desk / about["file_name"]).convert("RGB")))
            masks = {each["category_id"]: found.annToMask(each) for each in found.imgToAnns[about["id"]]}
            assert set(masks) == {label + 1 for label in np.unique(labels)}
            assert all((mask.astype(bool) == (labels == key - 1)).all() for key, mask in masks.items())


@pytest.mark.slow
def test_label_studio_gets_the_labels_of_the_engine(desk, monkeypatch):
    """Read back by Label Studio's own decoder, of its SDK's wheel: its needs would change what is installed here."""
    sdk = unpacked("label-studio-sdk==2.1.2") / "label_studio_sdk"
    for name, folder in (("label_studio_sdk", sdk), ("label_studio_sdk.converter", sdk / "converter")):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("ENGINE", str(desk / "d.engine"))
    monkeypatch.setenv("LABEL_STUDIO_URL", desk.as_uri())
    (desk / "label_studio.py").write_text(named_block("annotate.md", "label_studio.py"))
    spec = importlib.util.spec_from_file_location("label_studio", desk / "label_studio.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    config = """<View><Image name="image" value="$photo"/><BrushLabels name="brush" toName="image">
        <Label value="class 1"/><Label value="class 4"/></BrushLabels></View>"""
    task = {"id": 1, "data": {"photo": (desk / "photo.jpg").as_uri()}}
    with ThreadingHTTPServer(("127.0.0.1", 0), backend.Backend) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        body = json.dumps({"tasks": [task], "label_config": config}).encode()
        address = f"http://127.0.0.1:{server.server_port}"
        answer = json.loads(urllib.request.urlopen(f"{address}/predict", body).read())
        assert json.loads(urllib.request.urlopen(f"{address}/health").read())["status"] == "UP"
        server.shutdown()
    labels = backend.NET(np.asarray(Image.open(desk / "photo.jpg").convert("RGB")))
    (found,) = answer["results"]
    assert found["result"] and {each["from_name"] for each in found["result"]} == {"brush"}
    for each in found["result"]:
        (name,) = each["value"]["brushlabels"]
        assert name in ("class 1", "class 4")
        pixels = backend.brush.decode_rle(each["value"]["rle"]).reshape(*labels.shape, 4)[:, :, 3]
        assert np.array_equal(pixels == 255, labels == int(name[-1]))


@pytest.mark.slow
def test_python_passes_pyright(tmp_path):
    if not (BIN / "pyright").exists():
        pytest.skip("pyright is not installed; run: pip install 'pyright[nodejs]'")
    package = tmp_path / "types" / "fcn_deploy"
    package.mkdir(parents=True)
    for part in ("fcn_deploy/__init__.py", "fcn_deploy/py.typed", "runtime"):
        (package / Path(part).name).symlink_to(ROOT / part)
    for name in ("README.md", "docs/quickstart.md", "docs/howto/many-photographs.md"):
        for index, code in enumerate(blocks(ROOT / name, "python")):
            (tmp_path / f"block_{Path(name).stem}_{index}.py").write_text(code)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"include": ["block*.py"], "extraPaths": ["types"]}))
    words = [BIN / "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not start here: {done.stderr[-300:]}")
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] >= 3
    found = [item["message"] for item in told["generalDiagnostics"] if item["severity"] == "error"]
    assert not found, found
