"""An engine file that holds no network: what tests of the file itself write, read and damage."""

import hashlib
import json
import zipfile

from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.engine_format.stage import Stage, Upsampling

from fcn_deploy import ModelCard

CARD = ModelCard(("road", "sky"), stride=8, size_multiple=32)
MANIFEST = Manifest(CARD, "cpu", "float32", Upsampling("linear", "half_pixel", (8.0, 8.0)), (Stage("a.onnx"),), "test")
MEMBERS = {"a.onnx": bytes(range(256)) * 20, "golden.npz": b"golden", "report.json": b"{}"}


def read_all(path):
    with EngineFile(path) as file:
        return file.manifest, {name: file.read(name) for name in file.manifest.members}


def rewritten(engine, change, **zip_options):
    """The engine with its manifest changed, as an attacker would."""
    with zipfile.ZipFile(engine) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents["manifest.json"])
    change(manifest, contents)
    contents["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(engine, "w", **zip_options) as archive:
        archive.comment = hashlib.sha256(contents["manifest.json"]).hexdigest().encode()
        for name, content in contents.items():
            archive.writestr(name, content)
    return engine
