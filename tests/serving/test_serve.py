"""`soda serve` over real sockets: what it answers, when, and what it refuses."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_soda.errors import SodaError
from megatron_soda.inference import own
from megatron_soda.inference.own import Chance, answer
from megatron_soda.inference.tasks import transcribe
from megatron_soda.registry import TASKS
from megatron_soda.serving import run
from tests.exported import HOP, RATE, FakeCodec
from tests.serving.server import Gate, Served, need_packages, served

need_packages()
import httpx  # noqa: E402

from megatron_soda.serving import answers, guard  # noqa: E402

SPEECH, TRANSCRIPTIONS, CONTINUATIONS = (f"/v1/audio/{name}" for name in ("speech", "transcriptions", "continuations"))
SAY = {"input": "stay on", "voice": "any", "response_format": "pcm"}


@pytest.fixture(scope="module")
def server(exported_once):
    with served(exported_once.folder) as found:
        yield found


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as found:
        yield found


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(transcribe, "MOST_TOKENS", 12)


def sound(frames: float = 6, level: float = 0.4, format: str = "WAV") -> bytes:
    wave = np.random.default_rng(0).uniform(-level, level, int(frames * HOP)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format=format, subtype="PCM_16")
    return file.getvalue()


def codes(data: bytes) -> np.ndarray:
    wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return FakeCodec().encode([wave])[0]


def samples(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2") / np.float32(32767)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


def spoken(server: Served, text: str, seed: int = 0) -> np.ndarray:
    (found,) = answer(server.studio, TASKS["speak"], [server.studio.material(text=text)], Chance(seed))
    return FakeCodec().decode([found.codes])[0]


def test_transcriptions(server, client):
    data = sound()
    (found,) = answer(server.studio, TASKS["transcribe"], [server.studio.material(codes=codes(data))])
    expected = {"text": found.texts[0], "ended_by_itself": found.ended_by_itself}
    files = {"file": ("../../a.wav", data)}
    assert client.post(TRANSCRIPTIONS, files=files, data={"model": "whisper-1"}).json() == expected
    plain = client.post(TRANSCRIPTIONS, files=files, data={"response_format": "text"})
    assert plain.text == f"{found.texts[0]}\n"
    flac = {"file": ("a", sound(format="FLAC"))}
    assert client.post(TRANSCRIPTIONS, files=flac).json() == expected
    streamed = client.post(TRANSCRIPTIONS, files=files, data={"stream": "true"})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *deltas, last = events(streamed.text)
    assert "".join(event["delta"] for event in deltas) == found.texts[0]
    assert last == {"type": "transcript.text.done", **expected}


def test_text_is_said_as_soon_as_it_stays(server):
    """Letters that take several tokens are not said in part; the pieces, joined, are the text."""
    text, said = server.studio.model.text, []
    whole = "the señor says: 日本 press one"
    writing = answers.Writing(text, server.studio.model.space.text_size, said.append)
    ids = text.encode(whole)
    for number, token in enumerate(ids):
        writing.push(token)
        assert text.decode(ids[: number + 1]).startswith("".join(said))
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(said)
    assert len(said) > 5
    writing.finish(text.decode(ids))
    assert "".join(said) == whole


def test_speech(server, client):
    response = client.post(SPEECH, json={**SAY, "seed": 3})
    assert response.headers["x-sample-rate"] == str(RATE)
    wave = spoken(server, "stay on", 3)
    assert np.abs(samples(response.content) - wave).max() < 1e-4
    assert client.post(SPEECH, json={**SAY, "seed": 4}).content != response.content
    *deltas, last = events(client.post(SPEECH, json={**SAY, "seed": 3, "stream_format": "sse"}).text)
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == response.content
    assert last["type"] == "speech.audio.done"
    assert isinstance(last["ended_by_itself"], bool)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus", "aac"])
def test_formats(server, client, format):
    import av

    from megatron_soda.serving.formats import TYPES

    response = client.post(SPEECH, json={**SAY, "response_format": format})
    assert response.headers["content-type"] == TYPES[format]
    expected = spoken(server, "stay on")
    with av.open(io.BytesIO(response.content)) as file:
        rate = file.streams.audio[0].rate
        parts = [frame.to_ndarray().astype(np.float32) for frame in file.decode(audio=0)]
    found = np.concatenate(parts, 1)[0]
    assert abs(len(found) / rate - len(expected) / RATE) < 0.3  # what encoders add
    if format in ("wav", "flac"):
        assert np.abs(found / 32768 - expected).max() < 1e-4
    assert np.std(found) > 0


@pytest.mark.parametrize("format", ["flac", "mp3", "opus", "aac"])
@pytest.mark.parametrize("rate", [12_500, 44_100])
def test_formats_at_any_rate(format, rate):
    """Opus knows five, MP3 nine."""
    import av

    from megatron_soda.serving.formats import Stream

    wave = np.sin(2 * np.pi * 440 * np.arange(rate) / rate, dtype=np.float32) / 2
    stream = Stream(format, rate)
    data = b"".join([*(stream.push(piece) for piece in np.split(wave, 5)), stream.finish()])
    with av.open(io.BytesIO(data)) as file:
        frames = list(file.decode(audio=0))
    found = np.concatenate([frame.to_ndarray().astype(np.float32) for frame in frames], 1)[0]
    seconds = len(found) / frames[0].sample_rate
    assert abs(seconds - 1) < 0.15
    assert abs(np.abs(np.fft.rfft(found)).argmax() / seconds - 440) < 2


def test_mp3_is_what_clients_get_that_do_not_ask(client):
    response = client.post(SPEECH, json={"input": "stay", "voice": "alloy", "model": "tts-1"})
    assert response.headers["content-type"] == "audio/mpeg"


def test_a_voice(server, client, monkeypatch):
    data, prompts, plain = sound(4), [], own.sample
    monkeypatch.setattr(own, "sample", lambda *a, **k: prompts.append(a[2][0].ids) or plain(*a, **k))
    body = {**SAY, "voice_audio": base64.b64encode(data).decode(), "voice_text": "hold"}
    assert client.post(SPEECH, json=body).status_code == 200
    voice = ("hold", codes(data))
    expected = TASKS["speak"].prompt(server.studio.material(text="stay on", voice=voice))
    assert prompts == [expected.ids]
    assert client.post(SPEECH, json={**body, "voice_text": ""}).status_code == 200
    assert len(prompts) == 3  # its transcript first


def test_continuations(client):
    data = sound()
    fields = {"seconds": "0.4", "response_format": "pcm"}
    wave = samples(client.post(CONTINUATIONS, files={"file": data}, data=fields).content)
    start = FakeCodec().decode([codes(data)])[0]
    assert np.abs(wave[: len(start)] - start).max() < 1e-4
    assert 0 <= len(wave) - len(start) <= 5 * HOP


@pytest.mark.parametrize("format", ["pcm", "wav", "flac", "mp3"])
def test_sound_is_heard_before_the_end(server, client, monkeypatch, format):
    """The generation stops before its second frame until the first sound is here."""
    gate = Gate(monkeypatch, after=40 if format in ("mp3", "flac") else 5)  # these wait for a whole frame of theirs
    monkeypatch.setattr(FakeCodec, "lookahead", 0)
    seed = next(i for i in range(50) if len(spoken(server, "stay on", i)) > 14 * HOP)
    with client.stream("POST", SPEECH, json={**SAY, "response_format": format, "seed": seed}) as response:
        parts = response.iter_raw()
        heard = next(parts)
        assert gate.reached.wait(20)
        assert not gate.open.is_set()
        gate.open.set()
        rest = b"".join(parts)
    assert len(heard) > 0
    assert len(rest) > 0


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_client_that_hangs_up_ends_its_generation(server, client, monkeypatch):
    gate = Gate(monkeypatch, after=5)
    with httpx.Client(base_url=server.url) as other, other.stream("POST", SPEECH, json=SAY) as response:
        next(response.iter_raw())
    (job,) = server.worker._jobs
    wait_until(job._gone.is_set)
    gate.open.set()
    wait_until(lambda: not server.worker._jobs)
    assert gate.tokens == 5
    assert client.post(SPEECH, json=SAY).status_code == 200


def test_one_that_hangs_up_while_it_waits_is_never_begun(server, client, monkeypatch):
    gate, begun = Gate(monkeypatch, after=1), []
    plain = own.sample
    monkeypatch.setattr(own, "sample", lambda *a, **k: begun.append(1) or plain(*a, **k))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, SPEECH, json=SAY)
        assert gate.reached.wait(20)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + SPEECH, json=SAY, timeout=0.3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + TRANSCRIPTIONS, files={"file": sound()}, timeout=0.3)
        wait_until(lambda: len(server.worker._jobs) == 1)
        gate.open.set()
        assert first.result().status_code == 200
    assert begun == [1]


def test_twenty_at_once(server, monkeypatch):
    expected = [spoken(server, "on", seed) for seed in range(3)]
    data = sound()

    def one(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if number % 4 == 3:
                assert "text" in client.post(TRANSCRIPTIONS, files={"file": data}).json()
                return
            response = client.post(SPEECH, json={**SAY, "input": "on", "seed": number % 4})
            assert np.abs(samples(response.content) - expected[number % 4]).max() < 1e-4

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(one, range(20)))
    wait_until(lambda: not server.worker._jobs)  # a job is done a moment after its last answer


def test_too_many_are_told_to_come_back(server, client, monkeypatch):
    from megatron_soda.serving import work

    monkeypatch.setattr(work, "WAITING", 1)
    gate = Gate(monkeypatch, after=1)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, SPEECH, json=SAY)
        assert gate.reached.wait(20)
        second = client.post(SPEECH, json=SAY)
        gate.open.set()
        assert first.result().status_code == 200
    assert (second.status_code, "try again later" in second.json()["error"]["message"]) == (503, True)


FILE = {"file": ("a.wav", sound())}
WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    (SPEECH, {"content": b"{"}, 400, "the request is not JSON"),
    (SPEECH, {"content": b"[" * 100_000}, 400, "the request is not JSON"),
    (SPEECH, {"json": [1]}, 400, "not a JSON object"),
    (SPEECH, {"json": {**SAY, "input": " "}}, 400, "input is empty"),
    (SPEECH, {"json": {**SAY, "input": 3}}, 400, "input must be a text"),
    (SPEECH, {"json": {**SAY, "input": "a" * 4097}}, 400, "at most 4,096 letters"),
    (SPEECH, {"json": {**SAY, "input": "stay " * 200}}, 400, "leave no room for an answer"),
    (SPEECH, {"json": {**SAY, "speed": 2}}, 400, "its own speed"),
    (SPEECH, {"json": {**SAY, "instructions": "sadly"}}, 400, "follows none"),
    (SPEECH, {"json": {**SAY, "response_format": "ogg"}}, 400, "response_format must be one of mp3, opus"),
    (SPEECH, {"json": {**SAY, "response_format": ["pcm"]}}, 400, "response_format must be one of"),
    (SPEECH, {"json": {**SAY, "temperature": "hot"}}, 400, "temperature must be a number"),
    (SPEECH, {"json": {**SAY, "temperature": 10**400}}, 400, "temperature must be a number"),
    (SPEECH, {"json": {**SAY, "seed": -1}}, 400, "seed must be a whole number"),
    (SPEECH, {"json": {**SAY, "voice_audio": "?"}}, 400, "voice_audio must be a sound file in base64"),
    (SPEECH, {"json": {**SAY, "voice_audio": "AAAA"}}, 400, "the sound: cannot be read"),
    (TRANSCRIPTIONS, {"json": {}}, 400, "a sound file is needed"),
    (TRANSCRIPTIONS, {"files": {"file": b"text"}}, 400, "the sound: cannot be read"),
    (TRANSCRIPTIONS, {"files": {"file": sound(6, 0)}}, 400, "the sound: silent"),
    (TRANSCRIPTIONS, {"files": {"file": sound(40)}}, 400, "the sound: too long: 3.2 s; the limit is 1.92 s"),
    (TRANSCRIPTIONS, {"files": {"file": b"#EXTM3U\nfile:///etc/passwd\n"}}, 400, "the sound: cannot be read"),
    (TRANSCRIPTIONS, {"files": FILE, "data": {"response_format": "srt"}}, 400, "must be one of json, text"),
    (TRANSCRIPTIONS, {"files": FILE, "data": {"prompt": "x"}}, 400, "prompt: the model takes none"),
    (TRANSCRIPTIONS, {"files": [("file", b"a"), ("file", b"b")]}, 400, "Too many files"),
    (CONTINUATIONS, {"files": FILE}, 400, "seconds: how long"),
    (CONTINUATIONS, {"files": FILE, "data": {"seconds": "nan"}}, 400, "seconds must be a number"),
    (CONTINUATIONS, {"files": FILE, "data": {"seconds": "9"}}, 400, "has room for"),
    (CONTINUATIONS, {"files": FILE, "data": {"seconds": "1e308"}}, 400, "has room for"),
    ("/etc/passwd", {}, 404, "Not Found"),
    (SPEECH, {"json": SAY, "headers": {"origin": "https://example.com"}}, 403, "pages of https://example.com"),
    (SPEECH, {"json": SAY, "headers": {"origin": "null"}}, 403, "pages of null"),
    (SPEECH, {"json": SAY, "headers": {"host": "example.com"}}, 403, "it is not called example.com"),
]


@pytest.mark.parametrize(("path", "request_", "status", "message"), WRONG)
def test_what_is_wrong_is_said(client, path, request_, status, message):
    response = client.post(path, **request_)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert "/tmp" not in response.text


def test_an_upload_is_refused_before_its_end(server, monkeypatch):
    monkeypatch.setattr(guard, "MOST_UPLOAD", 1 << 20)
    address = server.url.removeprefix("http://")
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {1 << 30}\r\n\r\n"
    with socket.create_connection(address.split(":"), timeout=20) as connection:
        connection.sendall(head.encode() + bytes((1 << 20) + 1))
        found = connection.recv(65536)
    assert b" 413 " in found.split(b"\r\n")[0]


def test_no_file_is_served(server):
    """By any path, however it is written."""
    address = server.url.removeprefix("http://")
    for path in ("/page.html", "/../page.html", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/../../etc/passwd"):
        with socket.create_connection(address.split(":")) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            found = b"".join(iter(lambda c=connection: c.recv(65536), b""))
        assert b" 404 " in found.split(b"\r\n")[0]


def test_the_page_needs_nobody_else(client):
    page = client.get("/")
    assert page.status_code == 200
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w+""", page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["sample_rate"]) == ("tiny", RATE)


def test_a_failure_of_ours_is_not_shown(client, monkeypatch, capsys):
    monkeypatch.setattr(answers, "answer", lambda *_: 1 / 0)
    response = client.post(SPEECH, json=SAY)
    assert response.status_code == 500
    assert "division" not in response.text
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_what_to_install(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name != "uvicorn" else object())
    with pytest.raises(SodaError, match=r"needs starlette and python-multipart: pip install 'megatron-soda\[serve\]'"):
        run.check_installed()


def test_addresses(server, monkeypatch):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(SodaError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
        run.bind("127.0.0.1", port)
    for host in ("no.such.host.invalid", "a..b"):
        with pytest.raises(SodaError, match="cannot listen there"):
            run.bind(host, 0)
    with run.bind("127.0.0.1", 0) as waiting, pytest.raises(SodaError, match="cannot listen there"):
        run.bind("127.0.0.1", waiting.getsockname()[1])  # another server, whose model is still being loaded
    assert run.is_loopback("127.0.0.1")
    assert run.is_loopback("::1")
    assert not run.is_loopback("0.0.0.0")
    both = [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("192.0.2.1", "127.0.0.1")]  # the first is not ours
    monkeypatch.setattr(run.socket, "getaddrinfo", lambda *_, **__: both)
    with run.bind("localhost", 0) as found:
        assert found.getsockname()[0] == "127.0.0.1"
