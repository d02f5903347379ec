"""From a folder of sound to stores: the same bytes every time, everything bad counted, nothing done twice."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from data_prep import choose, encode
from data_prep.inputs import files
from data_prep.prepare import prepare
from data_prep.utterance import Utterance
from megatron_soda.audio.sound import Sound
from megatron_soda.codecs import load_codec
from megatron_soda.codecs.description import load_data_codec
from megatron_soda.codecs.embedded import EmbeddedCodec
from megatron_soda.config import Recipe, load_recipe
from megatron_soda.data.compact import SUFFIXES
from megatron_soda.data.convert import convert_stores
from megatron_soda.data.store import Store
from megatron_soda.data.units import read_units
from megatron_soda.data.validate import validate
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import data_tokenizer, train_sentencepiece, write_byte_tokenizer
from tests.codecs.test_codecs import mimi_folder  # noqa: F401  a fixture
from tests.test_tokenizer import SENTENCES
from tests.voices import RATE, WORDS, voice, write_speech


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


def recipe(run: Path, speech: Path, *overrides: str) -> Recipe:
    some = ["prepare.text_pieces=300", "prepare.workers=1", "prepare.valid_share=0.2", "prepare.test_share=0.2"]
    return load_recipe(None, [f"run={run}", f"prepare.speech={speech}", "prepare.shard_size=3", *some, *overrides])


@pytest.fixture(scope="module")
def prepared(speech, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    prepare(recipe(run, speech))
    return run / "data"


def stores(folder: Path) -> dict[str, bytes]:
    return {
        f"{s}.{x}": (folder / f"{s}.{x}").read_bytes()
        for s in ("train", "valid", "test")
        for x in ("bin", "idx", "json")
    }


def times(folder: Path) -> dict[Path, int]:
    """When the files that are kept were written; the index is made anew every time."""
    kept = (p for p in folder.rglob("*") if p.is_file() and "work" not in p.parts and p.name != ".lock")
    return {p: p.stat().st_mtime_ns for p in kept}


def test_stores_hold_every_utterance_in_both_orders(prepared, speech):
    assert validate(prepared)
    rows = list(read_units(sorted((prepared / "units").rglob("*.parquet"))))
    assert len(rows) == 12
    text = data_tokenizer(prepared)
    found = []
    for side in ("train", "valid", "test"):
        store = Store(prepared / side)
        space = store.space
        for i in range(len(store)):
            ids = store.document(i)
            first = "text" if ids[1] == space.text_start else "audio"
            start, end = (int(np.flatnonzero(ids == m)[0]) for m in (space.text_start, space.text_end))
            codes = space.codes(ids[(ids >= space.audio_base)])
            found.append((text.decode(ids[start + 1 : end]), first, codes.tobytes(), side))
    expected = {(r["text"], order, r["codes"].tobytes()) for r in rows for order in ("text", "audio")}
    assert {f[:3] for f in found} == expected
    assert len(found) == 24
    for row in rows:
        assert len({side for t, _, _, side in found if t == row["text"]}) == 1  # both orders on one side
        wave, _ = soundfile.read(row["audio"])
        assert row["codes"].shape == (-(-len(wave) // 1920), 8)


def test_codes_are_the_codecs(prepared):
    codec = load_data_codec(prepared)
    row = next(read_units(sorted((prepared / "units").rglob("*.parquet"))))
    wave = soundfile.read(row["audio"], dtype="float32")[0]
    assert np.array_equal(codec.encode([wave])[0], row["codes"])


def test_workers_and_interruptions_change_no_byte(prepared, speech, tmp_path, monkeypatch):
    prepare(recipe(tmp_path / "two", speech, "prepare.workers=2"))
    assert stores(tmp_path / "two" / "data") == stores(prepared)

    original, calls = encode.encode_shard, []

    def interrupted(job):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return spied(job)

    def spied(job):
        calls.append(job.out)
        return original(job)

    monkeypatch.setattr(encode, "encode_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe(tmp_path / "cut", speech))
    monkeypatch.setattr(encode, "encode_shard", spied)
    prepare(recipe(tmp_path / "cut", speech))
    assert len(calls) == len(set(calls)) == 4  # no shard twice
    assert stores(tmp_path / "cut" / "data") == stores(prepared)


def test_a_second_run_does_nothing_and_a_change_does(speech, tmp_path, monkeypatch, capsys):
    copy = Path(shutil.copytree(speech, tmp_path / "speech"))
    run = tmp_path / "run"
    first = prepare(recipe(run, copy))
    before = times(run / "data")
    assert prepare(recipe(run, copy)) == first
    assert times(run / "data") == before
    assert "nothing to do" in capsys.readouterr().err
    soundfile.write(copy / "clip_000.wav", voice(99, 1.0), RATE)
    assert prepare(recipe(run, copy))["tokens"] != first["tokens"]
    whole = stores(run / "data")
    for name, content in (("train.bin", b""), ("prepare.json", b"[]"), ("prepare.json", b"{"), ("codec.json", b"{")):
        (run / "data" / name).write_bytes(content)
        prepare(recipe(run, copy))
        assert stores(run / "data") == whole
    assert "train.bin" in capsys.readouterr().err.replace("\n", "")


def test_what_is_not_of_this_preparation_is_made_again(speech, tmp_path, capsys):
    """Files of the right name and form, but of other content: skipping goes by what they are."""
    settings = recipe(tmp_path, speech)
    prepare(settings)
    data = tmp_path / "data"
    before = stores(data)
    prepare(recipe(tmp_path / "other", speech, "seed=5"))
    other = tmp_path / "other" / "data"

    def tries(change) -> str:
        capsys.readouterr()
        change()
        prepare(settings)
        assert stores(data) == before
        assert validate(data)
        return "".join(capsys.readouterr().err.split())  # the terminal breaks lines

    assert before["train.bin"] != (other / "train.bin").read_bytes()
    assert "nothingtodo" in tries(lambda: None)
    for suffix in ("bin", "idx", "json"):
        shutil.copy(other / f"train.{suffix}", data / f"train.{suffix}")
    assert "train:astorefromanotherpreparation" in tries(lambda: None)

    def swap_sides():
        for suffix in ("bin", "idx", "json"):
            a, b = data / f"valid.{suffix}", data / f"test.{suffix}"
            one, two = a.read_bytes(), b.read_bytes()
            a.write_bytes(two)
            b.write_bytes(one)

    assert "astorefromanotherpreparation" in tries(swap_sides)
    assert "valid.parquet:missing" in tries((data / "valid.parquet").unlink)
    shutil.copy(data / "test.parquet", data / "kept")
    assert "test.parquet:missing" in tries(lambda: shutil.copy(data / "valid.parquet", data / "test.parquet"))
    assert (data / "test.parquet").read_bytes() == (data / "kept").read_bytes()
    tries(lambda: train_sentencepiece(data / "text_tokenizer.model", SENTENCES, 310))
    tries(lambda: (data / "prepare.json").write_text("[]"))
    tries(lambda: (data / "text_tokenizer.key").write_bytes(b"\xff"))


def test_another_run_that_was_killed_does_not_pass_for_this_one(speech, tmp_path, monkeypatch):
    prepare(recipe(tmp_path, speech))
    whole = stores(tmp_path / "data")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.stores._held_out", killed)  # after train and valid
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(tmp_path, speech, "seed=5"))
    assert stores(tmp_path / "data") != whole
    (tmp_path / "data" / ".train.bin.1.tmp").write_bytes(b"left by a kill")
    prepare(recipe(tmp_path, speech))
    assert stores(tmp_path / "data") == whole
    assert not list((tmp_path / "data").glob(".*.tmp"))


def test_a_tokenizer_of_the_run_itself(prepared, speech, tmp_path):
    prepare(recipe(tmp_path, speech))
    before = stores(tmp_path / "data")
    prepare(recipe(tmp_path, speech, f"prepare.tokenizer={tmp_path}/data/text_tokenizer.model"))
    assert stores(tmp_path / "data") == before


def test_units_that_were_changed_are_read_again(prepared, speech, tmp_path):
    units = Path(shutil.copytree(prepared / "units", tmp_path / "units"))
    given = f"prepare.units=[{units}/*.parquet]"
    prepare(recipe(tmp_path / "run", speech, given))
    before = stores(tmp_path / "run" / "data")
    path = sorted(units.glob("*.parquet"))[0]
    table = pq.read_table(path)
    i = table.column_names.index("text")
    pq.write_table(table.set_column(i, "text", [["other words"] * len(table)]), path)
    prepare(recipe(tmp_path / "run", speech, given))
    assert stores(tmp_path / "run" / "data") != before
    pq.write_table(table.drop_columns(["seconds"]), path)
    with pytest.raises(SodaError, match="column seconds must be float"):
        prepare(recipe(tmp_path / "run", speech, given))


def test_bad_files_are_listed_and_the_rest_is_used(speech, tmp_path):
    folder = Path(shutil.copytree(speech, tmp_path / "speech"))
    bad = {
        "empty.wav": b"",
        "noise.wav": b"RIFF" + bytes(range(200)),
        "text.mp3": b"this is no sound",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "none.wav", np.zeros(0), RATE)
    soundfile.write(folder / "stereo8k.wav", np.stack([voice(1, 1.0, 8000)] * 2, 1), 8000)
    soundfile.write(folder / "high.flac", voice(2, 1.0, 192_000), 192_000)
    with (folder / "manifest.jsonl").open("ab") as manifest:
        for name in [*bad, "silent.wav", "none.wav", "stereo8k.wav", "high.flac", "missing.wav"]:
            manifest.write(json.dumps({"audio": name, "text": f"words for {name}"}).encode() + b"\n")
        manifest.write(b"{not json\n")
        manifest.write(b'{"audio": "clip_000.wav", "text": "\xff\xfe"}\n')
        manifest.write(b'{"audio": "../secret.wav", "text": "x"}\n')
        manifest.write(b'{"audio": "clip_001.wav"}\n')
    with pytest.raises(SodaError, match="5 of 24 utterances cannot be used"):
        prepare(recipe(tmp_path / "strict", folder))
    summary = prepare(recipe(tmp_path / "run", folder, "prepare.max_rejects=0.5"))
    assert summary["utterances"] == 14
    listed = [json.loads(line) for line in (tmp_path / "run" / "data" / "rejects.jsonl").read_text().splitlines()]
    assert listed == summary["rejects"]
    wheres = " ".join(f"{r['where']} {r['reason']}" for r in listed)
    for name in [*bad, "silent.wav", "none.wav", "missing.wav", "manifest.jsonl:21"]:
        assert name in wheres
    assert len(listed) == 10
    assert all(r["reason"] for r in listed)
    # What could not be encoded counts in the split, also when only the units are left of the run.
    prepare(recipe(tmp_path / "again", folder, f"prepare.units=[{tmp_path}/run/data/units/*.parquet]"))
    assert stores(tmp_path / "again" / "data") == stores(tmp_path / "run" / "data")


def test_a_name_that_is_no_utf8(speech, tmp_path):
    folder = Path(shutil.copytree(speech, tmp_path / "speech"))
    (folder / "manifest.jsonl").unlink()
    for i, wav in enumerate(sorted(folder.glob("*.wav"))):
        wav.with_suffix(".txt").write_text(f"{WORDS[i % 7]} {i}")
    for suffix in (b".wav", b".txt"):
        os.rename(os.fsencode(folder) + b"/clip_000" + suffix, os.fsencode(folder) + b"/caf\xe9" + suffix)
    summary = prepare(recipe(tmp_path / "run", folder, "prepare.max_rejects=0.5"))
    assert summary["utterances"] == 11
    assert summary["rejects"] == [{"where": "caf\\udce9.wav", "reason": "not valid Unicode: audio"}]


def test_nothing_to_use(tmp_path):
    with pytest.raises(SodaError):
        prepare(recipe(tmp_path / "run", tmp_path / "nowhere"))
    one = write_speech(tmp_path / "one", 1)
    with pytest.raises(SodaError, match="too little usable input to split"):
        prepare(recipe(tmp_path / "run", one))
    malformed = [f"<|begin_of_text|>{i}" for i in range(20)]
    pq.write_table(pa.table({"text": malformed}), tmp_path / "c.parquet")
    released = ["prepare.speech=''", f"prepare.released=[{tmp_path}/c.parquet]"]
    prepare(recipe(tmp_path / "run2", write_speech(tmp_path / "speech", 12)))
    released.append(f"prepare.tokenizer={tmp_path}/run2/data/text_tokenizer.model")
    with pytest.raises(SodaError, match=r"rejects\.jsonl lists what could not be used"):
        prepare(recipe(tmp_path / "run", Path(), *released))
    listed = (tmp_path / "run" / "data" / "rejects.jsonl").read_text().splitlines()
    assert len(listed) == 20
    assert all("malformed document" in line for line in listed)


def test_fitted_codec_with_other_sizes(speech, tmp_path):
    prepare(recipe(tmp_path, speech, "prepare.codebooks=4", "prepare.entries=32"))
    store = Store(tmp_path / "data" / "train")
    assert (store.space.codebooks, store.space.entries) == (4, 32)
    codec = load_data_codec(tmp_path / "data")
    assert (codec.codebooks, codec.entries) == (4, 32)
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    assert load_data_codec(moved).fingerprint == codec.fingerprint
    given = EmbeddedCodec(load_codec("embedded").quantiser)
    given.save(tmp_path / "given.safetensors")
    chosen = json.loads((moved / "codec.json").read_text()) | {"fingerprint": given.fingerprint}
    chosen["arguments"]["path"] = str(tmp_path / "given.safetensors")
    (moved / "codec.json").write_text(json.dumps(chosen))
    assert load_data_codec(moved).fingerprint == given.fingerprint  # what was fitted is left from another run


def test_a_fitted_codec_that_is_not_the_one_that_was_fitted_is_fitted_again(speech, tmp_path):
    settings = recipe(tmp_path, speech, "prepare.entries=16")
    prepare(settings)
    fitted = tmp_path / "data" / "codec.safetensors"
    whole, before, kind = fitted.read_bytes(), stores(tmp_path / "data"), EmbeddedCodec.load(fitted).fingerprint
    for change in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9], b"", None):
        fitted.unlink() if change is None else fitted.write_bytes(change)
        prepare(settings)
        assert EmbeddedCodec.load(fitted).fingerprint == kind
        assert stores(tmp_path / "data") == before


def test_mimi_is_a_setting_away(speech, tmp_path, mimi_folder):  # noqa: F811
    mimi = ["prepare.codec=mimi", f"prepare.codec_path={mimi_folder}"]
    summary = prepare(recipe(tmp_path, speech, *mimi))
    assert summary["codec"]["name"] == "mimi"
    assert validate(tmp_path / "data")
    codec = load_data_codec(tmp_path / "data")
    row = next(read_units(sorted((tmp_path / "data" / "units").rglob("*.parquet"))))
    wave = soundfile.read(row["audio"], dtype="float32")[0]
    assert np.array_equal(codec.encode([wave])[0], row["codes"])
    with pytest.raises(SodaError, match=r"codec_path|local folder"):
        prepare(recipe(tmp_path / "none", speech, "prepare.codec=mimi", f"prepare.codec_path={tmp_path}/nothing"))


def write_text(path: Path, count: int = 400) -> Path:
    path.write_text("".join(f"the {i}th line says {i * i} and stays on the line\n" for i in range(count)))
    return path


def test_text_has_its_share_and_no_line_is_on_two_sides(speech, tmp_path):
    text = write_text(tmp_path / "text.txt")
    text.write_text(text.read_text() * 2)
    settings = [f"prepare.text=[{text}]", "prepare.text_share=0.2", "prepare.text_pieces=400"]
    summary = prepare(recipe(tmp_path / "run", speech, *settings))
    assert summary["repeated_texts"] == 400
    assert summary["reject_count"] == 0
    assert validate(tmp_path / "run" / "data")
    tokenizer = data_tokenizer(tmp_path / "run" / "data")
    lines: dict[str, str] = {}
    for side in ("train", "valid", "test"):
        store = Store(tmp_path / "run" / "data" / side)
        texts = [ids for ids in map(store.document, range(len(store))) if ids[1] < store.space.text_size]
        assert sum(map(len, texts)) / store.size == pytest.approx(0.2, abs=max(map(len, texts)) / store.size)
        for ids in texts:
            assert lines.setdefault(tokenizer.decode(ids[1:-1]), side) == side
    assert set(lines) <= set(text.read_text().splitlines())


def test_text_alone_makes_stores(tmp_path):
    text = write_text(tmp_path / "text.txt")
    summary = prepare(recipe(tmp_path / "run", Path(), "prepare.speech=''", f"prepare.text=[{text}]"))
    assert summary["documents"] == {"train": 240, "valid": 80, "test": 80}
    assert (summary["utterances"], summary["codec"]) == (0, None)
    assert validate(tmp_path / "run" / "data")


def test_units_are_used_again_without_encoding(prepared, speech, tmp_path, monkeypatch):
    def no_encoding(job):
        raise AssertionError("encodes again")

    monkeypatch.setattr(encode, "encode_shard", no_encoding)
    again = recipe(tmp_path / "again", speech, f"prepare.units=[{prepared}/units/*.parquet]")
    summary = prepare(again)
    assert stores(tmp_path / "again" / "data") == stores(prepared)
    assert summary["utterances"] == 12
    first = sorted((prepared / "units").glob("*.parquet"))[0]
    (tmp_path / "link.parquet").symlink_to(first)
    with pytest.raises(SodaError, match="is in another shard too"):
        prepare(
            recipe(tmp_path / "twice", speech, f"prepare.units=[{prepared}/units/*.parquet,{tmp_path}/link.parquet]")
        )
    assert load_data_codec(tmp_path / "again" / "data").fingerprint == load_data_codec(prepared).fingerprint
    other = prepare(recipe(tmp_path / "other", speech, f"prepare.units=[{prepared}/units/*.parquet]",
                           "prepare.orders=[semantic-only]"))  # fmt: skip
    assert Store(tmp_path / "other" / "data" / "train").slots == 1
    assert validate(tmp_path / "other" / "data")
    assert other["documents"]["train"] * 2 == summary["documents"]["train"]


def test_units_of_two_codecs_are_refused(prepared, speech, tmp_path):
    prepare(recipe(tmp_path / "other", speech, "prepare.codebooks=4", "prepare.entries=32"))
    both = f"prepare.units=[{prepared}/units/*.parquet,{tmp_path}/other/data/units/*.parquet]"
    with pytest.raises(SodaError, match="mean different sounds"):
        prepare(recipe(tmp_path / "run", speech, both))
    with pytest.raises(SodaError, match=r"prepare\.units: no file matches"):
        prepare(recipe(tmp_path / "run", speech, "prepare.units=[nothing/*.parquet]"))


def test_two_at_work_on_one_folder(speech, tmp_path):
    import fcntl

    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SodaError, match="another soda is at work"):
            prepare(recipe(tmp_path, speech))
    assert prepare(recipe(tmp_path, speech))["utterances"] == 12


def test_dry_run_counts_and_leaves_no_trace(speech, tmp_path, capsys):
    r = recipe(tmp_path / "run", speech)
    expected = prepare(r, dry_run=True)
    assert not (tmp_path / "run").exists()
    assert "utterances" in capsys.readouterr().err
    summary = prepare(r)
    assert expected["utterances"] == summary["utterances"]
    assert expected["hours"] == pytest.approx(summary["hours"], rel=0.05)
    assert expected["tokens"] == pytest.approx(sum(summary["tokens"].values()), rel=0.2)
    assert expected["bytes"]["stores"] == pytest.approx(summary["bytes"]["stores"], rel=0.25)


def test_dry_run_of_text_and_of_fewer_codes(speech, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{' '.join(WORDS[i % 7 :])} {WORDS[i % 11]} {WORDS[i % 13]}\n" for i in range(900)))
    some = recipe(tmp_path / "run", speech, "prepare.speech=''", f"prepare.text=[{text}]")
    assert prepare(some, dry_run=True)["tokens"] == pytest.approx(sum(prepare(some)["tokens"].values()), rel=0.4)
    few = recipe(tmp_path / "few", speech, "prepare.orders=[semantic-only]")
    assert prepare(few, dry_run=True)["tokens"] == pytest.approx(sum(prepare(few)["tokens"].values()), rel=0.1)
    with pytest.raises(SodaError, match="encoded already"):
        prepare(recipe(tmp_path / "units", speech, "prepare.units=[x]"), dry_run=True)


def test_recordings_become_documents(tmp_path):
    folder = write_speech(tmp_path / "speech")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["recording"] = f"talk {i // 3}"
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = prepare(recipe(tmp_path / "run", folder, "prepare.orders=[audio-first]"))
    assert sum(summary["documents"].values()) == 4
    store = Store(tmp_path / "run" / "data" / "train")
    assert np.count_nonzero(store.document(0) == store.space.audio_start) == 3


def test_long_audio_becomes_one_utterance(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    rows = []
    for i, seconds in enumerate((130.0, 2.0, 2.0, 2.0)):
        soundfile.write(folder / f"{i}.wav", voice(i, seconds), RATE)
        rows.append(json.dumps({"audio": f"{i}.wav", "text": f"words {i} and please stay on the line {i}"}))
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    prepare(recipe(tmp_path / "run", folder, "prepare.valid_share=0.3", "prepare.test_share=0.3"))
    found = {r["id"]: r for r in read_units(sorted((tmp_path / "run/data/units").rglob("*.parquet")))}
    assert found["0"]["codes"].shape == (1625, 8)
    assert found["0"]["seconds"] == pytest.approx(130)


@pytest.mark.full
def test_the_codec_is_fitted_on_long_recordings_too(tmp_path):
    """On the first minute of each. Four recordings of more than a minute, and nothing else."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", voice(i, 61.0 + 70 * (i == 3)), RATE)
        (folder / f"{i}.txt").write_text(f"words {i} and please stay on the line {i}")
    (folder / "noise.wav").write_bytes(b"noise")
    whole = [soundfile.read(folder / f"{i}.wav", dtype="float32")[0] for i in range(4)]
    waves = choose._fit_audio([Utterance(n, Sound(f"{folder}/{n}.wav"), "") for n in ("0", "noise", "3")])
    assert [50 < len(wave) / RATE <= 60 for wave in waves] == [True, True]
    for wave, number in zip(waves, (0, 3), strict=True):
        assert np.array_equal(wave, whole[number][: len(wave)])
    (folder / "noise.wav").unlink()
    prepare(recipe(tmp_path / "run", folder, "prepare.codebooks=2", "prepare.entries=16", "prepare.valid_share=0.3"))
    assert load_data_codec(tmp_path / "run" / "data").entries == 16


def test_dali_decodes_if_asked(prepared, speech, tmp_path, monkeypatch):
    from megatron_soda.audio import dali
    from megatron_soda.audio.reading import read_pieces
    from megatron_soda.audio.sound import BadAudio

    with pytest.raises(SodaError, match=r"megatron-soda\[dali\]"):
        prepare(recipe(tmp_path / "none", speech, "prepare.decoder=dali"))
    assert not list((tmp_path / "none").rglob("index"))
    with pytest.raises(SodaError, match="the embedded codec runs on the CPU"):
        recipe(tmp_path / "none", speech, "prepare.decoder=dali_gpu")
    seen = []

    class Decoder:
        def __init__(self, sample_rate, samples_per_frame, *, trim, threads, resample_on):
            self.shape = sample_rate, samples_per_frame
            assert (threads, resample_on) == (1, "")

        def decode(self, sounds):
            seen.extend(sounds)
            return [bad() if s.path.endswith("clip_002.wav") else read_pieces(s, *self.shape) for s in sounds]

    def bad():
        yield np.zeros(RATE, np.float32)
        raise BadAudio("no luck: third")

    monkeypatch.setattr(dali, "DaliDecoder", Decoder)
    monkeypatch.setattr(dali, "package", lambda: None)
    summary = prepare(recipe(tmp_path / "run", speech, "prepare.decoder=dali"))
    assert len(seen) == 12
    assert summary["reject_reasons"] == {"no luck": 1}
    wanted = {r["id"]: r["codes"].tobytes() for r in read_units(sorted((prepared / "units").rglob("*.parquet")))}
    found = {
        r["id"]: r["codes"].tobytes() for r in read_units(sorted((tmp_path / "run/data/units").rglob("*.parquet")))
    }
    del wanted["clip_002"]
    assert found == wanted


def test_a_path_that_is_there_comes_before_a_glob(tmp_path):
    """Folder by folder: [a] is a folder where there is one of that name, and else stands for `a`."""
    for name in ("[a]/x.txt", "[a]/y.txt", "a/x.txt", "b/[1].txt", "b/1.txt", "b/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in files([f"{tmp_path}/{one}" for one in patterns], "prepare.units")]

    assert found("[a]/x.txt") == ["[a]/x.txt"]
    assert found("[a]/*.txt") == ["[a]/x.txt", "[a]/y.txt"]
    assert found("b/[1].txt") == ["b/[1].txt"]
    assert found("b/[12].txt") == ["b/1.txt", "b/2.txt"]
    assert found("[ab]/1.txt", "**/2.txt") == ["b/1.txt", "b/2.txt"]
    with pytest.raises(SodaError, match="no file matches"):
        found("[a]")


def test_a_converted_copy_of_a_data_folder_is_one(speech, tmp_path):
    """Trained on, heard and prepared on, without the folder it was made from."""
    settings = ("prepare.codebooks=4", "prepare.entries=32")
    summary = prepare(recipe(tmp_path / "run", speech, *settings))
    data, copy = tmp_path / "run" / "data", tmp_path / "copy"
    kept = {"text_tokenizer.model", "codec.json", "codec.safetensors", "valid.parquet", "test.parquet"}
    before = {name: (data / name).read_bytes() for name in kept}
    convert_stores(data, [], "compact", copy)
    assert not list(tmp_path.glob(".*"))
    assert {name: (copy / name).read_bytes() for name in kept} == before
    codec, text = load_data_codec(data).fingerprint, data_tokenizer(data).fingerprint
    described = json.loads((copy / "prepare.json").read_text())
    assert described["stores"] == {side: Store(copy / side).fingerprint for side in ("train", "valid", "test")}
    assert described["bytes"]["stores"] == sum(p.stat().st_size for s in SUFFIXES for p in copy.glob(f"*.{s}"))
    assert described | {"bytes": 0} == json.loads((data / "prepare.json").read_text()) | {"bytes": 0}
    with pytest.raises(SodaError, match="already exists"):
        convert_stores(data, [], "compact", copy)
    shutil.rmtree(data)
    assert validate(copy)
    assert (load_data_codec(copy).fingerprint, data_tokenizer(copy).fingerprint) == (codec, text)
    before = times(copy)
    assert prepare(recipe(tmp_path / "run", speech, *settings, f"data.path={copy}"))["stores"] == summary["stores"]
    after = {p: t for p, t in times(copy).items() if "units" not in p.parts}
    assert {p.name for p in after if after[p] != before[p]} == {"codec.json"}  # it says where the codec is now
    convert_stores(copy, [], "megatron", None)
    described = json.loads((copy / "prepare.json").read_text())
    assert described["bytes"]["stores"] == sum(p.stat().st_size for s in ("bin", "idx") for p in copy.glob(f"*.{s}"))


def test_a_converted_copy_of_one_store_has_its_tokenizer_and_codec(prepared, speech, tmp_path):
    for side in ("train", "valid"):
        convert_stores(prepared, [side], "compact", tmp_path / "new" / side)
    names = {
        p.name
        for p in (tmp_path / "new").iterdir()
        if p.suffix[1:] not in (*SUFFIXES, "json") or p.name == "codec.json"
    } - {".lock"}
    assert names == {"text_tokenizer.model", "codec.json", "valid.parquet"}
    assert validate(tmp_path / "new", ["train", "valid"])
    for name, change in (
        ("text_tokenizer.model", lambda path: train_sentencepiece(path, SENTENCES, 310)),
        ("text_tokenizer.json", write_byte_tokenizer),
        ("codec.safetensors", lambda path: path.write_bytes(b"")),
        ("test.parquet", lambda path: path.write_bytes(b"")),
    ):
        shutil.copytree(tmp_path / "new", tmp_path / "other")
        change(tmp_path / "other" / name)
        with pytest.raises(SodaError, match=f"{name}: does not belong to .*--out NEW/test"):
            convert_stores(prepared, ["test"], "compact", tmp_path / "other" / "test")
        assert not (tmp_path / "other" / "test.json").exists()
        shutil.rmtree(tmp_path / "other")


def test_a_copy_that_fails_leaves_nothing(prepared, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_soda.data.convert.shutil.copyfile", full)
    with pytest.raises(SodaError, match="the disk is full"):
        convert_stores(prepared, [], "compact", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_too_few_pieces_for_the_letters_are_said_before_encoding(tmp_path, monkeypatch):
    """Of the letters of the training side; a dry run says the same, and what it says is enough."""
    folder = write_speech(tmp_path / "speech")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["text"] = "".join(chr(0x4E00 + 40 * i + k) for k in range(40))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare._encode", lambda *_: pytest.fail("encoded"))
        said = []
        for dry in (False, True):
            with pytest.raises(SodaError, match=r"of 512 pieces .* Set prepare\.text_pieces=\d+ or higher") as error:
                prepare(recipe(tmp_path / "run", folder, "prepare.text_pieces=512"), dry_run=dry)
            said.append(str(error.value))
    assert said[0] == said[1]
    enough = said[0].split("text_pieces=")[1].split()[0]
    assert prepare(recipe(tmp_path / "run", folder, f"prepare.text_pieces={enough}"))["utterances"] == 12
