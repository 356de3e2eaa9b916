"""Ten questions that a reader has, answered in the explorer's page within ten seconds each (docs/testing.md).

    pytest -n 0 -s tests/test_explore_tasks.py                  # prints the answers and how they were found

Skipped where Chromium, its driver or selenium is missing (Debian: chromium chromium-driver; PyPI: selenium).
"""
import time

import numpy as np
import pytest
from browser import Page


class Reader:
    """Answers a question from a fresh page by mouse and keys, counting them.

    A person's seconds are an estimate by the keystroke-level model: 1.35 to think, before and after, 1.3 a press with
    the way there, 0.3 a key, 1.2 a look; the page's waits are measured.
    """

    def __init__(self, page: Page):
        self.page = page
        self.presses = self.keys = self.looks = 0
        self.wait = 0.0

    def press(self, element, x=0.5, y=0.5):
        start = time.time()
        self.page.point(element, x, y, press=True)
        self.wait += time.time() - start
        self.presses += 1

    def key(self, name):
        start = time.time()
        self.page.key(name)
        self.wait += time.time() - start
        self.keys += 1

    def look(self, times=1):
        self.page.until("true")
        self.looks += times

    def answer(self, question, found):
        seconds = 2 * 1.35 + 1.3 * self.presses + 0.3 * self.keys + 1.2 * self.looks + self.wait
        print(f"\n| {question} | {self.presses} presses, {self.keys} keys, {self.looks} looks | {self.wait:.1f} "
              f"| {seconds:.1f} | {found} |")
        assert seconds < 10


@pytest.fixture(scope="module")
def now():
    """The page that is open."""
    return {}


@pytest.fixture
def read(open_page, now):
    """A reader before a page as it opens; one that is open already starts again."""
    def reader(name="scene.html"):
        if name not in now:
            now.clear()
            now[name] = open_page(name)
        now[name].start_again()
        return Reader(now[name])
    return reader


def test_where_does_a_word_look_in_a_block(read):
    reader = read()
    page = reader.page
    reader.press(page.named(".token", "balloon"))
    reader.press(page.find("#plot")[0], page.js("xOf(3) / $('plot').clientWidth"))
    reader.look()
    assert "Block 3, mean over 4 heads" in page.text("sentence") and "to “balloon”" in page.text("sentence")
    peak = page.js("(map => map.indexOf(Math.max(...map)))(wordMap(data.variants[0], view, view.word))")
    y, x = divmod(peak, 16)
    assert page.js(f"data.classes[data.truth[{8 * y + 4} * width + {8 * x + 4}]].name") == "air balloon"
    reader.answer("Where does “balloon” look in block 3?", f"most at row {y + 1}, column {x + 1}, on the balloon")


def test_which_block_separates_the_things_best(read):
    reader = read()
    page = reader.page
    best = {}
    for name in ("air balloon", "mushroom"):
        reader.press(page.named(".chip button", name))
        reader.look()
        assert f"thin: {name}" in page.text("plotname")
        thin = page.find("#plot polyline[stroke-width='1']")[0].get_attribute("points").split()
        best[name] = int(np.argmin([float(point.split(",")[1]) for point in thin]))         # y, from above
        blocks = "[...Array(8).keys()].map(block => IoUs(data.variants[0], {...START, block})[+view.word[1]])"
        ious = page.js(blocks)
        assert best[name] == np.argmax(ious) and page.ious()[name] == round(ious[5])
    reader.answer("Which block separates the things best?", ", ".join(f"{x}: block {n}" for x, n in best.items()))


def test_what_changes_with_magnet(read):
    reader = read()
    page = reader.page
    reader.press(page.named("#base label", "changes"))
    reader.look(2)
    assert "Where the masks differ, mIoU" in page.caption(1)
    found = [x.text for x in page.find(".chip output")]
    expected = page.js("data.classes.map((_, k) => data.variants.map(v => IoUs(v, START)[k].toFixed(0)).join(' | '))")
    assert found == expected and len(set(found)) > 1
    names = [x.text for x in page.find(".chip button")]
    reader.answer("What changes with MAGNET?", "IoU " + ", ".join(f"{name} {both.replace(' | ', ' to ')}"
                                                                for name, both in zip(names, found)))


def test_what_does_a_place_listen_to(read):
    reader = read()
    page = reader.page
    reader.press(page.find("canvas")[0], 0.7, 0.45)
    reader.look(2)
    said = page.text("sentence")
    assert "where the patch in row 8, column 12 looks (I2I" in said and "of that mushroom" in said
    y, x = divmod(int(np.argmax(page.js("[...data.variants[0].i2i(5, view.patch)]"))), 16)
    assert page.js(f"data.classes[data.truth[{8 * y + 4} * width + {8 * x + 4}]].name") == "mushroom"
    words = said.split("of that ")[1].split(",")[0]
    reader.answer("What does the mushroom's cap listen to, and where does it look?", f"{words}; at the mushroom")


def test_which_head_finds_a_thing_best(read):
    reader = read()
    page = reader.page
    reader.press(page.named(".chip button", "air balloon"))
    reader.look()
    label = page.text("headname").split(" | ")[0]
    assert "Head: mean over 4. air balloon by head: " in label
    ious = [float(x) for x in label.split(": ")[2].split()]
    reader.press(page.find("#head")[0], 0.02 + 0.24 * (1 + np.argmax(ious)))
    reader.look()
    assert page.js("view.head") == np.argmax(ious) and page.ious()["air balloon"] == max(ious) > min(ious)
    reader.answer("Which head of the expert finds the balloon best?", f"head {np.argmax(ious)}; IoU by head {ious}")


def test_at_which_noise_level_is_the_mask_best(read):
    reader = read()
    page = reader.page
    reader.press(page.find("#level")[0], 0.02)
    scores = [page.caption().split("mIoU ")[1]]
    for _ in range(2):
        reader.key("ARROW_RIGHT")
        scores.append(page.caption().split("mIoU ")[1])
    reader.look(3)
    assert page.js("view.level") == 2 and scores[2] == max(scores)
    reader.answer("At which noise level is the mask best?", f"at the last, sigma 0.515; mIoU {', '.join(scores)}")


def test_do_t2i_maps_segment(read):
    reader = read()
    page = reader.page
    before = page.caption().split("mIoU ")[1]
    reader.press(page.named("#direction label", "T2I"))
    reader.look()
    after = page.caption().split("mIoU ")[1]
    assert float(after.split()[0]) < float(before.split()[0]) - 10
    reader.answer("Do the T2I maps segment, too?", f"no: {after} instead of {before}")


def test_what_does_i2i_gain_and_where_is_it_wrong(read):
    reader = read()
    page = reader.page
    before = page.caption().split("mIoU ")[1]
    reader.press(page.named("#reading label", "i2i"))
    reader.press(page.named("#base label", "errors"))
    reader.look(2)
    after = page.caption().split("Where the mask is wrong, mIoU ")[1]
    assert after > before
    size = "[0, 0, data.variants[0].left.width, data.variants[0].left.height]"
    pixels = page.js(f"[...data.variants[0].left.getContext('2d').getImageData(...{size}).data]")
    coloured = np.ptp(np.array(pixels).reshape(512, 512, 4)[2::4, 2::4, :3], axis=2) > 20
    wrong = np.array(page.js("[...labelsOf(data.variants[0], view)]")) != np.array(page.js("[...data.truth]"))
    wrong = wrong.reshape(128, 128)
    assert 0 < wrong.mean() < 0.2 and (coloured != wrong).mean() < wrong.mean() / 2          # names stand over some
    reader.answer("What does the reading i2i gain, and where is it wrong?", f"{before} to {after}; along the edges")


def test_when_does_a_drawn_picture_get_its_layout(read):
    reader = read("drawn.html")
    reader.press(reader.page.find("#play")[0])
    start = time.time()
    reader.page.until("view.level === 2")
    reader.wait += time.time() - start
    reader.look()
    page = reader.page
    first, last = (np.array(page.js(f"[...labelsOf(data.variants[0], {{...START, level: {n}}})]")) for n in (0, 2))
    same = (first == last).mean()
    assert page.js("data.levels[0].sigma") == 1 and 0.5 < same < 1
    reader.answer("When does a drawn picture get its layout?", "in the first step, from noise alone: "
                  f"{100 * same:.0f} % of its mask are those of sigma 0.515")


def test_how_do_i_send_a_view(read, open_page):
    reader = read()
    reader.press(reader.page.named(".chip button", "mushroom"))
    reader.press(reader.page.named("#base label", "picture"))
    view = reader.page.js("view")
    address = reader.page.js("location.hash")
    reader.keys += 4                                            # of the browser, to copy its address
    reader.answer("How do I send this view to somebody?", "its address holds it; or the button, as a PNG")
    assert view != reader.page.js("START") and open_page("scene.html", address).js("view") == view
