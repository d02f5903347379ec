"""The commands for people's own sounds and texts, on a tiny random model: results, files, and what is refused."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_soda import cli
from megatron_soda.hf.load import load_model
from megatron_soda.inference import own
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.studio import generated_codes
from megatron_soda.inference.task import Prompt
from megatron_soda.inference.tasks import transcribe
from tests.exported import HOP, RATE, FakeCodec

FRAMES = 8


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(transcribe, "MOST_TOKENS", 12)


def write_sound(path: Path, seed: int = 0, frames: int = FRAMES) -> np.ndarray:
    """A recording, and the codes that the fake codec gives it."""
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, frames * HOP).astype(np.float32)
    wave *= np.repeat(np.linspace(0.2, 1, frames), HOP).astype(np.float32)
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    return FakeCodec().encode([wave])[0]


@pytest.fixture
def soda(exported, tmp_path, monkeypatch, capsys):
    """Runs a command on the model in tmp_path -> status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["soda", *arguments, "--model", str(exported.folder)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def greedy(exported, ids: list[int], stop: int, most: int):
    model = load_model(exported.folder)
    constraint = Constraint(exported.space, model.device)
    (result,) = sample(Decoder(model.model), constraint, [Prompt(ids, {stop}, most)], temperature=0)
    said = [token for token in result.ids[len(ids) :] if token < exported.space.text_size]
    return result, model.text.decode(said)


def test_transcribe(exported, soda, tmp_path):
    """Two files of different length: as each alone, by the paper's prompt, greedily."""
    s, expected = exported.space, []
    for number, name in enumerate(("a.wav", "b.wav")):
        codes = write_sound(tmp_path / name, number, FRAMES - 3 * number)
        ids = [s.bos, s.audio_start, *s.audio_ids(codes).tolist(), s.audio_end, s.text_start]
        result, said = greedy(exported, ids, s.text_end, max(12, -(-25 * len(codes) * HOP // RATE)))
        entry = {"task": "transcribe", "input": name, "text": said, "ended_by_itself": result.ended_by_itself}
        expected.append(entry)
    status, out, err = soda("transcribe", "a.wav", "b.wav", "--out", "written")
    assert status == 0
    assert json.loads((tmp_path / "written" / "results.json").read_text()) == expected
    assert out == "".join(f"{entry['input']}: {entry['text']}\n" for entry in expected)
    for entry in expected:
        assert (f"{entry['input']}: cut off at the length limit" in err) == (not entry["ended_by_itself"])
    assert soda("transcribe", "a.wav")[1] == f"{expected[0]['text']}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "b.wav", "run", "written"}  # nothing without --out


def test_speak(exported, soda, tmp_path):
    model, s = load_model(exported.folder), exported.space
    assert soda("speak", "stay on", "the line", "--temperature", "0", "--seed", "3")[0] == 0
    entries = json.loads((tmp_path / "spoken" / "results.json").read_text())
    assert [(entry["input"], entry["audio"]) for entry in entries] == [
        ("stay on", "speak_1.wav"),
        ("the line", "speak_2.wav"),
    ]
    for entry in entries:
        text = entry["input"]
        ids = [s.bos, s.text_start, *model.text.encode(text), s.text_end, s.audio_start]
        frames = min(math.ceil((2 + len(text) / 3) * 12.5), (160 - len(ids) - 2) // 4)
        result, _ = greedy(exported, ids, s.audio_end, frames * 4 + 2)
        expected = FakeCodec().decode([generated_codes(result.ids, s)])[0]
        wave, rate = soundfile.read(tmp_path / "spoken" / entry["audio"], dtype="float32")
        assert (rate, entry["seconds"]) == (RATE, len(expected) / RATE)
        assert np.abs(wave - expected).max() < 1e-4
        assert entry["ended_by_itself"] == result.ended_by_itself


def test_speak_in_a_voice(exported, soda, tmp_path, monkeypatch):
    """Without its text, the model's own transcript of the recording."""
    s, prompts = exported.space, []
    codes = write_sound(tmp_path / "me.wav", frames=4)
    plain = own.sample
    monkeypatch.setattr(own, "sample", lambda *a, **k: prompts.append(a[2]) or plain(*a, **k))
    encode, audio = load_model(exported.folder).text.encode, s.audio_ids(codes).tolist()
    soda("transcribe", "me.wav", "--out", "heard")
    (heard,) = json.loads((tmp_path / "heard" / "results.json").read_text())
    for option, said in ((["--voice-text", "stay on"], "stay on"), ([], heard["text"].strip())):
        prompts.clear()
        assert soda("speak", "line", "--voice", "me.wav", *option)[0] == 0
        ids = [s.bos, s.text_start, *encode(said), s.text_end, s.audio_start, *audio, s.audio_end]
        assert prompts[-1][0].ids == [*ids, s.text_start, *encode("line"), s.text_end, s.audio_start]
        (entry,) = json.loads((tmp_path / "spoken" / "results.json").read_text())
        assert (entry["voice"], entry["voice_text"]) == ("me.wav", said)


def test_continue(soda, tmp_path):
    (tmp_path / "b").mkdir()
    given = {name: write_sound(tmp_path / name, seed) for seed, name in enumerate(("a.wav", "b/a.wav"))}
    ended = set()
    for seed in range(4):
        status, _, err = soda("continue", *given, "--seconds", "0.4", "--seed", str(seed))
        assert status == 0
        entries = json.loads((tmp_path / "continued" / "results.json").read_text())
        assert [entry["audio"] for entry in entries] == ["a_continued.wav", "a_continued_2.wav"]
        for entry in entries:
            wave, _ = soundfile.read(tmp_path / "continued" / entry["audio"], dtype="float32")
            start = FakeCodec().decode([given[entry["input"]]])[0]
            assert np.abs(wave[: len(start)] - start).max() < 1e-4
            assert (entry["given_seconds"], entry["seconds"]) == (FRAMES * HOP / RATE, len(wave) / RATE)
            assert len(start) <= len(wave) <= len(start) + 5 * HOP
            cut = not entry["ended_by_itself"]
            assert (f"warning {entry['input']}: cut off at the length limit" in err) == cut
            assert len(wave) == len(start) + 5 * HOP or not cut
            ended.add(entry["ended_by_itself"])
    assert ended == {True, False}


def test_translate(exported, soda, tmp_path, monkeypatch):
    s, prompts = exported.space, []
    codes = write_sound(tmp_path / "hola.wav", frames=4)
    plain = own.sample
    monkeypatch.setattr(own, "sample", lambda *a, **k: prompts.append(a[2][0].ids) or plain(*a, **k))
    assert soda("translate", "hola.wav", "--to", "en", "--from", "es")[0] == 0
    encode = load_model(exported.folder).text.encode
    first, second, third = prompts
    audio = [s.bos, s.audio_start, *s.audio_ids(codes).tolist(), s.audio_end, s.text_start]
    assert first == [*audio, *encode("<language>es</language>")]
    assert second[: len(first)] == first
    tag = [s.text_end, s.text_start, *encode("<language>en</language>")]
    assert second[-len(tag) :] == tag
    assert third[: len(second)] == second
    assert third[-2:] == [s.text_end, s.audio_start]
    decode = load_model(exported.folder).text.decode
    (entry,) = json.loads((tmp_path / "translated" / "results.json").read_text())
    assert (entry["language"], entry["to"], entry["audio"]) == ("es", "en", "hola_en.wav")
    assert entry["source_text"] == decode(second[len(first) : -len(tag)])
    assert entry["text"] == decode(third[len(second) : -2])
    assert soundfile.info(tmp_path / "translated" / "hola_en.wav").duration == pytest.approx(entry["seconds"])


def test_examples_come_first(exported, soda, tmp_path, monkeypatch):
    s, prompts = exported.space, []
    codes = write_sound(tmp_path / "a.wav", frames=2)
    plain = own.sample
    monkeypatch.setattr(own, "sample", lambda *a, **k: prompts.append(a[2][0].ids) or plain(*a, **k))
    (tmp_path / "shots.jsonl").write_text('{"audio": "a.wav", "text": "stay on"}\n\n')
    assert soda("transcribe", "a.wav", "--shots", "shots.jsonl")[0] == 0
    words = load_model(exported.folder).text.encode("stay on")
    audio = [s.audio_start, *s.audio_ids(codes).tolist(), s.audio_end]
    document = [s.bos, *audio, s.text_start, *words, s.text_end, s.eos]
    assert prompts == [[*document, s.bos, *audio, s.text_start]]


def test_many_are_done_in_batches(soda, tmp_path, monkeypatch):
    from megatron_soda.inference import own_run

    names = [f"{number}.wav" for number in range(5)]
    for seed, name in enumerate(names):
        write_sound(tmp_path / name, seed, 3 + seed)
    at_once = soda("transcribe", *names)[1]
    monkeypatch.setattr(own_run, "BATCH", 2)
    assert soda("transcribe", *names)[1] == at_once
    assert len(at_once.splitlines()) >= 5


SHOTS = {
    "text.jsonl": ('{"audio": "a.wav"}', "text.jsonl, line 1: needs audio, text, each a text; text is missing"),
    "json.jsonl": ('{"audio": "a.wav", "text": "x"}\n{', "json.jsonl, line 2: is not JSON"),
    "empty.jsonl": ("\n", "empty.jsonl: there are no examples in it"),
    "gone.jsonl": ('{"audio": "no.wav", "text": "x"}', "gone.jsonl, line 1: no.wav: no such file"),
    "many.jsonl": ('{"audio": "a.wav", "text": "x"}\n' * 5, "a.wav: the prompt's"),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transcribe", "no.wav"], "no.wav: no such file"),
        (["transcribe", "hour.wav"], "hour.wav: too long: 3600.0 s; the limit is 1.92 s; the model's context of 160"),
        (["transcribe", "silence.wav"], "silence.wav: silent: peak below -60 dBFS"),
        (["transcribe", "text.jsonl"], "text.jsonl: cannot be read"),
        (["speak", " "], "text 1 is empty"),
        (["speak", "stay", "\ue000"], "text 2 is empty"),
        (["speak", "stay on the line " * 30], "leave no room for an answer in the model's context of 160 tokens"),
        (["speak", "stay", "--voice", "silence.wav"], "silence.wav: silent"),
        (["continue", "a.wav", "--seconds", "9"], "a.wav: has 0.6 s; the model's context of 160 tokens has room for"),
        (["continue", "a.wav", "--seconds", "1e308"], "has room for"),
        (["speak", "stay", "--temperature", "inf"], "must be finite numbers"),
        (["speak", "stay", "--seed", str(1 << 70)], "must be below 2^62"),
        (["transcribe", "a.wav", "--codec", "mimi"], "has its own codec"),
        (["transcribe", "a.wav", "--shots", "none.jsonl"], "none.jsonl: no such file"),
        *((["transcribe", "a.wav", "--shots", name], message) for name, (_, message) in SHOTS.items()),
    ],
)
def test_what_cannot_be_done_is_said(soda, tmp_path, arguments, message):
    write_sound(tmp_path / "a.wav")
    for name, (lines, _) in SHOTS.items():
        (tmp_path / name).write_text(lines)
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    if "hour.wav" in arguments:
        soundfile.write(tmp_path / "hour.wav", np.zeros(3600 * RATE, np.int16), RATE)
    status, _, err = soda(*arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_a_model_without_a_codec_is_told_which(exported, soda, tmp_path, monkeypatch):
    write_sound(tmp_path / "a.wav")
    (exported.folder / "codec" / "codec.json").unlink()
    sealed = json.loads((exported.folder / "soda.json").read_text())
    from megatron_soda.files import write_sealed

    files = {name: value for name, value in sealed["files"].items() if not name.startswith("codec")}
    del sealed["crc32"]
    write_sealed(exported.folder / "soda.json", {**sealed, "files": files})
    assert "for SODA's released models: --codec mimi" in soda("transcribe", "a.wav")[2]
    asked = []
    monkeypatch.setattr(own, "load_codec", lambda *a, **k: asked.append((a, k["codebooks"])) or FakeCodec())
    assert soda("transcribe", "a.wav", "--codec", "mimi:folder")[0] == 0
    assert asked == [(("mimi", "folder"), 4)]
    monkeypatch.setattr(FakeCodec, "entries", 8)
    assert "4 codebooks of 8 entries; the model's tokens" in soda("transcribe", "a.wav", "--codec", "mimi")[2]
