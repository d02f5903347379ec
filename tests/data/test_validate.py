"""`soda validate` says what is wrong with stores, and where; `soda inspect` shows them."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.data import validate as validate_module
from megatron_soda.data.convert import convert_stores
from megatron_soda.data.inspect import inspect, spans
from megatron_soda.data.store import Store, write_store
from megatron_soda.data.validate import validate
from megatron_soda.errors import SodaError
from megatron_soda.files import write_sealed
from megatron_soda.vocab import TokenSpace
from tests.helpers import SPACE, contents, documents, find_problems, write_data

FORMATS = ["megatron", "compact"]
BASE = SPACE.audio_base


@pytest.mark.parametrize("format", FORMATS)
def test_good_stores(tmp_path, capsys, format):
    write_data(tmp_path)
    convert_stores(tmp_path, [], format, None)
    assert validate(tmp_path)
    assert validate(tmp_path, ["valid"])
    assert "valid: 1,3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "token", "what"),
    [
        (lambda d: d[1:], 0, "is not legal at the start of a document"),  # no BOS
        (lambda d: d[:-1], None, "the document ends"),  # no EOS
        (lambda d: np.append(d, SPACE.eos), None, "is not legal after"),
        (lambda d: np.insert(d, 2, SPACE.bos), 2, "<|begin_of_text|> is not legal"),
        (lambda d: np.insert(d, 2, SPACE.text_start), 2, "<|text_start|> is not legal"),  # markers in pairs
        (lambda d: np.insert(d, 2, SPACE.audio_end), 2, "<|audio_end|> is not legal"),
        (lambda d: np.insert(d, 2, BASE + 3), 2, "a code of codebook 0 is not legal"),
        (lambda d: np.append(d[:-1], SPACE.size), None, "is out of range"),
        (lambda d: np.append(d[:-1], -1), None, "is out of range"),
    ],
)
def test_what_is_illegal_is_named(tmp_path, capsys, change, token, what):
    made = documents(40, 1)
    made[7] = change(made[7]).astype(np.int32)
    write_data(tmp_path)
    write_store(tmp_path / "valid", made, SPACE, codec="none", tokenizer="none")
    assert not validate(tmp_path)
    said = capsys.readouterr().out
    assert f"valid: document 7, token {'' if token is None else f'{token}:'}" in said
    assert what in said
    assert "valid: 1," in said
    assert said.count(": document ") == 1


def test_slots(tmp_path):
    """Whole frames, with codebook k at slot k."""
    head, tail = [SPACE.bos, SPACE.audio_start], [SPACE.audio_end, SPACE.eos]
    frame = [BASE + 1, BASE + 17, BASE + 33, BASE + 49]
    swapped, short = [frame[0], frame[2], frame[1], frame[3]], frame[:3]
    made = [np.array([*head, *codes, *tail], np.int32) for codes in (frame * 3, frame + swapped, frame + short, [])]
    write_store(tmp_path / "s", made, SPACE)
    found = find_problems(Store(tmp_path / "s"))
    assert [problem.split(":")[0] for problem in found] == [
        "document 1, token 7",
        "document 2, token 9",
        "document 3, token 2",
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_byte(tmp_path, capsys, format):
    write_data(tmp_path)
    convert_stores(tmp_path, [], format, None)
    for suffix, path in Store(tmp_path / "train").files.items():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert not validate(tmp_path, ["train"])
        assert f"train.{suffix}: " in capsys.readouterr().out
        content[-1] ^= 1
        path.write_bytes(content)
    assert validate(tmp_path)
    meta = json.loads((tmp_path / "train.json").read_text())
    for checksums in ("files", "crc32"):
        rest = {key: value for key, value in meta.items() if key != checksums}
        if checksums == "files":
            write_sealed(tmp_path / "train.json", rest)
        else:
            (tmp_path / "train.json").write_text(json.dumps(rest))
        assert not validate(tmp_path)
        assert "no checksums" in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_new_is_written_from_a_damaged_store(tmp_path, format):
    """A changed byte would get a checksum of its own, and nobody could see it any more."""
    other = FORMATS[format == "megatron"]
    write_data(tmp_path)
    convert_stores(tmp_path, [], format, None)
    for path in Store(tmp_path / "train").files.values():
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        before = contents(tmp_path)
        for write in (
            lambda: convert_stores(tmp_path, ["train"], other, None),
            lambda: convert_stores(tmp_path, ["train"], other, tmp_path / "out"),
            lambda: inspect(tmp_path / "train", 0, 1, tmp_path / "heard"),
        ):
            with pytest.raises(SodaError, match=rf"train\.{path.suffix[1:]}: "):
                write()
            assert contents(tmp_path) == before
        path.write_bytes(whole)


def test_what_a_killed_conversion_left_is_not_removed_beside_a_damaged_store(tmp_path):
    write_data(tmp_path)
    left = {suffix: (tmp_path / f"train.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    convert_stores(tmp_path, ["train"], "compact", None)
    for suffix, content in left.items():
        (tmp_path / f"train.{suffix}").write_bytes(content)
    whole = (tmp_path / "train.text").read_bytes()
    (tmp_path / "train.text").write_bytes(b"\xff" + whole[1:])
    with pytest.raises(SodaError, match=r"train\.text: has changed"):
        convert_stores(tmp_path, ["train"], "compact", None)
    assert (tmp_path / "train.bin").read_bytes() == left["bin"]
    (tmp_path / "train.text").write_bytes(whole)
    convert_stores(tmp_path, ["train"], "compact", None)
    assert not (tmp_path / "train.bin").exists()


def test_twice_and_leaks(tmp_path, capsys):
    write_data(tmp_path)
    made = documents(40, 1)
    made[30] = made[4]
    write_store(tmp_path / "valid", made, SPACE, codec="none", tokenizer="none")
    assert not validate(tmp_path)
    assert "valid: document 30 is duplicated: it is document 4 of valid" in capsys.readouterr().out
    made[30] = documents(200)[150]
    write_store(tmp_path / "valid", made, SPACE, codec="none", tokenizer="none")
    assert not validate(tmp_path)
    said = capsys.readouterr().out
    assert "valid: document 30 is in two stores, a leak between train and valid: it is document 150 of train" in said
    write_store(tmp_path / "valid", documents(200), SPACE, codec="none", tokenizer="none")
    assert not validate(tmp_path)
    assert "valid: 190 more documents that are also in train" in capsys.readouterr().out


def test_two_hashes_that_are_the_same_by_chance(tmp_path, monkeypatch):
    import torch

    write_data(tmp_path)
    monkeypatch.setattr(validate_module.ops, "hash_documents", lambda ids, offsets: torch.zeros_like(offsets[1:]))
    assert validate(tmp_path)


def test_provenance(tmp_path, capsys):
    write_data(tmp_path)
    write_store(tmp_path / "valid", documents(40, 1), SPACE, codec="other", tokenizer="none")
    assert not validate(tmp_path)
    assert "made by more than one codec" in capsys.readouterr().out
    write_data(tmp_path)
    (tmp_path / "codec.json").write_text('{"fingerprint": "none"}')
    assert validate(tmp_path)
    (tmp_path / "codec.json").write_text('{"fingerprint": "new"}')
    assert not validate(tmp_path)
    assert "codec.json': 'new'" in capsys.readouterr().out
    for broken in ("[1]", "{}", "{"):
        (tmp_path / "codec.json").write_text(broken)
        assert not validate(tmp_path)
        said = capsys.readouterr().out
        assert "codec.json: n" in said  # no fingerprint in it, not valid JSON
        assert "test: 1,331 tokens" in said
    (tmp_path / "codec.json").unlink()
    (tmp_path / "text_tokenizer.model").write_bytes(b"garbage")
    assert not validate(tmp_path)
    assert "text_tokenizer.model: " in capsys.readouterr().out
    (tmp_path / "text_tokenizer.model").unlink()
    other = TokenSpace(65, 1, 2, 4, 16)
    write_store(tmp_path / "test", documents(40, 2, other), other, codec="none", tokenizer="none")
    assert not validate(tmp_path)
    assert "different vocabularies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("slots", 99), ("slots", 0), ("slots", -1), ("slots", "4"), ("format", "zip"), ("format", []), ("space", None),
        ("space", {"text_size": "64", "bos": 1, "eos": 2}), ("space", {"text_size": 64.5, "bos": 1, "eos": 2}),
        ("space", {"text_size": 64, "bos": 999, "eos": 2}), ("space", {"text_size": 64, "bos": 1, "eos": -2}),
        ("space", {"text_size": 64, "bos": 1, "eos": 2, "entries": -1}),
        ("space", {"text_size": 64, "bos": 1, "eos": 2, "codebooks": 0}),
        ("space", {"text_size": 64, "bos": 1, "eos": 2, "codebooks": 200}),
        ("space", {"text_size": 2**31, "bos": 1, "eos": 2}), ("space", {"words": 1}),
        ("tokens", 1), ("documents", None), ("codec", ["a"]), ("codec", {}), ("files", {}), ("files", [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", FORMATS)
def test_a_json_that_cannot_be(tmp_path, capsys, format, key, value):
    write_data(tmp_path)
    convert_stores(tmp_path, [], format, None)
    meta = json.loads((tmp_path / "valid.json").read_text())
    write_sealed(tmp_path / "valid.json", meta | {key: value})
    assert validate(tmp_path) == (key == "codec" and not value)  # no codec: of text only
    said = capsys.readouterr().out
    assert "train: 5,770 tokens, 200 documents, 0 bad" in said
    assert "test: 1,331 tokens, 40 documents, 0 bad" in said


def test_corpora(tmp_path, capsys):
    write_data(tmp_path / "data")
    corpora = {"a": tmp_path / "data" / "train", "b": tmp_path / "b" / "train"}
    assert not validate(tmp_path / "data", ["valid"], corpora)
    assert "b: " in capsys.readouterr().out
    write_data(tmp_path / "b")
    assert not validate(tmp_path / "data", ["valid"], corpora)
    assert (
        "train: document 0 is in two stores, a leak between a and b: it is document 0 of a" in capsys.readouterr().out
    )
    write_store(tmp_path / "b" / "train", documents(30, 7), SPACE, codec="none", tokenizer="none")
    assert validate(tmp_path / "data", ["valid"], corpora)


def test_many_documents_go_to_several_files(tmp_path, monkeypatch, capsys):
    made = documents(400)
    made[390] = made[10]
    write_store(tmp_path / "s", made, SPACE)
    hashes = validate_module._Hashes
    monkeypatch.setattr(validate_module, "_Hashes", lambda documents: hashes(documents << 14))
    assert not validate(tmp_path, ["s"])
    assert "document 390 is duplicated: it is document 10 of s" in capsys.readouterr().out


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_parts_are_all_documents_once(lengths, tokens):
    made = [np.full(n + 1, i % SPACE.size, np.int32) for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "s", made, SPACE)
        store, next_one = Store(Path(folder) / "s"), 0
        for first, ids, offsets in store.parts(tokens):
            assert first == next_one
            assert len(ids) == offsets[-1] <= max(tokens, offsets[1])
            for start, end in itertools.pairwise(offsets):
                assert np.array_equal(ids[start:end], made[next_one])
                next_one += 1
    assert next_one == len(made)


# ---- inspect


def test_spans_are_the_document():
    for document in documents(30):
        found = spans(document, SPACE)
        assert np.array_equal(np.concatenate([ids for _, ids in found]), document)
        assert found[0][0] == "<|begin_of_text|>"
        assert found[-1][0] == "<|end_of_text|>"
        for kind, ids in found[1:-1]:
            if kind in ("text", "audio"):
                assert ((ids >= BASE) == (kind == "audio")).all()
            else:
                assert kind in ("<|text_start|>", "<|text_end|>", "<|audio_start|>", "<|audio_end|>")
    assert [kind for kind, _ in spans(np.array([-5, 70, SPACE.size]), SPACE)] == [
        "id -5?",
        "audio",
        f"id {SPACE.size}?",
    ]


def test_inspect_without_tokenizer_and_codec(tmp_path, capsys):
    write_data(tmp_path)
    inspect(tmp_path / "train", 0, 50, None)
    said = capsys.readouterr().out
    assert "document 49" in said
    assert "document 50" not in said
    ids = next(d for d in documents(50) if d[1] < BASE and d[1] != SPACE.text_start)
    assert " ".join(map(str, ids[1:-1] if ids[1] < 64 else [])) in said
    (tmp_path / "text_tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(SodaError, match=r"text_tokenizer\.model"):
        inspect(tmp_path / "train", 0, 1, None)
    (tmp_path / "text_tokenizer.model").unlink()
    with pytest.raises(SodaError, match="there is no document 200; the store has 200"):
        inspect(tmp_path / "train", 200, 1, None)
    with pytest.raises(SodaError, match=r"codec\.json: no such file"):
        inspect(tmp_path / "train", 0, 1, tmp_path / "out")


def test_an_illegal_document_is_shown(tmp_path, capsys):
    write_store(tmp_path / "s", [np.array([1, SPACE.audio_start, BASE, 2, SPACE.size + 4])], SPACE)
    inspect(tmp_path / "s", 0, 1, None)
    said = capsys.readouterr().out
    assert "not legal: token 4: id" in said
    assert f"id {SPACE.size + 4}?" in said


def test_inspect_reads_and_lets_hear(tmp_path, capsys):
    from data_prep.prepare import prepare
    from megatron_soda.config import load_recipe
    from tests.voices import write_speech

    settings = [f"run={tmp_path}", "prepare.text_pieces=300", "prepare.valid_share=0.2", "prepare.test_share=0.2",
                "prepare.workers=1", "prepare.store=compact"]  # fmt: skip
    summary = prepare(load_recipe(None, [*settings, f"prepare.speech={write_speech(tmp_path / 'speech')}"]))
    assert validate(tmp_path / "data")
    assert Store(tmp_path / "data" / "train").format == "compact"
    assert summary["bytes"]["stores"] < 2 * sum(summary["tokens"].values())
    capsys.readouterr()
    inspect(tmp_path / "data" / "train", 0, 2, tmp_path / "heard")
    said = capsys.readouterr().out
    lines = (tmp_path / "speech" / "manifest.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["text"] in said for line in lines) in (1, 2)  # two documents, perhaps of one utterance
    wavs = sorted((tmp_path / "heard").glob("train_0_*.wav"))
    assert len(wavs) == 1
    wave, rate = soundfile.read(wavs[0])
    assert rate == 24_000
    store = Store(tmp_path / "data" / "train")
    assert len(wave) == 1920 * int((store.document(0) >= store.space.audio_base).sum()) // 8
