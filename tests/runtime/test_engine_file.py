"""The engine file: what is written is read back."""

import json
import zipfile
from dataclasses import replace

import pytest
from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
from tiny_engine import MANIFEST, MEMBERS, read_all, rewritten

from fcn_deploy import DeployError


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "m.engine"
    write_engine(path, MANIFEST, MEMBERS)
    return path


def test_everything_comes_back(engine):
    manifest, members = read_all(engine)
    assert members == MEMBERS
    assert replace(manifest, members={}) == MANIFEST
    assert write_engine(engine, MANIFEST, MEMBERS) == manifest


def test_the_same_build_gives_the_same_bytes(engine, tmp_path):
    write_engine(tmp_path / "again.engine", MANIFEST, MEMBERS)
    assert (tmp_path / "again.engine").read_bytes() == engine.read_bytes()


def test_any_zip_tool_opens_it(engine):
    with zipfile.ZipFile(engine) as archive:
        assert archive.namelist()[0] == "manifest.json"
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert json.loads(archive.read("manifest.json"))["format"] == "fcn-deploy engine"


def test_missing_files_and_folders_are_said(tmp_path):
    with pytest.raises(DeployError, match="does not exist"):
        EngineFile(tmp_path / "none.engine")
    with pytest.raises(DeployError, match="cannot read"):
        EngineFile(tmp_path)


def test_an_engine_of_a_newer_version_says_so(engine):
    with pytest.raises(DeployError, match=r"version 99.*upgrade"):
        read_all(rewritten(engine, lambda manifest, _: manifest.update(version=99)))
