"""nano's world: what a scene says of itself, and what its captions say, is what its mask shows."""
import re

import numpy as np
import pytest

from nano import scenes
from nano.pretrain import word_merges
from nano.scenes import CLASSES, COLOURS, SKIES, THINGS, TRAIN_SEEDS, VAL_SEEDS
from text import clip_tokenizer

SEEDS = [*VAL_SEEDS[:50], *TRAIN_SEEDS[:14]]


@pytest.fixture(scope="module")
def drawn() -> list[scenes.Scene]:
    return [scenes.draw(seed) for seed in SEEDS]


def captions(drawn: list[scenes.Scene], each: int = 8) -> list[tuple[scenes.Scene, str]]:
    return [(s, scenes.caption(s, np.random.default_rng([i, j]))) for i, s in enumerate(drawn) for j in range(each)]


def mean_x(scene: scenes.Scene, name: str) -> float:
    return float(np.nonzero(scene.labels == CLASSES.index(name))[1].mean())


def nearest(pixels: np.ndarray, colours: dict[str, tuple], within: float = 1e9) -> str:
    """The colour word that most of these pixels (n, 3) are nearest to, of those that are near any."""
    apart = np.linalg.norm(pixels[:, None].astype(float) - np.array(list(colours.values()), float), axis=-1)
    votes = np.bincount(apart.argmin(1)[apart.min(1) < within], minlength=len(colours))
    return list(colours)[votes.argmax()]


def test_a_seed_is_a_scene(drawn):
    for seed, scene in list(zip(SEEDS, drawn))[:4]:
        again = scenes.draw(seed)
        assert (again.image == scene.image).all() and (again.labels == scene.labels).all()
        assert (again.stuff, again.things) == (scene.stuff, scene.things)
        assert scenes.caption(scene, np.random.default_rng(3)) == scenes.caption(again, np.random.default_rng(3))
    assert len({scene.image.tobytes() for scene in drawn}) == len(drawn)


def test_train_and_validation_are_disjoint():
    assert not range(max(TRAIN_SEEDS.start, VAL_SEEDS.start), min(TRAIN_SEEDS.stop, VAL_SEEDS.stop))
    assert (scenes.draw(7, 32).image != scenes.draw(TRAIN_SEEDS[7], 32).image).any()


def test_every_pixel_has_a_class(drawn):
    for scene in drawn:
        assert scene.image.shape == (scenes.SIDE, scenes.SIDE, 3) and scene.image.dtype == np.uint8
        assert scene.labels.shape == (scenes.SIDE, scenes.SIDE) and scene.labels.dtype == np.uint8
        named = [t.name for t in scene.things] + scene.stuff
        assert len(named) == len(set(named)) and 1 <= len(scene.things) <= 2
        assert {CLASSES[k] for k in np.unique(scene.labels)} == set(named)
        assert set(named) & set(THINGS) == {t.name for t in scene.things}
        for thing in scene.things:                       # large enough to be seen on a grid of 8 x 8 pixels
            assert (scene.labels == CLASSES.index(thing.name)).sum() > 4 * 64
    assert {t.name for s in drawn for t in s.things} == set(THINGS)
    assert {name for s in drawn for name in s.stuff} == set(scenes.STUFF)


def test_no_thing_is_nearly_hidden():
    """Two things stand in columns of their own, and no kind is wide enough to cover most of another."""
    for seed in range(300):
        scene = scenes.draw(seed, 32)
        if len(scene.things) == 2:
            assert min((scene.labels == CLASSES.index(t.name)).sum() for t in scene.things) > 0.02 * 32 * 32, seed


def test_the_mask_lies_on_the_picture(drawn):
    """Colour and place of each thing, measured through its mask."""
    for scene in drawn:
        for thing in scene.things:
            mask = scene.labels == CLASSES.index(thing.name)
            assert nearest(scene.image[mask], COLOURS, within=40) == thing.colour
            assert abs(mean_x(scene, thing.name) / scenes.SIDE - thing.x) < 0.25
        places = [mean_x(scene, t.name) for t in scene.things]
        assert places == sorted(places)
        tall = {t.size: (scene.labels == CLASSES.index(t.name)).any(1).sum() for t in scene.things}
        assert tall.get("big", 128) > 0.3 * scenes.SIDE and tall.get("small", 0) < 0.5 * scenes.SIDE
        sky = scene.labels == CLASSES.index(scene.stuff[0])
        assert scene.stuff[0] in SKIES and sky[:6].any() and not set(scene.stuff[1:]) & set(SKIES)
        top = {word: np.mean(pair, axis=0) for word, pair in SKIES.items()}
        assert nearest(scene.image[sky], top) == scene.stuff[0]


def test_captions_are_true(drawn):
    made = captions(drawn)
    described = compared = 0
    for scene, words in made:
        present = {t.name for t in scene.things} | set(scene.stuff)
        absent = [name for name in CLASSES if name not in present]
        assert not any(re.search(rf"\b{name}\b", words) for name in absent), words
        assert all(re.search(rf"\b{name}\b", words) for name in present), words
        for thing in scene.things:
            adjectives = re.search(rf"((?:\b(?:{'|'.join(COLOURS)}|big|small) )*){thing.name}\b", words)[1].split()
            assert set(adjectives) <= {thing.colour, thing.size}, words
            described += len(adjectives)
        pair = re.match(r"an? ([\w ]*?) (left|right) of an? ([\w ]*?) with ", words)
        if pair:
            first, second = (next(n for n in THINGS if noun.endswith(n)) for noun in (pair[1], pair[3]))
            assert (mean_x(scene, first) < mean_x(scene, second)) == (pair[2] == "left"), words
            compared += 1
    assert len(made) > 500 and described > 500 and compared > 10
    lists = [words for _, words in made if " with " not in words]
    assert 0.4 < len(lists) / len(made) < 0.6 and len({words for _, words in made}) > 400


def test_captions_fit_and_every_word_is_one_token(drawn):
    tokenizer = clip_tokenizer(word_merges(scenes.words()))
    for _, words in captions(drawn):
        tokens = tokenizer.encode(words).tokens
        assert [t.removesuffix("</w>") for t in tokens] == words.split() and len(tokens) <= 22 - 2
    longest = scenes.Scene(None, None, ["sunset", "grass", "sand"], [
        scenes.Thing(name, "orange", "small", 0.5) for name in ("teddy bear", "air balloon")])
    texts = [scenes.caption(longest, np.random.default_rng(i)) for i in range(200)]
    assert max(len(tokenizer.encode(words).ids) for words in texts) <= 22 - 2


def test_merges_do_not_depend_on_chance():
    """Of pairs that occur as often the first in the alphabet, whatever the order of the words; no token comes twice."""
    assert word_merges(["gh", "ab", "ef", "cd", "ij"]) == ["a b</w>", "c d</w>", "e f</w>", "g h</w>", "i j</w>"]
    merges = word_merges(scenes.words())
    assert merges == word_merges(scenes.words()[::-1])
    assert len({merge.replace(" ", "") for merge in merges}) == len(merges)


def test_the_sheet(command):
    code, out, err = command("nano/scenes.py", "--first", 9990)
    assert (code, out, err) == (0, "wrote scenes.png\n", "")
    for options in (["--first", -1], ["--first", 10_000], ["--out", "scenes.txt"], ["--out", "none/scenes.png"]):
        code, out, err = command("nano/scenes.py", *options)
        assert (code, out) == (2, "") and err.startswith("error: ") and options[0] in err and err.count("\n") == 1


def test_the_side_changes_the_size_alone():
    small, usual = scenes.draw(3, 64), scenes.draw(3)
    assert small.image.shape == (64, 64, 3) and (small.things, small.stuff) == (usual.things, usual.stuff)
    assert (small.labels == usual.labels[1::2, 1::2]).mean() > 0.97
