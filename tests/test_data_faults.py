"""Broken files of data sets: each is a sentence that names it, and one picture less; mistakes of ours surface."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as rle

import figures
from support import data as data_module
from support.data import DATASETS, IGNORE, TRAINING_SETS, Item, mask_of, read_ahead, runs_of
from support.files import Broken, stamp
from support.report import plot_losses

DEEP = "[" * 100_000                                     # a parser that calls itself comes to an end
MASK = np.array([[1, 1, 0], [0, 0, 1]], np.uint8)


def put(path, array, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, kind)


def photo(path):
    put(path, np.full((2, 3, 3), 90, np.uint8))


def coded(mask=MASK):
    code = rle.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def context(root, annos=(), **changes):
    """Two pictures; the first has the masks given, the second a good one."""
    base = root / "VOCdevkit/VOC2010"
    images = [{"image_id": i, "file_name": f"{i}.jpg", "phase": "val"} for i in (7, 8)]
    for image in images:
        photo(base / "JPEGImages" / image["file_name"])
    annos = [*annos, {"image_id": 8, "category_id": 2, "segmentation": coded()}]
    merged = {"images": images, "annos_segmentation": annos, **changes}
    (base / "trainval_merged.json").write_text(json.dumps(merged))
    return base / "trainval_merged.json"


# (what is wrong with a segmentation, what the sentence says)
SEGMENTATIONS = [
    (None, "should be an object"), ([[0, 0, 2, 0, 2, 2]], "should be an object"), ({"size": None}, "has the size None"),
    ({"size": [3, 2]}, "has the size [3, 2]"), ({"size": [40, 70]}, "has the size [40, 70]"),
    ({"size": [10**6, 10**6]}, "has the size [1000000, 1000000]"), ({"size": [10**9, 10**9]}, "has the size"),
    ({"size": 5}, "has the size 5"), ({"size": [2]}, "has the size [2]"), ({"counts": None}, "should be a text"),
    ({"counts": [1, 2, 3]}, "should be a text"), ({"counts": ""}, "are not COCO's"),
    ({"counts": "é"}, "are not COCO's"), ({"counts": "oo"}, "are not COCO's"),
    ({"counts": "000"}, "are not those of 2 x 3"), ({"counts": "16"}, "are not those of 2 x 3"),
    ({"counts": "6M3"}, "are not those of 2 x 3")]


def wrong(change):
    """A segmentation with some of its parts changed, or something else in its place."""
    return {**coded(), **change} if isinstance(change, dict) else change


@pytest.mark.parametrize("change, says", SEGMENTATIONS)
def test_a_mask_that_does_not_fit_is_one_picture_less(tmp_path, change, says):
    context(tmp_path, [{"image_id": 7, "category_id": 2, "segmentation": wrong(change)}])
    data = DATASETS["context59"](tmp_path)
    (_, broken), (_, item) = read_ahead(data.read, data.names)
    assert type(broken) is Broken and "trainval_merged.json" in str(broken) and says in str(broken)
    assert item.labels.tolist() == [[0, 0, IGNORE], [IGNORE, IGNORE, 0]]

    photo(tmp_path / "sa1b/sa_1.jpg")
    (tmp_path / "sa1b/sa_1.json").write_text(json.dumps({"annotations": [{"segmentation": wrong(change)}]}))
    with pytest.raises(Broken, match="sa_1.json") as e:
        TRAINING_SETS["sa1b"](tmp_path, None).read("sa_1")
    assert says in str(e.value)


@pytest.mark.parametrize("category", [70000, -1, 1.5, None, True, "2"])
def test_a_category_that_is_none_is_one_picture_less(tmp_path, category):
    context(tmp_path, [{"image_id": 7, "category_id": category, "segmentation": coded()}])
    data = DATASETS["context60"](tmp_path)
    (_, broken), (_, item) = read_ahead(data.read, data.names)
    assert type(broken) is Broken and "a category_id should be" in str(broken) and isinstance(item, Item)


def test_an_annotation_without_parts_is_one_picture_less(tmp_path):
    context(tmp_path, [{"image_id": 7}])
    data = DATASETS["context59"](tmp_path)
    (_, broken), (_, item) = read_ahead(data.read, data.names)
    assert type(broken) is Broken and isinstance(item, Item)


def test_masks_are_those_of_pycocotools():
    """Which itself would write beyond an array for some of what is refused here."""
    rng = np.random.default_rng(0)
    for k in range(300):
        h, w = (int(n) for n in rng.integers(1, 60, 2))
        mask = (rng.random((h, w)) < k / 299).astype(np.uint8)               # from empty to full
        code = coded(mask)
        runs = runs_of(code, (w, h))
        assert np.array_equal(mask_of(runs, (w, h)), mask) and data_module.area(runs) == rle.area(code)


@pytest.mark.parametrize("content", [
    "[]", "null", "{}", "{", DEEP, '{"annotations": 5}', '{"annotations": null}', '{"annotations": [5]}',
    '{"annotations": [{}]}', b'{"annotations": "\xff"}'])
def test_a_mask_file_that_is_none(tmp_path, content):
    photo(tmp_path / "sa1b/sa_1.jpg")
    (tmp_path / "sa1b/sa_1.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Broken, match="sa_1.json"):
        TRAINING_SETS["sa1b"](tmp_path, None).read("sa_1")


def test_masks_without_a_picture_are_no_data_set(tmp_path):
    photo(tmp_path / "sa1b/sa_1.jpg")
    (tmp_path / "sa1b/sa_2.json").write_text("{}")
    with pytest.raises(ValueError, match="has no sa_"):
        TRAINING_SETS["sa1b"](tmp_path, None)


@pytest.mark.parametrize("content", [
    "[]", "null", "{}", "{", DEEP, '{"images": 5, "annos_segmentation": []}', b'{"images": "\xff"}'])
def test_a_file_of_context_that_is_none_ends_before_the_work(tmp_path, content):
    context(tmp_path).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Broken, match="trainval_merged.json"):
        DATASETS["context59"](tmp_path)


@pytest.mark.parametrize("changes", [
    {"images": []}, {"images": [5]}, {"images": [{}]}, {"images": [{"phase": "val"}]},
    {"images": [{"phase": "val", "file_name": 5, "image_id": 1}]},
    {"images": [{"phase": "train", "file_name": "7.jpg", "image_id": 7}]}, {"annos_segmentation": None},
    {"annos_segmentation": [None]}, {"annos_segmentation": [{}]}, {"annos_segmentation": [{"image_id": []}]}])
def test_lists_of_context_that_are_none_end_before_the_work(tmp_path, changes):
    context(tmp_path, **changes)
    with pytest.raises(Broken, match="trainval_merged.json"):
        DATASETS["context59"](tmp_path)


@pytest.fixture
def ade(tmp_path):
    """One picture of ADE20K and where its label map should be."""
    photo(tmp_path / "ADEChallengeData2016/images/validation/x.jpg")
    path = tmp_path / "ADEChallengeData2016/annotations/validation/x.png"
    put(path, np.ones((2, 3), np.uint8))
    return path


@pytest.mark.parametrize("value, dtype, says", [
    (70000, np.int32, "from 70000 to 70000"), (-1, np.int32, "from -1 to -1"), (np.nan, np.float32, "not finite"),
    (1, np.float32, "holds fractions (mode F)"), (1, bool, "holds single bits (mode 1)")])
def test_a_label_map_of_other_numbers(tmp_path, ade, value, dtype, says):
    """PIL knows a file by its content: a TIFF called .png as well."""
    put(ade, np.full((2, 3), value, dtype), "TIFF")
    ((_, broken),) = read_ahead(DATASETS["ade20k"](tmp_path).read, ["x"])
    assert type(broken) is Broken and "x.png" in str(broken) and says in str(broken)


@pytest.mark.parametrize("value", [0, 150, 60000])
def test_a_label_map_of_32_bits_is_read_like_any_other(tmp_path, ade, value):
    put(ade, np.full((2, 3), value, np.int32), "TIFF")
    assert (DATASETS["ade20k"](tmp_path).read("x").labels == (149 if value == 150 else IGNORE)).all()


def test_a_pipe_is_no_picture(tmp_path, ade):
    """Opening it would wait for ever."""
    data = DATASETS["ade20k"](tmp_path)
    for path in data.files:
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(Broken, match=path.name):
            data.read("x")
        path.unlink()
        path.write_bytes(content)
    data.read("x")


def test_the_size_is_compared_before_a_label_map_is_decoded(tmp_path, ade):
    """Of 30 megabytes here; what is behind the header is not looked at."""
    put(ade, np.zeros((5000, 6000), np.uint8))
    ade.write_bytes(ade.read_bytes()[:60])
    with pytest.raises(Broken, match="size \\(6000, 5000\\), its picture \\(3, 2\\)"):
        DATASETS["ade20k"](tmp_path).read("x")


def voc(root, split):
    base = root / "VOCdevkit/VOC2012"
    for name in "ab":
        photo(base / f"JPEGImages/{name}.jpg")
        put(base / f"SegmentationClass/{name}.png", np.ones((2, 3), np.uint8))
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_bytes(split)


def test_a_list_with_a_byte_order_mark_keeps_its_first_picture(tmp_path):
    voc(tmp_path, b"\xef\xbb\xbfa\nb\n")
    data = DATASETS["voc"](tmp_path)
    assert data.names == ["a", "b"]
    assert all(isinstance(item, Item) for _, item in read_ahead(data.read, data.names))


def test_a_list_in_another_encoding_is_named(tmp_path):
    voc(tmp_path, "é\n".encode("latin-1"))
    with pytest.raises(Broken, match="val.txt.*UTF-8"):
        DATASETS["voc"](tmp_path)


def test_names_that_no_file_can_have_are_pictures_less(tmp_path):
    """A list in UTF-16 without its mark, half a character in JSON."""
    voc(tmp_path, "\na\nb\n".encode("utf-16-le"))
    half = {"image_id": 9, "file_name": "\ud800.jpg", "phase": "val"}
    context(tmp_path, images=[half])
    for name in ("voc", "context59"):
        data = DATASETS[name](tmp_path)
        assert all(type(item) is Broken for _, item in read_ahead(data.read, data.names))
        assert len(stamp(data.files)) == 12


# ---------------------------------------------------------------------------- captions


@pytest.fixture
def train2017(tmp_path):
    """One picture of COCO, and where COCO's own captions should be."""
    photo(tmp_path / "coco/train2017/000000000009.jpg")
    put(tmp_path / "coco/stuffthingmaps/train2017/000000000009.png", np.zeros((2, 3), np.uint8))
    (tmp_path / "coco/annotations").mkdir()
    return tmp_path / "coco/annotations/captions_train2017.json"


@pytest.mark.parametrize("content", [
    "[]", "null", "{}", "{", DEEP, '{"9": 5}', '{"9": null}', '{"8": "A dog."}', '{"annotations": 5}',
    '{"annotations": [5]}', '{"annotations": [{"image_id": 9}]}', '{"annotations": [{"image_id": 9, "caption": 5}]}',
    b'{"9": "\xe9"}'])
def test_captions_that_are_none_end_before_the_work(tmp_path, train2017, content):
    """Unless the names of the classes are the prompt: nobody needs captions then."""
    train2017.write_bytes(content if isinstance(content, bytes) else content.encode())
    for captions in (None, train2017):
        with pytest.raises(Broken, match="captions_train2017.json"):
            TRAINING_SETS["coco"](tmp_path, captions)
    data = TRAINING_SETS["coco"](tmp_path, False)
    assert data.read(data.names[0]).caption == "person" and train2017 not in data.files


# ---------------------------------------------------------------------------- what numbers depend on


def test_files_are_all_that_is_read(tmp_path, ade, train2017):
    context(tmp_path)
    voc(tmp_path, b"a b")
    train2017.write_text('{"9": "A dog."}')
    photo(tmp_path / "sa1b/deep/sa_1.jpg")
    (tmp_path / "sa1b/deep/sa_1.json").write_text('{"annotations": []}')
    for data, count in ((DATASETS["ade20k"](tmp_path), 2), (DATASETS["voc"](tmp_path), 4),
                        (DATASETS["context59"](tmp_path), 3), (TRAINING_SETS["coco"](tmp_path, None), 3),
                        (TRAINING_SETS["sa1b"](tmp_path, None), 2), (DATASETS["scenes"](), 0),
                        (TRAINING_SETS["scenes"](None, None), 0)):
        assert len(set(data.files)) == count and all(path.is_file() for path in data.files)
        before = stamp(data.files)
        for path in data.files:
            content = path.read_bytes()
            path.write_bytes(content + b" ")
            assert stamp(data.files) != before
            path.write_bytes(content)


# ---------------------------------------------------------------------------- mistakes of ours


@pytest.mark.parametrize("kind", [AttributeError, TypeError, NameError, KeyError, OSError, ValueError])
@pytest.mark.parametrize("part", ["open_stored", "open_labels", "Item"])
def test_a_mistake_of_ours_is_no_broken_picture(tmp_path, ade, monkeypatch, kind, part):
    def mistake(*args):
        raise kind("ours")
    monkeypatch.setattr(data_module, part, mistake)
    with pytest.raises(kind, match="ours"):
        list(read_ahead(DATASETS["ade20k"](tmp_path).read, ["x"]))


# ---------------------------------------------------------------------------- figures: prompts, what is written


def test_prompts_in_utf8_alone(tmp_path):
    model = SimpleNamespace(preset=SimpleNamespace(size=1024))
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfun caf\xc3\xa9\n\n")
    assert figures.prompts_for(model, 5, path) == ["un café"]
    path.write_bytes(b"un caf\xe9\n")
    with pytest.raises(Broken, match="prompts.txt.*UTF-8"):
        figures.prompts_for(model, 5, path)


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(Figure, "savefig", full)
    path = tmp_path / "old.png"
    path.write_bytes(b"whole")
    with pytest.raises(ValueError, match="No space left"):
        figures.picture_rows(path, "title", [], [[np.zeros((2, 2))]], [])
    with pytest.raises(ValueError, match="No space left"):
        plot_losses([{"step": 1, "flow": 1.0, "focal": 1.0, "dice": 1.0}], path)
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["old.png"]
