"""Checkpoints and state dicts that are damaged, foreign, or would run code: refused in one line."""

import json

import pytest
import torch
from fcn_deploy.fcn.checkpoint import load_checkpoint, load_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import Plain

from fcn_deploy import DeployError, MisuseError


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_broken_and_foreign_checkpoints_are_one_line(tmp_path, exports):
    whole = (exports / "narrow.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    torch.save({"a": 1}, tmp_path / "odd.pth")
    for name in ("cut.safetensors", "junk.safetensors", "foreign.safetensors", "junk.pth", "odd.pth"):
        with pytest.raises(DeployError) as caught:
            load_checkpoint(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(MisuseError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")
    # Weights that are not of the architecture they name.
    with safe_open(exports / "narrow.safetensors", framework="pt") as file:
        metadata = file.metadata()
    other = json.loads(metadata["fcn_deploy.architecture"]) | {"backbone": "resnet50"}
    state = load_file(exports / "narrow.safetensors")
    save_file(state, tmp_path / "other.safetensors", metadata | {"fcn_deploy.architecture": json.dumps(other)})
    with pytest.raises(DeployError, match=r"other\.safetensors does not hold the FCN-8s resnet50 it says"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DeployError, match="holds no state dict"):  # what would run is read as an empty object
        load_checkpoint(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


def test_pickles_run_no_code(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save({"state_dict": Plain().eval()}, tmp_path / "whole.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, said in (
        ("evil.pth", "holds a pickled object, whose code is not run"),
        ("whole.pth", "holds a pickled object, whose code is not run"),
        ("broken.safetensors", "cannot read weights"),
        ("empty.pth", "holds no state dict"),
        ("list.pth", "holds no state dict"),
    ):
        with pytest.raises(DeployError, match=said) as caught:
            load_state(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(MisuseError, match="does not exist"):
        load_state(tmp_path / "none.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The bytes of a checkpoint whose header is most of it, and its tensors."""
    from fcn_deploy.fcn.checkpoint import save_checkpoint
    from helpers import checkpoint_of, random_network

    path = tmp_path_factory.mktemp("tiny") / "m.safetensors"
    save_checkpoint(path, checkpoint_of(random_network(width=0.01)))
    return path.read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_an_edited_header_is_refused_in_one_line_or_read(tiny, tmp_path_factory, data):
    length = 8 + int.from_bytes(tiny[:8], "little")
    place, bits = data.draw(st.integers(0, length - 1)), data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("edit") / "m.safetensors"
    path.write_bytes(tiny[:place] + bytes([tiny[place] ^ bits]) + tiny[place + 1 :])
    try:
        load_checkpoint(path)
    except DeployError as error:
        assert "\n" not in str(error) and "m.safetensors" in str(error)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_truncated_checkpoint_is_refused(tiny, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "m.safetensors"
    path.write_bytes(tiny[: data.draw(st.integers(0, len(tiny) - 1))])
    with pytest.raises(DeployError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and "m.safetensors" in str(caught.value)
