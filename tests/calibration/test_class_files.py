"""Files that name classes, as tools write them: labels are never shifted by a heading, a comment or a number."""

import json

import pytest
from fcn_deploy.calibration.class_files import in_label_order, read_classes
from fcn_deploy.calibration.datasets import _classes
from fcn_deploy.calibration.mask_options import MaskOptions

from fcn_deploy import DeployError, MisuseError

NAMES = ["land", "road", "class 7"]
COLORS = {"land": (0, 0, 0), "road": (128, 64, 128), "class 7": (0, 0, 200)}
HEX = ("#000000", "#804080", "#0000c8")


def classes(file, masks=MaskOptions()):  # noqa: B008 (frozen)
    return _classes(file, (), None, None, masks)


@pytest.mark.parametrize(
    "text",
    [
        "land\nroad\nclass 7\n", "land\n:\nroad\nclass 7",
        "# classes\nland\n\nroad\nclass 7", "id,name\n0,land\n1,road\n2,class 7\n",
        "name;id\nland;0\nroad;1\nclass 7;2\n",
        '"id","name"\n0,"land"\n1,"road"\n2,"class 7"\n', "0\tland\n1\troad\n2\tclass 7",
        "1,road\n0,land\n2,class 7\n", "names:\n  0: land\n  1: road\n  2: class 7\n", "- land\n- road\n- class 7\n",
        "land,road,:,class 7\n", "0. land\n1) road\n2 - class 7\n", "0 -> land\n1 -> road\n2 -> class 7\n",
        "Pixel Value, Class\n0, land\n1, road\n2, class 7\n",  # Roboflow's _classes.csv
        "Value,Count,Class_Name\n0,9,land\n1,9,road\n2,9,class 7\n", "DN;Label\n0;land\n1;road\n2;class 7\n",
        "Idx\tRatio\tTrain\tName\n0\t0.1\t1\tland\n1\t0.2\t2\troad\n2\t0.3\t3\tclass 7\n",  # ADE20K's
        json.dumps({"id2label": {"0": "land", "1": "road", "2": "class 7"}, "model_type": "segformer"}),
        "0=land\n1 = road\n2=class 7\n", "0=land\nroad\n2=class 7\n", "1=road,0=land,2=class 7\n",
        "land=0\nroad=1\nclass 7=2\n",
        "---\nnames:\n- land\n- road\n- class 7\n",
        "__ignore__\nland\nroad\nclass 7\n", "0 land\n1 road\n2 class 7\n255 void\n",
        json.dumps(NAMES), json.dumps({"names": NAMES}, indent=1),
        json.dumps({"1": "road", "0": "land", "2": "class 7"}),
        json.dumps({name: index for index, name in enumerate(NAMES)}),
        json.dumps({"categories": [{"id": 2 - i, "name": name} for i, name in enumerate(NAMES[::-1])]}, indent=2),
    ],
)  # fmt: skip
def test_names_are_in_label_order(tmp_path, text):
    file = tmp_path / "names"
    file.write_text(text)
    assert classes(file) == (NAMES, {})


@pytest.mark.parametrize(
    "text",
    [
        "land=0,0,0\nroad = #804080\nclass 7=0,0,200\n",
        "# label:color_rgb:parts:actions\nland:0,0,0::\nroad:128,64,128::\nclass 7:0,0,200::\n",
        "# QGIS Generated Color Map Export File\nINTERPOLATION:EXACT\n"
        "0,0,0,0,255,land\n1,128,64,128,255,road\n2,0,0,200,255,class 7\n",
        "land (0, 0, 0)\nroad [128,64,128]\nclass 7 (0 0 200)\n",
        "name,r,g,b,id\nroad,128,64,128,1\nland,0,0,0,0\nclass 7,0,0,200,2\n",
        ",Class_Name,RGB\n0,land,\"0,0,0\"\n1,road,\"128,64,128\"\n2,class 7,\"0,0,200\"\n",
        json.dumps({"pathClasses": [{"name": name, "color": color} for name, color in COLORS.items()]}),
        "id,name,color\n" + "".join(f"{i},{name},{HEX[i]}\n" for i, name in enumerate(NAMES)), json.dumps(COLORS),
        json.dumps([{"label": name, "color": color} for name, color in zip(NAMES, HEX, strict=True)]),
        json.dumps({str(i): {"name": name, "rgb": COLORS[name]} for i, name in enumerate(NAMES)}),
    ],
    ids=[
        "equals signs", "CVAT", "QGIS", "brackets", "table by columns", "table of pandas", "QuPath", "table",
        "JSON of colours", "JSON of objects", "JSON by number",
    ],
)  # fmt: skip
def test_names_may_have_colours(tmp_path, text):
    file = tmp_path / "names"
    file.write_text(text)
    assert classes(file) == (NAMES, COLORS)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("7: land\n8: road\n", MisuseError, "numbers its classes 7, 8, .* pass --mask-values 7=land,8=road"),
        ("1 land\n2 road\n", MisuseError, "no labels 0 to 1.*in label order"),
        ("0,land\n0,road\n", MisuseError, "no labels 0 to 1"),
        ("land\nroad\nland\n", DeployError, "names 'land' twice"),
        ("Void\nland\nroad\n", MisuseError, "'Void' as label 0, .* --mask-values 0=void,1=land,"),
        ('{"a": 1.5}', DeployError, "JSON that does not list"), ("[1, 2]", DeployError, "JSON that does not list"),
        ('[{"x": 1}]', DeployError, "JSON that does not list"), ("[land, road]", DeployError, "is no JSON"),
        ('{"a": [1, 2]}', DeployError, "three numbers"), ('{"a": [0.5, 0, 1]}', DeployError, "three numbers"),
        ('{"a": [Infinity, 0, 1]}', DeployError, "three numbers"),
        ("land,1,2,3,0\nroad,4,5,6,1\n", DeployError, "of four numbers; write NUMBER,NAME,R,G,B"),
        ("land 0 0 0 255\nroad 1 2 3 255\n", DeployError, "of four numbers; write NUMBER,NAME,R,G,B"),
        ("id,name,r,g,b\n0,land,1,2\n", DeployError, "of 4 columns, and its heading has 5"),
        ("id,name\nx,land\n", DeployError, "'x' is no value of labels"),
        ("name,r,g,b\nland,0.0,0.5,1.0\n", DeployError, "three numbers from 0 to 255"),
        ("land 0.1 0.5 1.0\nroad 1.0 0.5 0.2\n", DeployError, "more than a name and not understood"),
        ("<View>\n<Label value='land'/>\n</View>\n", DeployError, "more than a name and not understood"),
        ("class names = {\nland, road}\n", DeployError, "more than a name and not understood"),
        ("CLASSES = ('land', 'road')\n", DeployError, "more than a name and not understood"),
        ("land #fff\nroad #000\n", DeployError, "more than a name and not understood"),
        ("0,1,0.5,land\n1,2,0.1,road\n", DeployError, "more than a name and not understood"),
        ("id\tname\ttrainId\n7\tland\t0\n8\troad\t1\n", MisuseError, "--mask-values 7=land,8=road"),
        ("names: [land, road]\n", DeployError, "as YAML"), ("nc: 1\nnames:\n- land\n", DeployError, "as YAML"),
        ("path: ../d\ntrain: images/train\nnc: 2\n", DeployError, "'path: ../d', as YAML"),
        ("- name: land\n- name: road\n", DeployError, "'name: land', as YAML"),
        ("0 0:0:0\n1 128:64:128\n", DeployError, "more than a name and not understood"),  # GRASS's colours
        ("-1: void\n0: land\n1: road\n", DeployError, "'-1: void', which is more than a name"),
        ("land\n4 wheeler\nroad\n", MisuseError, "'wheeler' 4, which stands at place 1, .* number all"),
        ("road,1\nland,0\nclass 7\n", MisuseError, "'road' 1, which stands at place 0"),
        ("id,name\n0,land\n1,\n", DeployError, "no name for its class at place 1"),
        ('["land", ""]', DeployError, "no name for its class at place 1"),
        ('[{"name": "a", "color": "red"}]', DeployError, "three numbers"),
        ('{"0": 5}', DeployError, "no labels 0 to 0|JSON"), ("[]", DeployError, "is empty"),
    ],
)  # fmt: skip
def test_what_names_no_labels_is_asked_about(tmp_path, text, error, said):
    file = tmp_path / "names"
    file.write_text(text)
    with pytest.raises(error, match=said) as raised:
        classes(file)
    assert len(str(raised.value)) < 300


def test_values_that_are_named_need_no_order(tmp_path):
    file = tmp_path / "names"
    file.write_text("7: land\n8: road\n")
    assert classes(file, MaskOptions("7=land,8=road"))[0] == ["land", "road"]
    with pytest.raises(MisuseError):
        in_label_order(read_classes(file), file)
