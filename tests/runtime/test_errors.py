"""Errors of libraries as one line: what they say, without what is for the library's own developers."""

import pytest
from fcn_deploy.runtime.command import fail
from fcn_deploy.runtime.errors import MOST, DeployError, MisuseError, brief, one_line

OPENVINO = """Exception from src/inference/src/cpp/core.cpp:126:
Exception from src/frontends/onnx/frontend/src/frontend.cpp:98:
Check 'node' failed at src/frontends/onnx/frontend/src/core/graph.cpp:12:
  Not supported:
  operator Foo
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n\n  lines,\tand a tab"), "two lines, and a tab"),
        (RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : no\ninput x"), "2 : INVALID_ARGUMENT : no input x"),
        (RuntimeError(OPENVINO), "Not supported: operator Foo"),
        (RuntimeError("Exception from core.cpp:126:\n"), "Exception from core.cpp:126:"),
        (MemoryError(), "MemoryError"),
    ],
    ids=["lines", "onnxruntime", "openvino", "places-alone", "nothing"],
)
def test_what_a_library_says_is_one_line(error, said):
    assert one_line(error) == said
    assert one_line(error, 5) == said[:5]


@pytest.mark.parametrize("kind", [DeployError, MisuseError])
@pytest.mark.parametrize("remedy", ["export it again", "r" * 200])
def test_a_message_is_short_and_keeps_its_remedy(kind, remedy):
    text = str(kind(f"m.onnx: {'reason ' * 100}; {remedy}"))
    assert len(text) == MOST and text.startswith("m.onnx: reason") and text.endswith(f"…; {remedy}")
    assert str(kind(f"m.onnx is foreign; {remedy}")) == f"m.onnx is foreign; {remedy}"


def test_beginnings_of_long_paths_are_cut_before_a_reason():
    reason, path = "holds what it should not, " + "and more " * 12 + "(refused by --strict)", "/home" + "/folder" * 30
    assert str(MisuseError(f"{path}/in/a.tif {reason}")) == f"…/in/a.tif {reason}"
    short = f"{path}/in/a.tif is missing"
    assert str(MisuseError(short)) == short


def test_what_has_no_remedy_is_cut_at_its_end():
    assert brief("x" * 400) == "x" * 299 + "…"
    assert brief("x; " + "y" * 400) == "x; " + "y" * 296 + "…"  # nothing would be left of the reason


def test_the_name_of_the_command_counts(capsys):
    assert fail("build-engine", f"{'a ' * 300}; do that\nnow", 2) == 2
    said = capsys.readouterr().err
    assert len(said) == MOST + 1 and said.startswith("build-engine: error: a a") and said.endswith("; do that now\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "it fails: /onnxruntime_src/onnxruntime/core/providers/cpu/tensor/concat.cc:159 Prepare(…) x was false. A",
            "it fails: A",
        ),
        ('it fails: File "/usr/lib/site-packages/torch/nn/modules/conv.py", line 12, in forward: B', "it fails: B"),
        ("it fails: /usr/lib/site-packages/timm/layers.py:7 C", "it fails: C"),
        ("/data/site/model.onnx: D", "/data/site/model.onnx: D"),
        ("/" + "a/" * 2000 + "m.onnx fails", "…/a/m.onnx fails"),  # and in no time
    ],
)
def test_places_in_libraries_are_left_out(given, said):
    assert str(DeployError(given)) == said
