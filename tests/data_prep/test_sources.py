"""Every layout made small, read back by its bytes; and what is damaged, hostile or too large to hold."""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import sources
from data_prep.utterance import Reject, Utterance
from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError


def read(
    path: Path | str, layout: str = "auto", scratch: Path | None = None, needs_text: bool = True, **options: Any
) -> tuple[list[Utterance], dict[str, str]]:
    found: list[Utterance] = []
    rejects: dict[str, str] = {}
    for one in sources.read(str(path), layout, scratch or Path("/nonexistent"), needs_text, **options):
        if isinstance(one, Utterance):
            found.append(one)
        else:
            assert one.where not in rejects
            rejects[one.where] = one.reason
    return found, rejects


def both(path: Path | str, layout: str, scratch: Path | None = None, needs_text: bool = True) -> list[Utterance]:
    """The same by name and by auto, and not one reject."""
    found, rejects = read(path, layout, scratch, needs_text)
    assert rejects == {}
    assert read(path, "auto", scratch, needs_text) == (found, {})
    return found


def sound_bytes(level: float, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(800, level, np.float32), 16000, format=format)
    return file.getvalue()


def level(sound: Sound) -> float:
    """What sounds there, as a reader of the byte range finds it."""
    data = Path(sound.path).read_bytes()
    if sound.row >= 0:
        value = pq.read_table(sound.path)[sound.column][sound.row].as_py()
        data = value["bytes"]
    elif sound.offset >= 0:
        data = data[sound.offset : sound.offset + sound.size]
    samples, rate = soundfile.read(io.BytesIO(data))
    assert rate == 16000
    assert len(samples) == 800
    return round(float(samples.mean()), 1)


def put(path: Path, content: bytes | str | float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, float):
        content = sound_bytes(content, path.suffix[1:].upper())
    path.write_bytes(content.encode() if isinstance(content, str) else bytes(content))
    return path


# --- manifests ---


def test_columns_and_segments(tmp_path: Path) -> None:
    put(tmp_path / "long.wav", 0.1)
    rows = [
        {"audio_filepath": "long.wav", "transcription": "a", "offset": 1.5, "duration": 2, "lang": "de"},
        {"path": "long.wav", "sentence": "b", "start": "0", "end": "1.25", "client_id": "x", "recording": "r"},
        {"wav": "long.wav", "text": "", "normalized_text": "c", "duration": 0.05, "prompt": "P", "speaker_id": "y"},
        {"audio": "long.wav", "text": "d", "start": 2, "id": "own"},
    ]
    put(tmp_path / "manifest.jsonl", "\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "long.wav")
    assert both(tmp_path, "manifest") == [
        Utterance("long:1.5-3.5", Sound(path, start=1.5, end=3.5), "a", language="de"),
        Utterance("long:0.0-1.25", Sound(path, end=1.25), "b", "x", recording="r"),
        Utterance("long", Sound(path, seconds=0.05), "c", "y", prompt="P"),
        Utterance("own", Sound(path, start=2.0), "d"),
    ]
    bad = [
        {"start": -1},
        {"start": "x"},
        {"start": float("nan")},
        {"end": 1e999},
        {"start": True},
        {"start": [1]},
        {"start": 2, "end": 2},
        {"offset": 1, "duration": 0},
        {"end": 10**400},
    ]
    put(tmp_path / "manifest.jsonl", "\n".join(json.dumps({"audio": "long.wav", "text": "x", **row}) for row in bad))
    found, rejects = read(tmp_path)
    assert found == []
    assert {reason.split(":")[0] for reason in rejects.values()} == {"not a number of seconds", "not a segment"}
    assert len(rejects) == len(bad)


def test_no_text_is_told_where_one_is_needed(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    put(tmp_path / "x.csv", "wav,speaker\na.wav,s\n")
    found = both(tmp_path / "x.csv", "manifest", needs_text=False)
    assert [(u.text, u.prompt, u.speaker) for u in found] == [("", "", "s")]
    put(tmp_path / "x.csv", "wav,text\na.wav,\na.wav\n")
    assert read(tmp_path / "x.csv") == ([], {"x.csv:2": "no transcript", "x.csv:3": "no transcript"})
    assert len(read(tmp_path / "x.csv", needs_text=False)[0]) == 2
    put(tmp_path / "x.jsonl", '{"wav": "a.wav"}\n{"wav": "a.wav", "text": ""}\n{"wav": "a.wav", "text": "t"}\n')
    assert len(read(tmp_path / "x.jsonl", needs_text=False)[0]) == 3
    found, rejects = read(tmp_path / "x.jsonl")
    assert ([u.text for u in found], set(rejects)) == (["t"], {"x.jsonl:1", "x.jsonl:2"})


def test_sounds_alone_are_a_layout(tmp_path: Path) -> None:
    put(tmp_path / "b/two.flac", 0.2)
    put(tmp_path / "one.wav", 0.1)
    put(tmp_path / "notes.pdf", b"x")
    put(tmp_path / ".hidden.wav", 0.3)
    found = both(tmp_path, "audio", needs_text=False)
    assert [(u.id, level(u.audio), u.text) for u in found] == [("one", 0.1, ""), ("b/two", 0.2, "")]
    assert [u.id for u in both(tmp_path / "one.wav", "audio", needs_text=False)] == ["one"]
    assert read(tmp_path) == ([], {"one.wav": "no transcript", "b/two.flac": "no transcript"})
    # One sound with its text beside it, and it is another layout.
    put(tmp_path / "b/two.txt", "two")
    assert read(tmp_path) == read(tmp_path, "pairs")
    assert [(u.id, u.text) for u in read(tmp_path, needs_text=False)[0]] == [("one", ""), ("b/two", "two")]


@pytest.mark.parametrize("layout", ["pairs", "emilia", "librispeech"])
def test_sounds_without_text_in_layouts_of_text(tmp_path: Path, layout: str) -> None:
    suffix, beside, text = {
        "pairs": (".wav", "A_W1.txt", "said"),
        "emilia": (".mp3", "A_W1.json", '{"text": "said"}'),
        "librispeech": (".flac", "A.trans.txt", "A_W1 said"),
    }[layout]
    for name in ("A_W1", "A_W2"):
        put(tmp_path / f"{name}{suffix}", sound_bytes(0.1))
    put(tmp_path / beside, text)
    found, rejects = read(tmp_path)
    assert [u.text for u in found] == ["said"]
    assert [(where, reason.split(":")[0]) for where, reason in rejects.items()] == [(f"A_W2{suffix}", "no transcript")]
    assert [(u.id, u.text) for u in both(tmp_path, layout, needs_text=False)] == [("A_W1", "said"), ("A_W2", "")]


def test_several_manifests_in_order_with_ids_of_their_own(tmp_path: Path) -> None:
    for name in ("b/train.jsonl", "a/x/dev.jsonl", "a/dev.jsonl"):
        put(tmp_path / "data" / Path(name).parent / "s.wav", 0.1)
        put(
            tmp_path / "data" / name, '{"audio": "s.wav", "text": "t"}\n{"audio": "s.wav", "text": "t", "id": "own"}\n{'
        )
    found, rejects = read(tmp_path / "data/**/*.jsonl")
    assert [u.id for u in found] == ["a/dev:s", "own", "a/x/dev:s", "own", "b/train:s", "own"]
    assert list(rejects) == ["a/dev.jsonl:3", "a/x/dev.jsonl:3", "b/train.jsonl:3"]
    assert read(tmp_path / "data/**/*.jsonl") == (found, rejects)


def test_a_folder_of_folders_with_manifests(tmp_path: Path) -> None:
    for name in ("de", "en"):
        put(tmp_path / name / "wavs/s.wav", 0.1)
        put(tmp_path / name / "manifest.csv.gz", gzip.compress(b"audio,text\nwavs/s.wav,t\n"))
    assert [u.id for u in both(tmp_path, "manifest")] == ["de/manifest:wavs/s", "en/manifest:wavs/s"]


def test_gz_cut_short(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    lines = [json.dumps({"audio": "a.wav", "text": f"{number**7}", "id": str(number)}) for number in range(3000)]
    packed = gzip.compress("\n".join(lines).encode())
    path = put(tmp_path / "m.jsonl.gz", packed[: len(packed) // 2])
    found, rejects = read(path)
    assert 500 < len(found) < 2500
    assert [u.id for u in found] == [str(number) for number in range(len(found))]
    assert rejects == {f"m.jsonl.gz:{len(found) + 1}": "cut short: the .gz file ends too early"}
    put(path, packed)
    assert len(read(path)[0]) == 3000
    put(path, b"no gzip at all")
    assert read(path)[1]["m.jsonl.gz:1"].startswith("damaged:")


def test_the_first_comes_before_the_rest_is_there(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", 0.1)
    os.mkfifo(tmp_path / "m.jsonl")
    first_came = threading.Event()
    was_early: list[bool] = []

    def write() -> None:
        with open(tmp_path / "m.jsonl", "wb", buffering=0) as file:
            file.write(b'{"audio": "a.wav", "text": "1"}\n{"audio": "a.w')
            was_early.append(first_came.wait(20))
            file.write(b'av", "text": "2"}\n')

    writer = threading.Thread(target=write)
    writer.start()
    stream = sources.read(str(tmp_path / "m.jsonl"), "manifest", tmp_path)
    assert getattr(next(stream), "text", None) == "1"
    first_came.set()
    assert [getattr(one, "text", None) for one in stream] == ["2"]
    writer.join()
    assert was_early == [True]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_long_manifests_are_not_held(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "a.wav", 0.1)
    count, text = 40_000, "some words that are said " * 40
    path = tmp_path / f"m.{kind}"
    if kind == "csv":
        path.write_text("audio,text\n" + f"a.wav,{text}\n" * count)
    else:
        pq.write_table(pa.table({"audio": ["a.wav"] * count, "text": [text] * count}), path)
    stream = sources.read(str(path), "auto", tmp_path)
    seen, resident = 0, []
    for seen, one in enumerate(stream, start=1):
        assert isinstance(one, Utterance)
        if seen % 5_000 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert seen == count
    assert max(resident) - resident[0] < 30 * 2**20  # held, they would be over 50 MB


def test_parquet(tmp_path: Path) -> None:
    held = [{"bytes": sound_bytes(0.1), "path": "x/a.wav"}, {"bytes": sound_bytes(0.2), "path": None}]
    apart = [{"bytes": None, "path": "c.wav"}, {"bytes": None, "path": "none.wav"}]
    put(tmp_path / "c.wav", 0.3)
    table = pa.table(
        {
            "audio": [*held, *apart, held[0], apart[0], None],
            "sentence": list("abcdefg"),
            "speaker_id": [1, 2, 3, 4, 5, 6, 7],
        }
    )
    path = tmp_path / "m.parquet"
    pq.write_table(table, path, row_group_size=2)  # with, without, and both
    found, rejects = read(path)
    assert [(u.id, u.text, u.speaker, level(u.audio), u.audio.name) for u in found] == [
        ("m:0", "a", "1", 0.1, "a.wav"),
        ("m:1", "b", "2", 0.2, ""),
        ("c", "c", "3", 0.3, ""),
        ("m:4", "e", "5", 0.1, "a.wav"),
        ("c", "f", "6", 0.3, ""),
    ]
    assert rejects == {"m.parquet:3": "no file: 'none.wav'", "m.parquet:6": "no 'audio'"}
    # Packed, it is unpacked once.
    put(tmp_path / "m.parquet.gz", gzip.compress(path.read_bytes()))
    scratch = tmp_path / "scratch"
    assert len(read(tmp_path / "m.parquet.gz", "auto", scratch)[0]) == 5
    assert [file.suffix for file in scratch.iterdir()] == [".parquet"]


def test_bytes_of_parquet_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = pa.table({"audio": [{"bytes": os.urandom(10_000), "path": "a"}] * 20, "id": list("abcdefghijklmnopqrst")})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.path_in_schema == "audio.bytes"
    whole = bytearray(path.read_bytes())
    begin, size = column.data_page_offset, column.total_compressed_size
    whole[begin : begin + size] = b"\xff" * size  # whoever reads these pages fails
    put(path, bytes(whole))
    with pytest.raises(OSError, match=r"."):
        pq.read_table(path)
    assert "".join(u.id for u in both(path, "manifest", needs_text=False)) == "abcdefghijklmnopqrst"


def test_parquet_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"sound": ["a"], "text": ["b"]}), path)
    with pytest.raises(
        SodaError, match=r"m.parquet: has the columns sound, text. Wanted: one of audio, audio_filepath"
    ):
        read(path)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-20], bytes(1000)):
        put(path, content)
        found, rejects = read(path)
        assert found == []
        assert rejects["m.parquet"].startswith("not Parquet: or it is cut short")


# --- corpora in folders ---


def test_librispeech(tmp_path: Path) -> None:
    folder = tmp_path / "dev-clean/84/121123"
    put(tmp_path / "README.TXT", "x")
    for number in range(3):
        put(folder / f"84-121123-000{number}.flac", 0.1)
    put(folder / "84-121123.trans.txt", "84-121123-0000 GO  ON\n84-121123-0001 YES\n84-121123-0009 GONE\nbad\n")
    found, rejects = read(tmp_path)
    assert found == read(tmp_path, "librispeech")[0]
    assert [(u.id, u.text, u.speaker, u.language, u.recording) for u in found] == [
        ("dev-clean/84/121123/84-121123-0000", "GO ON", "84", "en", ""),
        ("dev-clean/84/121123/84-121123-0001", "YES", "84", "en", ""),
    ]
    assert level(found[0].audio) == 0.1
    assert {where.rpartition("/")[2]: reason.split(":")[0] for where, reason in rejects.items()} == {
        "84-121123.trans.txt:3": "no file",
        "84-121123.trans.txt:4": "no file",
        "84-121123-0002.flac": "no transcript",
    }


def test_ljspeech(tmp_path: Path) -> None:
    put(tmp_path / "wavs/LJ001-0001.wav", 0.1)
    put(tmp_path / "wavs/LJ001-0002.wav", 0.2)
    put(tmp_path / "metadata.csv", 'LJ001-0001|He said "1, 2|He said one two\nLJ001-0002||spelled out\n')
    found = both(tmp_path, "ljspeech")
    assert [(u.id, u.text, level(u.audio)) for u in found] == [
        ("wavs/LJ001-0001", 'He said "1, 2', 0.1),
        ("wavs/LJ001-0002", "spelled out", 0.2),
    ]
    assert both(tmp_path / "metadata.csv", "ljspeech") == found
    put(tmp_path / "metadata.csv", "LJ001-0001\nLJ9|gone\n../x|out\n|a||\n")
    assert [reason.split(":")[0] for reason in read(tmp_path)[1].values()] == [
        "not 'ID|TEXT|NORMALIZED TEXT'",
        "no file",
        "no file",
        "not 'ID|TEXT|NORMALIZED TEXT'",
    ]


def test_commonvoice(tmp_path: Path) -> None:
    header = "client_id\tpath\tsentence\tup_votes\tlocale\n"
    for language in ("de", "en"):
        folder = tmp_path / "cv" / language
        put(folder / "clips/c1.mp3", 0.1)
        put(folder / "clips/c2.mp3", 0.2)
        put(folder / "train.tsv", f"{header}s\tc1.mp3\tTrain\t2\t{language}\n")
        put(folder / "other.tsv", f"{header}s\tc2.mp3\tOther\t2\t{language}\n")
        if language == "en":
            put(folder / "validated.tsv", f'{header}s1\tc1.mp3\t"Quoted" and "open\t2\ten\ns2\tgone.mp3\tx\t0\ten\n')
    found, rejects = read(tmp_path / "cv")
    assert [(u.id, u.text, u.speaker, u.language) for u in found] == [
        ("de/clips/c1", "Train", "s", "de"),
        ("en/clips/c1", '"Quoted" and "open', "s1", "en"),
    ]
    assert rejects == {"en/validated.tsv:3": "no file: 'clips/gone.mp3'"}
    assert [u.text for u in both(tmp_path / "cv/*/other.tsv", "commonvoice")] == ["Other", "Other"]
    (tmp_path / "cv/de/train.tsv").unlink()
    assert "de/clips" in read(tmp_path / "cv", "commonvoice")[1]


def emilia_json(text: str) -> str:
    return json.dumps(
        {"id": "?", "wav": "elsewhere.mp3", "text": text, "speaker": "S", "language": "en", "duration": 1.5}
    )


def test_emilia(tmp_path: Path) -> None:
    names = ["EN_B0_S1_W10", "EN_B0_S1_W9", "EN_B0_S10_W0", "EN_B0_S1_W2"]
    for name in names:
        put(tmp_path / "f" / f"{name}.mp3", 0.1)
        put(tmp_path / "f" / f"{name}.json", emilia_json(name))
    found = both(tmp_path, "emilia")
    assert [(u.id, u.recording, u.speaker, u.language) for u in found] == [
        ("f/EN_B0_S1_W2", "f/EN_B0_S1", "S", "en"),
        ("f/EN_B0_S1_W9", "f/EN_B0_S1", "S", "en"),
        ("f/EN_B0_S1_W10", "f/EN_B0_S1", "S", "en"),
        ("f/EN_B0_S10_W0", "f/EN_B0_S10", "S", "en"),
    ]
    assert found[0].audio == Sound(str(tmp_path / "f/EN_B0_S1_W2.mp3"))
    put(tmp_path / "f/EN_B0_S1_W2.json", "[]")
    (tmp_path / "f/EN_B0_S1_W9.json").unlink()
    (tmp_path / "f/EN_B0_S1_W10.mp3").unlink()
    assert {where: reason.split(":")[0] for where, reason in read(tmp_path)[1].items()} == {
        "f/EN_B0_S1_W2.mp3": "not a JSON object",
        "f/EN_B0_S1_W9.mp3": "no transcript",
        "f/EN_B0_S1_W10.json": "no sound file",
    }

    members = [
        (f"{name}.{kind}", b"x" if kind == "mp3" else emilia_json(name)) for name in names for kind in ("json", "mp3")
    ]
    make_tar(tmp_path / "t/EN-0.tar", members)
    found = both(tmp_path / "t", "emilia")
    assert [(u.id, u.recording) for u in found] == [
        ("EN-0/EN_B0_S1_W2", "EN_B0_S1"),
        ("EN-0/EN_B0_S1_W9", "EN_B0_S1"),
        ("EN-0/EN_B0_S1_W10", "EN_B0_S1"),
        ("EN-0/EN_B0_S10_W0", "EN_B0_S10"),
    ]


def test_pairs_named_by_a_glob(tmp_path: Path) -> None:
    for name in ("b/x", "a/x", "a/y"):
        put(tmp_path / f"{name}.wav", 0.1)
        put(tmp_path / f"{name}.txt", name)
    assert [u.id for u in both(tmp_path / "*/x.wav", "pairs")] == ["a/x", "b/x"]
    assert [u.id for u in both(tmp_path, "pairs")] == ["a/x", "a/y", "b/x"]
    put(tmp_path / "a/notes.md", "x")
    assert read(tmp_path / "a/*")[1] == {"notes.md": "not a known layout"}
    assert list(read(tmp_path / "a/*", "pairs")[1]) == ["notes.md"]


def test_links_that_go_round_end(tmp_path: Path) -> None:
    put(tmp_path / "a/x.wav", 0.1)
    put(tmp_path / "a/x.txt", "x")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [u.id for u in both(tmp_path, "pairs")] == ["a/x", "b/x"]


# --- tars ---


def make_tar(
    path: Path, members: list[tuple[str, bytes | str]], change: Callable[[tarfile.TarInfo], object] = id
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            member.size = len(data)
            change(member)
            tar.addfile(member, io.BytesIO(data))
    return path


SAMPLES: list[tuple[str, bytes | str]] = [
    ("./d/a.flac", sound_bytes(0.1, "FLAC")),
    (
        "./d/a.json",
        json.dumps({"transcript": "one", "speaker_id": 7, "lang": "en", "start": 5, "end": 6, "audio": "?"}),
    ),
    ("./d/b.c.wav", sound_bytes(0.2)),
    ("./d/b.txt", " two\n"),
    ("./d/b.cls", "0"),
    ("._e.wav", "resource fork"),
    ("e.txt", "three"),
    ("e.json", '{"text": "other", "speaker": "s"}'),
    ("e.mp3", b"mp3"),
]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_webdataset(tmp_path: Path, suffix: str) -> None:
    for number in range(2):
        make_tar(tmp_path / f"data/x/t-{number}{suffix}", SAMPLES)
    scratch = tmp_path / "scratch"
    found = both(tmp_path / "data", "webdataset", scratch)
    assert [(u.id, u.text, u.speaker, u.language, u.audio.name) for u in found[:3]] == [
        ("x/t-0/d/a", "one", "7", "en", "a.flac"),
        ("x/t-0/d/b", "two", "", "", "b.c.wav"),
        ("x/t-0/e", "three", "s", "", "e.mp3"),
    ]
    assert [u.id for u in found[3:]] == ["x/t-1/d/a", "x/t-1/d/b", "x/t-1/e"]
    assert [level(u.audio) for u in found[:2]] == [0.1, 0.2]
    assert all(u.audio.start == u.audio.end == 0 for u in found)
    assert both(tmp_path / f"data/**/*{suffix}", "webdataset", scratch)[2].id == "x/t-0/e"
    if suffix != ".tar":
        before = {file: file.stat().st_mtime_ns for file in scratch.iterdir()}
        shutil.rmtree(scratch)
        both(tmp_path / "data", "webdataset", scratch)
        assert {file: file.stat().st_mtime_ns for file in scratch.iterdir()} == before  # so nothing is encoded again
        assert sorted(file.suffix for file in scratch.iterdir()) == [".tar", ".tar"]
        assert {u.audio.path for u in found} == {str(file) for file in scratch.iterdir()}


def test_tar_of_sounds_alone(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar", [("x.wav", b"1"), ("y.wav", b"2"), ("z.wav", b"3"), ("z.txt", "t"), ("w.wav", b"4")]
    )
    found, rejects = read(path, needs_text=False)
    # A sound alone may have its text later on: it comes when the tar has been seen.
    assert ([u.id for u in found], [u.text for u in found]) == (["a/z", "a/x", "a/y", "a/w"], ["t", "", "", ""])
    assert rejects == {}
    found, rejects = read(path)
    assert [u.text for u in found] == ["t"]
    assert rejects == dict.fromkeys(("a.tar:x.wav", "a.tar:y.wav", "a.tar:w.wav"), "no transcript")


def test_hostile_tar(tmp_path: Path) -> None:
    kinds = {
        "link.wav": tarfile.SYMTYPE,
        "hard.wav": tarfile.LNKTYPE,
        "dev.wav": tarfile.CHRTYPE,
        "fifo.wav": tarfile.FIFOTYPE,
    }

    def change(member: tarfile.TarInfo) -> None:
        if member.name in kinds:
            member.type, member.linkname, member.size = kinds[member.name], "/etc/passwd", 0

    bad = ["../a.wav", "/b.wav", "x/../../c.wav", *kinds]
    members: list[tuple[str, bytes | str]] = [(name, b"x") for name in bad]
    members += [("bad.wav", b"x"), ("bad.json", "{"), ("bad2.wav", b"x"), ("bad2.txt", b"\xff"), ("alone.txt", "x")]
    members += [
        ("two.wav", b"x"),
        ("two.flac", b"x"),
        ("two.txt", "two"),
        ("odd.wav", b"x"),
        ("odd.json", '{"text": 7}'),
    ]
    path = make_tar(tmp_path / "t.tar", members, change)
    found, rejects = read(path)
    assert [(u.id, u.text) for u in found] == [("t/two", "two")]
    assert {where.removeprefix("t.tar:"): reason.split(":")[0] for where, reason in rejects.items()} == {
        **dict.fromkeys(bad, "unsafe member"),
        "bad.wav": "not JSON",
        "bad2.wav": "not UTF-8",
        "alone.txt": "no sound file",
        "two.flac": "a second sound",
        "odd.wav": "wrong type",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["t.tar"]


def test_tar_cut_at_every_place(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = []
    for number in range(4):
        members += [(f"s{number}.wav", bytes([number]) * 700), (f"s{number}.txt", f"text {number}")]
    path = make_tar(tmp_path / "t.tar", members)
    whole = path.read_bytes()
    everything, _ = read(path)
    seen: set[int] = set()
    for length in range(0, 4 * 2560 + 512, 128):
        put(path, whole[:length])
        found, rejects = read(path, "webdataset")
        # Not one without its text, and all whose text's bytes are there.
        assert found == everything[: len(found)]
        assert len(found) == sum(length >= number * 2560 + 2048 + 6 for number in range(4))
        assert [reason.split(":")[0] for reason in rejects.values()] == ["cut short"]
        seen.add(len(found))
    assert seen == {0, 1, 2, 3, 4}
    put(path, whole[:2560] + b"\x01" * 512 + whole[2560 + 512 :])
    found, rejects = read(path)
    assert found == everything[:1]
    assert list(rejects) == ["t.tar"]
    packed = gzip.compress(whole, 0)
    put(tmp_path / "p.tar.gz", packed[: len(packed) // 3])
    found, rejects = read(tmp_path / "p.tar.gz", "auto", tmp_path / "scratch")
    assert 0 < len(found) < 4
    assert rejects["p.tar.gz"].startswith("cut short:")
    put(tmp_path / "p.tar.gz", b"no gzip")
    assert read(tmp_path / "p.tar.gz", "auto", tmp_path / "scratch")[1]["p.tar.gz"].startswith("damaged:")


def test_a_tar_of_many_members_is_not_held(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "t.tar", [(f"s{number}.{kind}", "x") for number in range(3000) for kind in ("wav", "txt")]
    )
    tracemalloc.start()
    seen = sum(isinstance(one, Utterance) for one in sources.read(str(path), "auto", tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 3000
    assert peak < 2**20


# --- Hugging Face datasets ---


def save_to_disk(folder: Path, table: pa.Table, shards: int = 2, options: pa.ipc.IpcWriteOptions | None = None) -> None:
    """As datasets' save_to_disk does."""
    folder.mkdir(parents=True)
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    rows = -(-table.num_rows // shards)
    for shard, name in enumerate(names):
        with pa.ipc.new_stream(folder / name, table.schema, options=options) as stream:
            stream.write_table(table.slice(shard * rows, rows).combine_chunks(), max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def dataset(count: int = 7) -> pa.Table:
    audio = [{"bytes": sound_bytes(number / 10), "path": f"s{number}.wav"} for number in range(count)]
    return pa.table({"audio": audio, "text": [f"text {n}" for n in range(count)], "speaker_id": list(range(count))})


@pytest.mark.parametrize("large", [False, True])
def test_saved_dataset(tmp_path: Path, large: bool) -> None:
    table = dataset()
    if large:
        kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
        table = table.set_column(0, "audio", table["audio"].cast(kind))
    save_to_disk(tmp_path / "d", table)
    found = both(tmp_path / "d", "hf")
    assert [(u.text, u.speaker, u.audio.name, level(u.audio)) for u in found] == [
        (f"text {n}", str(n), f"s{n}.wav", n / 10) for n in range(7)
    ]
    assert [u.id for u in found][3:5] == ["data-00000-of-00002:3", "data-00001-of-00002:0"]
    assert all(u.audio.offset > 0 and u.audio.row == -1 for u in found)
    assert both(tmp_path / "d/*.arrow", "hf") == found


def test_saved_dataset_dict(tmp_path: Path) -> None:
    table = dataset(3)
    for split in ("train", "test", "left-over"):
        save_to_disk(tmp_path / split, table.append_column("id", pa.array(list("abc"))))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "gone"]}')
    found, rejects = read(tmp_path)
    assert [u.id for u in found] == [f"{split}/{n}" for split in ("train", "test") for n in "abc"]
    assert [level(u.audio) for u in found] == [0.0, 0.1, 0.2] * 2
    assert rejects == {"gone": "no such split"}
    (tmp_path / "test/data-00001-of-00002.arrow").unlink()
    assert "test/data-00001-of-00002.arrow" in read(tmp_path)[1]
    (tmp_path / "dataset_dict.json").write_text("[]")
    with pytest.raises(SodaError, match=r"not what datasets.save_to_disk writes"):
        read(tmp_path)


def test_saved_dataset_with_paths(tmp_path: Path) -> None:
    outside = put(tmp_path / "elsewhere/a.wav", 0.4)
    held = [
        {"bytes": None, "path": str(outside)},
        {"bytes": None, "path": "no.wav"},
        {"bytes": b"x", "path": None},
        None,
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    save_to_disk(tmp_path / "d", pa.table({"audio": pa.array(held, kind), "text": list("abcd")}), shards=1)
    found, rejects = read(tmp_path / "d")
    assert [u.text for u in found] == ["a", "c"]
    assert found[0].audio == Sound(str(outside))
    assert found[1].audio.size == 1
    assert [reason.split(":")[0] for reason in rejects.values()] == ["no file", "no 'audio'"]


def test_saved_dataset_compressed_or_damaged(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "c", dataset(), 1, pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(SodaError, match=r"arrow: its buffers are compressed"):
        read(tmp_path / "c")
    save_to_disk(tmp_path / "w", dataset().drop_columns("audio"), 1)
    with pytest.raises(SodaError, match="has the columns text, speaker_id"):
        read(tmp_path / "w")
    save_to_disk(tmp_path / "d", dataset(), 1)
    path = tmp_path / "d/data-00000-of-00001.arrow"
    whole = path.read_bytes()
    found, _ = read(tmp_path / "d")
    for length in range(0, len(whole), 97):
        put(path, whole[:length])
        some, rejects = read(tmp_path / "d")
        assert some == found[: len(some)]
        assert len(rejects) == 1
    put(path, whole[:-8])
    assert read(tmp_path / "d") == (found, {f"{path.name}:7": "cut short: the Arrow stream has no end"})
    # Damaged anywhere: no crash, and no range outside the file.
    generator = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[generator.randrange(2000)] = generator.randrange(256)
        put(path, bytes(damaged))
        try:
            some, _ = read(tmp_path / "d")
        except SodaError:
            continue
        assert all(
            0 <= u.audio.offset <= u.audio.offset + u.audio.size <= len(whole) for u in some if u.audio.size >= 0
        )


def test_parquet_shards_as_on_the_hub(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(dataset(2), tmp_path / f"train-{number:05d}-of-00002.parquet")
    (tmp_path / "README.md").write_text("x")
    found = both(tmp_path, "hf")
    assert [u.id for u in found] == [f"train-0000{shard}-of-00002:{row}" for shard in range(2) for row in range(2)]
    assert [level(u.audio) for u in found] == [0.0, 0.1] * 2


# --- any bytes ---


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        [
            "m.jsonl",
            "m.jsonl.gz",
            "m.tsv",
            "m.parquet",
            "t.tar",
            "t.tgz",
            "a.arrow",
            "1-2.trans.txt",
            "x.json",
            "metadata.csv",
        ]
    ),
    content=st.binary(max_size=2000) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    layout=st.sampled_from(sources.LAYOUTS),
    damage=st.integers(0, 4000),
)
def test_any_bytes_never_raise(tmp_path: Path, name: str, content: bytes, layout: str, damage: int) -> None:
    folder = tmp_path / "any"
    for old in folder.rglob("*.*"):
        old.unlink()
    put(folder / "x.mp3", b"x")
    if name == "t.tar":  # garbage inside a tar goes deeper than garbage instead of one
        whole = bytearray(make_tar(folder / name, SAMPLES).read_bytes())
        whole[damage : damage + len(content)] = content
        content = bytes(whole)
    path = put(folder / name, content)
    for given_path in (path, folder):
        with contextlib.suppress(SodaError):
            for one in sources.read(str(given_path), layout, tmp_path / "scratch"):
                assert isinstance(one, Utterance | Reject)
                if isinstance(one, Utterance) and one.audio.offset >= 0:
                    assert one.audio.offset + one.audio.size <= Path(one.audio.path).stat().st_size
