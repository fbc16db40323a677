"""Networks as people bring them, from the module to labels: exported or refused for the right reason, and equal."""

import re
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.export import from_torch
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.build.config import BuildConfig, TensorRTOptions
from fcn_deploy.export.build.core import core_of
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.parity import decided
from fcn_deploy.export.build.targets.tensorrt.plan import build_plan
from fcn_deploy.export.build.targets.tensorrt.profiles import default_profiles
from fcn_deploy.export.from_torch import every_size
from fcn_deploy.export.from_torch import network as traced
from fcn_deploy.export.graph.edit import metadata, opset
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.fcn.foreign import scores_of
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from helpers import needs
from zoo import ZOO, network

from fcn_deploy import DeployError, ModelCard, Segmenter

# Those of the literature by the quick exporter at all of these opsets, and by the slow one at one of two in turn; the
# others at some; those that differ from others in their ends alone by the quick exporter.
OPSETS = [("torchscript", 11), ("torchscript", 13), ("torchscript", 17)]
DYNAMO = [("dynamo", 18), ("dynamo", 23)]
ENDS = ("coarse", "one-score", "values", "softmax-first", "softmax-last", "tuple", "named-tuple")
CASES = [
    (name, exporter, version)
    for place, (name, kind) in enumerate(ZOO.items())
    for exporter, version in ([*OPSETS, DYNAMO[place % 2]] if kind.style else [OPSETS[0], OPSETS[2], DYNAMO[1]])
    if exporter == "torchscript" or name not in ENDS
]
BUILT = [name for name, kind in ZOO.items() if set(kind.refused) != {"torchscript", "dynamo"}]
SIDES = (1, 2, 3, 5, 7, 8, 11, 19, 23, 29, 32, 37, 43, 50, 53, 64, 71, 83, 97, 130)


@dataclass(frozen=True)
class Exported:
    """What came of an export: the file, its card and what was said, or why it was refused."""

    path: object
    card: ModelCard | None
    notes: tuple[str, ...]
    refused: str = ""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports by (name, exporter, opset), each made once, and what PyTorch gives for each network as well."""
    folder, made, kept = tmp_path_factory.mktemp("zoo"), {}, {}

    def once(name, function):
        def call(*given):
            key = name, function, *(each for each in given if isinstance(each, (AcceptedSizes, str)))
            if key not in kept:
                kept[key] = function(*given)
            return kept[key]

        return call

    def get(name: str, exporter: str, version: int) -> Exported:
        key = name, exporter, version
        if key not in made:
            path, notes = folder / f"{name}-{exporter}-{version}.onnx", []
            options = ImportOptions(**ZOO[name].options)
            model = kept.get(name) or kept.setdefault(name, network(name))
            try:
                with pytest.MonkeyPatch.context() as patch:
                    for module, function in (
                        (traced, traced.find_accepted_sizes),
                        (every_size, every_size.expected_scores),
                    ):
                        patch.setattr(module, function.__name__, once(name, function))
                    card, _ = from_torch.export_module(
                        model, None, path, exporter=exporter, opset_version=version, name=name, options=options,
                        note=notes.append,
                    )  # fmt: skip
                made[key] = Exported(path, card, tuple(notes))
            except DeployError as error:
                assert not path.exists()
                made[key] = Exported(path, None, tuple(notes), str(error))
        return made[key]

    return get


@pytest.mark.parametrize(("name", "exporter", "version"), CASES)
def test_a_network_is_exported_or_refused_for_the_right_reason(exported, name, exporter, version):
    kind, found = ZOO[name], exported(name, exporter, version)
    if reason := kind.refused.get(exporter):
        assert re.search(reason, found.refused) and "\n" not in found.refused, found.refused
        return
    assert not found.refused
    written, card = onnx.load(found.path), found.card
    assert opset(written) == version
    assert ModelCard.from_json(metadata(written, "fcn_deploy.card"), name) == card
    resized = kind.whole and kind.multiple > 1
    assert (card.size_multiple, card.smallest) == ((1, 1) if resized else (kind.multiple, kind.smallest))
    assert bool(card.whole) == kind.whole and card.activation == kind.activation[0]
    assert all(any(part in note for note in found.notes) for part in kind.notes), found.notes


def spec(name: str) -> tuple[str, int]:
    """By which exporter a network's engine is built, so that all come to be: the oldest opset, or the newest."""
    return DYNAMO[1] if "torchscript" in ZOO[name].refused else OPSETS[sorted(ZOO).index(name) % 3]


def reference(name: str, card: ModelCard):
    """PyTorch's own scores of an image, [H,W,3] uint8 RGB → float32 [K,H,W].

    Images are padded or resized as the export says, for what takes no other sizes.
    """
    kind, model = ZOO[name], scores_of(network(name), name)
    order = [2, 1, 0] if kind.options.get("bgr") else [0, 1, 2]
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))

    def run(image: np.ndarray) -> np.ndarray:
        x = ((torch.from_numpy(image.copy()).permute(2, 0, 1).float() - mean) / std)[None, order]
        height, width = x.shape[2:]
        if kind.whole and kind.multiple > 1:
            step = kind.multiple
            nearest = [max((side + step // 2) // step * step, step) for side in (height, width)]
            y = F.interpolate(model(F.interpolate(x, nearest, mode="bilinear")), (height, width), mode="bilinear")
        else:
            right, down = (
                -(-max(side, kind.smallest) // kind.multiple) * kind.multiple - side for side in (width, height)
            )
            y = model(F.pad(x, (0, right, 0, down)))
            if y.shape[2:] != (height + down, width + right):
                y = F.interpolate(y, scale_factor=card.stride, mode="bilinear")
            y = y[:, :, :height, :width]
        return y[0].numpy()

    return run


def unseen_sizes(count: int = 40) -> list[tuple[int, int]]:
    """Pairs of sides, small, odd, prime and long ones, none as it was traced or verified."""
    random = np.random.default_rng(0)
    return [tuple(int(side) for side in random.choice(SIDES, 2, replace=False)) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_an_engine_gives_pytorchs_labels_at_40_unseen_sizes(exported, tmp_path, name):
    kind, found = ZOO[name], exported(name, *spec(name))
    source = import_model(found.path)
    build_engine(source, tmp_path / "e.engine", BuildConfig(latency_sizes=[(32, 32)]))
    run, undecided, pixels, seen = reference(name, found.card), 0, 0, set()
    with Segmenter(tmp_path / "e.engine", threads=1) as net, torch.inference_mode():
        assert net.card.activation == kind.activation[1] and net.network.manifest.upsampling.mode == kind.head
        assert all(stage.halo is not None for stage in net.network.manifest.stages) == kind.tiles
        for index, (height, width) in enumerate(unseen_sizes()):
            image = natural_noise(height, width, net.card, seed=100 + index)
            scores = run(image)
            if net.card.activation == "none":
                np.testing.assert_allclose(net.values(image), scores, atol=1e-4 * max(np.ptp(scores), 1))
                continue
            if len(scores) == 1:
                soft = scores if kind.activation[0] == "probability" else 1 / (1 + np.exp(-scores))
                np.testing.assert_allclose(net.probabilities(image), soft, atol=1e-4)
                expected = soft[0] > 0.5
            else:
                expected = scores.argmax(0)
            clear = decided(scores, found.card)
            labels = net(image)
            assert labels.shape == (height, width) and (labels == expected)[clear].all()
            undecided, pixels = undecided + (~clear).sum(), pixels + labels.size
            seen |= set(np.unique(labels).tolist())
    assert undecided < 0.005 * max(pixels, 1)
    assert len(seen) >= 2 or kind.activation[1] == "none"


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_a_plan_is_built_or_refused_by_the_name_of_the_node(exported, name):
    needs("tensorrt_rtx")
    core = core_of(import_model(exported(name, *spec(name)).path))
    assert core.upsampling.mode == ZOO[name].head
    options = TensorRTOptions(("sm89",))
    if reason := ZOO[name].refused.get("rtx"):
        with pytest.raises(DeployError, match=reason):
            build_plan(core.model, options, default_profiles(core.card))
    else:
        assert build_plan(core.model, options, default_profiles(core.card)).plan


class BySevens(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x if x.shape[2] % 7 else -x)


@pytest.mark.slow
def test_the_exporter_that_takes_a_network_is_found_and_the_other_ones_reason_said(tmp_path):
    notes = []
    from_torch.export_module(network("rms-norm"), None, tmp_path / "m.onnx", name="rms-norm", note=notes.append)
    assert any("exported by dynamo; by torchscript: " in note and "rms_norm" in note for note in notes)
    with pytest.raises(DeployError, match=r"by torchscript: .*rms_norm.*; by dynamo: it writes opset 18 and newer"):
        from_torch.export_module(network("rms-norm"), None, tmp_path / "n.onnx", name="rms-norm", opset_version=13)
    with pytest.raises(DeployError, match=r"by torchscript: .*; by dynamo: ."):
        from_torch.export_module(BySevens(3, 2, 1).eval(), None, tmp_path / "n.onnx", name="sevens")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
