"""Corpora as people have them: what the columns say is used or refused, and nothing is left out without a word."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from av.error import FFmpegError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import sources
from data_prep.prepare import prepare
from data_prep.sources.rows import SOUND_SUFFIXES
from data_prep.utterance import Utterance
from megatron_soda.audio.dali import _load
from megatron_soda.audio.reading import read_audio, read_pieces
from megatron_soda.audio.sound import BadAudio, Sound
from megatron_soda.config import load_recipe
from megatron_soda.data.validate import validate
from megatron_soda.errors import SodaError
from tests.data_prep import test_sources
from tests.data_prep.test_sources import level, make_tar, put, read, save_to_disk, sound_bytes
from tests.voices import voice, write_speech


def tone(path: Path, seconds: float, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(round(seconds * rate)) / 8), rate)
    return path


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def kinds(rejects: dict[str, str]) -> dict[str, str]:
    return {where: reason.split(":")[0] for where, reason in rejects.items()}


# --- segments ---

SAME = [
    {"start": 1.1, "end": 3.3},
    {"start": 1.1, "duration": 2.2},
    {"offset": 1.1, "duration": 2.2},
    {"offset": 1.1, "end": 3.3},
    {"start": "1.1", "duration": "2.2"},
    {"start": 1.1, "offset": 1.1, "end": 3.3, "duration": 2.2},
    {"start": 1.1, "offset": 1.105, "end": 3.3, "duration": 2.195},
]


def written(kind: str, path: Path, row: dict[str, Any]) -> Path:
    """A manifest of one row."""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif kind == "structs":
        pq.write_table(pa.Table.from_pylist([{**row, "audio": {"bytes": None, "path": row["audio"]}}]), path)
    elif kind == "jsonl":
        jsonl(path, row)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, "excel-tab" if kind == "tsv" else "excel").writerows([row.keys(), row.values()])
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "structs"])
def test_segments_in_all_columns_are_the_same(tmp_path: Path, kind: str) -> None:
    tone(tmp_path / "a.wav", 4)
    for row in SAME:
        path = written(
            kind, tmp_path / f"m.{kind.replace('structs', 'parquet')}", {"audio": "a.wav", "text": "t", **row}
        )
        sound = Sound(str(tmp_path / "a.wav"), start=1.1, end=3.3)
        assert read(path) == ([Utterance("a:1.1-3.3", sound, "t")], {}), row
    assert len(read_audio(sound, 16000)) == round(2.2 * 16000)


@given(st.decimals(0, 10**5, places=3), st.decimals("0.001", 10**5, places=3))
def test_sums_are_those_of_decimals(start: Decimal, duration: Decimal) -> None:
    from data_prep.sources.rows import segment

    by_end = segment({"start": float(start), "end": float(start + duration)})
    assert segment({"start": float(start), "duration": float(duration)}) == by_end
    assert segment({"offset": str(start), "duration": str(duration)}) == by_end
    assert by_end == (float(start), float(start + duration), 0.0)


def test_columns_that_contradict_or_say_nothing(tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 4)
    cases = {
        "contradiction": [
            {"start": 1, "offset": 2, "duration": 1},
            {"start": 0, "offset": 1},
            {"start": 1, "duration": 1, "end": 3},
            {"start": 0, "duration": 4, "end": 2},
            {"offset": 1, "duration": 1, "end": 2.02},
            {"duration": 1, "end": 2},
        ],
        "not a segment": [
            {"start": 1, "duration": 0},
            {"offset": 0, "duration": 0},
            {"duration": 0},
            {"start": 2, "end": 1},
            {"end": 0},
            {"start": 1, "duration": 1e-30},
        ],
        "not a number of seconds": [
            {column: value}
            for column in ("start", "end", "offset", "duration")
            for value in (-1, "x", " ", True, [1], "nan", float("nan"), "inf", 1e999, 10**400, "-0.5", {}, "1e99999")
        ],
    }
    for reason, rows in cases.items():
        path = jsonl(tmp_path / "m.jsonl", *({"audio": "a.wav", "text": "t", **row} for row in rows))
        found, rejects = read(path)
        assert found == []
        assert kinds(rejects) == {f"m.jsonl:{number}": reason for number in range(1, len(rows) + 1)}


def test_a_duration_alone_is_the_files(tmp_path: Path) -> None:
    path = tone(tmp_path / "a.wav", 4)
    rows = [{"audio": "a.wav", "text": "t", "duration": seconds} for seconds in (4, 3.6, 4.4, 3, 5, 40)]
    found, rejects = read(jsonl(tmp_path / "m.jsonl", *rows))
    assert rejects == {}
    assert [u.audio for u in found] == [Sound(str(path), seconds=row["duration"]) for row in rows]
    whole = read_audio(path)
    for utterance in found[:3]:
        assert np.array_equal(read_audio(utterance.audio), whole)
    for utterance in found[3:]:
        for decode in (read_audio, lambda sound: list(read_pieces(sound, 24000, 1920))):
            with pytest.raises(BadAudio, match="not as long as the manifest says: "):
                decode(utterance.audio)
    # Of a long recording 2 % may lack.
    assert read_audio(Sound(str(tone(path, 50)), seconds=50.9)).size
    with pytest.raises(BadAudio, match=r"not as long as the manifest says: 50.00 s, not 51.1 s"):
        read_audio(Sound(str(path), seconds=51.1))
    assert _load(Sound(str(path), seconds=50.9)) is not None
    assert _load(Sound(str(path), seconds=51.1)) is None


def test_a_short_duration_does_not_decode_hours(tmp_path: Path) -> None:
    """Each of its thousand sentences would."""
    path = tone(tmp_path / "a.flac", 1800)
    seen = 0
    with pytest.raises(BadAudio, match="not as long"):  # noqa: PT012
        for piece in read_pieces(Sound(str(path), seconds=5), 16000, 1280):
            seen += len(piece)
    assert seen <= 120 * 16000


def test_a_duration_that_is_ignored_stops_a_run(tmp_path: Path) -> None:
    folder = write_speech(tmp_path / "speech")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    jsonl(folder / "manifest.jsonl", *({**line, "duration": 0.05} for line in lines))
    recipe = load_recipe(None, [f"run={tmp_path / 'run'}", f"prepare.speech={folder}", "prepare.workers=1"])
    for dry_run in (True, False):
        with pytest.raises(SodaError, match="not as long as the manifest says: 12"):
            prepare(recipe, dry_run=dry_run)


def test_where_a_sound_was_cut_from_is_not_looked_at(tmp_path: Path) -> None:
    side = {"text": "t", "start": 5, "end": 1, "offset": -1, "duration": 100}
    make_tar(tmp_path / "t/a.tar", [("x.wav", sound_bytes(0.1)), ("x.json", json.dumps(side))])
    audio = {"bytes": sound_bytes(0.1), "path": "x.wav"}
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist([{"audio": audio, **side}]), tmp_path / "p/a.parquet")
    save_to_disk(tmp_path / "h", pa.Table.from_pylist([{"audio": audio, **side}]), 1)
    put(tmp_path / "e/A_W0.wav", 0.1)
    put(tmp_path / "e/A_W0.json", json.dumps(side))
    for folder in "tphe":
        ((utterance,), rejects) = read(tmp_path / folder)
        assert rejects == {}
        assert (utterance.audio.start, utterance.audio.end, utterance.audio.seconds) == (0, 0, 0)


def test_saved_datasets_with_paths_have_segments(tmp_path: Path) -> None:
    path = str(tone(tmp_path / "a.wav", 4))
    save_to_disk(
        tmp_path / "h",
        pa.table({"audio": [path] * 2, "text": ["a", "b"], "start": [1.1, None], "duration": [2.2, 4]}),
        1,
    )
    assert [u.audio for u in read(tmp_path / "h")[0]] == [Sound(path, start=1.1, end=3.3), Sound(path, seconds=4.0)]


# --- corpora of the hub ---


def hub_table(rows: list[dict[str, Any]], classes: dict[str, list[str]]) -> pa.Table:
    """As datasets writes Parquet: classes are integers, and their names stand in the schema's metadata."""
    features: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in rows[0]}
    features |= {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
    features["audio"] = {"sampling_rate": 16000, "_type": "Audio"}
    table = pa.Table.from_pylist(rows)
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


VOXPOPULI = [
    {
        "audio_id": f"2009-PLENARY-{number}",
        "language": language,
        "audio": {"bytes": sound_bytes(number / 10), "path": f"{number}.wav"},
        "raw_text": "",
        "normalized_text": f"text {number}",
        "gender": "female",
        "speaker_id": str(100 + number),
        "is_gold_transcript": True,
        "accent": "None",
    }
    for number, language in enumerate([1, 0, 2, -1, 7, None])
]
NAMES = {"language": ["en", "de", "fr"]}


@pytest.mark.parametrize("saved", [False, True])
def test_voxpopuli(tmp_path: Path, saved: bool) -> None:
    table = hub_table(VOXPOPULI, NAMES)
    if saved:
        save_to_disk(tmp_path / "data", table, 1)
    else:
        (tmp_path / "data").mkdir()
        pq.write_table(table, tmp_path / "data/train-00000-of-00001.parquet")
    found, rejects = read(tmp_path / "data")
    assert rejects == {}
    assert [(u.text, u.speaker, u.language, level(u.audio)) for u in found] == [
        (f"text {number}", str(100 + number), language, number / 10)
        for number, language in enumerate(["de", "en", "fr", "", "7", ""])
    ]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"info": {"features": {"language": 7}}}',
        b'{"info": {"features": {"language": {"names": [1, 2]}}}}',
    ],
)
def test_classes_without_names_are_numbers(tmp_path: Path, metadata: bytes | None) -> None:
    table = hub_table(VOXPOPULI, NAMES).replace_schema_metadata(
        {"huggingface": metadata} if metadata is not None else None
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found, rejects = read(tmp_path / "a.parquet")
    assert [u.language for u in found] == ["1", "0", "2", "-1", "7", ""]
    assert rejects == {}


FLEURS = [
    {
        "id": 1500 + number // 3,
        "num_samples": 800,
        "path": f"/home/somebody/{number}.wav",
        "audio": {"bytes": sound_bytes(number / 10), "path": f"{number}.wav"},
        "transcription": f"text {number // 3}",
        "raw_transcription": f"Text {number // 3}.",
        "gender": number % 2,
        "lang_id": 1,
        "language": "Afrikaans",
        "lang_group_id": 3,
    }
    for number in range(9)
]


def test_fleurs(tmp_path: Path) -> None:
    """Its id is the number of the sentence, which three people say."""
    table = hub_table(FLEURS, {"gender": ["male", "female"], "lang_id": ["en_us", "af_za"]})
    for shard in range(2):
        pq.write_table(table.slice(5 * shard, 5), tmp_path / f"train-0000{shard}-of-00002.parquet")
    found, rejects = read(tmp_path)
    assert rejects == {}
    assert len({u.id for u in found}) == len(found) == 9
    assert [(u.text, u.language, level(u.audio)) for u in found] == [
        (f"text {number // 3}", "Afrikaans", number / 10) for number in range(9)
    ]
    columns = {"text": "raw_transcription", "language": "lang_id", "speaker": "gender", "id": None}
    found, _ = read(tmp_path, columns=columns)
    assert [(u.text, u.language, u.speaker) for u in found[:2]] == [
        ("Text 0.", "af_za", "male"),
        ("Text 0.", "af_za", "female"),
    ]
    assert found[6].id == "train-00001-of-00002:1"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_numbers_as_names(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.wav", 0.1)
    row = {"text": "t", "speaker": 7, "id": 15, "language": 3, "recording": 12, "prompt": 9}
    found = [read(written(kind, tmp_path / f"m.{kind}", {"audio": f"{name}.wav", **row})) for name in "ab"]
    assert [rejects for _, rejects in found] == [{}, {}]
    for (utterance,), _ in found:
        assert utterance == replace(found[0][0][0], id=utterance.id, audio=utterance.audio)
        assert (utterance.speaker, utterance.language, utterance.recording, utterance.prompt) == ("7", "3", "12", "9")
    assert [u.id for (u,), _ in found] == ["a:15", "b:15"]  # it may count sentences


def test_floats_as_names_and_what_is_no_name(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    speakers = [7.0, 7.5, True, float("nan"), float("inf"), [7], 1e300]
    path = jsonl(tmp_path / "m.jsonl", *({"audio": "a.wav", "text": "t", "speaker": one} for one in speakers))
    found, rejects = read(path)
    assert [u.speaker for u in found] == ["7", str(int(1e300))]
    assert set(kinds(rejects).values()) == {"wrong type"}
    assert len(rejects) == 5


# --- NeMo ---


def test_nemo(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    rows = [
        {"audio_filepath": "a.wav", "text": "t", "duration": 0.05},
        {"audio_filepath": "a.wav", "text": "s", "duration": 0.02, "offset": 0.01},
    ]
    path = jsonl(tmp_path / "train_manifest.json", *rows)
    found = read(path)
    assert found[1] == {}
    assert [u.text for u in found[0]] == ["t", "s"]
    assert read(path, "manifest") == found
    assert read(tmp_path / "*_manifest.json") == found
    packed = put(tmp_path / "manifest.json.gz", gzip.compress(path.read_bytes()))
    assert read(packed) == read(tmp_path) == found
    packed.unlink()
    jsonl(tmp_path / "manifest.json", *rows)
    assert read(tmp_path) == found
    # One that is something else is not taken for a manifest.
    put(tmp_path / "manifest.json", '{\n "name": "a corpus"\n}')
    assert read(tmp_path, needs_text=False)[0][0].text == ""
    jsonl(tmp_path / "manifest.jsonl", *rows)
    assert read(tmp_path) == found
    jsonl(tmp_path / "manifest.json", *rows)
    with pytest.raises(SodaError, match=r"manifest.jsonl and manifest.json; keep one"):
        read(tmp_path)
    with pytest.raises(SodaError, match="nothing here has a known layout"):
        read(put(tmp_path / "other.json", "[1]"))


def test_a_json_beside_a_sound_is_emilias(tmp_path: Path) -> None:
    for name in ("A_W1", "A_W0"):
        put(tmp_path / f"{name}.mp3", 0.1)
        put(tmp_path / f"{name}.json", '{"wav": "x", "text": "said"}')
    found = read(tmp_path)
    assert [u.recording for u in found[0]] == ["A", "A"]
    assert read(tmp_path / "*.mp3") == found
    assert [u.id for u in read(tmp_path / "A_W1.mp3")[0]] == ["A_W1"]


# --- paths ---


def test_audio_outside_the_manifests_folder(tmp_path: Path) -> None:
    put(tmp_path / "audio/x/a.wav", 0.1)
    names = ["../audio/x/a.wav", str(tmp_path / "audio/x/a.wav"), "x/a.wav"]
    path = jsonl(
        tmp_path / "lists/m.jsonl", *({"audio": name, "text": "t", "id": f"n{i}"} for i, name in enumerate(names))
    )
    found, rejects = read(path)
    assert found == []
    assert kinds(rejects) == {
        "m.jsonl:1": "outside the folder",
        "m.jsonl:2": "outside the folder",
        "m.jsonl:3": "no file",
    }
    assert "prepare.audio_root" in rejects["m.jsonl:1"]
    for root, known in (("audio", ["n0", "n1", "n2"]), (".", ["n0", "n1"]), ("/", ["n0", "n1"])):
        found, rejects = read(path, audio_root=str(tmp_path / root))
        assert [u.id for u in found] == known
        assert {level(u.audio) for u in found} == {0.1}
        assert kinds(rejects) == dict.fromkeys([f"m.jsonl:{n}" for n in (3,) if len(known) == 2], "no file")
    found, rejects = read(path, audio_root=str(put(tmp_path / "other/b.wav", 0.1).parent))
    assert (found, set(kinds(rejects).values())) == ([], {"outside the folder", "no file"})
    jsonl(path, {"audio": "x/a.wav", "text": "t"})
    assert [u.id for u in read(path, audio_root=str(tmp_path / "audio"))[0]] == ["x/a"]
    with pytest.raises(SodaError, match=r"prepare.audio_root: .*none: no such folder"):
        read(path, audio_root=str(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["parquet", "structs", "saved"])
def test_audio_root_of_tables_with_paths(tmp_path: Path, kind: str) -> None:
    sound = str(put(tmp_path / "audio/a.wav", 0.1))
    row = {"audio": "a.wav", "text": "t"}
    if kind == "saved":
        save_to_disk(tmp_path / "d", pa.Table.from_pylist([row, {**row, "audio": "/etc/passwd"}]), 1)
        path = tmp_path / "d"
    else:
        (tmp_path / "d").mkdir()
        path = written(kind, tmp_path / "d/m.parquet", row)
    found, rejects = read(path, audio_root=str(tmp_path / "audio"))
    assert [u.audio.path for u in found] == [sound]
    assert [reason.split(":")[0] for reason in rejects.values()] == ["outside the folder"] * (kind == "saved")


def test_home_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "d/a b.wav", 0.1)
    names = ["~/d/a b.wav", f"file://{tmp_path}/d/a%20b.wav", f"file://localhost{tmp_path}/d/a%20b.wav"]
    names += ["file://elsewhere/a.wav", "file:///%00", "~nobody-here/a.wav", "s3://bucket/a.wav"]
    path = jsonl(tmp_path / "d/m.jsonl", *({"audio": name, "text": "t"} for name in names))
    found, rejects = read(path)
    assert [(u.id, level(u.audio)) for u in found] == [("a b", 0.1)] * 3
    assert list(kinds(rejects).values()) == ["not on this machine", "not a path", "no file", "no file"]
    save_to_disk(tmp_path / "h", pa.table({"audio": names[:2], "text": ["a", "b"]}), 1)
    assert len(read(tmp_path / "h")[0]) == 2


@pytest.mark.parametrize(("ours", "disks"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_two_forms_of_accents(tmp_path: Path, ours: Any, disks: Any) -> None:
    def said(name: str) -> str:
        return unicodedata.normalize(ours, name)

    def on_disk(name: str) -> str:
        return unicodedata.normalize(disks, name)

    assert said("é") != on_disk("é")
    put(tmp_path / "m" / on_disk("Löwe/é.wav"), 0.1)
    jsonl(tmp_path / "m/manifest.jsonl", {"audio": said("Löwe/é.wav"), "text": "t"})
    put(tmp_path / "p" / on_disk("é.wav"), 0.1)
    put(tmp_path / "p" / said("é.txt"), "t")
    put(tmp_path / "l/1" / on_disk("1-é.flac"), 0.1)
    put(tmp_path / "l/1/1.trans.txt", said("1-é T\n"))
    put(tmp_path / "j/wavs" / on_disk("é.wav"), 0.1)
    put(tmp_path / "j/metadata.csv", said("é|t|t\n"))
    put(tmp_path / "c/clips" / on_disk("é.mp3"), 0.1)
    put(tmp_path / "c/train.tsv", said("path\tsentence\né.mp3\tt\n"))
    make_tar(tmp_path / "t/a.tar", [(on_disk("é.wav"), sound_bytes(0.1)), (said("é.txt"), "t")])
    for folder in "mpljct":
        found, rejects = read(tmp_path / folder)
        assert rejects == {}, folder
        assert [u.text.lower() for u in found] == ["t"], folder
        assert level(found[0].audio) == 0.1


# --- prepare.columns ---


def table_of(layout: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows (without a sound) in one of the layouts with columns, each with a sound."""
    folder.mkdir(parents=True)
    for number in range(len(rows)):
        put(folder / f"A_W{number}.wav", number / 10)
    if layout == "jsonl":
        return jsonl(folder / "m.jsonl", *({"audio": f"A_W{n}.wav", **row} for n, row in enumerate(rows)))
    if layout in ("csv", "tsv"):
        with open(folder / f"m.{layout}", "w", newline="") as file:
            writer = csv.writer(file, "excel" if layout == "csv" else "excel-tab")
            writer.writerows([["audio", *rows[0]], *([f"A_W{n}.wav", *row.values()] for n, row in enumerate(rows))])
        return folder / f"m.{layout}"
    if layout == "paths":
        pq.write_table(
            pa.Table.from_pylist([{"audio": f"A_W{n}.wav", **row} for n, row in enumerate(rows)]), folder / "m.parquet"
        )
        return folder / "m.parquet"
    sounds = [{"bytes": sound_bytes(n / 10), "path": None} for n in range(len(rows))]
    table = pa.Table.from_pylist([{"audio": sound, **row} for sound, row in zip(sounds, rows, strict=True)])
    if layout == "parquet":
        pq.write_table(table, folder / "m.parquet")
        return folder / "m.parquet"
    if layout == "arrow":
        save_to_disk(folder / "d", table, 1)
        return folder / "d"
    if layout == "tar":
        members = [
            (f"A{n}.{kind}", data)
            for n, row in enumerate(rows)
            for kind, data in (("wav", sound_bytes(n / 10)), ("json", json.dumps(row)))
        ]
        return make_tar(folder / "m.tar", members)
    if layout == "commonvoice":
        (folder / "c/clips").mkdir(parents=True)
        for n in range(len(rows)):
            put(folder / f"c/clips/{n}.wav", n / 10)
        lines = [["path", *rows[0]], *([f"{n}.wav", *row.values()] for n, row in enumerate(rows))]
        put(folder / "c/train.tsv", "".join("\t".join(line) + "\n" for line in lines))
        return folder / "c"
    assert layout == "emilia"
    for n, row in enumerate(rows):
        put(folder / f"A_W{n}.json", json.dumps(row))
    return folder


WITH_COLUMNS = ["jsonl", "csv", "tsv", "paths", "parquet", "arrow", "tar", "commonvoice", "emilia"]


@pytest.mark.parametrize("layout", WITH_COLUMNS)
def test_columns_under_other_names(tmp_path: Path, layout: str) -> None:
    rows = [{"text": "raw", "Clean": f"clean {n}", "speaker": "s", "who": f"w{n}", "id": "same"} for n in range(2)]
    path = table_of(layout, tmp_path / "x", rows)
    columns = {"text": "Clean", "speaker": "who", "id": None}
    found, rejects = read(path, columns=columns)
    assert rejects == {}
    assert [(u.text, u.speaker, level(u.audio)) for u in found] == [("clean 0", "w0", 0.0), ("clean 1", "w1", 0.1)]
    assert len({u.id for u in found}) == 2
    found, _ = read(path, columns={"speaker": None, "id": None})
    assert [(u.text, u.speaker) for u in found] == [("raw", ""), ("raw", "")]
    assert len(read(path, columns={"text": None}, needs_text=False)[0]) == 2
    assert set(kinds(read(path, columns={"text": None})[1]).values()) == {"no transcript"}
    with pytest.raises(SodaError, match=r"prepare.columns: text: Sentence: no row has such a column; .*Clean"):
        read(path, columns={"text": "Sentence"})


@pytest.mark.parametrize("layout", ["jsonl", "csv", "parquet", "arrow", "paths"])
def test_the_sounds_own_column(tmp_path: Path, layout: str) -> None:
    path = table_of(layout, tmp_path / "x", [{"text": "t"}, {"text": "u"}])
    if layout in ("jsonl", "csv"):
        put(path, path.read_text().replace("audio", "the_sound"))
    elif layout == "arrow":
        with pa.memory_map(str(path / "data-00000-of-00001.arrow")) as file:
            table = pa.ipc.open_stream(file).read_all()
        save_to_disk(tmp_path / "y", table.rename_columns(["the_sound", "text"]), 1)
        path = tmp_path / "y"
    else:
        pq.write_table(pq.read_table(path).rename_columns(["the_sound", "text"]), path)
    found, rejects = read(path, "hf" if layout == "arrow" else "manifest", columns={"audio": "the_sound"})
    assert [(u.text, level(u.audio)) for u in found] == [("t", 0.0), ("u", 0.1)]
    assert rejects == {}


def test_columns_that_are_wrong(tmp_path: Path) -> None:
    path = table_of("jsonl", tmp_path / "x", [{"text": "t"}])
    with pytest.raises(
        SodaError, match=r"prepare.columns: there is no column 'sentence'; there are audio, text, speaker"
    ):
        read(path, columns={"sentence": "text"})
    with pytest.raises(SodaError, match=r"prepare.columns: audio: a column is needed"):
        read(path, columns={"audio": None})
    for kind in ("csv", "parquet"):
        path = table_of(kind, tmp_path / kind, [{"text": "t"}])
        with pytest.raises(SodaError, match="one of the_sound"):
            read(path, columns={"audio": "the_sound"})
    # Pairs have no columns to rename; one that only some rows have is there.
    put(tmp_path / "p/a.wav", 0.1)
    put(tmp_path / "p/a.txt", "t")
    with pytest.raises(SodaError, match="no row has such a column"):
        read(tmp_path / "p", columns={"text": "sentence"})
    path = jsonl(tmp_path / "p/m.jsonl", {"audio": "a.wav", "t": "x"}, {"audio": "a.wav", "text": "y", "id": "2"})
    found, rejects = read(path, columns={"text": "t"})
    assert [u.text for u in found] == ["x"]
    assert rejects == {"m.jsonl:2": "no transcript"}


def test_columns_and_root_from_the_recipe(tmp_path: Path) -> None:
    folder = write_speech(tmp_path / "speech")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    (folder / "manifest.jsonl").unlink()
    path = jsonl(
        tmp_path / "lists/m.json", *({"audio": line["audio"], "Said": line["text"], "id": 1} for line in lines)
    )
    settings = [
        f"run={tmp_path / 'run'}",
        f"prepare.speech={path}",
        f"prepare.audio_root={folder}",
        "prepare.columns={text: Said, id: null}",
    ]
    assert prepare(load_recipe(None, settings), dry_run=True)["utterances"] == 12
    with pytest.raises(SodaError, match="no row has such a column"):
        prepare(load_recipe(None, [*settings[:-1], "prepare.columns={text: said}"]), dry_run=True)


# --- folders of anything ---


def encode(path: Path) -> bool:
    """A second of sound in the format of the path's suffix, if it can be written here."""
    samples = (0.3 * np.sin(np.arange(48000) / 20)).astype(np.float32)
    known = {"aif": "AIFF", "aifc": "AIFF", "oga": "OGG", "opus": "OGG", "snd": "AU", "sph": "NIST", "wave": "WAV"}
    suffix = path.suffix[1:]
    name = known.get(suffix, suffix.upper())
    if name in soundfile.available_formats() and suffix != "mpc":
        soundfile.write(path, samples, 48000, format=name, subtype="OPUS" if suffix == "opus" else None)
        return True
    codecs = {
        "webm": "libopus",
        "wma": "wmav2",
        "wmv": "wmav2",
        "avi": "mp2",
        "mp2": "mp2",
        "mpa": "mp2",
        "mpg": "mp2",
        "mpeg": "mp2",
        "flv": "aac",
        "spx": "libspeex",
        "amr": "libopencore_amrnb",
        "tta": "tta",
        "wv": "wavpack",
        "ac3": "ac3",
        "eac3": "eac3",
        "dts": "dca",
        "g722": "g722",
        "3gp": "aac",
    }
    formats = {
        "aac": "adts",
        "mka": "matroska",
        "mkv": "matroska",
        "m4a": "mp4",
        "m4b": "mp4",
        "wma": "asf",
        "wmv": "asf",
        "mpa": "mp2",
        "mpg": "mpeg",
        "spx": "ogg",
    }
    rate = {"g722": 16000, "amr": 8000}.get(suffix, 48000)
    try:
        with av.open(str(path), "w", format=formats.get(suffix, suffix)) as output:
            stream: Any = output.add_stream(codecs.get(suffix, "aac"), rate=rate, options={"strict": "-2"})
            stream.layout = "mono"
            stream.bit_rate = 12200 if suffix == "amr" else 64000
            resampler = av.AudioResampler(
                stream.format, "mono", rate, frame_size=stream.codec_context.frame_size or 960
            )
            frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate = 48000
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                output.mux(stream.encode(piece))
            output.mux(stream.encode(None))
    except (FFmpegError, ValueError) as error:
        print(suffix, error)
        path.unlink(missing_ok=True)
        return False
    return True


NOT_WRITTEN = {".ape", ".dts", ".mpc", ".spx", ".tak"}  # FFmpeg's libraries here only read them


@pytest.mark.parametrize("suffix", SOUND_SUFFIXES)
def test_every_suffix_is_one_that_is_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"A{suffix}"
    if not encode(path):
        assert suffix in NOT_WRITTEN
        decoder = {".dts": "dca", ".mpc": "mpc8", ".spx": "speex"}.get(suffix, suffix[1:])
        assert av.Codec(decoder, "r").type == "audio"
        return
    put(tmp_path / "A.txt", "said")
    ((utterance,), rejects) = read(tmp_path)
    assert (utterance.id, utterance.text, rejects) == ("A", "said", {})
    samples = read_audio(utterance.audio)
    assert 0.8 < len(samples) / 24000 < 1.2
    assert np.abs(samples).max() > 0.1
    put(tmp_path / "LibriSpeech/1.trans.txt", "1-2 SAID\n")
    path.rename(tmp_path / f"LibriSpeech/1-2{suffix}")
    ((utterance,), rejects) = read(tmp_path / "LibriSpeech")
    assert (utterance.text, utterance.audio.path, rejects) == ("SAID", str(tmp_path / f"LibriSpeech/1-2{suffix}"), {})


def test_files_that_are_left_out_are_told(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    put(tmp_path / "a.txt", "t")
    beside = ["a.lab", "a.normalized.txt", "a.TextGrid", "a.png"]
    about = ["README", "README.txt", "LICENSE-2.0.txt", "notes.md", "SHA256SUMS.txt", "md5sum.txt", "sha256.sha256"]
    about += ["speakers.tsv", "corpus.json", ".DS_Store", "cover.jpg", "Makefile", "paper.pdf"]
    for name in (*beside, *about):
        put(tmp_path / name, "x")
    assert read(tmp_path) == read(tmp_path, "pairs")
    assert read(tmp_path)[1] == {}
    for name in ("b.TXT", "c.xyz", "c.txt", "d.xyz", "deep/e.zip", "deep/0001", "f.tar", "g.wav.gz"):
        put(tmp_path / name, "x")
    found, rejects = read(tmp_path, "pairs")
    assert [u.id for u in found] == ["a"]
    assert rejects == {
        "b.TXT": "no sound file: only the text",
        "c.xyz": "not a sound file: .xyz",
        "d.xyz": "not a sound file: .xyz",
        "deep/e.zip": "not a sound file: .zip",
        "deep/0001": "not a sound file: without a suffix",
        "f.tar": "not a sound file: .tar",
        "g.wav.gz": "not a sound file: .gz",
    }
    rejects = read(tmp_path, "audio", needs_text=False)[1]
    assert list(rejects) == ["c.xyz", "d.xyz", "f.tar", "g.wav.gz", "deep/0001", "deep/e.zip"]


@pytest.mark.parametrize(
    ("layout", "sound", "text"), [("emilia", "A_W0.mp3", "A_W0.json"), ("librispeech", "1-2.flac", "1.trans.txt")]
)
def test_left_out_in_other_folders(tmp_path: Path, layout: str, sound: str, text: str) -> None:
    put(tmp_path / sound, sound_bytes(0.1))
    put(tmp_path / text, '{"text": "t"}' if layout == "emilia" else "1-2 T\n")
    put(tmp_path / "3-4.xyz", "x")
    put(tmp_path / "SPEAKERS.TXT", "x")
    found, rejects = read(tmp_path)
    assert len(found) == 1
    assert rejects == {"3-4.xyz": "not a sound file: .xyz"}


def test_left_out_beside_tars_and_manifests(tmp_path: Path) -> None:
    make_tar(tmp_path / "t/a.tar", [("x.wav", b"1"), ("x.txt", "t")])
    for name in ("t/b.tar.xz", "t/c.wav"):
        put(tmp_path / name, b"x")
    found, rejects = read(tmp_path / "t")
    assert len(found) == 1
    assert kinds(rejects) == {"b.tar.xz": "not in a tar", "c.wav": "not in a tar"}
    put(tmp_path / "m/a/x.wav", 0.1)
    jsonl(tmp_path / "m/a/manifest.jsonl", {"audio": "x.wav", "text": "t"})
    put(tmp_path / "m/b/y.wav", 0.1)
    found, rejects = read(tmp_path / "m")
    assert len(found) == 1
    assert kinds(rejects) == {str(tmp_path / "m/b"): "no manifest"}


def test_emilia_in_tars_and_loose(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [("A_W0.json", '{"text": "t"}'), ("A_W0.mp3", b"1")])
    put(tmp_path / "A_W1.mp3", 0.1)
    put(tmp_path / "A_W1.json", '{"text": "u"}')
    found, rejects = read(tmp_path, "emilia")
    assert ([u.text for u in found], rejects) == (["t", "u"], {})


def test_ljspeech_of_other_sounds(tmp_path: Path) -> None:
    for name in ("a.flac", "b.wav", "c.mp3"):
        put(tmp_path / "wavs" / name, 0.1)
    put(tmp_path / "metadata.csv", "a|A|\nb.wav|B|\nc|C|c spelled out\n")
    found, rejects = read(tmp_path)
    assert ([u.text for u in found], rejects) == (["A", "B", "C"], {})
    assert [u.text for u in read(tmp_path, columns={"text": "normalized_text"}, needs_text=False)[0]] == [
        "",
        "",
        "c spelled out",
    ]


# --- tables with quotes and line breaks ---

CELLS = [
    "plain",
    'He said "no".',
    '"All of it."',
    "two\nlines",
    "a\ttab",
    ", and; more",
    "",
    '"',
    '""',
    'x "\n\n" y',
    " white ",
]
TEXTS = [" ".join(text.split()) for text in CELLS]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_what_pythons_csv_module_writes(tmp_path: Path, kind: str, newline: str, quoting: Any) -> None:
    put(tmp_path / "a.wav", 0.1)
    path = tmp_path / f"m.{kind}"
    for order in (CELLS, CELLS[::-1]):
        with open(path, "w", newline="") as file:
            writer = csv.writer(
                file, "excel-tab" if kind == "tsv" else "excel", quoting=quoting, lineterminator=newline
            )
            writer.writerow(["audio", "text", "speaker"])
            writer.writerows(["a.wav", cell, f"s{n}"] for n, cell in enumerate(order))
        found, rejects = read(path, needs_text=False)
        assert rejects == {}
        assert [(u.text, u.speaker) for u in found] == [
            (" ".join(text.split()), f"s{n}") for n, text in enumerate(order)
        ]


STRAY = ['"Quoted" and "open', '"Hello"', 'up"', 'a "b" c', '"', '"open', '""', "'", '"a "b""']


@pytest.mark.parametrize("texts", [*itertools.permutations(STRAY, 2), tuple(STRAY), ('"Hello"',) * 3])
def test_quotes_of_a_tsv_without_quoting_stay(tmp_path: Path, texts: tuple[str, ...]) -> None:
    put(tmp_path / "clips/a.mp3", 0.1)
    lines = ["client_id\tpath\tsentence\tlocale", *(f"s\ta.mp3\t{text}\ten" for text in ("x", *texts, "y"))]
    put(tmp_path / "train.tsv", "\n".join(lines) + "\n")
    found, rejects = read(tmp_path)
    assert rejects == {}
    assert [u.text for u in found] == ["x", *texts, "y"]


def test_an_open_quote_takes_no_other_line_with_it(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    good = "".join(f"a.wav,line {n}\n" for n in range(3000))
    for bad in ('a.wav,"open\n', 'a.wav,"open\na.wav,"open\n'):
        path = put(tmp_path / "m.csv", f'audio,text\n{bad}{good}a.wav,"quoted\ntext"\n')
        found, rejects = read(path)
        assert [u.text for u in found] == [*(f"line {n}" for n in range(3000)), "quoted text"]
        assert rejects == {f"m.csv:{2 + n}": "not csv: a quote is not closed" for n in range(bad.count("\n"))}
    path = put(tmp_path / "m.csv", f'audio,text\na.wav,"open\n{good}')
    assert len(read(path)[0]) == 3000
    path = put(tmp_path / "m.csv", b'audio,text\na.wav,"open\n\xff"\na.wav,good\n')
    found, rejects = read(path)
    assert [u.text for u in found] == ["good"]
    assert list(kinds(rejects).values()) == ["not csv", "not UTF-8"]


def test_a_quoted_tsv_of_common_voice_and_a_pipe(tmp_path: Path) -> None:
    put(tmp_path / "clips/a.mp3", 0.1)
    put(tmp_path / "train.tsv", 'path\tsentence\na.mp3\t"""Hello"", he said."\n')
    assert [u.text for u in read(tmp_path)[0]] == ['"Hello", he said.']
    put(tmp_path / "a.wav", 0.1)
    os.mkfifo(tmp_path / "m.tsv")
    writer = subprocess.Popen(
        [sys.executable, "-c", f"open({str(tmp_path / 'm.tsv')!r}, 'w').write('audio\\ttext\\na.wav\\tt\\n')"]
    )
    assert [u.text for u in read(tmp_path / "m.tsv", "manifest")[0]] == ["t"]
    assert writer.wait(20) == 0


# --- tars in any order ---

PARTS = {
    "wav": lambda n: bytes([n]) * 10,
    "json": lambda n: json.dumps({"text": f"json {n}", "speaker": n}),
    "txt": lambda n: f"txt {n}",
}


def orders() -> dict[str, list[tuple[str, bytes | str]]]:
    members = {(n, kind): (f"d/s{n}.{kind}", make(n)) for n in range(4) for kind, make in PARTS.items()}
    by_suffix = [members[n, kind] for kind in ("json", "txt", "wav") for n in range(4)]
    shuffled = list(members.values())
    random.Random(0).shuffle(shuffled)
    return {
        "samples": list(members.values()),
        "suffixes": by_suffix,
        "sounds first": by_suffix[::-1],
        "shuffled": shuffled,
    }


@pytest.mark.parametrize("emilia", [False, True])
@pytest.mark.parametrize("order", list(orders()))
def test_members_in_any_order(tmp_path: Path, order: str, emilia: bool) -> None:
    members = [(name.replace("d/s", "d/A_W" if emilia else "d/s"), data) for name, data in orders()[order]]
    path = make_tar(tmp_path / "t.tar", members)
    found, rejects = read(path)
    assert rejects == {}
    assert sorted((u.text, u.speaker) for u in found) == [(f"txt {n}", str(n)) for n in range(4)]
    for utterance in found:
        data = path.read_bytes()[utterance.audio.offset :][: utterance.audio.size]
        assert data == PARTS["wav"](int(utterance.speaker))
    assert {u.recording for u in found} == ({"d/A"} if emilia else {""})
    if emilia:
        assert [u.id for u in found] == [f"t/d/A_W{n}" for n in range(4)]


def test_true_duplicates_of_members(tmp_path: Path) -> None:
    members = [("a.wav", b"1"), ("a.txt", "t"), ("b.wav", b"2"), ("c.wav", b"3"), ("b.txt", "u"), ("b.wav", b"4")]
    members += [("c.txt", "v"), ("c.txt", "w"), ("d.txt", "alone"), ("e.xyz", b"5"), ("e.txt", "unknown")]
    found, rejects = read(make_tar(tmp_path / "t.tar", members))
    assert [(u.id, u.text) for u in found] == [("t/a", "t"), ("t/b", "u"), ("t/c", "v")]
    assert kinds(rejects) == {
        "t.tar:b.wav": "a second sound",
        "t.tar:c.txt": "a second text",
        "t.tar:d.txt": "no sound file",
        "t.tar:e.xyz": "no sound file",
    }


def test_a_tar_in_an_odd_order_that_is_cut(tmp_path: Path) -> None:
    members = orders()["sounds first"]
    path = make_tar(tmp_path / "t.tar", members)
    whole, everything = path.read_bytes(), {u.id: u for u in read(path)[0]}
    for length in range(0, len(members) * 1024 + 512, 256):
        found, rejects = read(put(path, whole[:length]), "webdataset")
        assert "cut short" in kinds(rejects).values()
        assert all(u.text in (everything[u.id].text, everything[u.id].text.replace("txt", "json")) for u in found)
        assert {u.id for u in found} <= set(everything)
    assert len(found) == 4


def test_names_alone_are_held(tmp_path: Path) -> None:
    import tracemalloc

    count = 2000
    names = [f"s{n}.{kind}" for kind in ("json", "wav") for n in range(count)]
    path = make_tar(
        tmp_path / "t.tar", [(name, '{"text": "' + "x" * 3000 + '"}' if "json" in name else b"1") for name in names]
    )
    tracemalloc.start()
    seen = sum(isinstance(one, Utterance) for one in sources.read(str(path), "auto", tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == count
    assert peak < 3 * 2**20  # the texts are 6 MB


# --- any bytes ---


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["csv", "tsv"]),
    lines=st.lists(
        st.text(st.sampled_from('ab"\t,\n \\é'), max_size=12) | st.just("a.wav\tx") | st.just("a.wav,x"), max_size=12
    ),
)
def test_any_quotes_never_raise_and_keep_good_lines(tmp_path: Path, kind: str, lines: list[str]) -> None:
    put(tmp_path / "a.wav", 0.1)
    separator = "," if kind == "csv" else "\t"
    content = "\n".join([f"audio{separator}text", *lines, f"a.wav{separator}last"])
    found, rejects = read(put(tmp_path / f"m.{kind}", content))
    given_lines = [line for line in content.split("\n")[1:] if line.strip()]
    assert len(found) + len(rejects) <= len(given_lines)
    if '"' not in content:
        assert len(found) + len(rejects) == len(given_lines)
    assert '"' in content or found[-1].text == "last"


@pytest.mark.parametrize("layout", [*WITH_COLUMNS, "audio", "pairs", "librispeech", "ljspeech"])
def test_what_is_prepared_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Some texts and some sounds are there twice: whatever the source, no document is."""

    def spoken(level: float, format: str = "WAV") -> bytes:
        file = io.BytesIO()
        soundfile.write(file, voice(round(40 * level) % 36, 0.4), 24_000, format=format)
        return file.getvalue()

    monkeypatch.setattr(test_sources, "sound_bytes", spoken)
    monkeypatch.setattr(sys.modules[__name__], "sound_bytes", spoken)
    rows = [{"text": f"sentence {number % 15} of all"} for number in range(18)]
    speech = tmp_path / "speech"
    if layout == "emilia":
        source = speech
        for number, row in enumerate(rows):  # of a recording each
            put(speech / f"B{number}_W000000.wav", number / 20)
            put(speech / f"B{number}_W000000.json", json.dumps(row))
    elif layout in WITH_COLUMNS:
        source = table_of(layout, speech, rows)
    else:
        source = speech
        folder = {"librispeech": speech / "1/2", "ljspeech": speech / "wavs"}.get(layout, speech)
        for number, row in enumerate(rows):
            put(folder / f"1-2-{number:04d}.wav", number / 20)
            if layout == "pairs":
                put(folder / f"1-2-{number:04d}.txt", row["text"])
        lines = [(f"1-2-{number:04d}", row["text"]) for number, row in enumerate(rows)]
        if layout == "librispeech":
            put(folder / "1-2.trans.txt", "".join(f"{id} {text}\n" for id, text in lines))
        if layout == "ljspeech":
            put(speech / "metadata.csv", "".join(f"{id}|{text}|{text}\n" for id, text in lines))
    orders = "audio-only" if layout == "audio" else "text-first,audio-only"
    shares = ["prepare.valid_share=0.2", "prepare.test_share=0.2", "prepare.max_rejects=0.5", "prepare.text_pieces=300"]
    settings = [f"run={tmp_path}/run", f"prepare.speech={source}", f"prepare.orders=[{orders}]", "prepare.workers=1"]
    recipe = load_recipe(None, [*settings, *shares])
    summary = prepare(recipe)
    assert summary["utterances"] >= 15
    assert validate(recipe.data_folder)


def test_brackets_that_are_there_and_brackets_that_match(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "[x]" / f"{name}.wav", 0.1)
        put(tmp_path / "x" / f"{name}.wav", 0.1)
    found, _ = read(tmp_path / "[x]" / "[ab].wav", needs_text=False)
    assert [u.audio.path for u in found] == [str(tmp_path / "[x]" / f"{name}.wav") for name in "ab"]
