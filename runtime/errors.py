"""The errors that users meet: one line that names the value, the rule and the remedy."""

import re

# Such as "/onnxruntime_src/onnxruntime/core/providers/cpu/tensor/concat.cc:159 PrepareForCompute(…) x was false. "
PLACES_IN_CODE = re.compile(r"(?:\S*/)+[\w.-]+\.(?:cc|cpp|h|hpp|cu):\d+(?: .*? was false\.)? ?")


class DeployError(Exception):
    """Something that was asked for in the right way failed: a broken file, a full disk, a wrong model.

    Command lines print it as one line and exit with `exit_code`.
    """

    exit_code = 1


class MisuseError(DeployError):
    """What was asked for makes no sense as asked: a bad option, a missing input, an unsafe overwrite."""

    exit_code = 2


class InterruptError(DeployError):
    """A command was interrupted, and can be gone on with."""

    exit_code = 130


class OverBudgetError(DeployError):
    """An image needs more memory than it may take, has too many pixels, or is of a size that its engine is not for."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error of a library says, in one line; its kind where it says nothing.

    Line breaks are left out, and so is what is for the library's own developers: ONNX Runtime's mark, and the places in
    their code that ONNX Runtime and OpenVINO name.

    Args:
        most: characters; None: all.
    """
    lines = str(error).splitlines()
    said = [line for line in lines if not line.lstrip().startswith(("Exception from ", "Check '"))]
    text = " ".join(" ".join(said).split()) or " ".join(" ".join(lines).split()) or type(error).__name__
    return PLACES_IN_CODE.sub("", text.removeprefix("[ONNXRuntimeError] : "))[:most]
