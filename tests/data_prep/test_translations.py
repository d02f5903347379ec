"""Parallel corpora: CVSS-T, CoVoST 2 and manifests of pairs; what is incomplete is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_prep import asterisk, interleave, sources
from data_prep.documents import of_units, plan_documents
from data_prep.encode import encode_jobs, encode_shard
from data_prep.index import make_index
from data_prep.utterance import Reject, Utterance
from megatron_soda.audio.sound import Sound
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.data.units import read_shard
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import TextTokenizer, write_byte_tokenizer
from tests.exported import FakeCodec


def sound(path: Path, level: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(4000, level), 8000, format="WAV")


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """Common Voice: three clips, of which the third has no transcript."""
    folder = tmp_path / "cv/es"
    lines = ["client_id\tpath\tsentence\tlocale"]
    for number, text in enumerate(('Dijo "no".', "Dos   perros", "")):
        sound(folder / f"clips/common_voice_es_{number}.mp3")
        lines.append(f"speaker{number}\tcommon_voice_es_{number}.mp3\t{text}\tes")
    (folder / "validated.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def cvss(tmp_path: Path) -> Path:
    folder = tmp_path / "cvss"
    for split, numbers in {"train": (1, 0), "dev": (2,), "test": (7,)}.items():
        for number in numbers:
            sound(folder / f"{split}/common_voice_es_{number}.mp3.wav")
        lines = [f"common_voice_es_{number}.mp3\ttranslation {number}\n" for number in numbers]
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder


def read(path: Path, layout: str, audio_root: Path | str = "") -> tuple[list[Utterance], list[Reject]]:
    everything = list(sources.read(str(path), layout, path.parent / "scratch", audio_root=str(audio_root)))
    found = [one for one in everything if isinstance(one, Utterance)]
    return found, [one for one in everything if isinstance(one, Reject)]


def test_cvss(cvss: Path, voice: Path) -> None:
    found, rejects = read(cvss, "cvss", voice)

    def pair(number: int, text: str) -> list[Utterance]:
        name = f"common_voice_es_{number}"
        source, target = Sound(str(voice / f"clips/{name}.mp3")), Sound(str(cvss / f"train/{name}.mp3.wav"))
        who = f"speaker{number}"
        return [
            Utterance(name, source, text, who, "es", recording=name),
            Utterance(f"{name}:en", target, f"translation {number}", who, "en", recording=name),
        ]

    assert found == [*pair(0, 'Dijo "no".'), *pair(1, "Dos perros")]
    assert [(one.where, one.reason.split(":")[0]) for one in rejects] == [
        ("dev.tsv:1", "no transcript"),
        ("test.tsv:1", "no source"),
    ]
    only, _ = read(cvss / "dev.tsv", "cvss", voice)
    assert only == []


def test_a_line_of_cvss_that_cannot_be_used_is_a_reject(cvss: Path, voice: Path) -> None:
    (cvss / "train/common_voice_es_0.mp3.wav").unlink()
    with (cvss / "train.tsv").open("a") as file:
        file.write("\nno tab\ncommon_voice_es_1.mp3\tagain\nother_3.mp3\tx\n")
    with (voice / "validated.tsv").open("a") as file:
        file.write("s\tother_3.mp3\ty\tes\n")
    found, rejects = read(cvss, "cvss", voice)
    assert [one.id for one in found] == ["common_voice_es_1", "common_voice_es_1:en"]
    reasons = {one.where: one.reason for one in rejects}
    assert reasons["train.tsv:2"] == "no file: 'common_voice_es_0.mp3.wav'"
    assert reasons["train.tsv:4"] == "not 'NAME<tab>TEXT'"
    assert reasons["train.tsv:5"] == "duplicate id: 'common_voice_es_1.mp3'"
    assert reasons["train.tsv:6"] == "not a clip of Common Voice: 'other_3.mp3'"


INCOMPLETE = {
    "dev's sound": lambda cvss, voice: [path.unlink() for path in (cvss / "dev").iterdir()] and (cvss / "dev").rmdir(),
    "dev's table": lambda cvss, voice: (cvss / "dev.tsv").unlink(),
    "transcripts": lambda cvss, voice: (voice / "validated.tsv").unlink(),
    "clips": lambda cvss, voice: (voice / "clips").rename(voice / "others"),
}
SAYS = {
    "dev's sound": r"cvss/dev: no such folder; dev\.tsv names the recordings in it",
    "dev's table": r"cvss/dev\.tsv: no such file\. CVSS-T has train\.tsv",
    "transcripts": r"es/validated\.tsv: not there\. A folder of Common Voice has",
    "clips": r"es/clips: not there\. A folder of Common Voice has",
}


@pytest.mark.parametrize("part", INCOMPLETE)
def test_an_incomplete_corpus_is_refused_by_name(cvss: Path, voice: Path, part: str) -> None:
    INCOMPLETE[part](cvss, voice)
    with pytest.raises(SodaError, match=SAYS[part]):
        read(cvss, "cvss", voice)


def test_cvss_needs_the_sources(cvss: Path) -> None:
    with pytest.raises(SodaError, match=r"layout cvss: .* set prepare\.audio_root to its folder"):
        read(cvss, "cvss")


def test_covost(voice: Path) -> None:
    table = voice / "covost_v2.es_de.tsv"
    lines = [
        "path\ttranslation\tsplit",
        'common_voice_es_1.mp3\tZwei "Hunde\\\tund\\\\oder\ttrain',
        "common_voice_es_0.mp3\tzu wenig",
        "common_voice_es_1.mp3\tnoch einmal\ttest",
        "common_voice_es_9.mp3\tfehlt\ttest",
    ]
    table.write_text("\n".join(lines) + "\n")
    for place, root in ((table, ""), (voice, ""), (table, voice)):
        found, rejects = read(place, "covost", root)
        assert [(u.id, u.text, u.language, u.audio.path) for u in found] == [
            ("common_voice_es_1", "Dos perros", "es", str(voice / "clips/common_voice_es_1.mp3")),
            ("common_voice_es_1:de", 'Zwei "Hunde und\\oder', "de", ""),
        ]
        assert {one.where.split(":")[1]: one.reason.split(":")[0] for one in rejects} == {
            "3": "wrong number of cells",
            "4": "duplicate id",
            "5": "no source",
        }


def test_covost_that_is_none_is_refused(voice: Path) -> None:
    with pytest.raises(SodaError, match=r"es: no covost_v2\.SOURCE_TARGET\.tsv in it"):
        read(voice, "covost")
    with pytest.raises(SodaError, match=r"validated\.tsv: CoVoST 2's tables are called"):
        read(voice / "validated.tsv", "covost")
    (voice / "covost_v2.es_en.tsv").write_text("client_id\tsentence\n")
    with pytest.raises(SodaError, match=r"es_en\.tsv: its first line must name the columns path and translation"):
        read(voice, "covost")


def pairs_in(folder: Path) -> Path:
    rows = [
        {"audio": "a.wav", "text": "uno", "language": "es", "translation": "one", "translation_language": "en"},
        {"audio": "b.wav", "text": "two", "language": "en", "translation": "dos", "translation_language": "es"},
        {"audio": "c.wav", "text": "tres", "language": "es", "translation_language": "en"},
        {"audio": "d.wav", "text": "cuatro", "language": "es", "translation": "four"},
    ]
    rows[1] |= {"translation_audio": "b-es.wav", "speaker": "ann", "prompt": "2"}
    for name in ("a", "b", "b-es", "c", "d"):
        sound(folder / f"{name}.wav")
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_manifests_of_pairs(tmp_path: Path) -> None:
    folder = pairs_in(tmp_path / "pairs")
    found, rejects = read(folder, "parallel")
    a, b, other = (Sound(str(folder / f"{name}.wav")) for name in ("a", "b", "b-es"))
    assert found == [
        Utterance("a-en", a, "uno", "", "es", recording="a-en"),
        Utterance("a-en:en", Sound(""), "one", "", "en", recording="a-en"),
        Utterance("b-es", b, "two", "ann", "en", "2", "b-es"),
        Utterance("b-es:es", other, "dos", "ann", "es", "2", "b-es"),
    ]
    assert [(one.where, one.reason) for one in rejects] == [
        ("manifest.jsonl:3", "no transcript: of the translation"),
        ("manifest.jsonl:4", "no language: of the translation"),
    ]
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(SodaError, match=r"pairs: has no manifest; a folder of pairs has one manifest\.jsonl"):
        read(folder, "parallel")


def test_a_source_in_several_languages_and_several_manifests(tmp_path: Path) -> None:
    for part in ("one", "two"):
        row = {"audio": "a.wav", "text": "uno", "language": "es"}
        rows = [{**row, "translation": word, "translation_language": to} for to, word in (("en", "one"), ("fr", "un"))]
        sound(tmp_path / part / "a.wav")
        (tmp_path / part / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    everything = list(sources.read(str(tmp_path / "*/manifest.jsonl"), "parallel", tmp_path / "scratch"))
    assert all(isinstance(one, Utterance) for one in everything)
    ids = [one.id for one in everything if isinstance(one, Utterance)]
    assert len(set(ids)) == len(ids) == 8
    recordings = [one.recording for one in everything if isinstance(one, Utterance)]
    assert all(recordings.count(recording) == 2 for recording in recordings)


def test_a_line_that_is_no_table_is_rejected(tmp_path: Path, voice: Path) -> None:
    table = tmp_path / "covost_v2.es_en.tsv"
    lines = [
        "path\ttranslation\tsplit",
        "common_voice_es_0.mp3\tone\rtwo\ttrain",
        "common_voice_es_1.mp3\tTwo dogs\ttrain",
    ]
    table.write_bytes(("\n".join(lines) + "\n").encode())
    found, rejects = read(table, "covost", voice)
    assert [one.text for one in found] == ["Dos perros", "Two dogs"]
    assert any("not tsv" in one.reason for one in rejects)


def test_pairs_become_the_papers_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the index and the codec: a translation without sound is a document that ends with its text."""
    monkeypatch.setattr("data_prep.encode.load_codec", lambda **_: FakeCodec())
    found, _ = read(pairs_in(tmp_path / "pairs"), "parallel")
    index = make_index(iter(found), tmp_path / "index", shard_size=9, reject=lambda reject: pytest.fail(str(reject)))
    codec = CodecDescription.of(FakeCodec(), {"spec": "embedded", "path": str(tmp_path)})
    (job,) = encode_jobs(index.shards, tmp_path, codec, decoder="soundfile", trim=False)
    assert encode_shard(job) == 0
    rows, codes = read_shard(job.out)
    assert [(row.id, row.heard, row.seconds) for row in rows] == [
        ("a-en", True, 0.5),
        ("a-en:en", False, 0.0),
        ("b-es", True, 0.5),
        ("b-es:es", True, 0.5),
    ]
    write_byte_tokenizer(tmp_path / "t.json")
    tokenizer = TextTokenizer(tmp_path / "t.json")
    space = tokenizer.space(4, 16)
    made = []
    for item in of_units(rows, codes, "0000", ["translation"], tokenizer, space, {}):
        assert not isinstance(item, Reject)
        made.append(item[1])

    def text(said: str) -> list[int]:
        return [space.text_start, *tokenizer.encode(said), space.text_end]

    def audio(row: int) -> list[int]:
        some = codes[rows[row].start : rows[row].end]
        return [space.audio_start, *space.audio_ids(some), space.audio_end]

    es, en = "<language>es</language>", "<language>en</language>"
    assert [ids.tolist() for ids in made] == [
        [space.bos, *audio(0), *text(f"{es}uno"), *text(f"{en}one"), space.eos],
        [space.bos, *audio(2), *text(f"{en}two"), *text(f"{es}dos"), *audio(3), space.eos],
    ]
    assert all(space.check(ids) is None for ids in made)


def test_a_sound_is_encoded_once_however_often_it_occurs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    class Counting(FakeCodec):
        def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
            encoded.append(len(waves))
            return super().encode(waves)

    monkeypatch.setattr("data_prep.encode.load_codec", lambda **_: Counting())
    rng = np.random.default_rng(0)
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", rng.uniform(-0.1 - 0.1 * i, 0.1 + 0.1 * i, 6000 + 2000 * i), 16000)
    (tmp_path / "2.wav").write_bytes(b"no sound")
    used = [0, 1, 1, 2, 0, 2]
    some = [Utterance(f"u{n}", Sound(str(tmp_path / f"{i}.wav")), f"text {n}") for n, i in enumerate(used)]
    index = make_index(iter(some), tmp_path / "index", shard_size=9, reject=lambda reject: pytest.fail(str(reject)))
    codec = CodecDescription.of(FakeCodec(), {"spec": "embedded", "path": str(tmp_path)})
    (job,) = encode_jobs(index.shards, tmp_path, codec, decoder="soundfile", trim=False)
    assert encode_shard(job) == 2
    assert sum(encoded) == 2
    rows, codes = read_shard(job.out)
    assert [row.id for row in rows] == ["u0", "u1", "u2", "u4"]
    found = [codes[row.start : row.end].tolist() for row in rows]
    assert found[0] == found[3] != found[1] == found[2]
    assert [row.seconds for row in rows] == [0.375, 0.5, 0.5, 0.375]


def test_what_has_no_sound_is_only_translated() -> None:
    source, target = (
        Utterance(name, Sound(path), name, language=language, recording="r")
        for name, path, language in (("uno", "a.wav", "es"), ("one", "", "en"))
    )
    planned = list(plan_documents([source, target], ["text-first", "audio-only", "translation"]))
    assert [(one.order, [u.id for u in one.spoken]) for one in planned if not isinstance(one, Reject)] == [
        ("text-first", ["uno"]),
        ("audio-only", ["uno"]),
        ("translation", ["uno", "one"]),
    ]
    with pytest.raises(interleave.CannotPlan, match="no codes: of the source"):
        interleave.ORDERS["translation"]([target, source])


def test_every_two_languages_of_a_free_prompt_are_pairs() -> None:
    some = [Utterance(f"{lang}/{p}", Sound(f"{lang}{p}"), p, "s", lang, p) for lang in ("en", "es", "fr") for p in "ab"]
    found = list(asterisk.pairs(some[:-1]))
    assert [one.id for one in found[:4]] == ["en-es/a/en", "en-es/a/es", "en-fr/a/en", "en-fr/a/fr"]
    both = [(one.recording, other.recording) for one, other in zip(found[::2], found[1::2], strict=True)]
    assert all(one == other for one, other in both)
    assert sorted(one for one, _ in both if one.endswith("b")) == ["en-es/b", "es-en/b"]
    assert len({one.id for one in found}) == len(found) == 2 * (6 + 2)
    assert {one.prompt for one in found} == {"a", "b"}
