"""Manifests and the Asterisk prompts: every bad input is a counted reject or a clear SodaError."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import asterisk, inputs, sources
from data_prep.utterance import Reject, Utterance, prompt_key
from megatron_soda.audio.sound import Sound
from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError


def reasons(rejects: list[Reject]) -> dict[str, str]:
    return {reject.where: reject.reason for reject in rejects}


def read(path: Path, layout: str = "auto") -> tuple[list[Utterance], list[Reject]]:
    everything = list(sources.read(str(path), layout, path.parent / "scratch"))
    found = [one for one in everything if isinstance(one, Utterance)]
    return found, [one for one in everything if isinstance(one, Reject)]


# --- prompt keys ---


def test_prompt_key() -> None:
    assert prompt_key("  Hello,\n WORLD! ", "id") == "hello world"
    assert prompt_key("Straße — ¿qué?", "id") == "strasse qué"
    assert prompt_key("नमस्ते।", "id") == "नमस्ते"  # vowel signs are no punctuation
    assert prompt_key("...", "id") == "id"


@given(st.text())
def test_prompt_key_is_stable(text: str) -> None:
    key = prompt_key(text, "id")
    assert key
    assert key == " ".join(key.split())
    assert prompt_key(f" {text} .", "id") == key


# --- manifests ---


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    (folder / "wavs").mkdir(parents=True)
    for name in ("a.wav", "b.flac", "c d.ogg"):
        soundfile.write(folder / "wavs" / name, np.full(2400, 0.1), 24000)
    soundfile.write(tmp_path / "outside.wav", np.zeros(2400), 24000)
    return folder


GOOD = [
    {"audio": "wavs/a.wav", "text": "Hello,  World.", "speaker": "anna", "language": "en", "id": "first"},
    {"audio": "wavs/b.flac", "text": "Да."},
    {"audio": "./wavs/../wavs/c d.ogg", "text": 'He said "no", twice.', "speaker": None},
]


def check_good(folder: Path, found: list[Utterance]) -> None:
    assert found == [
        Utterance("first", Sound(str(folder / "wavs/a.wav")), "Hello, World.", "anna", "en"),
        Utterance("wavs/b", Sound(str(folder / "wavs/b.flac")), "Да."),
        Utterance("wavs/c d", Sound(str(folder / "wavs/c d.ogg")), 'He said "no", twice.'),
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_good_manifests(speech: Path, kind: str, newline: str, bom: bytes) -> None:
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in GOOD]
    else:
        names = ["audio", "text", "speaker", "language", "id"]
        cells = [["Audio", *names[1:]], *([row.get(name) or "" for name in names] for row in GOOD)]
        if kind == "csv":
            cells = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
        lines = [("," if kind == "csv" else "\t").join(row) for row in cells]
    path = speech / f"manifest.{kind}"
    path.write_bytes(bom + (newline.join(lines) + newline * 2).encode())
    for given_path in (speech, path):
        found, rejects = read(given_path)
        check_good(speech, found)
        assert rejects == []


def test_every_bad_json_line_is_a_reject(speech: Path) -> None:
    lines: list[tuple[bytes, str]] = [
        (b"{broken", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "no audio"}', "no 'audio'"),
        (b'{"audio": "", "text": "no audio"}', "no 'audio'"),
        (b'{"audio": "wavs/none.wav", "text": "x"}', "no file"),
        (b'{"audio": "wavs", "text": "a folder"}', "no file"),
        (b'{"audio": "../outside.wav", "text": "x"}', "outside"),
        (b'{"audio": "wavs/../../outside.wav", "text": "x"}', "outside"),
        (json.dumps({"audio": str(speech.parent / "outside.wav"), "text": "x"}).encode(), "outside"),
        (b'{"audio": "wavs/b.flac", "text": "\xff\xfe"}', "not UTF-8"),
        (b'{"audio": 7, "text": "x"}', "audio: a string is needed"),
        (b'{"audio": "wavs/b.flac", "text": ["x"]}', "text: a string is needed"),
        (b'{"audio": "wavs/b.flac", "text": "x", "speaker": true}', "speaker: a string is needed"),
        (b'{"audio": "wavs/b.flac", "text": "x", "id": 3.5}', "id: a string is needed"),
        (b'{"audio": "wavs/b.flac"}', "no transcript"),
        (b'{"audio": "wavs/b.flac", "text": null}', "no transcript"),
        (b'{"audio": "wavs/b.flac", "text": " \\n "}', "no transcript"),
        (b'{"audio": "a\\u0000b", "text": "x"}', "not a path"),
        (b'{"audio": "wavs/b.flac", "text": "\\ud800"}', "not valid Unicode"),
        (b'{"audio": "' + b"x" * 5000 + b'", "text": "x"}', "name too long"),
    ]
    good = b'{"audio": "wavs/a.wav", "text": "good"}'
    (speech / "manifest.jsonl").write_bytes(b"\n".join([good, *(line for line, _ in lines)]))
    found, rejects = read(speech)
    assert [utterance.id for utterance in found] == ["wavs/a"]
    assert [reject.where for reject in rejects] == [f"manifest.jsonl:{n}" for n in range(2, len(lines) + 2)]
    for reject, (line, expected) in zip(rejects, lines, strict=True):
        assert expected.lower() in reject.reason.lower(), line[:80]


def test_bad_csv_and_tsv_lines(speech: Path) -> None:
    (speech / "manifest.csv").write_bytes(
        b"audio,text\nwavs/a.wav,Good.\nwavs/b.flac,Hello, there\nwavs/b.flac,\nwavs/b.flac\n"
        b'wavs/b.flac,"open\nwavs/b.flac,"x" y\nwavs/b.flac,\xe9\n,x\n\nwavs/b.flac, "Good, too"\n'
    )
    found, rejects = read(speech)
    assert [utterance.text for utterance in found] == ["Good.", "Good, too"]
    by_line = reasons(rejects)
    assert list(by_line) == [f"manifest.csv:{n}" for n in range(3, 10)]
    assert "wrong number of cells: 3 cells for 2 columns" in by_line["manifest.csv:3"]
    assert by_line["manifest.csv:4"] == by_line["manifest.csv:5"] == "no transcript"
    assert "not csv" in by_line["manifest.csv:6"]
    assert "not csv" in by_line["manifest.csv:7"]
    assert by_line["manifest.csv:8"] == "not UTF-8"
    assert by_line["manifest.csv:9"] == "no 'audio'"

    (speech / "manifest.csv").rename(speech / "other.csv")
    (speech / "manifest.tsv").write_text('audio\ttext\nwavs/a.wav\t"Quoted," she said\nwavs/b.flac\tx\ty\n')
    found, rejects = read(speech)
    assert [utterance.text for utterance in found] == ['"Quoted," she said']
    assert len(rejects) == 1


def test_absolute_paths_inside_and_links(speech: Path) -> None:
    linked = speech.parent / "linked"
    linked.symlink_to(speech)
    (speech / "wavs/link.wav").symlink_to(speech.parent / "outside.wav")
    rows = [str(speech / "wavs/a.wav"), str(linked / "wavs/b.flac"), "wavs/link.wav"]
    (speech / "manifest.jsonl").write_text("".join(json.dumps({"audio": r, "text": "x"}) + "\n" for r in rows))
    found, rejects = read(linked)
    assert [utterance.id for utterance in found] == ["wavs/a", "wavs/b", "wavs/link"]
    assert rejects == []


def test_text_files_beside_sound_files(speech: Path) -> None:
    (speech / "wavs/a.txt").write_bytes(b"\xef\xbb\xbfGood\nmorning.\n")
    (speech / "wavs/b.txt").write_bytes(b"\xff")
    (speech / "wavs/._a.wav").write_bytes(b"a resource fork")
    soundfile.write(speech / "wavs/a.flac", np.zeros(100), 24000)
    found, rejects = read(speech)
    assert found == [
        Utterance("wavs/a", Sound(str(speech / "wavs/a.flac")), "Good morning."),
        Utterance("wavs/a", Sound(str(speech / "wavs/a.wav")), "Good morning."),
    ]
    assert reasons(rejects) == {
        "wavs/b.flac": "not UTF-8: b.txt",
        "wavs/c d.ogg": "no transcript: c d.txt is not there",
    }


def test_nothing_usable(speech: Path, tmp_path: Path) -> None:
    def message(path: Path, layout: str = "auto") -> str:
        with pytest.raises(SodaError) as caught:
            read(path, layout)
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    text = message(tmp_path / "empty")
    for part in ("manifest.jsonl", "manifest.csv", "manifest.tsv", "X.txt beside X.wav", '{"audio": "wavs/a.wav"'):
        assert part in text
    assert reasons(read(speech, "pairs")[1])["wavs/a.wav"] == "no transcript: a.txt is not there"
    (speech / "manifest.jsonl").write_text('{"audio": "none.wav", "text": "x"}\n')
    assert read(speech) == ([], [Reject("manifest.jsonl:1", "no file: 'none.wav'")])
    (speech / "manifest.jsonl").write_bytes(b"")
    assert read(speech) == ([], [])
    (speech / "manifest.csv").write_text("sound,text\nwavs/a.wav,x\n")
    assert "keep one" in message(speech)
    assert "must name the columns" in message(speech / "manifest.csv")
    assert "ends in .jsonl, .csv or .tsv" in message(speech / "wavs/a.wav", "manifest")
    (speech / "manifest.csv").write_text("audio,text\nwavs/a.wav,x\n", encoding="utf-16")
    assert "must name the columns" in message(speech / "manifest.csv")
    assert "there is no such layout" in message(speech, "kaldi")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["jsonl", "csv", "tsv"]),
    lines=st.lists(
        st.binary(max_size=60)
        | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
        | st.dictionaries(
            st.sampled_from(["audio", "text", "id", "speaker"]),
            st.none() | st.integers() | st.sampled_from(["wavs/a.wav", "wavs/b.flac", "../outside.wav"]) | st.text(),
        ).map(lambda row: json.dumps(row).encode()),
        max_size=8,
    ),
)
def test_any_bytes_give_utterances_rejects_or_soda_error(speech: Path, kind: str, lines: list[bytes]) -> None:
    path = speech / f"manifest.{kind}"
    header = [b"audio,text" if kind == "csv" else b"audio\ttext"] * (kind != "jsonl")
    content = b"\n".join(header + lines)
    path.write_bytes(content)
    try:
        found, rejects = read(path)
    except SodaError:
        return
    # Every line that is not blank is one or the other.
    given_lines = [line for line in content.split(b"\n")[len(header) :] if not is_blank(line)]
    if kind != "csv" or b'"' not in content:  # where a cell may go on over lines
        assert len(found) + len(rejects) == len(given_lines)
    for utterance in found:
        assert utterance.text or kind == "jsonl"  # without any text column there is none
        assert Path(utterance.audio.path).is_relative_to(speech)


def is_blank(line: bytes) -> bool:
    try:
        return not line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return False


# --- Asterisk prompts, with stand-ins for apt-get and dpkg-deb: no network, no Debian ---

COPYRIGHT = """Format: x
Source: somewhere

Files: *
Copyright: 2003, Allison
License: CC-BY-SA-3.0

Files: it-*
Copyright: 2012, Carlo
License: CC-BY-3.0
"""
# A "package" is JSON: {path in the package: latin-1 content}; the stand-in for dpkg-deb writes them out.
DPKG_DEB = """
import json, os, sys
_, option, package, folder = sys.argv
assert option == "-x"
for name, content in json.load(open(package)).items():
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").write(content.encode("latin-1"))
"""
APT_GET = """
import os, shutil, sys
here = os.path.dirname(sys.argv[0])
open(here + "/log", "a").write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists(here + "/fail-" + sys.argv[1]):
    sys.exit("E: " + open(here + "/fail-" + sys.argv[1]).read())
if sys.argv[1] == "download":
    if os.path.exists(here + "/needs-lists") and not any("Dir::State::lists" in a for a in sys.argv):
        sys.exit("E: Unable to locate package")
    name = next(a for a in sys.argv[2:] if not a.startswith("-"))
    file = next((f for f in os.listdir(here) if f.startswith(name + "_")), None)
    if file is None:
        sys.exit("E: Unable to locate package")
    shutil.copy(here + "/" + file, file)
"""


class Archive:
    """Small packages, and the folder of stand-in programs that serves them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name, code in (("apt-get", APT_GET), ("dpkg-deb", DPKG_DEB)):
            (folder / name).write_text(f"#!{sys.executable}\n{code}")
            (folder / name).chmod(0o755)
        sounds = "usr/share/asterisk/sounds"
        for language, voice in (("en", "en_US_f_Allison"), ("it", "it_IT_m_Carlo")):
            name = f"asterisk-core-sounds-{language}"
            document = f"usr/share/doc/{name}"
            lines = (
                "\ufeff; a comment\n\nhello: Hello\u00e8:  there.\ndigits/1: One.\ndigits/1: Two.\nbeep: [a tone]\n"
                "letters/dash: dash [-]\nspace: <space>\nnone: (nothing)\nempty:\ngone: Gone.\nno colon\n"
            )
            text = gzip.compress(lines.encode(), mtime=0).decode("latin-1")
            files = {f"{document}/copyright": COPYRIGHT, f"{document}/core-sounds-{language}.txt.gz": text}
            self.add(name, "1.6.1-1", files)
            prompts = ("hello", "digits/1", "beep", "letters/dash", "space", "none", "empty", "unknown")
            audio = {f"{sounds}/{voice}/{prompt}.g722": "\x00" * 800 for prompt in prompts}
            self.add(f"{name}-g722", "1.6.1-1", audio)
        glosses = (
            "  1 This software: a licence line\n"
            '0001 n | a thing; "It is a thing."; "Two  spaces"- Author  \n0002 n | a thing; "It is a thing."\n'
        )
        words = {f"usr/share/wordnet/data.{part}": glosses for part in ("noun", "verb", "adj", "adv")}
        words["usr/share/doc/wordnet-base/copyright"] = "WordNet licence"
        self.words = words
        self.add("wordnet-base", "1:3.0-37", words)
        contents: dict[str, str] = {}
        for package in folder.glob("*.deb"):
            name = package.name.partition("_")[0]
            subprocess.run([folder / "dpkg-deb", "-x", package, folder / "unpacked" / name], check=True)
            contents[name] = asterisk._content(name, folder / "unpacked" / name)
        monkeypatch.setattr(asterisk, "CONTENT", contents)
        monkeypatch.setenv("PATH", str(folder))

    def add(self, name: str, version: str, files: dict[str, str]) -> None:
        """Puts this version in the place of any other."""
        for other in self.folder.glob(f"{name}_*.deb"):
            other.unlink()
        (self.folder / f"{name}_{version.replace(':', '%3a')}_all.deb").write_text(json.dumps(files))

    def calls(self) -> list[str]:
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    return Archive(tmp_path / "archive", monkeypatch)


def failure(folder: Path, languages: list[str]) -> str:
    with pytest.raises(SodaError) as caught:
        asterisk.fetch(folder, languages)
    assert list(folder.rglob("*.tmp")) == list(folder.rglob("*.part")) == []
    return str(caught.value)


def test_fetch_and_read(archive: Archive, tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    asterisk.fetch(folder, ["en", "it", "en"])
    found, rejects = asterisk.read(folder, ["it", "en"])
    assert [u.id for u in found[:3]] == ["it/digits/1", "it/hello", "it/letters/dash"]
    assert [u.id for u in found[3:]] == ["en/digits/1", "en/hello", "en/letters/dash"]
    assert {(u.speaker, u.language) for u in found} == {("Carlo", "it"), ("Allison", "en")}
    assert [(u.prompt, u.text) for u in found[:3]] == [
        ("digits/1", "One."),
        ("hello", "Helloè: there."),
        ("letters/dash", "dash"),
    ]
    assert all(Path(u.audio.path).is_file() for u in found)
    assert reasons([reject for reject in rejects if reject.where.startswith(("en/", "core-sounds-en"))]) == {
        "core-sounds-en.txt:5": "a second line: digits/1",
        "core-sounds-en.txt:12": "not 'id: text'",
        "en/beep": "no speech: [a tone]",
        "en/empty": "no transcript",
        "en/none": "no speech: (nothing)",
        "en/space": "no speech: <space>",
        "en/unknown": "no transcript",
        "en/gone": "no audio",
    }
    notice = (folder / "ATTRIBUTION.md").read_text()
    for part in ("Source: somewhere", "Allison", "CC-BY-SA-3.0", "Carlo", "CC-BY-3.0"):
        assert part in notice


def test_fetch_goes_on_where_it_was(archive: Archive, tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    asterisk.fetch(folder, ["en"])
    assert len(archive.calls()) == 2
    asterisk.fetch(folder, ["en"])
    assert archive.calls() == []
    # Interrupted while unpacking: no stamp. The packages are there.
    (folder / "en" / asterisk.STAMP).unlink()
    with pytest.raises(SodaError, match="fetch them first"):
        asterisk.read(folder, ["en"])
    asterisk.fetch(folder, ["en"])
    assert archive.calls() == []
    # A sound file is gone, and a package is damaged: that one is downloaded again.
    next((folder / "en").rglob("hello.g722")).unlink()
    (folder / "packages/asterisk-core-sounds-en-g722_1.6.1-1_all.deb").write_bytes(b"half")
    asterisk.fetch(folder, ["en"])
    assert len(archive.calls()) == 1
    assert len(asterisk.read(folder, ["en"])[0]) == 3
    # One that was cut short is found too, though there are as many as before, and so is the list of texts.
    for name in ("hello.g722", "core-sounds-en.txt.gz"):
        cut = next((folder / "en").rglob(name))
        whole = cut.read_bytes()
        cut.write_bytes(whole[:-1])
        with pytest.raises(SodaError, match="incomplete"):
            asterisk.read(folder, ["en"])
        asterisk.fetch(folder, ["en"])
        assert cut.read_bytes() == whole
    # The notice names every language that is there, also those of earlier calls.
    asterisk.fetch(folder, ["it"])
    assert "## en" in (folder / "ATTRIBUTION.md").read_text()


def test_a_wrong_package_is_refused(archive: Archive, tmp_path: Path) -> None:
    archive.add("asterisk-core-sounds-en", "1.6.1-1", {"usr/evil": "x"})
    message = failure(tmp_path / "speech", ["en"])
    assert "asterisk-core-sounds-en_1.6.1-1_all.deb: holds different files" in message
    assert "--speech DIR" in message
    assert not (tmp_path / "speech/en/usr").exists()
    assert not list((tmp_path / "speech").rglob("*.deb"))


@pytest.mark.parametrize("version", ["1.6.1-1build1", "1.6.1-2"])
def test_another_version_with_the_same_files_is_taken(archive: Archive, tmp_path: Path, version: str) -> None:
    """Another distribution's build: the transcript is zipped at another time, the changelog is another."""
    name = "asterisk-core-sounds-en"
    text = f"usr/share/doc/{name}/core-sounds-en.txt.gz"
    unpacked = archive.folder / "unpacked" / name
    again = gzip.compress(gzip.decompress((unpacked / text).read_bytes()), mtime=7).decode("latin-1")
    files = {text: again, f"usr/share/doc/{name}/copyright": COPYRIGHT, f"usr/share/doc/{name}/changelog": "other"}
    archive.add(name, version, files)
    asterisk.fetch(tmp_path / "speech", ["en"])
    assert len(asterisk.read(tmp_path / "speech", ["en"])[0]) == 3
    assert f"## en: {name}_{version}_all.deb, {name}-g722_1.6.1-1_all.deb" in (
        tmp_path / "speech/ATTRIBUTION.md"
    ).read_text(encoding="utf-8")


def test_old_lists_are_replaced_by_our_own(archive: Archive, tmp_path: Path) -> None:
    (archive.folder / "needs-lists").touch()
    folder = tmp_path / "with space"
    asterisk.fetch(folder, ["en"])
    calls = archive.calls()
    assert [call.split()[0] for call in calls] == ["download", "update", "download", "download"]
    assert f"-oDir::State::lists={folder}/apt/lists" in calls[1]
    assert not (folder / "apt").exists()


def test_no_network(archive: Archive, tmp_path: Path) -> None:
    (archive.folder / "fail-download").write_text("Unable to locate package asterisk")
    (archive.folder / "fail-update").write_text("Could not resolve host")
    message = failure(tmp_path / "speech", ["en"])
    for part in ("Unable to locate", "Could not resolve", "a network?", "--speech DIR"):
        assert part in message
    (archive.folder / "fail-update").unlink()
    message = failure(tmp_path / "speech", ["en"])
    assert "Unable to locate" in message
    assert "None of this system's apt sources has it" in message
    assert "a network?" not in message


@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb"])
def test_missing_programs(archive: Archive, tmp_path: Path, program: str) -> None:
    (archive.folder / program).unlink()
    message = failure(tmp_path / "speech", ["en"])
    assert message.startswith(f"{program} is not installed on this machine")
    assert "--speech DIR" in message


def test_other_failures(archive: Archive, tmp_path: Path) -> None:
    assert "en, es, fr, it, ru" in failure(tmp_path / "speech", ["en", "xx"])
    assert "(none)" in failure(tmp_path / "speech", [])
    (tmp_path / "file").touch()
    assert "cannot be made" in failure(tmp_path / "file", ["en"])
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    said = f"{tmp_path}/link is a link to {tmp_path}/gone, which does not exist"
    assert said in failure(tmp_path / "link" / "asterisk", ["en"])
    (archive.folder / "dpkg-deb").write_text(f"#!{sys.executable}\nimport sys; sys.exit('no space left on device')")
    assert "no space left on device" in failure(tmp_path / "speech", ["en"])
    with pytest.raises(SodaError, match="missing or incomplete"):
        asterisk.read(tmp_path / "speech", ["en"])


def test_damaged_transcripts(archive: Archive, tmp_path: Path) -> None:
    asterisk.fetch(tmp_path, ["en"])
    packed = next(tmp_path.rglob("core-sounds-en.txt.gz"))
    size = packed.stat().st_size
    packed.write_bytes(b"\x1f\x8bhalf".ljust(size, b"\0"))
    with pytest.raises(SodaError, match="fetch it again"):
        asterisk.read(tmp_path, ["en"])
    packed.write_bytes(b"\x1f\x8bhalf")  # cut short is seen at once, and fetching mends it
    with pytest.raises(SodaError, match="incomplete; fetch them first"):
        asterisk.read(tmp_path, ["en"])
    asterisk.fetch(tmp_path, ["en"])
    assert asterisk.read(tmp_path, ["en"])[0]


def test_text(archive: Archive, tmp_path: Path) -> None:
    (path,) = asterisk.fetch_text(tmp_path)
    assert sorted(path.read_text(encoding="utf-8").splitlines()) == ["It is a thing.", "Two spaces", "a thing"]
    assert "WordNet licence" in (tmp_path / "wordnet-LICENSE.txt").read_text()
    assert not (tmp_path / "wordnet").exists()
    assert len(archive.calls()) == 1
    assert asterisk.fetch_text(tmp_path) == [path]
    assert archive.calls() == []


def test_text_of_another_version(archive: Archive, tmp_path: Path) -> None:
    archive.add("wordnet-base", "1:3.0-39", {**archive.words, "usr/share/doc/wordnet-base/changelog": "3.0-39"})
    (path,) = asterisk.fetch_text(tmp_path)
    assert "It is a thing." in path.read_text(encoding="utf-8")
    archive.add("wordnet-base", "1:3.1-1", {**archive.words, "usr/share/wordnet/data.noun": "0001 n | another"})
    with pytest.raises(SodaError, match=r"wordnet-base_1%3a3\.1-1_all\.deb: holds different files") as caught:
        asterisk.fetch_text(tmp_path / "other")
    assert "--speech" not in str(caught.value)


def test_speech_does_without_text_that_cannot_be_fetched(archive: Archive, tmp_path: Path, capsys) -> None:
    """And says so: on the terminal, and as a reject, which the summary and the page show. Text alone is an error."""
    next(archive.folder.glob("wordnet-base_*.deb")).unlink()
    recipe = load_recipe(None, ["prepare.text=[wordnet]", f"prepare.downloads={tmp_path}"])
    patterns, rejects = inputs._text_patterns(recipe)
    assert patterns == []
    assert [(r.where, r.reason) for r in rejects] == [
        ("prepare.text: wordnet", "text not downloaded, so the speech is prepared without it")
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert "without WordNet's text: wordnet-base: apt-get could not download it" in said
    assert "None of this system's apt sources has it" in said
    recipe.prepare.speech = ""
    with pytest.raises(SodaError, match="wordnet-base"):
        inputs._text_patterns(recipe)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30)), st.integers(0, 100))
def test_sentences(glosses: list[str], limit: int) -> None:
    lines = asterisk._sentences(glosses, limit)
    assert lines == asterisk._sentences(glosses[::-1], limit)
    assert len(set(lines)) == len(lines)
    assert sum(len(line.encode()) + 1 for line in lines) <= limit
    assert all(line and line == " ".join(line.split()) for line in lines)


def test_importing_needs_neither_torch_nor_a_network() -> None:
    code = (
        "import sys, socket\n"
        "class Refuse(socket.socket):\n"
        "    def __init__(self, *_, **__): raise SystemExit('a socket was opened')\n"
        "socket.socket = Refuse\n"
        "import data_prep.asterisk, megatron_soda.audio.reading, data_prep.sources, data_prep.texts\n"
        "sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
