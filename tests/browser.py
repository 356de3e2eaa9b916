"""The explorer's page in headless Chromium, for the tests: its pages, the browser, and what a person does there."""
import json
import shutil
import time
from argparse import Namespace
from pathlib import Path

import pytest

import explore

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (PyPI)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs Chromium and its driver (Debian: chromium chromium-driver)", allow_module_level=True)

MAGNET = Path(explore.__file__).parent / "nano" / "magnet.safetensors"
PROMPT = "a big red air balloon with snow and sand under the sunset"
SCENE = 15                                                      # an air balloon and a mushroom, night and water


def write_pages(folder: Path) -> None:
    """Pages by nano: a scene without and with MAGNET, and a generation."""
    given = Namespace(words=[], scene=SCENE, generate=None, every=10, model="nano", lora=MAGNET, seed=0, device="cpu",
                      dtype="float32", out=folder / "scene.html")
    explore.main(given)
    changed = {"words": ["air balloon", "sand"], "scene": None, "generate": PROMPT, "lora": None}
    explore.main(Namespace(**vars(given) | changed | {"out": folder / "drawn.html"}))


def new_driver() -> webdriver.Chrome:
    """A browser that writes down its console and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


class Page:
    """A page in the browser, and what a person does there."""

    def __init__(self, driver, path, address="", width=1280, height=900):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                               {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        driver.get("about:blank")
        driver.get(f"file://{path}{address}")
        self.until("document.body.dataset.ready === 'yes'")

    def start_again(self):
        """As the page is when it has just been opened, without the second that opening takes."""
        self.driver.execute_script("hover = { word: null, patch: null, map: false }; change({ ...START }, 'block')")
        self.until("true")

    def js(self, expression):
        return self.driver.execute_script(f"return {expression}")

    def until(self, expression):
        """Waits for the page and its next drawing; fails after 20 s."""
        end = time.time() + 20
        while not self.js(expression):
            assert time.time() < end, expression
            time.sleep(0.02)
        drawn = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(true)))"
        self.driver.execute_async_script(drawn)

    def text(self, name):
        self.until("true")
        return self.js(f"$('{name}').textContent")

    def find(self, css):
        return self.driver.find_elements("css selector", css)

    def point(self, element, x=0.5, y=0.5, press=False):
        """The mouse to a place in an element, given in shares of its size."""
        self.js("window.scrollTo(0, 0)")
        box = self.driver.execute_script("return arguments[0].getBoundingClientRect()", element)
        at = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **at})
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent",
                                        {"type": kind, "button": "left", "clickCount": 1, **at})
        self.until("true")

    def key(self, name):
        """A key, to what has the focus."""
        webdriver.ActionChains(self.driver).send_keys(getattr(webdriver.Keys, name)).perform()
        self.until("true")

    def caption(self, v=0):
        self.until("true")
        return self.js(f"data.variants[{v}].leftCaption.textContent")

    def named(self, css, name):
        """The first element of a kind with this text."""
        return next(x for x in self.find(css) if x.text.startswith(name))

    def ious(self):
        """{class: its IoU}, of the first variant, from the chips under the picture."""
        self.until("true")
        names = [x.text for x in self.find(".chip button")]
        return dict(zip(names, [float(x.text.split(" | ")[0]) for x in self.find(".chip output")]))


def opening(driver: webdriver.Chrome, folder: Path):
    """Opens a page; afterwards, nothing may stand in the console and nothing may have been asked of elsewhere."""
    opened = []

    def open_one(name, *args, **options):
        opened.append(name)
        return Page(driver, folder / name, *args, **options)

    yield open_one
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert bool(asked) == bool(opened)
    assert all(url.startswith((f"file://{folder}", "data:", "blob:", "about:blank")) for url in asked)
