"""Labelled images from every layout, at their own sizes."""

import numpy as np
import pytest
import tifffile
from fcn_deploy.calibration.datasets import VOC_CLASSES, class_pixels, load_dataset, take_census
from fcn_deploy.calibration.digits import CLASSES, Digits, canvas
from fcn_deploy.calibration.mask_options import MaskOptions
from helpers import needs_shared
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard


def put(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette:
        image.putpalette(palette)
    image.save(path)


def pair(images, labels, name, size=(6, 8), value=1, suffix="png"):
    put(images / f"{name}.{suffix}", np.full((*size, 3), 100))
    put(labels / f"{name}.png", np.full(size, value))


def folder_pairs(root, split="train", classes="road\nsky\nvoid\n"):
    for name, size in (("a", (6, 8)), ("b", (9, 5))):
        pair(root / split, root / f"{split}annot", name, size)
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def test_folder_pairs_keep_their_sizes_and_void_is_not_counted(tmp_path):
    put(folder_pairs(tmp_path) / "trainannot" / "a.png", [[0, 1], [2, 255]] * 3 and np.tile([[0, 1], [2, 255]], (3, 4)))
    data = load_dataset(str(tmp_path), "train")
    assert tuple(data.classes) == ("road", "sky") and len(data) == 2 and data.name(1) == "b.png"
    image, labels = data[0]
    assert image.shape == (6, 8, 3) and sorted(np.unique(labels)) == [0, 1, 255]
    assert data[1][0].shape == (9, 5, 3)


@pytest.mark.parametrize("layout", ["train/images", "images/train"])
def test_the_other_folder_layouts(tmp_path, layout):
    pair(tmp_path / layout, tmp_path / layout.replace("images", "labels"), "a", suffix="jpg")
    data = load_dataset(str(tmp_path), "train")
    assert len(data) == 1 and len(data.classes) == 2


def test_images_beside_labels_are_divided(tmp_path):
    for index in range(20):
        pair(tmp_path / "images", tmp_path / "labels", f"{index:02}")
    train, val = (load_dataset(str(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 2) and val.name(0) == "09.png"


def test_voc_layout_reads_palette_labels_and_its_class_names(tmp_path):
    root = tmp_path / "VOC2012"
    put(root / "JPEGImages" / "x.jpg", np.zeros((4, 6, 3)))
    put(root / "SegmentationClass" / "x.png", np.tile([[0, 15, 255]], (4, 2)), palette=[1, 2, 3] * 256)
    listing = root / "ImageSets" / "Segmentation" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("x\n")
    data = load_dataset(str(root), "val")
    assert tuple(data.classes) == tuple(VOC_CLASSES) and len(VOC_CLASSES) == 21
    assert sorted(np.unique(data[0][1])) == [0, 15, 255]
    listing.write_text("x\ny\n")
    with pytest.raises(DeployError, match="names y"):
        load_dataset(str(root), "val")
    with pytest.raises(MisuseError, match=r"test\.txt"):
        load_dataset(str(root), "test")


def test_class_names_may_be_numbered_or_missing(tmp_path):
    folder_pairs(tmp_path, classes="0: road\n1 sky\n")
    assert tuple(load_dataset(str(tmp_path), "train").classes) == ("road", "sky")
    (tmp_path / "classes.txt").unlink()
    assert len(load_dataset(str(tmp_path), "train").classes) == 2
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(DeployError, match="empty"):
        load_dataset(str(tmp_path), "train")


def test_a_count_takes_images_spread_evenly(tmp_path):
    for index in range(9):
        pair(tmp_path / "val", tmp_path / "valannot", f"{index}")
    data = load_dataset(str(tmp_path), "val", count=3)
    assert [data.name(i) for i in range(3)] == ["0.png", "4.png", "8.png"]


def test_a_class_beyond_the_card_names_the_file(tmp_path):
    put(folder_pairs(tmp_path) / "trainannot" / "b.png", np.full((9, 5), 7))
    with pytest.raises(DeployError, match=r"b\.png holds class 7, and there are 2 classes"):
        load_dataset(str(tmp_path), "train")[1]


def test_labels_of_another_size_are_refused(tmp_path):
    put(folder_pairs(tmp_path) / "trainannot" / "b.png", np.zeros((5, 9)))
    with pytest.raises(DeployError, match=r"5×9 and .*b\.png is 9×5"):
        load_dataset(str(tmp_path), "train")[1]


def test_a_missing_label_is_said_before_training_starts(tmp_path):
    (folder_pairs(tmp_path) / "trainannot" / "b.png").unlink()
    with pytest.raises(DeployError, match=r"b\.png has no label"):
        load_dataset(str(tmp_path), "train")


def test_a_label_without_an_image_is_said(tmp_path, caplog):
    put(folder_pairs(tmp_path) / "trainannot" / "z.png", np.zeros((6, 8)))
    assert len(load_dataset(str(tmp_path), "train")) == 2
    assert "labels without an image are left out, 1 in " in caplog.text and ": z.png" in caplog.text


def test_two_labels_of_one_image_are_refused(tmp_path):
    put(folder_pairs(tmp_path) / "trainannot" / "b.bmp", np.zeros((9, 5)))
    with pytest.raises(DeployError, match=r"b\.bmp and .*b\.png are labels of one image"):
        load_dataset(str(tmp_path), "train")


def test_pixels_of_each_class_are_counted_and_every_label_is_checked(tmp_path):
    put(folder_pairs(tmp_path) / "trainannot" / "a.png", [[0, 1, 1, 2, 255, 0, 0, 0]] * 6)
    data = load_dataset(str(tmp_path), "train")
    assert class_pixels(data).tolist() == [24, 12 + 45]  # b is of class 1
    assert class_pixels(Digits("train", count=2, sizes=((40, 40),))).sum() == 3200
    put(tmp_path / "trainannot" / "b.png", np.zeros((5, 9)))
    with pytest.raises(DeployError, match=r"5×9 and .*b\.png is 9×5"):
        class_pixels(data)
    put(tmp_path / "trainannot" / "b.png", np.full((9, 5), 7))
    with pytest.raises(DeployError, match=r"b\.png holds class 7"):
        class_pixels(data)
    (tmp_path / "trainannot" / "b.png").unlink()
    with pytest.raises(DeployError, match="does not exist"):
        class_pixels(data)


def test_a_negative_class_is_refused(tmp_path):
    folder_pairs(tmp_path)
    (tmp_path / "trainannot" / "a.png").unlink()
    Image.fromarray(np.full((6, 8), -1, np.int32)).save(tmp_path / "trainannot" / "a.tif")
    with pytest.raises(DeployError, match="holds class -1"):
        load_dataset(str(tmp_path), "train")[0]


def test_coloured_or_broken_labels_are_refused(tmp_path):
    put(folder_pairs(tmp_path) / "trainannot" / "a.png", np.full((6, 8, 3), (1, 0, 0)))
    with pytest.raises(
        DeployError, match=r"has the colour \(1, 0, 0\) in 48 pixels, of no class; say what it is by --mask"
    ):
        load_dataset(str(tmp_path), "train")[0]
    (tmp_path / "trainannot" / "a.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DeployError, match="not an image"):
        load_dataset(str(tmp_path), "train")[0]


def test_other_names_than_the_models_are_said(tmp_path, caplog):
    load_dataset(str(folder_pairs(tmp_path)), "train", card=ModelCard(("road", "sky")))
    assert not caplog.text
    load_dataset(str(tmp_path), "train", card=ModelCard(("cat", "dog")))
    assert "names its classes otherwise than the model: road, sky" in caplog.text


@pytest.mark.parametrize("kind", ["values", "mapped", "palette", "colours", "void"])
def test_labels_of_the_models_classes_in_another_order_are_told_by_their_names(tmp_path, caplog, kind):
    card = ModelCard(("road", "sky", "tree"), colors=((128, 64, 128), (0, 0, 200), (0, 99, 0)))
    folder_pairs(tmp_path, classes="tree\nRoad\nsky\n" + ("void\n" if kind == "void" else ""))
    stored = np.tile(np.uint8([[0, 1], [2, 255]]), (3, 4))
    meant = np.uint8([2, 0, 1, *[255] * 253])[stored]
    masks = MaskOptions()
    if kind == "mapped":
        masks, stored = MaskOptions("5=sky,6=tree,7=road"), np.uint8([6, 7, 5, *[255] * 253])[stored]
    image = Image.fromarray(stored)
    if kind == "palette":
        image.putpalette([value for place in (2, 0, 1) for value in card.colors[place]] + [9] * (253 * 3))
    elif kind == "colours":
        meant = np.where(meant == 255, 0, meant)
        image = Image.fromarray(np.uint8(card.colors)[meant])
    elif kind == "void":
        image = Image.fromarray(np.where(stored == 255, 3, stored).astype(np.uint8))
    image.save(tmp_path / "trainannot" / "a.png")
    data = load_dataset(str(tmp_path), "train", card=card, masks=masks)
    assert data.classes == card.classes and "has the model's classes in another order" in caplog.text
    np.testing.assert_array_equal(data[0][1], meant)
    assert [data.label_map.name_of(label).lower() for label in range(3)] == ["road", "sky", "tree"]


def test_misuse(tmp_path):
    with pytest.raises(MisuseError, match="not a folder"):
        load_dataset(str(tmp_path / "none"), "train")
    with pytest.raises(MisuseError, match="no labelled images"):
        load_dataset(str(tmp_path), "train")
    with pytest.raises(MisuseError, match="no split"):
        load_dataset("digits", "test")
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(MisuseError, match="no images"):
        load_dataset(str(tmp_path), "train")
    with pytest.raises(MisuseError, match="has 2 classes and the model has 3"):
        load_dataset(str(folder_pairs(tmp_path)), "train", card=ModelCard(("a", "b", "c")))


def test_digits_are_made_from_their_seed_alone():
    first, again, other = Digits("train"), Digits("train"), Digits("train", seed=1)
    np.testing.assert_array_equal(first[3][0], again[3][0])
    assert first.size(3) != other.size(3) or (first[3][0] != other[3][0]).any()
    assert len({first.size(i) for i in range(20)}) > 15  # mixed sizes
    assert tuple(first.classes) == CLASSES and len(first.colors) == 11


def test_digits_of_train_and_val_are_different_handwriting():
    train, val = (canvas(200, 200, 0, split, 0)[0] for split in ("train", "val"))
    assert (train != val).any()


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (96, 96), (150, 333)])
def test_digits_fill_canvases_of_any_size(size):
    image, labels = canvas(*size, 0, "val", 5)
    assert image.shape == (*size, 3) and image.dtype == np.uint8 and labels.shape == size
    if min(size) >= 96:
        assert 0.03 < (labels > 0).mean() < 0.6
        classes = set(np.unique(labels)) - {0}
        assert classes and max(classes) <= 10


def test_the_photographs_beside_the_project():
    camvid = load_dataset(str(needs_shared("camvid")), "val")
    assert len(camvid) == 101 and len(camvid.classes) == 11 and camvid.classes[0] == "sky"
    image, labels = camvid[0]
    assert image.shape == (360, 480, 3) and set(np.unique(labels)) <= {*range(11), 255}
    nuclei = load_dataset(str(needs_shared("nuclei")), "val")
    assert len(nuclei.classes) == 2
    assert len({nuclei[i][0].shape for i in range(len(nuclei))}) >= 4


def test_what_is_no_image_is_not_counted(tmp_path):
    root = folder_pairs(tmp_path)
    rgba = np.full((6, 8, 4), 100, np.uint8)
    rgba[:, :3, 3] = 0
    put(root / "train" / "a.png", rgba)
    image, labels = load_dataset(str(root), "train")[0]
    assert (labels[:, :3] == 255).all() and (labels[:, 3:] == 1).all()
    assert image[0, 0].tolist() == [124, 116, 104] and (image[:, 3:] == 100).all()


def test_pictures_of_a_data_set_that_nothing_reads_are_counted_and_named(tmp_path, caplog):
    for name in ("train", "trainannot"):
        (tmp_path / name).mkdir()
    for name in ("a.dcm", "b.dcm", "c.nii.gz"):
        (tmp_path / "train" / name).write_bytes(b"x")
    with pytest.raises(MisuseError, match=r"holds 3 files that are not read here: 2 \.dcm \(pydicom reads it\)"):
        load_dataset(str(tmp_path), "train")
    put(tmp_path / "train" / "x.png", np.zeros((4, 4, 3)))
    put(tmp_path / "trainannot" / "x.png", np.tile([[0, 1, 0, 1]], (4, 1)))
    assert len(load_dataset(str(tmp_path), "train")) == 1
    assert "2 .dcm (pydicom reads it), 1 .nii.gz (nibabel reads it)" in caplog.text


def cvats(root, indices=False):
    """What CVAT exports as `Segmentation mask 1.1`: VOC's layout, and the classes in labelmap.txt."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    put(root / "JPEGImages" / "a.png", np.zeros((4, 6, 3)))
    labels = np.tile([0, 1, 2], (4, 2))
    palette = np.array([(0, 0, 0), (128, 64, 128), (0, 0, 142)])
    put(
        root / "SegmentationClass" / "a.png", labels if indices else palette[labels], palette.ravel().tolist() * indices
    )
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("a\n")
    lines = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\nlorry:0,0,142::\n"
    (root / "labelmap.txt").write_text(lines)
    return labels


@pytest.mark.parametrize("indices", [False, True])
def test_an_export_of_cvat_has_the_classes_of_its_labelmap(tmp_path, indices):
    labels, names = cvats(tmp_path, indices), ("background", "road", "lorry")
    for card in (None, ModelCard(names)):
        data = load_dataset(str(tmp_path), "default", card=card)
        assert data.classes == names and np.array_equal(data[0][1], labels)
    turned = load_dataset(str(tmp_path), "default", card=ModelCard(("road", "background", "lorry")))
    assert np.array_equal(turned[0][1], np.array([1, 0, 2])[labels])


def test_vocs_layout_with_classes_of_ones_own(tmp_path, caplog):
    labels, names = cvats(tmp_path, indices=True), ("background", "road", "lorry")
    (tmp_path / "labelmap.txt").rename(tmp_path / "colours")
    assert load_dataset(str(tmp_path), "default", card=ModelCard(names)).classes == names
    for masks in (MaskOptions("0=background,1=road,2=lorry"), MaskOptions(colors=tmp_path / "colours")):
        data = load_dataset(str(tmp_path), "default", masks=masks)
        assert data.classes == names and np.array_equal(data[0][1], labels)
    assert not caplog.messages
    assert load_dataset(str(tmp_path), "default").classes == VOC_CLASSES
    assert "classes are taken for the 21 of Pascal VOC" in caplog.text


def test_labels_that_lie_elsewhere_than_their_image_are_named(tmp_path, caplog):
    """Drawn in QGIS over another extent, or stored from south to north: of the same size, and of other ground."""

    def place(transform):
        a, b, c, d, e, f = transform
        return [(34264, "d", 16, (a, b, 0, c, d, e, 0, f, *(0,) * 7, 1), True)]

    north, south, near = (10, 0, 5e5, 0, -10, 5e6), (10, 0, 5e5, 0, 10, 5e6 - 320), (10, 0, 5e5 + 2, 0, -10, 5e6)
    for name in ("train", "trainannot"):
        (tmp_path / name).mkdir()
    image, labels = np.zeros((32, 40, 3), np.uint8), np.tile(np.uint8([0, 1]), (32, 20))
    tifffile.imwrite(tmp_path / "train" / "a.tif", image, photometric="rgb", extratags=place(north))
    for transform, said in ((north, False), (near, False), (south, True), (None, False)):
        tags = [] if transform is None else place(transform)
        tifffile.imwrite(tmp_path / "trainannot" / "a.tif", labels, photometric="minisblack", extratags=tags)
        caplog.clear()
        take_census(load_dataset(str(tmp_path), "train"), "train")
        assert ("lies elsewhere than a.tif, by 32 pixels at a corner" in caplog.text) == said
