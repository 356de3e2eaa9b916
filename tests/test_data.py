"""Every data set in a miniature tree of its downloaded layout against hand-made label maps; how they are read."""
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from support.data import DATASETS, FACTS, IGNORE, TRAINING_SETS, Item, centre_crop, read_ahead, subset
from support.files import Broken


def put(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette:                                                 # VOC's label files: indices with colours attached
        image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(path)


def photo(path, h=2, w=3):
    put(path, np.full((h, w, 3), 90))


def labels_of(name, root):
    data = DATASETS[name](root)
    assert len(data.names) == 1
    item = data.read(data.names[0])
    assert item.image.mode == "RGB" and item.image.size == (3, 2) and item.labels.dtype == np.uint8
    return item.labels.tolist(), data.classes


@pytest.mark.parametrize("folder", ["SegmentationClass", "SegmentationClassAug"])
def test_voc(tmp_path, folder):
    base = tmp_path / "VOCdevkit/VOC2012"
    photo(base / "JPEGImages/2007_1.jpg")
    photo(base / "JPEGImages/2007_2.jpg")                       # not in val.txt
    put(base / folder / "2007_1.png", [[0, 1, 20], [255, 15, 0]], palette=folder == "SegmentationClass")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("2007_1\n")
    labels, classes = labels_of("voc", tmp_path)
    assert labels == [[IGNORE, 0, 19], [IGNORE, 14, IGNORE]] and classes[14] == "person" and len(classes) == 20
    labels, classes = labels_of("voc21", tmp_path)
    assert labels == [[0, 1, 20], [IGNORE, 15, 0]] and classes[0] == "background" and classes[15] == "person"


def test_context(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2010"
    photo(base / "JPEGImages/a.jpg")

    def anno(image_id, category_id, mask):
        encoded = rle.encode(np.asfortranarray(np.array(mask, np.uint8)))
        return {"image_id": image_id, "category_id": category_id,
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()}}

    (base / "trainval_merged.json").write_text(json.dumps({
        "images": [{"image_id": 7, "file_name": "a.jpg", "phase": "val", "height": 2, "width": 3},
                   {"image_id": 8, "file_name": "b.jpg", "phase": "train", "height": 2, "width": 3}],
        "annos_segmentation": [anno(7, 2, [[1, 1, 0], [0, 0, 0]]),         # aeroplane, the first class
                               anno(7, 458, [[0, 0, 1], [0, 0, 0]]),       # the last one
                               anno(7, 255, [[0, 0, 0], [1, 0, 0]]),       # a category outside the 59
                               anno(8, 9, [[1, 1, 1], [1, 1, 1]])]}))
    labels, classes = labels_of("context59", tmp_path)
    assert labels == [[0, 0, 58], [IGNORE, IGNORE, IGNORE]] and classes[0] == "aeroplane" and len(classes) == 59
    labels, classes = labels_of("context60", tmp_path)
    assert labels == [[1, 1, 59], [0, 0, 0]] and classes[0] == "background"


@pytest.mark.parametrize("folder", ["stuffthingmaps", "annotations"])
def test_coco(tmp_path, folder):
    photo(tmp_path / "coco/val2017/0001.jpg")
    put(tmp_path / f"coco/{folder}/val2017/0001.png", [[0, 12, 89], [91, 181, 255]])
    labels, classes = labels_of("coco-object", tmp_path)         # 12: category 13, stop sign; 89: toothbrush
    assert labels == [[0, 11, 79], [IGNORE, IGNORE, IGNORE]] and classes[11] == "stop sign"
    labels, classes = labels_of("coco-object81", tmp_path)
    assert labels == [[1, 12, 80], [0, 0, IGNORE]] and classes[80] == "toothbrush"
    labels, classes = labels_of("coco-object-bg", tmp_path)
    assert labels == [[1, 12, 80], [IGNORE, IGNORE, IGNORE]] and classes[0] == "background" and len(classes) == 81
    assert DATASETS["coco-object-bg"](tmp_path).always == (0,) and DATASETS["coco-object81"](tmp_path).always == ()
    labels, classes = labels_of("stuff27", tmp_path)
    coarse = FACTS["stuff27"]["coarse_of_fine"]
    assert labels == [[coarse[0], coarse[12], coarse[89]], [coarse[91], coarse[181], IGNORE]]
    assert classes[coarse[0]] == "person things" and len(classes) == 27


def test_ade20k(tmp_path):
    photo(tmp_path / "ADEChallengeData2016/images/validation/x.jpg")
    put(tmp_path / "ADEChallengeData2016/annotations/validation/x.png", [[0, 1, 150], [3, 3, 0]])
    labels, classes = labels_of("ade20k", tmp_path)
    assert labels == [[IGNORE, 0, 149], [2, 2, IGNORE]] and classes[:3] == ["wall", "building", "sky"]


def test_cityscapes(tmp_path):
    photo(tmp_path / "cityscapes/leftImg8bit/val/ulm/ulm_1_leftImg8bit.png")
    gt = tmp_path / "cityscapes/gtFine/val/ulm"
    put(gt / "ulm_1_gtFine_labelIds.png", [[0, 7, 33], [255, 24, 9]])
    labels, classes = labels_of("cityscapes", tmp_path)
    assert labels == [[IGNORE, 0, 18], [IGNORE, 11, IGNORE]] and classes[11] == "person"
    put(gt / "ulm_1_gtFine_labelTrainIds.png", [[255, 0, 18], [255, 11, 255]])
    assert labels_of("cityscapes", tmp_path)[0] == labels


@pytest.mark.parametrize("name", [n for n in DATASETS if not n.startswith("scenes")])
def test_wrong_tree_says_what_was_expected_and_found(tmp_path, name):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(ValueError, match="holiday") as error:
        DATASETS[name](tmp_path)
    assert name in str(error.value) and "/*" in str(error.value)


def test_label_map_of_another_size_is_refused(tmp_path):
    photo(tmp_path / "ADEChallengeData2016/images/validation/x.jpg", h=4)
    put(tmp_path / "ADEChallengeData2016/annotations/validation/x.png", [[0, 1, 150], [3, 3, 0]])
    data = DATASETS["ade20k"](tmp_path)
    with pytest.raises(ValueError, match="x.png"):
        data.read("x")


# ---------------------------------------------------------------------------- which are read, and when


def test_subset_is_fixed_and_nested():
    names = [f"{i:03d}" for i in range(100)]
    chosen = {n: subset(names, n) for n in (1, 10, 50, 100, 1000, None)}
    assert chosen[None] == chosen[100] == chosen[1000] == names
    assert [len(chosen[n]) for n in (1, 10, 50)] == [1, 10, 50]
    for few, many in ((1, 10), (10, 50), (50, 100)):
        assert set(chosen[few]) < set(chosen[many])
    assert all(x == sorted(x) == subset(names, n) for n, x in chosen.items())
    assert chosen[10] != names[:10] and chosen[10][0] < "050" < chosen[10][-1]           # from all over the list
    assert subset(names, 5) == ["005", "020", "036", "082", "093"]                       # in every version


@pytest.mark.parametrize("h, w, rows, columns", [(4, 9, (0, 4), (2, 6)), (9, 4, (2, 6), (0, 4)), (5, 5, (0, 5), (0, 5)),
                                                 (1, 8, (0, 1), (3, 4))])
def test_centre_crop_by_hand(h, w, rows, columns):
    labels = np.arange(h * w, dtype=np.uint8).reshape(h, w)
    item = centre_crop(Item(Image.fromarray(np.stack([labels] * 3, -1)), labels, "x"))
    want = labels[slice(*rows), slice(*columns)]
    assert (item.labels == want).all() and (np.asarray(item.image)[..., 0] == want).all() and item.name == "x"


def test_read_ahead_keeps_the_order():
    """However long each takes; what cannot be read comes in its place, as its files.Broken."""
    def read(name):
        time.sleep(0.01 * (int(name) % 3))
        if int(name) % 4 == 3:
            raise Broken(f"broken {name}")
        return f"item {name}"
    names = [str(i) for i in range(20)]
    for ahead in (1, 3, 50):
        got = list(read_ahead(read, names, ahead))
        assert [name for name, _ in got] == names
        for i, (name, item) in enumerate(got):
            assert item == f"item {name}" if i % 4 != 3 else str(item) == f"broken {name}"
            assert i % 4 != 3 or type(item) is Broken
    assert list(read_ahead(read, [], 3)) == []


@pytest.mark.parametrize("ahead", [1, 4])
def test_read_ahead_reads_no_more_than_it_may(ahead):
    """Pictures are large: no more wait than `ahead`, however slow the computing is."""
    started = []
    for i, _ in enumerate(read_ahead(started.append, range(20), ahead)):
        time.sleep(0.005)
        assert len(started) <= i + 1 + ahead
    assert sorted(started) == list(range(20))


def test_read_ahead_overlaps_with_computing():
    """While the first picture is computed, the next is read: each waits for the other, neither alone can go on."""
    computing, second_read = threading.Event(), threading.Event()

    def read(name):
        if name == "second":
            assert computing.wait(10)
            second_read.set()
        return name
    items = read_ahead(read, ["first", "second"], ahead=2)
    assert next(items) == ("first", "first")
    computing.set()
    assert second_read.wait(10)
    assert next(items) == ("second", "second")


def test_stuff27_names_are_those_of_their_members():
    """Each coarse class of stuff gathers fine classes that bear its name."""
    fine = dict(zip(FACTS["coco-stuff171"]["source_ids"], FACTS["coco-stuff171"]["classes"]))
    names, coarse = FACTS["stuff27"]["classes"], FACTS["stuff27"]["coarse_of_fine"]
    members = {name: {fine[i] for i, c in enumerate(coarse) if i in fine and c == k} for k, name in enumerate(names)}
    for word in ("ceiling", "floor", "food", "furniture", "wall", "window", "building", "ground", "plant", "sky",
                 "solid", "water"):
        assert any(word in m for m in members[f"{word} stuff"]), word
    assert "paper" in members["rawmaterial stuff"] and "curtain" in members["textile stuff"]
    assert "fence" in members["structural stuff"] and "person" in members["person things"]


def test_a_label_file_that_holds_colours(tmp_path):
    photo(tmp_path / "ADEChallengeData2016/images/validation/a.jpg")
    photo(tmp_path / "ADEChallengeData2016/annotations/validation/a.png")
    with pytest.raises(Broken, match="a.png.*holds colours"):
        DATASETS["ade20k"](tmp_path).read("a")


def test_augmented_labels_come_first(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2012"
    put(base / "JPEGImages/a.jpg", np.full((2, 3, 3), 90))
    for folder, label in (("SegmentationClass", 1), ("SegmentationClassAug", 2)):
        put(base / folder / "a.png", np.full((2, 3), label))
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("a\n")
    assert DATASETS["voc"](tmp_path).read("a").labels[0, 0] == 1


def test_captions_are_files_of_the_data(tmp_path):
    put(tmp_path / "coco/train2017/1.jpg", np.full((4, 6, 3), 90))
    put(tmp_path / "coco/stuffthingmaps/train2017/1.png", np.full((4, 6), 2))
    put(tmp_path / "sa1b/sa_1.jpg", np.full((4, 6, 3), 90))
    (tmp_path / "sa1b/sa_1.json").write_text('{"annotations": []}')
    captions = tmp_path / "c.json"
    captions.write_text('{"1": "A car."}')
    for name in ("coco", "sa1b"):
        assert captions in TRAINING_SETS[name](tmp_path, captions).files
