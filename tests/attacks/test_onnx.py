"""ONNX files that are damaged, incomplete, or would take the machine down: one line of why not."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.importer.import_model import import_model
from foreign_onnx import PLAIN, SCORES, TO_SIZE, made, refused

from fcn_deploy import DeployError, MisuseError


def test_files_that_are_no_onnx(tmp_path):
    with pytest.raises(MisuseError, match="does not exist"):
        import_model(tmp_path / "none.onnx")
    with pytest.raises(MisuseError, match="is not a file"):
        import_model(tmp_path)
    good = made(PLAIN).SerializeToString()
    for data in (b"", b"junk", b"\x89PNG\r\n\x1a\n" + bytes(99), good[: len(good) // 2], bytes(1000)):
        assert "is not a valid ONNX model" in refused(tmp_path, data)
    empty = made(PLAIN)
    del empty.graph.output[:]
    assert "no output" in refused(tmp_path, empty)
    unknown = made(PLAIN)
    unknown.graph.initializer[0].data_type = 58
    assert "is of an unknown type, 58" in refused(tmp_path, unknown)
    for opset in (6, 99):
        changed = made(PLAIN)
        changed.opset_import[0].version = opset
        assert f"is of opset {opset}; 7 to " in refused(tmp_path, changed)


def test_damaged_files_are_refused_in_one_line_or_read(tmp_path):
    good, random = made(PLAIN).SerializeToString(), np.random.default_rng(1)
    outcomes = set()
    for _ in range(60):
        data = bytearray(good)
        for place in random.integers(0, len(good), 3):
            data[place] = random.integers(256)
        (tmp_path / "m.onnx").write_bytes(data)
        try:
            import_model(tmp_path / "m.onnx")
            outcomes.add("read")
        except DeployError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_weights_in_files_that_are_missing_or_truncated(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    import_model(tmp_path / "m.onnx")
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:100])
    with pytest.raises(DeployError, match=r"of m\.data for .*, and the file has 100; it is truncated"):
        import_model(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    with pytest.raises(DeployError, match=r"keeps weights \(.*\) in m\.data, which is not beside it"):
        import_model(tmp_path / "m.onnx")
    outside = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "m.data").write_bytes(data)
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.data"
    assert "cannot be read" in refused(tmp_path / "sub", outside)


HUGE = {
    "ConstantOfShape": "z = ConstantOfShape(big)",
    "Expand": "z = Expand(one, big)",
    "Tile": "t = Unsqueeze(one, i0)\n z = Tile(t, million2)",
    "Resize": "z = Resize(p, , bigscale)",
    "Range": "z = Range(index0, far, index1)",
    "Pad": "z = Pad(p, bigpads)",
    "computed": "a = Shape(p)\n b = Mul(a, million)\n z = Expand(one, b)",
}


@pytest.mark.parametrize("operator", HUGE)
def test_a_tensor_that_would_take_the_machine_down_is_named_before_it_is_made(tmp_path, operator):
    weights = {
        "big": np.array([1 << 20, 1 << 20]), "million": np.array([1 << 20]), "bigscale": np.float32([1, 1, 1e5, 1e5]),
        "far": np.array(1 << 40), "index0": np.array(0), "bigpads": np.array([0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20]),
        "million2": np.array([1 << 40]),
    }  # fmt: skip
    text = HUGE[operator] + "\n" + SCORES + TO_SIZE
    text += "e = Cast<to=1>(z)\n h = ReduceMax<keepdims=0>(e)\n y = Add(f, h)"
    said = refused(tmp_path, made(text, weights=weights))
    name = "Expand" if operator == "computed" else operator
    assert f"node z ({name}) makes a tensor of " in said


def test_images_declared_of_impossible_sizes(tmp_path):
    assert "more than a machine" in refused(tmp_path, made(PLAIN, "float[1,3,1048576,1048576] p"))
