"""export-triton: the repository that it writes, and a real tritonserver that serves it."""

import errno
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import triton_server
from fcn_deploy.export.triton.repository import TritonConfig, config_text, parse_outputs, write_repository
from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
from helpers import command, needs, one_error, photo
from tiny_engine import MANIFEST, MEMBERS

from fcn_deploy import DeployError, MisuseError, Segmenter

SIZES = [(1, 1), (37, 90), (240, 321), (5, 700), (203, 17), (240, 321)]


@pytest.fixture
def engine(tmp_path):
    write_engine(tmp_path / "road.engine", MANIFEST, MEMBERS)
    return tmp_path / "road.engine"


def test_the_repository_has_what_the_server_needs(engine, tmp_path):
    out = tmp_path / "models"
    done = command("export-triton", engine, "-o", out, "--json", "--threads", "2", "--outputs", "labels,scores")
    assert json.loads(done.stdout)["model"] == str(out / "road")
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"road/config.pbtxt", "road/1/model.py", "road/1/model.engine"}
    assert (out / "road/1/model.engine").read_bytes() == engine.read_bytes()
    text = (out / "road/config.pbtxt").read_text()
    assert 'name: "image", data_type: TYPE_UINT8, dims: [ -1, -1, 3 ], allow_ragged_batch: true' in text
    assert 'name: "scores", data_type: TYPE_FP32, dims: [ 2, -1, -1 ]' in text
    assert 'key: "threads", value: { string_value: "2" }' in text
    assert max(len(line) for line in text.splitlines() if line.startswith("#")) <= 120


def test_another_version_is_put_beside_the_first(engine, tmp_path):
    models = tmp_path / "models"
    write_repository(engine, models, TritonConfig())
    write_engine(engine, MANIFEST, MEMBERS | {"golden.npz": b"another"})  # built again
    write_repository(engine, models, TritonConfig(version=2))
    assert sorted(path.name for path in (models / "road").iterdir()) == ["1", "2", "config.pbtxt"]
    with pytest.raises(MisuseError, match="--model-version"):
        write_repository(engine, models, TritonConfig())
    with pytest.raises(MisuseError, match=r"config\.pbtxt exists and says something else"):
        write_repository(engine, models, TritonConfig(version=3, instances=2))
    assert not (models / "road" / "3").exists()
    write_repository(engine, models, TritonConfig(instances=2), force=True)
    assert "count: 2" in (models / "road" / "config.pbtxt").read_text()


def test_a_version_that_cannot_be_replaced_stays(engine, tmp_path, monkeypatch):
    write_repository(engine, tmp_path / "models", TritonConfig())
    version = tmp_path / "models/road/1"
    (version / "mark").touch()
    rename = Path.rename

    def fail(path, target):
        if path.name == "version":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DeployError, match="No space left"):
        write_repository(engine, tmp_path / "models", TritonConfig(), force=True)
    assert (version / "mark").exists() and (version / "model.engine").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--outputs", "labels,masks"], "choose of labels, scores, values, probabilities"),
        (["--name", "a/b"], "choose one of letters"),
        (["--site-packages", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(engine, tmp_path, words, said):
    done = command("export-triton", engine, "-o", tmp_path / "models", *words, ok=2)
    assert said in one_error(done)
    assert not (tmp_path / "models").exists()


def test_a_damaged_engine_is_refused_before_anything_is_written(engine, tmp_path):
    content = bytearray(engine.read_bytes())
    content[content.index(b"golden", 3000)] ^= 1
    engine.write_bytes(content)
    with pytest.raises(DeployError):
        write_repository(engine, tmp_path / "models", TritonConfig())
    assert not (tmp_path / "models").exists()


def test_engines_for_gpus_are_run_on_gpus(engine):
    from dataclasses import replace

    text = config_text(engine, replace(MANIFEST, target="sm89"), TritonConfig(outputs=tuple(parse_outputs("labels,"))))
    assert "KIND_GPU" in text


def test_texts_that_are_not_ascii_reach_the_server_whole(engine):
    from dataclasses import replace

    card = replace(MANIFEST.card, classes=("Straße", 'a "b" \\'))
    text = config_text(engine, replace(MANIFEST, card=card), TritonConfig())
    (line,) = [line for line in text.splitlines() if 'key: "card"' in line]
    said = line.partition('string_value: "')[2].removesuffix('" } }')
    assert said.isascii() and '"' not in said
    assert json.loads(said.encode().decode("unicode_escape").encode("latin1"))["classes"] == list(card.classes)


@pytest.fixture(scope="module")
def served(exports, tmp_path_factory):
    """A tritonserver of narrow.engine: its HTTP and gRPC addresses."""
    needs("tritonclient")
    folder = tmp_path_factory.mktemp("triton")
    triton_server.server_folder()
    site = triton_server.site_with_old_numpy(folder / "site")
    write_repository(
        exports / "narrow.engine", folder / "models",
        TritonConfig(outputs=("labels", "probabilities", "scores"), warmup=((40, 50),), site_packages=site, threads=1),
    )  # fmt: skip
    with triton_server.running(folder / "models", folder / "log") as addresses:
        yield addresses


@pytest.fixture(scope="module")
def net(exports):
    with Segmenter(exports / "narrow.engine", threads=1) as net:
        yield net


def infer(module, client, image, *outputs):
    """The outputs of one image, by tritonclient."""
    taken = module.InferInput("image", image.shape, "FP32" if image.dtype == np.float32 else "UINT8")
    taken.set_data_from_numpy(image)
    wanted = [module.InferRequestedOutput(name) for name in outputs]
    answer = client.infer("narrow", [taken], outputs=wanted)
    return [answer.as_numpy(name) for name in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_real_triton_gives_the_labels_of_a_call(served, net, protocol):
    module = needs(f"tritonclient.{protocol}")
    with module.InferenceServerClient(served[protocol == "grpc"]) as client:
        for index, size in enumerate(SIZES):
            image = photo(*size, index)
            labels, scores = infer(module, client, image[None], "labels", "scores")
            assert np.array_equal(labels[0], net(image)) and labels.dtype == np.uint8
            assert np.array_equal(scores[0], net.heatmap(image))
        batch = np.stack([photo(30, 41, seed) for seed in range(3)])
        (found,) = infer(module, client, batch, "probabilities")
        assert np.array_equal(found, np.stack([net.probabilities(image) for image in batch]))
        for wrong, said in ((photo(8, 9)[None].astype(np.float32), "FP32"), (photo(8, 9)[None, :, :0], "no pixels")):
            with pytest.raises(Exception, match=said):
                infer(module, client, wrong, "labels")
        (labels,) = infer(module, client, photo(8, 9)[None], "labels")  # and goes on
        assert labels.shape == (1, 8, 9)


@pytest.mark.slow
def test_requests_of_mixed_sizes_at_once_are_each_answered_with_their_own(served, net):
    module = needs("tritonclient.grpc")
    images = [photo(*SIZES[index % len(SIZES)], index) for index in range(24)]
    with module.InferenceServerClient(served[1]) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: infer(module, client, image[None], "labels")[0][0], images))
        counts = client.get_inference_statistics("narrow", as_json=True)["model_stats"][0]["batch_stats"]
    assert all(np.array_equal(labels, net(image)) for labels, image in zip(answers, images, strict=True))
    assert any(int(each["batch_size"]) > 1 for each in counts), counts


@pytest.mark.slow
def test_labels_by_shared_memory_are_those_of_a_call(served, net):
    module, shared = needs("tritonclient.grpc"), needs("tritonclient.utils.shared_memory")
    image = photo(131, 77)
    given = shared.create_shared_memory_region("image", "/fcn_deploy_test_image", image.nbytes)
    taken = shared.create_shared_memory_region("labels", "/fcn_deploy_test_labels", image.nbytes // 3)
    try:
        shared.set_shared_memory_region(given, [image[None]])
        with module.InferenceServerClient(served[1]) as client:
            client.register_system_shared_memory("image", "/fcn_deploy_test_image", image.nbytes)
            client.register_system_shared_memory("labels", "/fcn_deploy_test_labels", image.nbytes // 3)
            inputs = module.InferInput("image", [1, *image.shape], "UINT8")
            inputs.set_shared_memory("image", image.nbytes)
            outputs = module.InferRequestedOutput("labels")
            outputs.set_shared_memory("labels", image.nbytes // 3)
            client.infer("narrow", [inputs], outputs=[outputs])
            client.unregister_system_shared_memory()
        labels = shared.get_contents_as_numpy(taken, np.uint8, image.shape[:2])
        assert np.array_equal(labels, net(image))
        del labels
    finally:
        shared.destroy_shared_memory_region(given)
        shared.destroy_shared_memory_region(taken)


@pytest.mark.slow
def test_clients_read_the_classes_in_the_models_configuration(served, net):
    module = needs("tritonclient.http")
    with module.InferenceServerClient(served[0]) as client:
        card = client.get_model_config("narrow")["parameters"]["card"]["string_value"]
    assert json.loads(card) == json.loads(net.card.to_json())


@pytest.mark.slow
def test_a_server_that_misreads_arrays_is_refused_in_one_line_instead_of_answering_empty(exports, tmp_path):
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("this Python has NumPy 1, which every server reads; install 'numpy>=2'")
    write_repository(
        exports / "narrow.engine", tmp_path / "models", TritonConfig(site_packages=triton_server.PURELIB)
    )  # fmt: skip
    with pytest.raises(ChildProcessError) as error, triton_server.running(tmp_path / "models", tmp_path / "log"):
        pass
    said = f"TritonModelException: this server misreads arrays of NumPy {np.__version__}; install 'numpy<2'"
    assert said in str(error.value)


STAND_IN = '''
"""What model.py uses of the server's module."""
from types import SimpleNamespace as Record

class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values
    def as_numpy(self):
        return self.values
    def to_dlpack(self):
        return self.values
    from_dlpack = classmethod(lambda cls, name, values: cls(name, values))

class TritonModelException(Exception): pass

class TritonError(Exception):
    INTERNAL, INVALID_ARG = "internal", "invalid"

def InferenceResponse(output_tensors, error=None):
    return Record(tensors={each.name: each.values for each in output_tensors}, error=error)

def get_input_tensor_by_name(request, name):
    return request.image
'''
SERVE = """
import errno
import json
from types import SimpleNamespace
import numpy as np
import triton_python_backend_utils as pb_utils
from model import TritonPythonModel

model = TritonPythonModel()
config = {"output": [{"name": "labels"}], "parameters": {"threads": {"string_value": "1"}}}
model.initialize({
    "model_repository": "..", "model_version": "1", "model_config": json.dumps(config), "model_instance_kind": "CPU",
})
images = np.zeros((2, 37, 53, 3), np.uint8), np.zeros((1, 37, 53), np.uint8), np.zeros((0, 3, 3, 3), np.uint8)
requests = [
    SimpleNamespace(image=pb_utils.Tensor("image", image), requested_output_names=lambda: ["labels"])
    for image in images
]
for answer in model.execute(requests):
    print({name: values.shape for name, values in answer.tensors.items()}, answer.error and answer.error.args)
model.finalize()
"""


@pytest.mark.slow
def test_model_py_answers_and_refuses_each_request_by_itself(exports, tmp_path):
    """With a stand-in for the server's module, so that it is tested where no server runs."""
    version = write_repository(exports / "narrow.engine", tmp_path, TritonConfig()) / "1"
    for name, code in (("triton_python_backend_utils", STAND_IN), ("serve", SERVE)):
        (version / f"{name}.py").write_text(code)
    done = subprocess.run([sys.executable, "serve.py"], cwd=version, capture_output=True, text=True)
    assert not done.stderr
    good, bad, empty = done.stdout.splitlines()
    assert good == "{'labels': (2, 37, 53)} None"
    assert bad.startswith("{} ") and "image of shape [37, 53]" in bad and "'invalid'" in bad
    assert "without an image" in empty


def test_the_engine_in_the_repository_is_a_whole_one(engine, tmp_path):
    model = write_repository(engine, tmp_path / "models", TritonConfig())
    with EngineFile(Path(model) / "1" / "model.engine") as file:
        assert {name: file.read(name) for name in file.manifest.members} == MEMBERS
