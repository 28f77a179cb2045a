"""The playground in a real browser, on the running demo server. Screenshots are left in ``runs/screenshots``."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm")
from score_vllm.demo import demo_clip
from score_vllm.video import decode_video
from tests.explained import kept_indices

from .conftest import API_KEY, ROOT, Server
from .requests_of import ask, chat, data_url

webdriver = pytest.importorskip("selenium.webdriver")
axe = pytest.importorskip("axe_core_python.selenium")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SCREENSHOTS = ROOT / "runs" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; nothing is downloaded for it."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver here; Debian's packages are chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--mute-audio"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"{CHROMIUM} does not start here: {error.msg}")
    yield driver
    driver.quit()


class Page:
    """The playground, as a user meets it."""

    def __init__(self, browser: Any, server: Server, theme: str = "light", width: int = 1200) -> None:
        self.browser = browser
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(f"{server.url}/playground")
        self.wait(lambda: "connecting" not in self.text("#server"))

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).get_property("textContent").strip()

    def wait(self, what: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 120, 0.05).until(lambda _: what(), f"{what}; the page says: {self.state()}")

    def state(self) -> str:
        return f"{self.text('#server')!r}, {self.text('#error')!r}"

    def log_in(self) -> None:
        self.find("#key").send_keys(API_KEY + Keys.TAB)
        self.wait(lambda: "keeps" in self.text("#server"))

    def take_sample(self) -> None:
        self.find("#sample").click()
        self.wait(lambda: "clip.mp4" in self.text("#clip"))

    def upload(self, path: Path) -> None:
        self.find("#file").send_keys(str(path))
        self.wait(lambda: path.name in self.text("#clip"))

    def ratio(self, text: str) -> None:
        """Type it, as the number field takes anything."""
        self.type("#number", text)

    def type(self, selector: str, text: str) -> None:
        """In the place of what is there."""
        self.find(selector).clear()
        self.find(selector).send_keys(text)

    def click_and_wait(self, button: str, answers: int) -> None:
        """Until the answers are there, with their pictures."""
        self.find(button).click()
        self.wait(lambda: len(self.all("article[data-drawn]")) == answers and self.find(button).is_enabled())

    def complaint(self, button: str = "#ask") -> str:
        self.find(button).click()
        return self.wait(lambda: self.text("#error"))

    def numbers(self, index: int = 0) -> dict[str, str]:
        fields = self.all("article")[index].find_elements(By.CSS_SELECTOR, "[data-number]")
        return {field.get_attribute("data-number"): field.text for field in fields}

    def picture(self, selector: str = ".stage") -> np.ndarray:
        """[H, W, 3] uint8 of a canvas."""
        url = self.browser.execute_script("return arguments[0].toDataURL()", self.find(selector))
        with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
            return np.asarray(image.convert("RGB"))

    def screenshot(self, name: str) -> Path:
        """The whole page, into the artefacts."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path = SCREENSHOTS / f"playground-{name}.png"
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    """Logged in; afterwards nothing was said in the console, and no other machine was asked for anything."""
    browser.get_log("browser")
    made = Page(browser, server)
    made.log_in()
    yield made
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in entries if not name.startswith((server.url, "blob:", "data:"))] == []
    # What the tests provoke is logged by the browser itself.
    own = re.compile(r"responded with a status of 4|net::ERR_")
    assert [entry["message"] for entry in browser.get_log("browser") if not own.search(entry["message"])] == []


def test_the_page_is_closed_to_everything_else(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/playground") as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in policy
    assert "*" not in policy
    assert not re.search(r"https?://|<script(?! type=\"module\" src=\"playground/)|style=|\son\w+=", text)
    for name in ("playground.css", "playground.js"):
        with urllib.request.urlopen(f"{server.url}/playground/{name}") as answer:
            assert answer.headers["Content-Security-Policy"] == policy
            assert not re.search(r"https?://|innerHTML|eval\(|localStorage", answer.read().decode())
    for path in ("/playground/../endpoints.py", "/playground/x", "/playground/%2e%2e/cli.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.url + path)
    with urllib.request.urlopen(f"{server.url}/playground/playground.js?path=/etc/passwd") as answer:
        assert answer.read().startswith(b"// The playground")


def test_the_key_is_asked_for_and_guards_the_settings(browser: Any, server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.url}/v1/playground")
    assert caught.value.code == 401
    page = Page(browser, server)
    assert page.find("#key").is_displayed()
    assert page.text("#error") == "This server asks for its API key."
    page.find("#key").send_keys("wrong" + Keys.TAB)
    page.take_sample()
    assert page.complaint() == "This server asks for its API key."
    page.find("#key").clear()
    page.log_in()
    assert page.text("#error") == ""
    assert page.text("#server") == "demo · score keeps 10 % by default"


def test_ask_about_the_sample_and_see_what_was_kept(page: Page, server: Server) -> None:
    page.take_sample()
    page.click_and_wait("#ask", 1)
    said = chat(server, ask(data_url(demo_clip())), retention_ratio=0.1, max_tokens=128, score_explain=True)
    (video,) = said.score["videos"]
    assert page.text("article .text") == said.choices[0].message.content
    assert page.text("article h2") == "10 % kept by score"
    numbers = page.numbers()
    assert numbers["visual"] == "1024 → 102"
    assert numbers["prompt"] == str(said.usage.prompt_tokens)
    assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", numbers["first"])
    assert re.fullmatch("[0-9.]+|\u2013", numbers["speed"]), "no pace where all tokens come at once"
    assert len(page.all(".strip i")) == video["grid"][0]
    # The frames that PyAV decodes, with the patches that the server kept: bright there, faded elsewhere.
    cells, rows, columns = video["grid"]
    mask = np.zeros(cells * rows * columns, dtype=bool)
    mask[kept_indices(video)] = True
    mask = mask.reshape(cells, rows, columns)
    frames = decode_video(demo_clip().read_bytes()).frames[::2]
    wrong = 0
    for cell in (0, 5, cells - 1):
        page.all(".strip i")[cell].click()
        page.wait(lambda cell=cell: page.find("article").get_attribute("data-drawn") == str(cell))
        words = page.text("figcaption")
        assert words.startswith(f"cell {cell + 1} of {cells} · {video['cell_seconds'][cell]:.2f} s · ")
        assert words.endswith(f"{video['kept_per_cell'][cell]} of {rows * columns} tokens kept")
        drawn = page.picture()
        height, width = drawn.shape[:2]
        frame = np.asarray(Image.fromarray(frames[cell]).resize((width, height)))
        for row, column in np.ndindex(rows, columns):
            middle = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)
            plain, seen = frame[middle].astype(int), drawn[middle].astype(int)
            faded = 0.18 * plain + 0.82 * 255
            nearer = np.abs(seen - plain).sum() < np.abs(seen - faded).sum()
            wrong += bool(nearer) != bool(mask[cell, row, column])
    assert wrong <= 0.02 * 3 * rows * columns, "patches whose middle is an edge may be off"
    page.screenshot("ask")


def test_slider_keyboard_and_another_ratio(page: Page, server: Server, clips: dict[str, Path]) -> None:
    page.upload(clips["plain"])
    slider = page.find("#ratio")
    slider.send_keys(*[Keys.ARROW_RIGHT] * 5)
    assert page.find("#number").get_property("value") == "0.15"
    page.find("#question").send_keys(Keys.CONTROL + Keys.ENTER)
    page.wait(lambda: page.all("article[data-drawn]"))
    (video,) = chat(server, ask(data_url(clips["plain"])), retention_ratio=0.15).score["videos"]
    assert page.numbers()["visual"] == f"{video['original_tokens']} → {video['retained_tokens']}"
    assert "15 % kept" in page.text("article h2")
    strip = page.find(".strip")
    assert (strip.get_attribute("role"), strip.aria_role) == ("slider", "slider")
    strip.send_keys(Keys.END)
    assert strip.get_attribute("aria-valuenow") == strip.get_attribute("aria-valuemax") == str(video["grid"][0])
    strip.send_keys(Keys.ARROW_LEFT)
    assert page.text("figcaption").startswith(f"cell {video['grid'][0] - 1} of ")
    strip.send_keys(Keys.HOME)
    assert strip.get_attribute("aria-valuetext").startswith("cell 1 of ")


def test_methods_that_are_allowed_can_be_chosen(page: Page) -> None:
    page.take_sample()
    page.find("#method option[value=uniform]").click()
    page.click_and_wait("#ask", 1)
    assert page.text("article h2") == "10 % kept by uniform"
    assert '"retention_method": "uniform"' in page.text("#curl")


def test_compare_side_by_side(page: Page) -> None:
    page.take_sample()
    page.click_and_wait("#compare", 2)
    whole, kept = page.numbers(0), page.numbers(1)
    assert (whole["visual"], kept["visual"]) == ("1024 → 1024", "1024 → 102")
    rows = {
        row.find_element(By.CSS_SELECTOR, "th").text: row.text.replace("\u00d7", "x")
        for row in page.all("#difference tbody tr")
    }
    assert rows["Visual tokens"] == "Visual tokens 1024 102 10.0x fewer"
    assert rows["Prompt tokens"].startswith(f"Prompt tokens {whole['prompt']} {kept['prompt']} ")
    assert re.search(r"[\d.]+ m?s [\d.]+ m?s [\d.]+x (sooner|later)$", rows["Time to first token"])
    first, second = page.all("article")
    assert abs(first.location["y"] - second.location["y"]) < 2, "side by side"
    first.find_elements(By.CSS_SELECTOR, ".strip i")[3].click()
    captions = [article.find_element(By.CSS_SELECTOR, "figcaption") for article in (first, second)]
    assert all(caption.text.startswith("cell 4 of 16") for caption in captions), "both move together"
    page.screenshot("compare-light")


def test_compare_of_a_new_clip_is_even(page: Page, fresh_clip: Path) -> None:
    """The second answer alone would be without the vision tower's time."""
    page.upload(fresh_clip)
    page.click_and_wait("#compare", 2)
    assert page.find("#encoded").is_displayed(), "both found every cell encoded"


@pytest.mark.parametrize(("name", "message"), [("not_a_video", "video"), ("audio", "no video stream"), ("empty", "")])
def test_a_file_that_is_no_video(name: str, message: str, page: Page, clips: dict[str, Path]) -> None:
    page.upload(clips[name])
    text = page.complaint()
    assert message in text
    assert len(text) > 20
    assert page.find("#ask").is_enabled()
    assert not page.find("#results").is_displayed()
    page.take_sample()
    page.click_and_wait("#ask", 1)
    assert page.text("#error") == "", "the next good question clears it"


@pytest.mark.parametrize("ratio", ["0", "2", "-1"])
def test_a_ratio_that_the_server_refuses(ratio: str, page: Page) -> None:
    page.take_sample()
    page.ratio(ratio)
    assert "retention_ratio must be a number in (0, 1]" in page.complaint()


def test_no_clip(page: Page) -> None:
    assert page.complaint() == "Choose a clip first, or take the sample."


def test_a_server_that_is_gone(page: Page, browser: Any) -> None:
    page.take_sample()
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/*"]})
    try:
        assert page.complaint() == "The server does not answer: is it still running?"
    finally:
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.click_and_wait("#ask", 1)


def test_an_answer_can_be_stopped(page: Page, browser: Any) -> None:
    page.take_sample()
    page.ratio("0.9")
    page.type("#most", "20000")
    line = {"offline": False, "latency": 0, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    # So slow that the answer is still coming when the button is found, however fast the server is.
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**line, "downloadThroughput": 100})
    try:
        page.find("#ask").click()
        page.find("#stop").click()
        page.wait(lambda: page.find("#ask").is_enabled())
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**line, "downloadThroughput": -1})
    assert page.text("#error") == ""


def test_a_clip_that_the_browser_cannot_decode_is_still_explained(page: Page, clips: dict[str, Path]) -> None:
    """MPEG-4 Part 2."""
    page.upload(clips["odd"])
    page.click_and_wait("#ask", 1)
    assert "cannot decode the clip" in page.text(".note")
    assert page.picture().std() > 0


def test_the_code_shown_runs(page: Page, server: Server, tmp_path: Path) -> None:
    page.upload(Path(shutil.copy(demo_clip(), tmp_path / "it's mine.mp4")))
    page.type("#question", 'What "happens" for $HOME, `ls` or \\n?')
    page.find("#code summary").click()
    environment = {**os.environ, "OPENAI_API_KEY": API_KEY}
    options: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "cwd": tmp_path,
        "env": environment,
        "timeout": 240,
    }
    done = subprocess.run(["bash", "-euc", page.text("#curl")], **options)
    answer = json.loads(done.stdout)
    assert answer["score"]["videos"][0]["retained_tokens"] == 102, done.stderr
    code = subprocess.run([sys.executable, "-c", page.text("#python")], **options)
    assert code.stdout.splitlines()[0] == answer["choices"][0]["message"]["content"].splitlines()[0], code.stderr
    assert API_KEY not in page.text("#code")
    page.find("[data-copy=curl]").click()
    page.wait(lambda: page.text("#copied"))


@pytest.mark.parametrize(("theme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_every_width_and_theme(theme: str, width: int, browser: Any, server: Server) -> None:
    page = Page(browser, server, theme, width)
    page.log_in()
    page.take_sample()
    page.click_and_wait("#compare" if theme == "dark" else "#ask", 2 if theme == "dark" else 1)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    page.screenshot(f"{theme}-{width}")
    for element in page.all("input, button, select, textarea, canvas[role], [role=slider], summary"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    found = axe.Axe().run(browser)["violations"]
    assert [(one["id"], one["help"], [node["html"][:200] for node in one["nodes"]]) for one in found] == []
