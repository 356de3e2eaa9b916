"""What a reader does in the explorer's page, in headless Chromium: pointing, pressing, keys, sliders, links, a phone.

Skipped where Chromium, its driver or selenium is missing (Debian: chromium chromium-driver; PyPI: selenium).
"""
import base64
import io
import time

import numpy as np
import pytest
from browser import MAGNET, SCENE, webdriver
from PIL import Image

import seg4diff
from nano import scenes
from support.metrics import classes_in, confusion, scores

# Where things stand on the page; none of them may move when something is pointed at.
PLACES = "['stage', 'plot', 'tokens', 'kept'].map(name => $(name).getBoundingClientRect().top)"

# ---------------------------------------------------------------------------- values


def test_masks_and_scores_are_the_library_s(open_page):
    """Of every block, without and with MAGNET, I2T and T2I; and the reading i2i against the whole matrix."""
    page = open_page("scene.html")
    scene = scenes.draw(SCENE)
    image = Image.fromarray(scene.image)
    ids = classes_in(scene.labels)
    names = [scenes.CLASSES[i] for i in ids]
    for v, lora in enumerate((None, MAGNET)):
        model = seg4diff.load("nano", "cpu", "float32", lora=lora)
        for direction, kind in (("I2T", "softmax"), ("T2I", "t2i")):
            for block in (0, 3, 5):
                at = f"{{...START, direction: '{direction}', block: {block}}}"
                mine = np.array(page.js(f"[...labelsOf(data.variants[{v}], {at})]")).reshape(scene.labels.shape)
                seg = seg4diff.segment(model, image, names, block=block, kind=kind)
                assert (mine == seg.labels).mean() > 0.99, (lora, direction, block)
                conf = confusion(scene.labels, ids[seg.labels].astype(np.uint8), len(scenes.CLASSES))
                shown = page.js(f"mIoU(data.variants[{v}], {at})")
                assert shown == pytest.approx(scores(conf)["mIoU"], abs=0.7)
    plotted = page.js("data.variants.map(v => blockValue(v, 5))")
    assert " | ".join(f"{x:.1f}" for x in plotted) == page.js("$('plot').querySelector('text:last-child').textContent")


def test_readings(open_page):
    """shares and i2i, from the page's own maps by numpy."""
    page = open_page("scene.html")
    maps = np.array(page.js("data.classes.map((_, k) => [...classMap(data.variants[0], START, k)])"))        # (K, N)
    rows = np.array(page.js("Array.from({length: 256}, (_, n) => [...data.variants[0].i2i(5, n)])"))         # (N, N)
    shares = maps / maps.sum(0)
    expected = {"paper": maps, "shares": shares, "i2i": shares @ (rows / rows.sum(1, keepdims=True)).T}
    for reading, wanted in expected.items():
        got = page.js(f"classMaps(data.variants[0], {{...START, reading: '{reading}'}}).map(([k, map]) => [...map])")
        np.testing.assert_allclose(np.array(got), wanted, rtol=1e-4, atol=1e-7)
    scores = page.js("['paper', 'i2i'].map(reading => mIoU(data.variants[0], {...START, reading}))")
    assert scores[1] > scores[0]
    two = page.js("classMaps(data.variants[0], {...START, reading: 'shares', off: [0, 1]}).map(([k, map]) => [...map])")
    np.testing.assert_allclose(np.array(two).sum(0), 1, atol=1e-5)


# ---------------------------------------------------------------------------- what a reader does


def test_pointing_and_pressing(open_page):
    """The mouse shows, a press keeps, on patches and on words; Escape lets go; what is off the page returns to rest."""
    page = open_page("scene.html")
    rest = page.text("sentence")
    places = page.js(PLACES)
    assert "Block 5 (the expert), mean over 4 heads, sigma 0.515" in rest and "attention to “air balloon” (I2T" in rest
    left, right = page.find("canvas")[:2]
    before = page.js("$('heading').textContent")
    page.point(left, 0.28, 0.2)                                 # the balloon: column 5, row 4
    assert "where the patch in row 4, column 5 looks (I2I" in page.text("sentence")
    assert "of that balloon" in page.text("sentence") or "of that air" in page.text("sentence")
    assert page.js("$('heading').textContent") != before and page.js(PLACES) == places
    page.point(page.find("h1")[0])
    assert page.text("sentence") == rest and page.js("location.hash") in ("", "#")
    page.point(left, 0.28, 0.2, press=True)
    page.point(page.find("h1")[0])
    assert "row 4, column 5" in page.text("sentence") and "patch=52" in page.js("location.hash")
    page.point(page.find(".token")[0])                          # over a word, its map; the bars stay those of the patch
    assert "attention to “<sos>”" in page.text("sentence") and "row 4, column 5" in page.text("heading")
    page.point(right, 0.5, 0.5)                                 # over the map, its value there
    page.point(page.find(".token")[2], press=True)
    page.point(right, 0.9, 0.9)
    assert "in the marked patch" in page.js("data.variants[0].rightCaption.textContent")
    assert "word=t2" in page.js("location.hash")
    page.key("ESCAPE")
    assert "patch" not in page.js("location.hash")
    page.point(page.find(".chip button")[0], press=True)
    assert page.js("view.word") == "c0"
    page.point(page.find(".chip input")[0], press=True)
    assert page.js("view.off") == [0] and 0 not in page.js("[...labelsOf(data.variants[0], view)]")


def test_blocks_heads_levels_readings(open_page):
    """Plot, sliders and switches by mouse and keys; what is not kept gives way, and the sentence says so."""
    page = open_page("scene.html")
    plot = page.find("#plot")[0]
    page.point(plot, 0.5, 0.5, press=True)
    block = page.js("view.block")
    assert block in (3, 4) and plot.get_attribute("aria-valuenow") == str(block)
    page.key("ARROW_RIGHT")
    assert page.js("view.block") == block + 1 and f"Block {block + 1}" in page.text("sentence")
    page.js("$('head').focus()")
    page.key("ARROW_RIGHT")
    assert page.js("view.head") == 0 and "head 0, sigma 0.515" in page.text("sentence")
    page.js("$('level').focus()")
    page.key("ARROW_LEFT")
    assert page.js("[view.level, view.head]") == [1, -1]        # single heads are kept at the preset's level alone
    assert "18 of 28 steps left" in page.text("sentence") and "18 of 28" in page.text("levelname")
    page.find("#reading input[value=i2i]")[0].send_keys(webdriver.Keys.SPACE)
    assert page.js("[view.reading, view.level]") == ["i2i", 2] and "attends to" in page.text("sentence")
    page.find("#direction input[value=T2I]")[0].send_keys(webdriver.Keys.SPACE)
    assert page.js("[view.reading, view.direction]") == ["shares", "T2I"]
    assert "(T2I, Eq. 4, 10)" in page.text("sentence")
    page.find("#base input[value=truth]")[0].send_keys(webdriver.Keys.SPACE)
    assert page.js("data.variants.map(v => v.leftCaption.textContent)") == ["True mask"] * 2
    page.find("#base input[value=changes]")[0].send_keys(webdriver.Keys.SPACE)
    assert "Where the masks differ, mIoU" in page.js("data.variants[1].leftCaption.textContent")
    page.find("#reset")[0].click()
    assert page.js("view") == page.js("START") and page.js("location.hash") in ("", "#")


def test_keys_alone(open_page):
    """Tab reaches all that can be chosen, with a visible focus; arrows on the picture move the patch."""
    page = open_page("scene.html")
    name = "event.target.id || event.target.className || event.target.tagName"
    page.driver.execute_script(f"window.reached = []; addEventListener('focusin', event => reached.push({name}))")
    webdriver.ActionChains(page.driver).send_keys(webdriver.Keys.TAB * 40).perform()
    reached = set(page.js("reached"))
    assert {"plot", "play", "level", "head", "save", "reset", "token", "CANVAS", "INPUT", "BUTTON"} <= reached
    page.js("document.querySelector('canvas').focus()")
    for name in ("ARROW_UP", "ARROW_LEFT"):
        page.key(name)
    assert page.js("view.patch") == 8 * 16 + 7 and page.js("view.show") == "patch"
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    label = page.find("canvas")[0].get_attribute("aria-label")
    assert "The chosen patch: row 9, column 8" in label and "nano" in label


def test_the_address_holds_the_view(open_page):
    address = "#block=3&head=1&direction=T2I&base=picture&word=t3&patch=37&show=patch&off=1,2"
    page = open_page("scene.html", address)
    view = page.js("view")
    assert view == page.js("START") | {"block": 3, "head": 1, "direction": "T2I", "base": "picture", "word": "t3",
                                       "patch": 37, "show": "patch", "off": [1, 2]}
    page.js("change({block: 4})")
    again = open_page("scene.html", page.js("location.hash"))
    assert again.js("view") == view | {"block": 4}
    wrong = "#block=99&level=-1&head=x&word=c9&patch=9999&reading=none&off=0,1,2,3,7&show=patch"
    broken = open_page("scene.html", wrong)
    assert broken.js("view") == broken.js("START")


def test_save_as_png(open_page, driver, tmp_path):
    page = open_page("scene.html")
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.find("#save")[0].click()
    end = time.time() + 20
    while not (tmp_path / "attention.png").exists():
        assert time.time() < end
        time.sleep(0.05)
    saved = Image.open(tmp_path / "attention.png")
    shown = page.js("data.variants[1].right.toDataURL().split(',')[1]")
    right = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert("RGB"))
    part = np.asarray(saved.convert("RGB"))[12 + 512 + 40:][:512, 512 + 24:][:, :512]
    assert saved.width == 2 * 512 + 36 and (part == right).all()


def test_generation(open_page):
    """Each step has its picture; play goes through all of them."""
    page = open_page("drawn.html")
    assert page.js("data.variants[0].images.length") == page.js("data.levels.length") == 3
    assert "Drawn from the prompt" in page.text("prompt") and "Attention that goes to text" in page.text("plotname")
    share = page.js("blockValue(data.variants[0], 5)")
    assert 0 < share < 100
    page.find("#play")[0].click()
    page.until("view.level === 0")
    assert "Sampling step: sigma 1.000" in page.text("levelname")
    first = page.js("data.variants[0].left.toDataURL()")
    page.until("view.level === 2")
    assert page.js("data.variants[0].left.toDataURL()") != first


@pytest.mark.parametrize("name", ["scene.html", "drawn.html"])
def test_a_phone(open_page, driver, name):
    """390 pixels wide: nothing beside the screen, a finger chooses a patch, and nothing jumps when it does."""
    page = open_page(name, width=390, height=844)
    assert page.js("document.documentElement.scrollWidth") <= 390
    places = page.js(PLACES)
    box = page.driver.execute_script("return arguments[0].getBoundingClientRect()", page.find("canvas")[0])
    touch = [{"x": box["x"] + 40, "y": box["y"] + 40}]
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": touch})
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.until("view.patch >= 0 && view.show === 'patch'")
    assert page.js(PLACES) == places
    page.js("change({ show: 'word', base: 'picture' })")        # long captions
    page.until("true")
    assert page.js(PLACES) == places
    small = "[...document.querySelectorAll('.token, .act, .switch label')].filter(x => x.clientHeight < 28).length"
    assert page.js(small) == 0


def test_dark(open_page, driver):
    page = open_page("scene.html")
    light = page.js("getComputedStyle(document.body).backgroundColor")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                           {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    assert light == "rgb(255, 255, 255)" and page.js("getComputedStyle(document.body).backgroundColor") != light
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
