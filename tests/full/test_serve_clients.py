"""`soda serve` with the clients that people have: the `openai` package, and a browser that may use this server only."""

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_soda.inference.own import Chance, answer, codes_of, continuation
from megatron_soda.registry import TASKS
from tests.exported import HOP, RATE
from tests.full.test_browser import FLAGS, wait_for
from tests.serving.server import Gate, Served, need_packages, served

need_packages()
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def server(exported_once) -> Iterator[Served]:
    with served(exported_once.folder) as found:
        yield found


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sounds") / "mine.wav"
    wave = np.random.default_rng(0).uniform(-0.4, 0.4, 6 * HOP)
    soundfile.write(path, wave, RATE)
    return path


def test_the_openai_package(server: Served, recording: Path) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed (the extra `full`)")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    with recording.open("rb") as file:
        text = client.audio.transcriptions.create(model="tiny", file=file).text
        file.seek(0)
        events = list(client.audio.transcriptions.create(model="tiny", file=file, stream=True))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == text
    asked: dict[str, Any] = {"model": "tiny", "voice": "alloy", "input": "stay on"}
    with client.audio.speech.with_streaming_response.create(**asked, response_format="wav") as response:
        data = b"".join(response.iter_bytes())
    wave, rate = soundfile.read(io.BytesIO(data))
    assert rate == RATE
    assert np.std(wave) > 0
    assert len(client.audio.speech.create(**asked).content) > 100
    with pytest.raises(openai.BadRequestError, match="input is empty"):
        client.audio.speech.create(**{**asked, "input": " "})


@pytest.fixture
def browser(server: Served, tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `full`)")
    from selenium.webdriver.chrome.service import Service

    driver = shutil.which("chromedriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not driver or not chromium:
        pytest.skip("there is no chromium with a chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    for flag in (*FLAGS, *fake, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    browser.execute_cdp_cmd("Network.enable", {})
    browser.get(server.url)
    yield browser
    browser.quit()


def status(browser: Any) -> str:
    return browser.execute_script("return document.getElementById('status').textContent")


def asked_hosts(browser: Any) -> set[str]:
    import json
    from urllib.parse import urlsplit

    sent = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:", "chrome:"))}


def long_continuation(server: Served, recording: Path) -> int:
    """A seed with which 0.8 s follow."""
    material = continuation(server.studio, codes_of(server.studio, recording), 0.8, "")
    task = TASKS["continue"]
    return next(
        seed for seed in range(50) if not answer(server.studio, task, [material], Chance(seed))[0].ended_by_itself
    )


def test_the_page(server: Served, browser: Any, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload, transcribe, continue, speak in that voice: all by this server alone, heard before the end."""
    find = browser.find_element
    wait_for(browser, "return document.getElementById('limit').textContent.includes(' s')")
    find("id", "file").send_keys(str(recording))
    find("id", "transcribe").click()
    wait_for(browser, "return document.getElementById('status').textContent.startsWith('Done')")
    assert find("id", "heard").get_attribute("value")
    find("id", "seconds").clear()
    find("id", "seconds").send_keys("0.8")
    seed = long_continuation(server, recording)
    browser.execute_script(f"Math.random = () => {seed + 0.5} / 1e9")
    gate = Gate(monkeypatch, after=20)
    find("id", "continue").click()
    wait_for(browser, "return document.body.dataset.first > 0")  # while the generation stands still
    assert status(browser) == "Speaking …"
    gate.open.set()
    wait_for(browser, "return document.body.dataset.finished > 0")
    wait_for(browser, "return document.getElementById('answer').duration > 0.4")
    find("id", "heard").clear()  # the random model's transcript fills the context
    find("id", "heard").send_keys("hold")
    find("id", "text").send_keys("stay")
    find("id", "voiced").click()
    find("id", "speak").click()
    wait_for(browser, "return document.getElementById('status').textContent.startsWith('Done')")
    wait_for(browser, "return document.getElementById('answer').duration > 0")
    assert asked_hosts(browser) == {server.url.removeprefix("http://")}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_record_and_stop(server: Served, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the microphone, here Chromium's beeping one; an answer that is stopped ends its generation."""
    find = browser.find_element
    find("id", "record").click()
    wait_for(browser, "return document.getElementById('record').textContent === 'Stop recording'")
    time.sleep(1.2)  # of sound
    find("id", "record").click()
    wait_for(browser, "return !document.getElementById('transcribe').disabled")
    find("id", "transcribe").click()
    wait_for(browser, "return document.getElementById('status').textContent.startsWith('Done')")
    gate = Gate(monkeypatch, after=6)
    find("id", "text").send_keys("stay on the line")
    find("id", "speak").click()
    assert gate.reached.wait(20)
    (job,) = server.worker._jobs
    find("id", "stop").click()
    wait_for(browser, "return document.getElementById('status').textContent === 'Stopped.'")
    assert job._gone.wait(20)
    gate.open.set()


def test_an_error_is_shown(browser: Any) -> None:
    browser.find_element("id", "speak").click()
    wait_for(browser, "return document.getElementById('status').textContent.includes('input is empty')")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
