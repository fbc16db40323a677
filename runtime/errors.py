"""The errors that users meet: one line that names the value, the rule and the remedy."""

import re

MOST = 300  # characters of a message, its command's name included
LEAST_REASON = 60  # of them, that stay of what comes before a remedy
# Such as "/onnxruntime_src/onnxruntime/core/providers/cpu/tensor/concat.cc:159 PrepareForCompute(…) x was false. ", and
# `File "/…/site-packages/torch/nn/modules/module.py", line 1501`.
PLACES_IN_CODE = re.compile(
    r"\S*/[\w.-]+\.(?:cc|cpp|h|hpp|cu):\d+(?: .*? was false\.)? ?"
    r"|\b[\w.-]+\.(?:cc|cpp|h|hpp|cu):\d+(?: .*? was false\.)? "
    r"|(?:File )?\"?[^\s\"]*site-packages/[^\s\":]+\.py\"?(?:, line |:)\d+(?:,? in \w+)?:? ?"
)
LONG_PATH = re.compile(r"(?<![^\s'\"(])/[^\s'\"]+(/[^\s/'\"]+/[^\s/'\"]+)")  # with its last two parts
NAMES_CODE = re.compile(r"\.(?:cc|cpp|h|hpp|cu):\d|site-packages")  # quickly


class DeployError(Exception):
    """Something that was asked for in the right way failed: a broken file, a full disk, a wrong model.

    Command lines print it as one line and exit with `exit_code`. Its text has MOST characters at most.
    """

    exit_code = 1

    def __str__(self) -> str:
        return brief(super().__str__())


class MisuseError(DeployError):
    """What was asked for makes no sense as asked: a bad option, a missing input, an unsafe overwrite."""

    exit_code = 2


class InterruptError(DeployError):
    """A command was interrupted, and can be gone on with."""

    exit_code = 130


class OverBudgetError(DeployError):
    """An image needs more memory than it may take, has too many pixels, or is of a size that its engine is not for."""


def brief(message: str, most: int = MOST) -> str:
    """A message in so many characters: of one that is longer the reason is cut, and not the remedy, after its last ;.

    Before that the beginnings of paths are. The places in libraries' code that it names are left out in any case.
    """
    message = _without_places(message)
    if len(message) > most:
        message = LONG_PATH.sub(r"…\1", message)
    if len(message) <= most:
        return message
    reason, semicolon, remedy = " ".join(message.split()).rpartition("; ")
    left = most - len("…; ") - len(remedy)
    if not semicolon or left < LEAST_REASON:
        return f"{message[: most - 1]}…"
    return f"{reason[:left]}…; {remedy}"


def _without_places(text: str) -> str:
    """A text without the places in libraries' code that it names."""
    return PLACES_IN_CODE.sub("", text) if NAMES_CODE.search(text) else text


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
    return _without_places(text.removeprefix("[ONNXRuntimeError] : "))[:most]
