"""Documents of every kind, from units, texts and released corpora, against ids put together by hand."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import documents, interleave
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config.prepare import Order
from megatron_soda.data.units import read_shard, write_units
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import TokenSpace
from tests.voices import WORDS

ORDERS = get_args(Order)
CODEC = CodecDescription("none", "f", 4, 16, 24_000, 1_920, {})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "text.model"
    train_sentencepiece(path, [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], 300)
    return TextTokenizer(path)


def row(id: str, frames: int = 3, **fields) -> dict:
    codes = np.random.default_rng(len(id) + frames).integers(0, 16, (frames, 4))
    return {"id": id, "codes": codes, "text": "please hold", "language": "en", "speaker": "s", "prompt": "",
            "recording": "", "seconds": 0.08 * frames, "audio": f"{id}.wav", **fields}  # fmt: skip


def part_settings(tokenizer: Path, space: TokenSpace, **some) -> documents.PartSettings:
    fixed = {"tokenizer_fingerprint": "t", "orders": (), "shares": (0.0, 0.0), "seed": 0, "corpus_codebooks": 4}
    return documents.PartSettings(tokenizer, space=space, **{**fixed, **some})


def make(folder: Path, rows: list[dict], tokenizer: TextTokenizer, orders: list[str], codebooks: int = 4, **settings):
    """The documents of a shard, by their first ids, and the rejects."""
    write_units(folder / "unit.parquet", rows, codec=CODEC, key="k")
    space = TokenSpace(tokenizer.size, tokenizer.bos, tokenizer.eos, codebooks, 16)
    common = part_settings(tokenizer.path, space, orders=tuple(orders), **settings)
    (job,) = documents.unit_jobs([folder / "unit.parquet"], ["k"], ["0" * len(rows)], folder, common)
    assert not documents.is_done(job)
    documents.make_part(job)
    assert documents.is_done(job)
    return space, whole(job.out), json.loads(job.out.with_suffix(".rejects.json").read_text())


def whole(path: Path, side: str = "train") -> list[list[int]]:
    ids, lengths = documents.read_part(path, side)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


def spans(space: TokenSpace, tokenizer: TextTokenizer):
    def text(words: str) -> list[int]:
        return [space.text_start, *tokenizer.encode(words), space.text_end]

    def audio(r: dict, codebooks: int = 4) -> list[int]:
        ids = [space.audio_base + 16 * k + int(c) for frame in r["codes"] for k, c in enumerate(frame[:codebooks])]
        return [space.audio_start, *ids, space.audio_end]

    return text, audio


def test_the_orders_are_those_of_the_recipe():
    assert set(ORDERS) == set(interleave.ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_golden_documents(order, tokenizer, tmp_path):
    one = row("a", 3, text="please hold", speaker="ann", recording="r")
    two = row("bb", 2, text="the line", speaker="bob", recording="r", language="es")
    space, made, rejects = make(tmp_path, [one, two], tokenizer, [order])
    text, audio = spans(space, tokenizer)
    wanted = {
        "text-first": [*text("please hold"), *audio(one), *text("the line"), *audio(two)],
        "audio-first": [*audio(one), *text("please hold"), *audio(two), *text("the line")],
        "audio-only": [*audio(one), *audio(two)],
        "semantic-only": [*audio(one, 1), *audio(two, 1)],
        "text-only": tokenizer.encode("please hold the line"),
        "asr": [*audio(one), *text("please hold"), *audio(two), *text("the line")],
        "tts": [*text("[0]please hold"), *audio(one), *text("[0]the line"), *audio(two)],
        "conversational": [*text("[0]please hold"), *audio(one), *text("[1]the line"), *audio(two)],
        "translation": [
            *audio(one),
            *text("<language>en</language>please hold"),
            *text("<language>es</language>the line"),
            *audio(two),
        ],
    }[order]
    assert made == [[space.bos, *wanted, space.eos]]
    assert space.check(np.array(made[0]), 1 if order == "semantic-only" else 0) is None
    assert rejects == []


def test_recordings_and_single_utterances(tokenizer, tmp_path):
    rows = [row("a"), row("b", recording="r"), row("c", recording="r"), row("d", recording="q"), row("e")]
    space, made, _ = make(tmp_path, rows, tokenizer, ["audio-only"])
    assert sorted(d.count(space.audio_start) for d in made) == [1, 1, 1, 2]


def test_what_cannot_be_is_rejected_and_the_rest_stays(tokenizer, tmp_path):
    bad = row("bad")
    bad["codes"][1, 2] = 16
    below = row("below")
    below["codes"][0, 0] = -1
    rows = [row("a"), bad, row("mute", text=""), row("empty", 0), below]
    space, made, rejects = make(tmp_path, rows, tokenizer, ["text-first", "audio-only"])
    assert len(made) == 3  # both of a, and mute's audio
    assert {(r["where"], r["reason"].split(":")[0]) for r in rejects} == {
        ("bad", "code out of range"),
        ("below", "code out of range"),
        ("empty", "no codes"),
        ("mute", "no transcript"),
    }
    assert all(space.check(np.array(d)) is None for d in made)


@pytest.mark.parametrize("rows", [["a"], ["a", "b", "c"]])
def test_a_translation_needs_a_pair(rows, tokenizer, tmp_path):
    _, made, rejects = make(tmp_path, [row(r, recording="r") for r in rows], tokenizer, ["translation"])
    assert made == []
    assert rejects[0]["reason"].startswith("no pair")


def test_fewer_codebooks_than_the_codec(tokenizer, tmp_path):
    r = row("a")
    space, made, _ = make(tmp_path, [r], tokenizer, ["audio-only"], codebooks=2)
    _, audio = spans(space, tokenizer)
    assert made == [[space.bos, *audio(r, 2), space.eos]]
    with pytest.raises(SodaError, match="4 codebooks of 16"):
        make(tmp_path, [r], tokenizer, ["audio-only"], codebooks=5)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.integers(0, 4), st.sampled_from(["", "r", "q"])), max_size=12),
    st.lists(st.sampled_from(sorted(set(ORDERS) - {"semantic-only"})), min_size=1, max_size=3, unique=True),
    st.integers(0, 5),
)
def test_any_text_makes_legal_documents(tmp_path_factory, tokenizer, utterances, orders, seed):
    rows = [row(f"u{i}", frames, text=text, recording=r) for i, (text, frames, r) in enumerate(utterances)]
    folder = tmp_path_factory.mktemp("any")
    space, made, rejects = make(folder, rows, tokenizer, orders, seed=seed)
    assert all(space.check(np.array(d)) is None for d in made)
    if rows and "audio-only" in orders:
        codes = sum(r["codes"].size for r in rows)
        only = [d for d in made if not set(d) & {space.text_start} and d[1] == space.audio_start]
        assert sum(sum(i >= space.audio_base for i in d) for d in only) == codes
    assert len(rejects) >= sum(r["codes"].size == 0 for r in rows)
    again = make(tmp_path_factory.mktemp("again"), rows, tokenizer, orders, seed=seed)
    assert again[1:] == (made, rejects)


def test_released_corpora(tokenizer, tmp_path):
    space = TokenSpace(tokenizer.size, tokenizer.bos, tokenizer.eos, 4, 16)
    codes = np.arange(8).reshape(2, 4) % 16
    letters = "".join(chr(0xE000 + 16 * k + int(c)) for frame in codes for k, c in enumerate(frame))
    audio, text = f"<|audio_start|>{letters}<|audio_end|>", "<|text_start|>please hold<|text_end|>"
    strings = [f"<|begin_of_text|>{a}{b}<|end_of_text|>" for a, b in ((text, audio), (audio, text))]
    strings += [f"<|begin_of_text|>{text}{letters}<|end_of_text|>", None, "<|begin_of_text|>the line<|end_of_text|>"]
    pq.write_table(pa.table({"id": list("abcde"), "text": strings}), tmp_path / "c.parquet", row_group_size=2)
    common = part_settings(tokenizer.path, space)
    jobs = documents.string_jobs([tmp_path / "c.parquet"], tmp_path, common)
    assert len(jobs) == 3
    made, rejects = [], []
    for job in jobs:
        documents.make_part(job)
        made += whole(job.out)
        rejects += json.loads(job.out.with_suffix(".rejects.json").read_text())
    of_text = [space.text_start, *tokenizer.encode("please hold"), space.text_end]
    of_audio = [space.audio_start, *space.audio_ids(codes).tolist(), space.audio_end]
    assert sorted(made) == sorted(
        [space.bos, *rest, space.eos]
        for rest in ([*of_text, *of_audio], [*of_audio, *of_text], tokenizer.encode("the line"))
    )
    assert len(rejects) == 2
    assert all(r["reason"].startswith("malformed document") for r in rejects)
    pq.write_table(pa.table({"words": [1]}), tmp_path / "wrong.parquet")
    with pytest.raises(SodaError, match=r"column `text`.*words"):
        documents.string_jobs([tmp_path / "wrong.parquet"], tmp_path, common)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SodaError, match="Parquet"):
        documents.string_jobs([tmp_path / "no.parquet"], tmp_path, common)


def test_a_shard_that_is_none(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"junk")
    with pytest.raises(SodaError, match=r"x\.parquet"):
        read_shard(tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "y.parquet")
    with pytest.raises(SodaError, match=r"y\.parquet"):
        read_shard(tmp_path / "y.parquet")


def test_a_changed_bit_in_a_damaged_part_is_refused(tokenizer, tmp_path):
    make(tmp_path, [row("a"), row("b")], tokenizer, ["text-first"])
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for at in range(8 * begin, 8 * len(content), 37):
        flipped = bytearray(content)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(SodaError, match=r"damaged; delete it .* \(its checksum does not match\)"):
            documents.read_part(path, "train")
