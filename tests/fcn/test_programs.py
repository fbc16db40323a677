"""Networks that are no plain modules: saved programs, compiled and quantised ones, other calls, autocast."""

import argparse
from pathlib import PurePosixPath

import pytest
import torch
from fcn_deploy.fcn.checkpoint import load_state
from fcn_deploy.fcn.foreign import scores_of
from fcn_deploy.fcn.load_module import load_module, load_strictly
from torch import nn
from zoo import Plain, resized

from fcn_deploy import DeployError

IMAGE = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(1)
    return Plain(resized).eval()


def program():
    size = torch.export.Dim.AUTO
    return torch.export.export(small(), (torch.zeros(2, 3, 64, 96),), dynamic_shapes=({0: size, 2: size, 3: size},))


def compiled_in_place():
    model = small()
    model.compile()
    return model


class Inside(nn.Module):
    """A part of it is compiled."""

    def __init__(self):
        super().__init__()
        self.body = torch.compile(small())

    def forward(self, x):
        return self.body(x)


class ByName(Plain):
    def forward(self, *, mask=None, pixel_values):
        return super().forward(pixel_values)


class OfADictionary(Plain):
    def forward(self, batch):
        return super().forward(batch["picture"])


def built(kind):
    torch.manual_seed(1)
    return kind(resized).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(small()),
        lambda: torch.jit.trace(small(), torch.zeros(1, 3, 64, 96)),
        lambda: torch.jit.freeze(torch.jit.script(small())),
        lambda: program().module(),
        compiled_in_place,
        lambda: Inside().eval(),
        lambda: built(ByName),
        lambda: built(OfADictionary),
    ],
    ids=[
        "scripted",
        "traced",
        "frozen",
        "exported",
        "compiled in place",
        "compiled inside",
        "by name",
        "in a dictionary",
    ],
)
def test_a_network_of_any_form_gives_the_scores_of_the_plain_module(make):
    with torch.inference_mode():
        found, expected = scores_of(make(), "it")(IMAGE), small()(IMAGE)
    torch.testing.assert_close(found, expected)


def test_a_compiled_network_of_the_caller_stays_compiled():
    model = compiled_in_place()
    scores_of(model, "it")
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("form", ["n.pt2", "n.pt"])
def test_files_of_programs_are_opened(tmp_path, form):
    if form == "n.pt2":
        torch.export.save(program(), tmp_path / form)
    else:
        torch.jit.script(small()).save(str(tmp_path / form))
    model, card = load_module(str(tmp_path / form), None, print)
    with torch.inference_mode():
        torch.testing.assert_close(scores_of(model, "it")(IMAGE), small()(IMAGE))
    assert card is None


class Halved(Plain):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_autocast_does_nothing_and_is_said():
    notes = []
    made = scores_of(built(Halved), "it", note=notes.append)
    with torch.inference_mode():
        assert torch.equal(made(IMAGE), small()(IMAGE))
        assert not torch.equal(built(Halved)(IMAGE), small()(IMAGE))  # outside it is as it was
    assert notes == ["it computes in part in half precision, by autocast or casts; it is exported in float32"]


def in_training_for_int8():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model.train())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4)), {nn.Linear}),
        in_training_for_int8,
    ],
    ids=["dynamic", "in training"],
)
def test_layers_that_pytorch_quantised_are_refused_by_that_reason(make):
    with pytest.raises(DeployError, match=r"has layers that PyTorch quantised, .* let build-engine --int8 quantise it"):
        scores_of(make(), "it")


def test_layers_that_have_no_weights_yet_are_refused_by_name():
    with pytest.raises(DeployError, match=r"it: 0 \(LazyConv2d\) has no weights before its first image; run it once"):
        scores_of(nn.Sequential(nn.LazyConv2d(4, 3)), "it")


@pytest.mark.parametrize(("layer", "said"), [(nn.Conv3d, "volumes"), (nn.Conv1d, "signals")])
def test_networks_of_volumes_and_signals_are_called_that(layer, said):
    with pytest.raises(DeployError, match=f"it works on {said}"):
        scores_of(nn.Sequential(layer(3, 4, 3, padding=1), nn.ReLU(), layer(4, 2, 1)), "it")


@pytest.mark.parametrize(
    ("end", "taken"),
    [
        (lambda y, x: [nn.functional.avg_pool2d(y, 4), nn.functional.avg_pool2d(y, 2), y], "2"),
        (lambda y, x: (y[:, :1] * 2, y), "1"),
        (lambda y, x: (y, y + 1), "0"),
    ],
    ids=["coarse first", "one channel first", "equal"],
)
def test_of_several_maps_the_finest_of_several_classes_is_taken(end, taken):
    notes = []
    scores_of(Plain(end).eval(), "it", note=notes.append)
    assert notes == [f"it gives several outputs ({', '.join(str(i) for i in range(3 if taken == '2' else 2))}); "
                     f"{taken} is used, and --output takes another"]  # fmt: skip


class Options:
    def __init__(self):
        self.rate = [0.1]


def test_a_lightning_checkpoint_is_read_whatever_else_it_holds_and_whatever_its_prefix(tmp_path):
    own = small().state_dict()
    average = {f"average.net.{name}": value * 0 for name, value in list(own.items())[:2]}
    state = average | {f"net.inner.{name}": value + 1 for name, value in own.items()} | {"loss.weight": torch.ones(2)}
    options = argparse.Namespace(path=PurePosixPath("data"), more=Options())
    torch.save({"state_dict": state, "hyper_parameters": options, "callbacks": {Options: options}}, tmp_path / "l.ckpt")
    notes, model = [], small()
    load_strictly(model, load_state(tmp_path / "l.ckpt", notes.append), "l.ckpt", "it", notes.append)
    assert all(torch.equal(value, own[name] + 1) for name, value in model.state_dict().items())
    assert any("argparse.Namespace" in note and "are not read" in note for note in notes)
    assert any(
        "the prefix 'net.inner.' of its names is dropped; 3 names without it are left out" in note for note in notes
    )
