"""What all command lines have in common: exit codes, versions, help without waiting, and options of one meaning."""

import inspect
import json
import logging
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_args
from unittest import mock

import numpy as np
import pytest
import typer
from fcn_deploy.runtime import command as runtime_command
from fcn_deploy.runtime.command import SCHEMA, parse_memory, print_record, run
from fcn_deploy.runtime.infer import label_images
from fcn_deploy.runtime.options import Declared, plainly
from helpers import ROOT, command, one_error, save_photos
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fcn_deploy import DeployError, MisuseError

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def options_of(name):
    """Option → (what it takes, its help) of a command, as Typer sees it."""
    module, start = SCRIPTS[name].split(":")
    taken = []
    with (
        mock.patch.object(typer.Typer, "__call__", lambda app, **_: taken.append(app)),
        pytest.raises(SystemExit),
        mock.patch.object(sys, "argv", [name]),
    ):
        getattr(import_module(module), start)()
    found = {}
    for each in inspect.signature(taken[0].registered_commands[0].callback).parameters.values():
        kind, info = each.annotation.__origin__, each.annotation.__metadata__[0]
        if isinstance(info, typer.models.OptionInfo):
            spelled = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
            for option in spelled or [f"--{each.name.replace('_', '-')}"]:
                found[option] = kind, info
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_version_load_nothing_heavy(name):
    module, start = SCRIPTS[name].split(":")
    code = f"""
import sys
from {module} import {start}
try:
    {start}()
except SystemExit as end:
    heavy = {{"torch", "onnx", "onnxruntime", "openvino", "rich", "tifffile", "PIL", "jinja2", "sklearn"}}
    print(sorted(heavy & set(sys.modules)), end.code)
"""
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[] 0", done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("train-fcn", "--data", "none", "-o", "m.safetensors"),
        ("train-fcn", "--qat", "none.safetensors", "-o", "m.safetensors"),
        ("train-fcn", "--backbone-weights", "none.pth", "-o", "m.safetensors"),
        ("eval-fcn", "none.safetensors"),
        ("eval-fcn", "none.onnx"),
        ("eval-fcn", "none.engine"),
        ("eval-fcn", "{engine}", "--data", "none"),
        ("export-onnx", "none.safetensors", "-o", "m.onnx"),
        ("export-onnx", "none.onnx", "-o", "m.onnx"),
        ("export-onnx", "none:make", "-o", "m.onnx"),
        ("export-onnx", "json:loads", "--weights", "none.pth", "-o", "m.onnx"),
        ("build-engine", "none.onnx", "-o", "m.engine"),
        ("build-engine", "{onnx}", "-o", "m.engine", "--sizes", "none"),
        ("build-engine", "{onnx}", "-o", "m.engine", "--int8", "--calib", "none"),
        ("build-engine", "{onnx}", "-o", "m.engine", "--card", "none.toml"),
        ("inspect-model", "none.onnx"),
        ("inspect-model", "none.engine"),
        ("export-triton", "none.engine", "-o", "models"),
        ("verify-engine", "none.engine"),
        ("bench-engine", "none.engine"),
        ("bench-engine", "none.onnx"),
        ("bench-engine", "{engine}", "--sizes", "none"),
        ("infer", "none.engine", "{engine}", "-o", "out"),
        ("infer", "none.onnx", "{engine}", "-o", "out"),
        ("infer", "{engine}", "none.png", "-o", "out"),
        ("infer", "{engine}", "none/*.png", "-o", "out"),
    ],
    ids=" ".join,
)
def test_an_input_that_does_not_exist_is_misuse(exports, tmp_path, words):
    places = {"engine": exports / "narrow.engine", "onnx": exports / "narrow.onnx"}
    done = command(*(word.format(**places) for word in words), ok=2, cwd=tmp_path)
    assert "none" in one_error(done) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export-onnx", "m.onnx", "-o", "n.onnx", "--mean", "1"), "--mean is called --input-mean now"),
        (("build-engine", "m.onnx", "-o", "m.engine", "--scale", "2"), "--scale is called --input-scale now"),
        (("build-engine", "m.onnx", "-o", "m.engine", "--batch", "2"), "--batch is called --max-batch now"),
        (("eval-fcn", "m.onnx", "--scales", "2"), "--scales is called --image-scales now"),
        (("train-fcn", "-o", "m.safetensors", "--scale", "1,2"), "--scale is called --crop-scale now"),
        (("bench-engine", "m.onnx", "--profile"), "--profile is called --layers now"),
    ],
)
def test_options_of_earlier_releases_are_named(tmp_path, words, said):
    assert said in one_error(command(*words, ok=2, cwd=tmp_path))


def test_an_option_has_one_meaning_in_all_commands():
    taken = {}
    for name in SCRIPTS:
        for option, (kind, info) in options_of(name).items():
            kinds = frozenset(get_args(kind) or (kind,)) - {type(None)}
            taken.setdefault(option, {})[name] = kinds, info.metavar, info.parser
    for option, by_command in taken.items():
        first, *others = by_command.values()
        # What is written is a file in one command and a folder in another; a number is one all the same.
        same = {"-o", "--out"}
        assert option in same or all(other == first for other in others), f"{option}: {by_command}"
    assert {"--debug", "--version"} <= taken.keys()
    assert all(len(taken[option]) == len(SCRIPTS) for option in ("--debug", "--version"))


def test_help_is_in_whole_sentences():
    for name in SCRIPTS:
        for option, (_, info) in options_of(name).items():
            assert info.help[0].isupper() or info.help[0] in "`." or info.help.split(",")[0].islower(), option
            assert info.help.endswith((".", "].")) and " away" not in info.help, f"{name} {option}: {info.help}"


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2GB", 2 * 10**9), ("600MB", 6 * 10**8), ("1.5", 15 * 10**8), ("0.003", 3 * 10**6), (" 2 gb ", 2 * 10**9),
     ("4G", 4 * 10**9), ("500m", 5 * 10**8), (2, 2 * 10**9)],
)  # fmt: skip
def test_memory_is_in_gigabytes_or_as_its_suffix_says(text, amount):
    assert parse_memory(text) == amount


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "2TB", "1e3", "nan", "1.2.3", "0.0001MB", "GB", "9" * 40])
def test_an_amount_of_memory_that_is_none_is_one_line(text):
    with pytest.raises(MisuseError, match="600MB or 2GB"):
        parse_memory(text)


def test_memory_that_is_none_ends_every_command_that_takes_it(exports, tmp_path):
    for words in (
        ("infer", exports / "narrow.engine", tmp_path, "-o", tmp_path / "o", "--memory", "much"),
        ("inspect-model", exports / "narrow.engine", "--memory", "-3"),
        ("build-engine", exports / "narrow.onnx", "-o", tmp_path / "m.engine", "--workspace", "0"),
    ):
        assert "write an amount from 1MB on" in one_error(command(*words, ok=2))


def ended(function, *words, renamed=None):
    """The exit code of a command that is made of a function, and what it prints on standard error."""
    with mock.patch.object(sys, "argv", ["test", *words]), pytest.raises(SystemExit) as end:
        run(function, "test", renamed)
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DeployError("a broken file"), 1, "test: error: a broken file\n"),
        (MisuseError("two\nlines"), 2, "test: error: two lines\n"),
        (MemoryError(), 1, "test: error: out of memory; use smaller images or a machine with more\n"),
        (KeyboardInterrupt(), 130, "test: error: interrupted\n"),
        (ValueError("odd"), 1, "test: error: ValueError: odd (run again with --debug for details)\n"),
    ],
)
def test_errors_are_one_line_with_a_code(capsys, error, code, said):
    def failing() -> None:
        raise error

    assert ended(failing) == code
    assert capsys.readouterr().err == said


def test_debug_shows_where_it_failed():
    def failing() -> None:
        raise DeployError("a broken file")

    with mock.patch.object(sys, "argv", ["test", "--debug"]), pytest.raises(DeployError):
        run(failing, "test")


def test_a_dataclass_stands_for_its_options(capsys):
    @dataclass
    class Group:
        height: Annotated[int, typer.Option(help="Rows.")] = 3
        width: Annotated[int | None, typer.Option("-w", "--width", help="Columns.")] = None

    seen = []

    def taking(path: Annotated[str, typer.Argument()], group: Group, last: bool = False) -> int:
        seen.append((path, group, last))
        return 7

    # Annotations that are texts are looked up where a function is defined.
    taking.__annotations__ |= {"group": Group}
    assert ended(taking, "here", "--height", "5", "--last") == 7
    assert ended(taking, "there", "-w", "4") == 7
    assert seen == [("here", Group(5, None), True), ("there", Group(3, 4), False)]
    assert ended(taking, "here", "--height", "tall") == 2
    assert ended(taking) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "--height" in errors[0] and "see test --help" in errors[1]


NEEDED = [("m.engine",), ("a.jpg",), ("-o", "out")]
MORE = [
    ("b.jpg",), ("-",), ("",), ("--",), ("--force",), ("--no-live",), ("--live",), ("--forc",), ("--out=other",),
    ("--reconnect", "5"), ("--reconnect", "-1"), ("--reconnect", "1e2"), ("--nodata", "-9999"), ("--nodata", "nan"),
    ("--nodata", "7"), ("--memory", "600MB"), ("--memory", "lots"), ("--threads", "2"), ("--threads", "0"),
    ("--threads", "two"), ("--threads", "２"), ("--threads",), ("--max-pixels", "1_000"), ("--page", "all"),
    ("--shard", "1/2"), ("--overlay-side", "9"), ("-of", "x"), ("--version",), ("--bulk", "x"),
    ("b\udcff.jpg",),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(MORE), max_size=3), st.randoms(use_true_random=False), st.integers(0, 9))
def test_a_command_line_means_what_typer_takes_it_for_though_plain_ones_do_without(more, random, missing):
    groups = [*(group for place, group in enumerate(NEEDED) if place != missing), *more]
    random.shuffle(groups)
    words = [word for group in groups for word in group]

    def taken(parse):
        seen = []
        recorded = wraps(label_images)(lambda **values: seen.append(values))
        with mock.patch.object(runtime_command, "plainly", parse):
            return ended(recorded, *words), repr(seen)  # nan is itself, and 1 no 1.0

    assert taken(plainly) == taken(lambda parameters, words: None)


@pytest.mark.parametrize("words", [(), ("--share", "2"), ("none.png", "--share", "2"), (".", "--share", "2")])
def test_what_a_parser_of_plain_lines_does_not_know_is_left_to_typer(words, capsys):
    def taking(
        place: Annotated[Path, Declared(False, (), {"exists": True})],
        share: Annotated[float, Declared(True, ("--share",), {})],
        part: Annotated[float, Declared(True, ("--part",), {})] = 3,
    ) -> int:
        print(repr((place, share, part)))
        return 7

    def taken(parse):
        with mock.patch.object(runtime_command, "plainly", parse):
            return ended(taking, *words), capsys.readouterr()

    assert taken(plainly) == taken(lambda parameters, words: None)


def test_plain_command_lines_load_no_typer_and_a_photograph_only_what_labels_it(exports, tmp_path):
    code = "from fcn_deploy.runtime.infer import main; import sys; print('typer' in sys.modules, flush=True); main()"
    save_photos(tmp_path / "photos", [(20, 30)])
    words = [exports / "narrow.engine", tmp_path / "photos", "-o", tmp_path / "out"]
    words += ["--force", "--threads", "1", "--memory", "2GB"]
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("False\n") and "1 of 1 images labelled" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "fcn_deploy.runtime.labelling.pictures" in loaded and not loaded & {"typer", "pydantic", "numpy.ma"}
    others = ("bulk", "cluster", "derive", "manifest", "videos", "polygons", "instances")
    assert not loaded & {f"fcn_deploy.runtime.labelling.{name}" for name in others}


def test_a_record_says_what_it_is_and_by_which_schema(capsys):
    print_record("thing", {"file": "a"})
    assert json.loads(capsys.readouterr().out) == {"schema": SCHEMA, "record": "thing", "file": "a"}


def documented(record):
    """The fields of a record that docs/reference/json.md does not name."""
    page = (ROOT / "docs" / "reference" / "json.md").read_text()
    named = set(re.findall(r"`([a-z0-9_]+)`", page))
    assert record["schema"] == SCHEMA and record["record"] in re.findall(r"[a-z]+", " ".join(re.findall("## .*", page)))
    return [name for name in record if name not in named]


@pytest.mark.parametrize(
    "words",
    [
        ("infer", "{engine}", "{photos}", "-o", "{out}", "--overlay"),
        ("verify-engine", "{engine}"),
        ("bench-engine", "{engine}", "--sizes", "40x50", "--seconds", "0.1", "--layers"),
        ("inspect-model", "{engine}", "--memory", "50MB"),
        ("inspect-model", "{onnx}", "--target", "cpu", "--memory", "50MB"),
        ("eval-fcn", "{engine}", "--data", "{data}"),
        ("build-engine", "{onnx}", "-o", "{out}/m.engine", "--sizes", "40x50"),
        ("build-engine", "{onnx}", "-o", "{out}/m.onnx", "--standalone"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_records_are_as_the_docs_say(exports, tmp_path, words):
    save_photos(tmp_path / "photos", [(20, 30), (33, 40)])
    places = {"engine": exports / "narrow.engine", "onnx": exports / "narrow.onnx"}
    places |= {"photos": tmp_path / "photos", "out": tmp_path / "out", "data": tmp_path / "data"}
    save_photos(tmp_path / "data" / "val", [(20, 30)])
    (tmp_path / "data" / "valannot").mkdir()
    Image.fromarray(np.eye(20, 30, dtype=np.uint8)).save(tmp_path / "data" / "valannot" / "0.png")
    (tmp_path / "data" / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    done = command(*(word.format(**places) for word in words), "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records
    for record in records:
        assert not documented(record)
        assert not re.search(r'"\d+[x×]\d+"', json.dumps(record)), "a size that is no list"


def test_tracebacks_of_libraries_are_not_shown_and_those_of_this_package_are():
    from fcn_deploy.runtime.command import _Brief

    try:
        raise OSError("no such host")
    except OSError:
        given = sys.exc_info()
    records = [
        logging.LogRecord(name, logging.ERROR, "", 0, "it failed", (), given) for name in ("gcsfs", "fcn_deploy.x")
    ]
    library, ours = map(_Brief("%(levelname)s: %(message)s").format, records)
    assert library == "ERROR: it failed" and ours.startswith("ERROR: it failed\nTraceback")


def test_what_is_loaded_is_not_looked_through_for_garbage():
    code = "import gc; from fcn_deploy.runtime.command import run; run(lambda: print(gc.get_freeze_count()), 'x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10_000
