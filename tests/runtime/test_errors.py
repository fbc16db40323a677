"""Errors of libraries as one line: what they say, without what is for the library's own developers."""

import pytest
from fcn_deploy.runtime.errors import one_line

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
