"""Every data set in a miniature tree of its downloaded layout, label maps checked against hand-made ones."""
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from data import DATASETS, FACTS, IGNORE


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
