"""The documentation: its links, the options, files and errors that it names, and that its code runs."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

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


def test_every_option_that_is_named_exists():
    options = {"--help", "--index-url"}  # the second is pip's
    for _, rows in re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", generator().page(), re.DOTALL | re.MULTILINE):
        options |= set(re.findall(r"--[a-z][a-z0-9-]+", rows))
    options |= {
        option
        for file in (ROOT / "benchmarks").glob("*.py")
        for option in re.findall(r'"(--[a-z][\w-]+)"', file.read_text())
    }
    for page in PAGES:
        if page.name in ("CONTRIBUTING.md", "CHANGELOG.md"):
            continue  # of other programs, and of the past
        named = {
            option
            for code in re.findall(r"`[^`\n]+`", prose(page))
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", code)
        }
        for code in blocks(page, ""):
            lines = re.sub(r"\\\n", " ", code).splitlines()
            named |= {
                option
                for line in lines
                if not line.startswith("note:")
                for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", line)
            }
        assert named <= options, f"{page.name} names {sorted(named - options)}"


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    files = re.findall(
        r"`((?:runtime|calibration|fcn|export|tests|docs|benchmarks|shim|fcn_deploy)/[\w/.]*)`",
        (ROOT / name).read_text(),
    )
    assert len(files) > 5
    for file in files:
        assert (ROOT / file).exists(), f"{name} names {file}"


def test_every_public_name_is_in_the_reference():
    import fcn_deploy

    listed = re.findall(r"^::: fcn_deploy\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fcn_deploy.__all__)


@cache
def error_texts() -> list[str]:
    """All texts of the packages, values in them replaced by …."""
    texts = []
    for floor in ("runtime", "calibration", "fcn", "export"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def quoted_errors() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return [error for row in rows for error in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("error", quoted_errors())
def test_errors_of_the_troubleshooting_page_are_those_of_the_code(error):
    parts = [part.strip(" ;:") for part in error.split("…")]
    assert any(parts)
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    assert any(pattern.search(text) for text in error_texts()), f"no error says {error!r}"
