"""What label files of all kinds mean: values and colours as classes, and one line where that cannot be told."""

import numpy as np
import pytest
import tifffile
from fcn_deploy.calibration.census import one_class
from fcn_deploy.calibration.class_files import read_colors
from fcn_deploy.calibration.datasets import load_dataset, take_census
from fcn_deploy.calibration.label_map import LabelMap, label_map_for, label_map_of
from fcn_deploy.calibration.mask_options import MaskOptions, parse_values
from fcn_deploy.calibration.stream import open_stream
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard

NAMES = ("land", "road", "water")
COLORS = ((0, 0, 0), (128, 64, 128), (0, 0, 200))
CLASSES = np.uint8([[0, 1, 2, 0], [2, 2, 1, 255], [1, 0, 0, 1]])
PLAIN = label_map_of(NAMES, COLORS, MaskOptions())


def save(path, array, **options):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path)
    return path


def colored(labels, void=(255, 255, 255)):
    return np.uint8([*COLORS, *[void] * 253])[labels]


def data(root, *masks, classes="background\ncell\n", split="train", suffix=".png"):
    for folder in (root / split, root / f"{split}annot"):
        folder.mkdir(parents=True, exist_ok=True)
    for index, mask in enumerate(masks):
        mask = np.asarray(mask)
        save(root / split / f"{index}.png", np.full((*mask.shape[:2], 3), 90, np.uint8))
        save(root / f"{split}annot" / f"{index}{suffix}", mask)
    if classes:
        (root / "classes.txt").write_text(classes)
    return str(root)


BINARY = np.uint8([[0, 0, 255], [0, 255, 255]])


# Every kind of file.


@pytest.mark.parametrize(
    "name, dtype, options",
    [
        ("l.npy", np.uint8, {}), ("l.npy", ">u2", {}), ("l.npy", np.int64, {}), ("l.npy", np.float32, {}),
        ("l.png", np.uint16, {}), ("l.tif", np.uint8, {}), ("l.tif", np.uint16, {}), ("l.tif", np.int16, {}),
        ("l.tif", np.int32, {}), ("l.tif", np.float32, {}), ("l.tif", np.float64, {}), ("l.tif", np.uint64, {}),
        ("l.tif", np.uint16, {"byteorder": ">"}), ("l.tif", np.int16, {"byteorder": ">"}),
        ("l.tif", np.float32, {"byteorder": ">"}), ("l.tif", np.float32, {"compression": "zlib", "predictor": True}),
        ("l.tif", np.uint16, {"tile": (16, 16), "compression": "lzw"}), ("l.tif", np.int8, {}),
        ("l.tif", np.uint16, {"byteorder": ">", "photometric": "miniswhite"}), ("l.tif", np.uint8, {"bigtiff": True}),
    ],
)  # fmt: skip
def test_whole_numbers_of_any_type_are_classes(tmp_path, name, dtype, options):
    wanted = np.where(CLASSES == 255, 0, CLASSES)
    stored = wanted.astype(dtype)
    if options.get("photometric") == "miniswhite":
        stored = 65535 - stored
    read = PLAIN.read(save(tmp_path / name, stored, **options))
    assert read.labels.dtype == np.uint8 and np.array_equal(read.labels, wanted)
    assert read.values == {0, 1, 2}


def test_channels_of_one_and_booleans_are_taken(tmp_path):
    wanted = np.tile(np.where(CLASSES == 255, 0, CLASSES), 2)
    for array in (wanted[None], wanted[:, :, None], np.repeat(wanted[:, :, None], 3, 2)):
        assert np.array_equal(PLAIN.read(save(tmp_path / "l.npy", array)).labels, wanted)
    assert np.array_equal(PLAIN.read(save(tmp_path / "l.npy", wanted > 0)).labels, wanted > 0)
    assert np.array_equal(PLAIN.read(save(tmp_path / "l.png", np.repeat(wanted[:, :, None], 3, 2))).labels, wanted)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_nan_is_no_label(tmp_path, suffix):
    array = np.where(CLASSES == 255, np.nan, CLASSES).astype(np.float32)
    assert np.array_equal(PLAIN.read(save(tmp_path / f"l{suffix}", array)).labels, CLASSES)


@pytest.mark.parametrize("nodata, dtype", [("-9999", np.int16), ("-9999", np.float32), ("200", np.uint8), ("0", "u1")])
def test_the_no_data_tag_of_a_geotiff_is_no_label(tmp_path, nodata, dtype):
    stored = np.where(CLASSES == 255, int(nodata), CLASSES.astype(int)).astype(dtype)
    path = save(tmp_path / "l.tif", stored, extratags=[(42113, "s", 0, nodata, True)])
    read = PLAIN.read(path)
    assert read.nodata == int(nodata)
    assert np.array_equal(read.labels, np.where(stored == int(nodata), 255, CLASSES))


def test_what_the_user_says_of_a_value_stands_above_the_tag(tmp_path):
    values = CLASSES % 255
    path = save(tmp_path / "l.tif", values, extratags=[(42113, "s", 0, "0", True)])
    assert np.array_equal(label_map_of(NAMES, COLORS, MaskOptions("0,1,2")).read(path).labels, values)


def test_an_internal_mask_and_alpha_leave_out_what_they_hide(tmp_path):
    hidden = np.zeros(CLASSES.shape, bool)
    hidden[1] = True
    values = np.where(CLASSES == 255, 0, CLASSES)
    with tifffile.TiffWriter(tmp_path / "l.tif") as writer:
        writer.write(values, photometric="minisblack")
        writer.write(~hidden, photometric="mask", subfiletype=4)
    wanted = np.where(hidden, 255, values)
    assert np.array_equal(PLAIN.read(tmp_path / "l.tif").labels, wanted)
    alpha = np.where(hidden, 0, 255).astype(np.uint8)
    path = save(tmp_path / "l.png", np.dstack([colored(values), alpha]))
    assert np.array_equal(PLAIN.read(path).labels, wanted)
    Image.merge("LA", [Image.fromarray(values), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    assert np.array_equal(PLAIN.read(tmp_path / "la.png").labels, wanted)


@pytest.mark.parametrize(
    "array, said",
    [
        (np.float32([[0.5]]), "holds 0.5; labels are whole numbers"),
        (np.float32([[np.inf]]), "holds inf"),
        (np.array([[1j]]), "holds complex128"),
        (np.zeros((2, 2, 5), np.uint8), "has 5 channels of uint8"),
        (np.zeros((2, 2, 3), np.uint32), "has 3 channels of uint32"),
        (np.int16([[-7]]), "holds class -7"),
        (np.uint16([[65535]]), r"holds class 65535, and there are 3 classes .* --mask-values VALUE=CLASS"),
    ],
)
def test_what_is_no_label_is_refused_by_its_value(tmp_path, array, said):
    with pytest.raises(DeployError, match=said):
        PLAIN.read(save(tmp_path / "l.npy", array))


def test_a_damaged_file_of_any_kind_is_one_line(tmp_path):
    for name in ("l.npy", "l.tif", "l.png"):
        path = save(tmp_path / name, np.arange(4096, dtype=np.uint8).reshape(64, 64) % 3)
        for size in (0, 9, 150):
            path.write_bytes(path.read_bytes()[:size])
            with pytest.raises(DeployError) as caught:
                PLAIN.read(path)
            assert name in str(caught.value) and "\n" not in str(caught.value)


# Values.


def test_values_are_mapped_to_classes(tmp_path):
    path = save(tmp_path / "l.png", np.uint8([[7, 9], [0, 255]]))
    for text, wanted in (
        ("0=void,7=land,9=water", [[0, 2], [255, 255]]),
        ("0,7,9", [[1, 2], [0, 255]]),
        ("9=0,7=WATER,255=road,0=Void", [[2, 0], [255, 1]]),
    ):
        assert label_map_of(NAMES, COLORS, MaskOptions(text)).read(path).labels.tolist() == wanted
    with pytest.raises(DeployError, match="holds value 9, which --mask-values does not name; add 9=CLASS to it, or 9="):
        label_map_of(NAMES, COLORS, MaskOptions("0=land,7=water")).read(path)
    path = save(tmp_path / "l.tif", np.int16([[-1, 300]]))
    assert label_map_of(NAMES, COLORS, MaskOptions("-1=void,300=road")).read(path).labels.tolist() == [[255, 1]]


def test_black_and_white_are_0_and_255_however_an_optimiser_stores_them(tmp_path):
    told = label_map_of(("a", "b"), ((0, 0, 0), (255, 0, 0)), MaskOptions("0,255"))
    picture = Image.fromarray(BINARY)
    picture.save(tmp_path / "grey.png")
    picture.point(lambda value: value > 0, "1").save(tmp_path / "bit.png")
    indices = Image.fromarray((BINARY > 0).astype(np.uint8))
    indices.putpalette([0, 0, 0, 255, 255, 255])
    indices.save(tmp_path / "palette.png")
    for name in ("grey", "bit", "palette"):
        assert told.read(tmp_path / f"{name}.png").labels.tolist() == [[0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "write the values"), ("0,", "write the values"), ("a,b", "write the values"), ("0=land,1", "write the"),
        ("0=,1=road", "write the values"), ("1.5=road", "write the values"),
        ("0,0,1", "has the value 0 twice"), ("1=road,1=void", "has the value 1 twice"),
        ("1=road,2=water,3=road", "names 'road' twice, for 1 and 3"), ("1=road,2=1", "names 'road' twice"),
        ("1=forest", r"names 'forest', which is no class; the classes are land, road, water \(or their numbers\)"),
        ("1=3", "names '3', which is no class"), ("0,255", "lists 2 values, and there are 3 classes"),
    ],
)  # fmt: skip
def test_a_map_that_means_nothing_is_one_line(text, said):
    with pytest.raises(MisuseError, match=said) as caught:
        parse_values(text, NAMES)
    assert "\n" not in str(caught.value)


def test_a_map_names_the_classes_where_nothing_else_does(tmp_path):
    assert parse_values("1=road,2=water,0=void", None) == ({1: 0, 2: 1, 0: 255}, ("road", "water"))
    assert parse_values("0,255", None) == ({0: 0, 255: 1}, ("class 0", "class 1"))
    assert parse_values("3=1,5=0", None)[1] == ("class 0", "class 1")
    with pytest.raises(MisuseError, match="fewer than two classes"):
        parse_values("255=cell,0=void", None)
    images = load_dataset(data(tmp_path, BINARY, classes=None), "train", masks=MaskOptions("0=background,255=cell"))
    assert tuple(images.classes) == ("background", "cell") and images[0][1].tolist() == [[0, 0, 1], [0, 1, 1]]


# Questions.


def test_masks_of_0_and_255_are_asked_about(tmp_path):
    root = data(tmp_path, BINARY, BINARY)
    for classes in (tmp_path / "classes.txt", None):
        if classes is None:
            (tmp_path / "classes.txt").unlink()
        with pytest.raises(MisuseError) as caught:
            take_census(load_dataset(root, "train"), "train")
        said = str(caught.value)
        assert "hold the values 0 and 255 alone, and 255 is not counted, so only" in said
        assert "pass --mask-values 0,255 where 255 is" in said and "255=void where it is no label" in said
    (tmp_path / "classes.txt").write_text("background\ncell\n")
    assert take_census(load_dataset(root, "train", masks=MaskOptions("0,255")), "train").pixels.tolist() == [6, 6]
    with pytest.raises(MisuseError, match=r"hold 255 too, which is not counted, so only .*; add 255=CLASS to"):
        take_census(load_dataset(root, "train", masks=MaskOptions("0=background,1=cell")), "train")
    answered = load_dataset(root, "train", masks=MaskOptions("0=background,255=void"))
    census = take_census(answered, "train")
    assert census.pixels.tolist() == [6, 0]
    assert "labels of 'background' alone" in one_class(census.pixels, answered.classes, "train")


@pytest.mark.parametrize(
    "masks, classes, said",
    [
        ([BINARY | 255], "background\ncell\n", "the value 255 alone.* so no class is left; pass --mask-values 255="),
        ([BINARY], "a\nb\nc\n", r"0 and 255 alone.*pass --mask-values 0=CLASS,255=CLASS where they are classes, or"),
        ([BINARY // 255, BINARY], "a\nb\n", None),  # a void region beside a class that is there
        ([BINARY * 0], "a\nb\n", None),
    ],
)  # fmt: skip
def test_what_is_asked_is_what_may_be_hidden(tmp_path, masks, classes, said):
    images = load_dataset(data(tmp_path, *masks, classes=classes), "train")
    if said is None:
        take_census(images, "train")
    else:
        with pytest.raises(MisuseError, match=said):
            take_census(images, "train")


def test_a_class_hidden_by_the_no_data_tag_is_asked_about(tmp_path):
    root = data(tmp_path, BINARY // 255, suffix=".tif")
    save(tmp_path / "trainannot" / "0.tif", BINARY // 255, extratags=[(42113, "s", 0, "0", True)])
    with pytest.raises(MisuseError, match=r"0 is no-data by the files' own.*--mask-values 0,1 where 0 is 'background'"):
        take_census(load_dataset(root, "train"), "train")
    assert take_census(load_dataset(root, "train", masks=MaskOptions("0,1")), "train").pixels.tolist() == [3, 3]


def test_files_that_disagree_and_values_that_never_occur_are_said(tmp_path):
    images = load_dataset(data(tmp_path, BINARY // 255, BINARY), "train")
    (hint,) = take_census(images, "train").hints(images.label_map, "train")
    assert hint.startswith("1 labels of train hold 0 and 255 alone and others 1 (") and "1.png is the first" in hint
    told = load_dataset(str(tmp_path), "train", masks=MaskOptions("0=background,1=cell,255=void,9=void"))
    (hint,) = take_census(told, "train").hints(told.label_map, "train")
    assert hint == "no label of train holds 9, which --mask-values names"


def test_values_far_apart_without_names_are_no_hundred_classes(tmp_path):
    root = data(tmp_path, np.uint8([[0, 128, 254]]), classes=None)
    with pytest.raises(MisuseError, match=r"3 values from 0 to 254.*--mask-values 0=CLASS,128=CLASS,254=CLASS, or"):
        load_dataset(root, "train")
    assert len(load_dataset(root, "train", masks=MaskOptions("0,128,254")).classes) == 3


@pytest.mark.parametrize(
    ("masks", "objects"),
    [
        ([np.arange(60)], True), ([np.arange(20), np.arange(14)], True), ([np.arange(20)], False),
        ([np.arange(20), np.arange(20)], False), ([np.arange(20), np.arange(1, 14)], False),
        ([np.arange(5), [0, 1]], False),
    ],
)  # fmt: skip
def test_numbered_objects_are_no_classes(tmp_path, masks, objects):
    root = data(tmp_path, *[np.uint16([mask]) for mask in masks], classes=None)
    if objects:
        with pytest.raises(MisuseError, match="as those of numbered objects do, and nobody said that they are classes"):
            load_dataset(root, "train")
    else:
        assert len(load_dataset(root, "train").classes) == np.max(masks[0]) + 1
    (tmp_path / "classes.txt").write_text("".join(f"class {index}\n" for index in range(60)))
    assert len(load_dataset(root, "train").classes) == 60


def test_one_class_is_worth_a_line():
    assert one_class(np.array([5, 0]), ("a", "b"), "val").startswith("val has labels of 'a' alone")
    assert not one_class(np.array([5, 1]), ("a", "b"), "val") and not one_class(np.array([5]), ("a",), "val")


# Colours.


TABLE = "name,r,g,b\nland,0,0,0\nroad,128,64,128\nwater,0,0,200\nvoid,255,255,255\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE, "land 0 0 0\nroad 128 64 128\nwater 0 0 200\nvoid 255 255 255",
        "0 0 0 land\n128 64 128\troad\n0 0 200 water\n255 255 255 void", "0: land #000000\n1: road #804080\n"
        "2: water #0000C8\n3: void #ffffff",
        "\ufeff0,land,0,0,0\n1,road,128,64,128\n2,water,0,0,200\n9,void,255,255,255",
    ],
)  # fmt: skip
def test_files_of_colours_as_they_are_in_use(tmp_path, text):
    file = tmp_path / "colors.csv"
    file.write_text(text)
    assert read_colors(file) == [*zip(NAMES, COLORS, strict=True), ("void", (255, 255, 255))]
    told = label_map_of(NAMES, COLORS, MaskOptions(colors=file))
    for name in ("l.png", "l.tif", "l.npy"):
        assert np.array_equal(told.read(save(tmp_path / name, colored(CLASSES))).labels, CLASSES)
    tifffile.imwrite(
        tmp_path / "p.tif", np.moveaxis(colored(CLASSES), 2, 0), planarconfig="separate", photometric="rgb"
    )
    assert np.array_equal(told.read(tmp_path / "p.tif").labels, CLASSES)
    palette = Image.fromarray(np.uint8([[2, 0, 1]]))  # its indices say nothing, its colours do
    palette.putpalette([value for color in (COLORS[1], COLORS[2], COLORS[0]) for value in color])
    palette.save(tmp_path / "palette.png")
    assert told.read(tmp_path / "palette.png").labels.tolist() == [[0, 1, 2]]
    assert told.read(save(tmp_path / "g.png", np.uint8([[0, 255]]))).labels.tolist() == [[0, 255]]


def test_colours_of_the_card_and_of_classes_txt_tell_classes(tmp_path):
    card = ModelCard(NAMES, colors=COLORS)
    path = save(tmp_path / "l.png", colored(np.where(CLASSES == 255, 0, CLASSES)))
    assert np.array_equal(label_map_for(card, MaskOptions()).read(path).labels, np.where(CLASSES == 255, 0, CLASSES))
    with pytest.raises(DeployError, match=r"l\.png has colours, and nobody said .* pass --mask-colors FILE"):
        label_map_for(ModelCard(NAMES), MaskOptions()).read(path)
    root = data(tmp_path / "d", colored(CLASSES), classes=TABLE.replace(",", " ").partition("\n")[2])
    images = load_dataset(root, "train")
    assert images.classes == NAMES and images.colors == COLORS and np.array_equal(images[0][1], CLASSES)


def test_colours_alone_name_the_classes(tmp_path):
    (tmp_path / "colors.txt").write_text(TABLE)
    root = data(tmp_path / "d", colored(CLASSES), classes=None)
    images = load_dataset(root, "train", masks=MaskOptions(colors=tmp_path / "colors.txt"))
    assert images.classes == NAMES and images.colors == COLORS and np.array_equal(images[0][1], CLASSES)
    with pytest.raises(DeployError, match="nobody said of which class"):
        load_dataset(root, "train")


@pytest.mark.parametrize(
    "text, error, said",
    [
        ("land 0 0 0\nroad 0 0 0\n", DeployError, r"has the colour \(0, 0, 0\) twice"),
        ("land 0 0 0\nroad\n", DeployError, "the class 'road' without a colour"),
        ("land 0 0 300\n", DeployError, "from 0 to 255"), ("", DeployError, "is empty"),
        ("land 0 0 0\nforest 1 1 1\n", MisuseError, "names 'forest', which is no class"),
        ("land 0 0 0\nland 1 1 1\n", MisuseError, "names 'land' twice"),
    ],
)  # fmt: skip
def test_a_file_of_colours_that_means_nothing_is_one_line(tmp_path, text, error, said):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(error, match=said) as caught:
        label_map_of(NAMES, COLORS, MaskOptions(colors=tmp_path / "c.txt"))
    assert "\n" not in str(caught.value)
    with pytest.raises(MisuseError, match="does not exist"):
        label_map_of(NAMES, COLORS, MaskOptions(colors=tmp_path / "none.txt"))


def test_a_colour_of_no_class_is_named(tmp_path):
    stored = colored(CLASSES)
    stored[0, :3] = (9, 8, 7)
    with pytest.raises(DeployError, match=r"has the colour \(9, 8, 7\) in 3 pixels, of no class; say what it is"):
        label_map_of(NAMES, COLORS, MaskOptions()).read(save(tmp_path / "l.png", stored[:, :3]))
    with pytest.raises(DeployError, match="JPEG changes"):
        label_map_of(NAMES, COLORS, MaskOptions()).read(save(tmp_path / "l.jpg", stored))


def test_options_of_masks_are_not_for_digits():
    with pytest.raises(MisuseError, match="digits are drawn"):
        load_dataset("digits", "train", masks=MaskOptions("0,255"))


def test_calibration_needs_no_labels_that_it_can_read(tmp_path):
    root = data(tmp_path, colored(CLASSES), classes=None)
    ((_, image),) = open_stream(root, ModelCard(NAMES))
    assert image.shape == (*CLASSES.shape, 3)


def test_void_of_a_card_is_the_value_after_its_classes(tmp_path):
    path = save(tmp_path / "l.png", np.uint8([[0, 2, 3]]))
    assert label_map_for(ModelCard(NAMES), MaskOptions()).read(path).labels.tolist() == [[0, 2, 255]]
    assert isinstance(PLAIN, LabelMap)
    with pytest.raises(DeployError, match="holds class 3"):
        PLAIN.read(path)


@pytest.mark.parametrize(
    "kind", ["tag", "tag of colours", "alpha", "palette of an RGBA", "palette", "grey and alpha", "transparent grey"]
)
def test_a_class_that_is_hidden_by_its_file_is_told(tmp_path, caplog, kind):
    stored = np.array([[0, 1, 2, 0]], np.uint8)
    colors, masks, path = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8), MaskOptions(), tmp_path / "l.png"
    (tmp_path / "colours").write_text("land 0 0 0\nroad 255 0 0\nwater 0 255 0\n")
    if kind == "tag":
        path = save(tmp_path / "l.tif", stored, extratags=[(42113, "s", 0, "0", True)])
    elif kind == "tag of colours":
        path = save(tmp_path / "l.tif", colors[stored], extratags=[(42113, "s", 0, "0", True)], photometric="rgb")
    elif kind == "transparent grey":
        Image.fromarray(stored).save(path, transparency=0)
    elif kind == "grey and alpha":
        Image.fromarray(np.dstack([stored, np.uint8(255) * (stored > 0)])).save(path)
    else:
        masks = masks if kind == "palette" else MaskOptions(colors=tmp_path / "colours")
        picture = Image.fromarray(np.dstack([colors[stored], np.uint8(255) * (stored > 0)]))
        if kind != "alpha":
            picture = Image.fromarray(stored)
            picture.putpalette(colors.tobytes())
            picture.info["transparency"] = 0
        picture.save(path)
    classes = label_map_of(NAMES, [tuple(map(int, color)) for color in colors], masks)
    read = classes.read(path)
    assert read.labels.tolist() == [[255, 1, 2, 255]]
    assert len(caplog.messages) == 1 and "'land'" in caplog.text and len(caplog.messages[0]) < 300
    caplog.clear()
    named = label_map_of(NAMES, COLORS, MaskOptions("0=land,1=road,2=water"))
    if kind in ("tag", "palette", "transparent grey"):
        assert named.read(path).labels.tolist() == [[0, 1, 2, 0]] and not caplog.messages
    elif kind == "tag of colours":
        named = label_map_of(NAMES, COLORS, MaskOptions(colors=tmp_path / "colours"))
        assert named.read(path).labels.tolist() == [[0, 1, 2, 0]] and not caplog.messages


def test_what_a_class_has_without_a_label_too_is_not_told(tmp_path, caplog):
    stored = np.array([[0, 1, 0, 0]], np.uint8)
    Image.fromarray(np.dstack([stored, np.array([[255, 255, 0, 0]], np.uint8)])).save(tmp_path / "l.png")
    assert label_map_of(NAMES, COLORS, MaskOptions()).read(tmp_path / "l.png").labels.tolist() == [[0, 1, 255, 255]]
    path = save(tmp_path / "l.tif", stored, extratags=[(42113, "s", 0, "9", True)])
    label_map_of(NAMES, COLORS, MaskOptions()).read(path)
    assert not caplog.messages
