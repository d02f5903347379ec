"""The report page in a real browser, offline: nothing is fetched, everything sounds, fits and can be read."""

import importlib.util
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_soda.report import build_report

pytestmark = pytest.mark.full

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
WIDTHS = {"desktop": 1280, "phone": 390}

# Decodes the data URI of every player and answers {label, seconds, rms} for each.
DECODE = """
const done = arguments[arguments.length - 1];
(async () => {
  const found = [];
  for (const player of document.querySelectorAll("audio")) {
    const bytes = await (await fetch(player.src)).arrayBuffer();
    const sound = await new OfflineAudioContext(1, 1, 24000).decodeAudioData(bytes);
    const samples = sound.getChannelData(0);
    const rms = Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length);
    found.push({label: player.getAttribute("aria-label"), seconds: sound.duration, rms});
  }
  return found;
})().then(done, (error) => done(String(error)));
"""

# All visible text whose contrast with what lies behind it is below the WCAG AA limit of 4.5 to 1.
FAINT_TEXT = """
const numbers = (colour) => {
  const parts = (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  return parts.length > 3 ? parts : [...parts, 1];
};
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = numbers(getComputedStyle(e).backgroundColor);
    if (colour[3] > 0.99) return colour;
  }
  return [255, 255, 255, 1];
};
const faint = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
  if (element.closest("script, style, title")) continue;
  const style = getComputedStyle(element);
  const colour = numbers(element.closest("svg") ? style.fill : style.color);
  const [low, high] = [luminance(colour), luminance(behind(element))].sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  seen += 1;
  if (contrast < 4.5) faint.push(walker.currentNode.data.trim().slice(0, 40) + " " + contrast.toFixed(2));
}
return {seen, faint};
"""

# Lines of the charts whose contrast with the card behind them is below 3 to 1 (pale and hidden ones aside).
FAINT_LINES = (
    FAINT_TEXT.split("const faint")[0]
    + """
const found = [];
let seen = 0;
for (const line of document.querySelectorAll('svg [id*="line2d"] path')) {
  const style = getComputedStyle(line);
  if (style.stroke === "none" || style.strokeOpacity < 1 || !line.getClientRects().length) continue;
  if (line.closest('[id*="axis_"]')) continue;  // the grid is meant to be faint
  const [low, high] = [luminance(numbers(style.stroke)), luminance(behind(line))].sort((a, b) => a - b);
  seen += 1;
  if ((high + 0.05) / (low + 0.05) < 3) found.push(style.stroke);
}
return {seen, faint: found};
"""
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("fake_run", Path(__file__).parents[1] / "report/conftest.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = build_report(module.make_fake_run(tmp_path_factory.mktemp("run") / "soda-demo"))
    alone = tmp_path_factory.mktemp("alone") / "page.html"  # a copy with nothing beside it
    shutil.copy(report, alone)
    return alone


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `full`)")
    from selenium.webdriver.chrome.service import Service

    driver = shutil.which("chromedriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not driver or not chromium:
        pytest.skip("there is no chromium with a chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    browser.set_script_timeout(60)
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield browser
    browser.quit()


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light", media: str = "") -> None:
    """Opens the page afresh, with everything that folds unfolded."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")


def wait_for(browser: Any, script: str, seconds: float = 15) -> Any:
    """The first answer of `script` that is true."""
    end = time.monotonic() + seconds
    while not (answer := browser.execute_script(script)):
        assert time.monotonic() < end, f"still not true after {seconds} s: {script}"
        time.sleep(0.05)
    return answer


def test_loads_offline_without_a_word_on_the_console(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    show(browser, page)
    wait_for(browser, "return [...document.querySelectorAll('audio')].every((a) => a.readyState > 0)")
    assert browser.get_log("browser") == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    broken = "return [...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") == 9


def test_every_player_has_sound(browser: Any, page: Path) -> None:
    show(browser, page)
    wait_for(browser, "return [...document.querySelectorAll('audio')].every((a) => a.duration > 0)")
    found = browser.execute_async_script(DECODE)
    assert isinstance(found, list), found
    assert len(found) == 9
    assert [clip for clip in found if clip["rms"] <= 1e-4 or clip["seconds"] <= 0] == []


def test_plays_one_at_a_time(browser: Any, page: Path) -> None:
    show(browser, page)
    buttons = browser.find_elements("css selector", ".field button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", buttons[0])
    wait_for(browser, "return [...document.querySelectorAll('audio')].every((a) => a.readyState > 0)")
    buttons[0].click()  # in the middle of the picture: playing starts there
    half = browser.execute_script("return document.querySelectorAll('audio')[0].duration / 2")
    wait_for(browser, f"return document.querySelectorAll('audio')[0].currentTime > {half + 0.1}")
    browser.execute_script("document.querySelectorAll('audio')[1].play()")
    wait_for(browser, "return document.querySelectorAll('audio')[1].currentTime > 0.1")
    assert browser.execute_script("return document.querySelectorAll('audio')[0].paused")


def test_the_players_own_button_plays(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    show(browser, page)
    player = browser.find_element("css selector", "audio")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", player)
    wait_for(browser, "return document.querySelector('audio').readyState > 0")
    left = 20 - player.size["width"] // 2  # from the middle of the controls to the button at their left end
    ActionChains(browser).move_to_element_with_offset(player, left, 0).click().perform()
    wait_for(browser, "return document.querySelector('audio').currentTime > 0.1")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_fits_the_width(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.innerWidth") == width
    outside = """
        return [...document.querySelectorAll("main *, header *, footer *")]
          .filter((e) => !e.closest("svg, pre, .scroll, .field, .ticks") && e.getClientRects().length)
          .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
          .map((e) => e.tagName + "." + e.className)"""
    assert browser.execute_script(outside) == []
    scrolling = "return [...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(scrolling) == 0, "the table of results fits without scrolling"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_can_be_read(browser: Any, page: Path, scheme: str, width: int) -> None:
    show(browser, page, width, scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    red = int("".join(letter for letter in ground.split(",")[0] if letter.isdigit()))
    assert red > 200 if scheme == "light" else red < 60
    for script in (FAINT_TEXT, FAINT_LINES):
        found = browser.execute_script(script)
        assert found["seen"] > 10
        assert found["faint"] == []


def test_prints_light_even_in_the_dark(browser: Any, page: Path) -> None:
    show(browser, page, scheme="dark", media="print")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script(FAINT_TEXT)["faint"] == []
