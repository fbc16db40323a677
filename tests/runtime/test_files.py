"""Outputs appear whole or not at all, and existing ones are never lost."""

import os
import subprocess
import sys

import pytest
from fcn_deploy.runtime.files import check_writable, refuse_existing, replacing

from fcn_deploy import DeployError, MisuseError


def test_the_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "x.bin"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_new_file_replaces_the_old_one_in_missing_folders_too(tmp_path):
    path = tmp_path / "a" / "b" / "x.bin"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary.suffix == ".bin"
            temporary.write_text(text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = f"""
import resource
from pathlib import Path
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.errors import DeployError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replacing(Path({str(tmp_path)!r}) / "x.bin") as temporary:
        temporary.write_bytes(bytes(5000))
except DeployError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot write" in said and "x.bin" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeployError, match="cannot write"):
        check_writable(tmp_path / "file" / "x.bin")
    with pytest.raises(DeployError, match="cannot write"), replacing(tmp_path / "file" / "x.bin"):
        pass


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x.bin") as temporary:
            temporary.write_text("")
        assert (tmp_path / "x.bin").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_existing_outputs_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    assert refuse_existing(path, force=False) == path
    path.write_text("")
    assert refuse_existing(path, force=True) == path
    with pytest.raises(MisuseError, match="--force"):
        refuse_existing(path, force=False)
    with pytest.raises(MisuseError, match="folder"):
        refuse_existing(tmp_path, force=True)
