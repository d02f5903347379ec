"""Recordings without transcripts, some or all: used where the orders need none, else counted; and a dry run agrees."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import choose
from data_prep.prepare import prepare
from megatron_soda.codecs.embedded import EmbeddedCodec
from megatron_soda.config import Recipe, load_recipe
from megatron_soda.data.store import Store
from megatron_soda.data.validate import validate
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import data_tokenizer
from megatron_soda.vocab import BOS, EOS
from tests.voices import write_speech

MIXED, AUDIO = "prepare.orders=[text-first,audio-only]", "prepare.orders=[audio-only]"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """12 sound files and nothing else, some in a folder."""
    folder = write_speech(tmp_path_factory.mktemp("sounds"))
    (folder / "manifest.jsonl").unlink()
    (folder / "more").mkdir()
    for number in range(4):
        (folder / f"clip_{number:03d}.wav").rename(folder / "more" / f"clip_{number:03d}.wav")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    return folder


def recipe(run: Path, speech: Path | str, *overrides: str) -> Recipe:
    some = ["prepare.workers=1", "prepare.text_pieces=300", "prepare.valid_share=0.2", "prepare.test_share=0.2"]
    return load_recipe(None, [f"run={run}", f"prepare.speech={speech or chr(39) * 2}", *some, *overrides])


def both(recipe: Recipe) -> dict:
    """Prepares, and sees that a dry run expects it."""
    expected = prepare(recipe, dry_run=True)
    summary = prepare(recipe)
    assert expected["utterances"] == summary["utterances"]
    assert expected["rejects"] == summary["reject_count"]
    assert expected["hours"] == pytest.approx(summary["hours"], rel=1e-3)
    letters = summary["classes"]["text"]  # the estimate of these is a rule of thumb
    assert expected["tokens"] == pytest.approx(sum(summary["tokens"].values()), rel=0.1 if letters else 1e-6)
    assert validate(recipe.data_folder)
    return summary


def refused(recipe: Recipe, match: str) -> str:
    """What both say that cannot be prepared."""
    with pytest.raises(SodaError, match=match):
        prepare(recipe, dry_run=True)
    with pytest.raises(SodaError, match=match) as real:
        prepare(recipe)
    return str(real.value)


def test_a_folder_of_sound_files(sounds, tmp_path):
    summary = both(recipe(tmp_path, sounds, AUDIO))
    assert summary["utterances"] == sum(summary["documents"].values()) == 12
    store, tokenizer = Store(tmp_path / "data" / "train"), data_tokenizer(tmp_path / "data")
    assert tokenizer.size == store.space.text_size == 258
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好 🙂\n ")) == "Grüße, 你好 🙂\n "
    for index in range(len(store)):
        ids = store.document(index)
        assert list(ids[:2]) == [store.space.bos, store.space.audio_start]
        assert np.all(ids[2:-2] >= store.space.audio_base)
    before = (tmp_path / "data" / "train.bin").read_bytes()
    prepare(recipe(tmp_path, sounds, AUDIO))
    assert (tmp_path / "data" / "train.bin").read_bytes() == before


def test_semantic_only_and_one_file(sounds, tmp_path):
    both(recipe(tmp_path / "run", sounds, "prepare.orders=[semantic-only]"))
    assert Store(tmp_path / "run" / "data" / "train").slots == 1
    refused(recipe(tmp_path / "one", sounds / "clip_005.wav", AUDIO), "no document is left for the test store")


def test_without_the_setting_it_says_what_to_set(sounds, tmp_path):
    said = refused(recipe(tmp_path, sounds), "12 of 12 utterances cannot be used .*no transcript: 12")
    assert "prepare.orders=[audio-only]" in said
    assert f"{tmp_path}/data/rejects.jsonl lists" in said
    assert (tmp_path / "data" / "rejects.jsonl").read_text().count("no transcript") == 12


def test_a_manifest_of_which_some_lines_have_no_text(tmp_path):
    folder = write_speech(tmp_path / "speech")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for line, text in zip(lines[:3], (None, "", " \n"), strict=True):
        line["text"] = text
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    alone = both(recipe(tmp_path / "audio", folder, AUDIO))
    assert (alone["utterances"], alone["reject_count"]) == (12, 0)

    spoken = both(recipe(tmp_path / "text", folder, "prepare.max_rejects=0.5"))
    assert spoken["utterances"] == 9
    assert spoken["reject_reasons"] == {"no transcript": 3}
    assert spoken["rejects"][0] == {"where": "manifest.jsonl:1", "reason": "no transcript"}

    mixed = both(recipe(tmp_path / "mixed", folder, MIXED))
    assert (mixed["utterances"], sum(mixed["documents"].values())) == (12, 12 + 9)
    assert mixed["reject_reasons"] == {"no transcript": 3}
    assert mixed["rejects"][0]["reason"] == "no transcript: used only for audio-only"

    refused(recipe(tmp_path / "strict", folder), "3 of 12 utterances cannot be used")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_a_manifest_without_a_text_column(sounds, tmp_path, suffix):
    names = [str(path) for path in sorted(sounds.glob("*.wav"))]
    path = sounds / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"audio": names}), path)
    else:
        rows = [json.dumps({"audio": name}) for name in names] if suffix == "jsonl" else ["audio", *names]
        path.write_text("\n".join(rows))
    assert prepare(recipe(tmp_path, path, AUDIO), dry_run=True)["utterances"] == 8
    with pytest.raises(SodaError, match=r"no transcript: 8.*audio-only"):
        prepare(recipe(tmp_path, path), dry_run=True)
    path.unlink()


def test_given_text_trains_the_tokenizer(sounds, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {i}th line says {i * i} and stays on the line\n" for i in range(400)))
    summary = prepare(recipe(tmp_path / "run", sounds, AUDIO, f"prepare.text=[{text}]", "prepare.text_share=0.2"))
    assert summary["classes"]["text"]
    tokenizer = data_tokenizer(tmp_path / "run" / "data")
    assert tokenizer.path.suffix == ".model"
    assert len(tokenizer.encode("the 7th line says 49 and stays on the line")) < 35  # 41 bytes


def test_text_alone_uses_all_of_it_for_the_tokenizer(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}\n" for i in range(900)))
    seen = []
    original = choose.train_sentencepiece
    monkeypatch.setattr(
        choose, "train_sentencepiece", lambda path, texts, n: (seen.extend(texts), original(path, texts, n))
    )
    prepare(recipe(tmp_path / "run", "", f"prepare.text=[{text}]"))
    assert len(seen) > 400


def test_text_alone_leaves_no_speech_of_before(sounds, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}\n" for i in range(60)))
    prepare(recipe(tmp_path / "run", sounds, AUDIO))
    assert (tmp_path / "run/data/test.parquet").is_file()
    prepare(recipe(tmp_path / "run", "", f"prepare.text=[{text}]"))
    assert not (tmp_path / "run/data/test.parquet").exists()
    assert not (tmp_path / "run/data/codec.json").exists()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("translation", "no pair"),
        ("conversational", "no speaker"),
        ("text-only", "no transcript"),
        ("asr", "no transcript"),
    ],
)
def test_orders_that_need_what_is_not_there(sounds, tmp_path, order, reason):
    folder = write_speech(tmp_path / "speech")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        del line["speaker"]
        line["recording"] = f"talk {number // 3}"
        if reason == "no transcript":
            del line["text"]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = refused(recipe(tmp_path / "run", folder, f"prepare.orders=[{order}]"), reason)
    assert ("no document is left" in said) == (reason != "no transcript")


def test_a_tokenizer_that_is_not_there_is_told_before_anything_is_encoded(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(EmbeddedCodec, "encode", None)
    refused(recipe(tmp_path, sounds, AUDIO, "prepare.tokenizer=nowhere.model"), "nowhere.model: no such tokenizer")


def test_sounds_that_cannot_be_decoded(sounds, tmp_path):
    folder = write_speech(tmp_path / "speech")
    (folder / "manifest.jsonl").unlink()
    for number in range(3):
        (folder / f"bad_{number}.wav").write_bytes(b"RIFFnothing")
    refused(recipe(tmp_path / "run", folder, AUDIO), "3 of 15 utterances cannot be used")


def test_the_byte_tokenizer_is_exported_as_it_is(sounds, tmp_path):
    from megatron_soda.hf.tokenizer import save_tokenizer

    prepare(recipe(tmp_path, sounds, AUDIO))
    text, space = data_tokenizer(tmp_path / "data"), Store(tmp_path / "data" / "train").space
    exported = save_tokenizer(text, space, tmp_path / "hf", 512)
    ids = [space.bos, space.text_start, *text.encode("né à 8 h"), space.text_end, space.eos]
    string = f"{BOS}<|text_start|>né à 8 h<|text_end|>{EOS}"
    assert exported(string, add_special_tokens=False)["input_ids"] == ids
