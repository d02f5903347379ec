"""SODA's released documents, strings both ways: literal ones, malformed ones, and any at all."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import strings
from data_prep.strings import to_ids, to_string
from megatron_soda.tokenizer import TextTokenizer, clean_text, train_sentencepiece
from megatron_soda.vocab import BOS, EOS, LLAMA3, MARKERS, TokenSpace

TS, TE, AS, AE = MARKERS


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> TextTokenizer:
    """A tokenizer without merges: 'a' to 'z' are 0 to 25, then a space, '[', ']', '<', '>', '/', '0', '-'."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz []<>/0-")}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)])
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextTokenizer(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_sentencepiece(path, ["please hold the line", "a pound key", "¿desea dejar un mensaje?"] * 20, 300)
    return TextTokenizer(path)


# Two frames of 8 as the facts write them, character 0xE000 + 2048 * codebook + code, and their ids, 128260 + the same.
FRAME_A = "\ue000\ue800\uf000\uf800\U00010000\U00010800\U00011000\U00011800"  # code 0 eight times
IDS_A = [128260, 130308, 132356, 134404, 136452, 138500, 140548, 142596]
FRAME_B = "\ue7ff\uefff\uf7ff\uffff\U000107ff\U00010fff\U000117ff\U00011fff"  # code 2047 eight times
IDS_B = [130307, 132355, 134403, 136451, 138499, 140547, 142595, 144643]
# fmt: off
GOLDEN = {
    "text-first": (
        "<|begin_of_text|><|text_start|>hi<|text_end|>"
        "<|audio_start|>" + FRAME_A + FRAME_B + "<|audio_end|><|end_of_text|>",
        [128000, 128256, 7, 8, 128257, 128258, *IDS_A, *IDS_B, 128259, 128001],
    ),
    "audio-first, two utterances": (
        "<|begin_of_text|><|audio_start|>" + FRAME_A + "<|audio_end|><|text_start|>ab<|text_end|>"
        "<|audio_start|>" + FRAME_B + "<|audio_end|><|text_start|>c d<|text_end|><|end_of_text|>",
        [128000, 128258, *IDS_A, 128259, 128256, 0, 1, 128257,
         128258, *IDS_B, 128259, 128256, 2, 26, 3, 128257, 128001],
    ),
    "text-first, two utterances": (
        "<|begin_of_text|><|text_start|>ab<|text_end|><|audio_start|>" + FRAME_B + "<|audio_end|>"
        "<|text_start|>ab<|text_end|><|audio_start|>" + FRAME_A + "<|audio_end|><|end_of_text|>",
        [128000, 128256, 0, 1, 128257, 128258, *IDS_B, 128259, 128256, 0, 1, 128257, 128258, *IDS_A, 128259, 128001],
    ),
    "audio-only": (
        "<|begin_of_text|><|audio_start|>" + FRAME_B + FRAME_A + "<|audio_end|><|end_of_text|>",
        [128000, 128258, *IDS_B, *IDS_A, 128259, 128001],
    ),
    "tts": (
        "<|begin_of_text|><|text_start|>[0]a<|text_end|><|audio_start|>" + FRAME_A + "<|audio_end|><|end_of_text|>",
        [128000, 128256, 27, 32, 28, 0, 128257, 128258, *IDS_A, 128259, 128001],
    ),
    "spaces of Emilia's first release": (
        "<|begin_of_text|><|text_start|> a <|text_end|><|audio_start|>" + FRAME_A + "<|audio_end|><|end_of_text|>",
        [128000, 128256, 26, 0, 26, 128257, 128258, *IDS_A, 128259, 128001],
    ),
    "bare text": ("<|begin_of_text|>a b<|end_of_text|>", [128000, 0, 26, 1, 128001]),
    "S2ST, method 1": (
        "<|begin_of_text|><|audio_start|>" + FRAME_A + "<|audio_end|>"
        "<|text_start|><language>de</language>ja<|text_end|><|text_start|><language>en</language>yes<|text_end|>"
        "<|audio_start|>" + FRAME_B + "<|audio_end|><|end_of_text|>",
        [128000, 128258, *IDS_A, 128259,
         128256, 29, 11, 0, 13, 6, 20, 0, 6, 4, 30, 3, 4, 29, 31, 11, 0, 13, 6, 20, 0, 6, 4, 30, 9, 0, 128257,
         128256, 29, 11, 0, 13, 6, 20, 0, 6, 4, 30, 4, 13, 29, 31, 11, 0, 13, 6, 20, 0, 6, 4, 30, 24, 4, 18, 128257,
         128258, *IDS_B, 128259, 128001],
    ),
}
# fmt: on


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_strings(name, letters):
    string, ids = GOLDEN[name]
    (found,) = to_ids([string], LLAMA3, letters)
    assert found.tolist() == ids
    assert found.dtype == np.int32
    assert LLAMA3.check(found) is None
    assert to_string(found, LLAMA3, letters) == string


def test_golden_strings_all_at_once(letters):
    found = to_ids([string for string, _ in GOLDEN.values()] * 3, LLAMA3, letters)
    assert [ids.tolist() for ids in found] == [ids for _, ids in GOLDEN.values()] * 3


def test_semantic_only_and_fewer_codebooks(letters):
    string = BOS + AS + "\ue005\ue7ff" + AE + EOS
    (found,) = to_ids([string], LLAMA3, letters, corpus_codebooks=1)
    assert found.tolist() == [128000, 128258, 128265, 130307, 128259, 128001]
    assert LLAMA3.check(found, 1) is None
    assert to_string(found, LLAMA3, letters) == string
    two = TokenSpace(LLAMA3.text_size, LLAMA3.bos, LLAMA3.eos, 2, 2048)
    (found,) = to_ids([BOS + AS + FRAME_A + FRAME_B + AE + EOS], two, letters, corpus_codebooks=8)
    assert found.tolist() == [128000, 128258, 128260, 130308, 130307, 132355, 128259, 128001]
    assert two.check(found) is None


SMALL = TokenSpace(text_size=36, bos=34, eos=35, codebooks=2, entries=4)
F = "\ue000\ue007"  # a frame of it


@pytest.mark.parametrize(
    ("string", "reason"),
    [
        ("", "character 0: the document ends at the start of a document"),
        ("a", "character 0: text is not legal at the start of a document"),
        (f"{BOS}", "character 17: the document ends right after <|begin_of_text|>"),
        (f"{BOS}{EOS}", "character 17: <|end_of_text|> is not legal right after <|begin_of_text|>"),
        (f"{BOS}a", "character 18: the document ends inside bare text"),
        (f" {BOS}a{EOS}", "character 0: text is not legal at the start of a document"),
        (f"{BOS}a{EOS}\n", "character 33: text is not legal after <|end_of_text|>"),
        (f"{BOS}a{EOS}{BOS}a{EOS}", "character 33: <|begin_of_text|> is not legal after <|end_of_text|>"),
        (f"{AS}{F}{AE}{EOS}", "character 0: <|audio_start|> is not legal at the start of a document"),
        (f"{BOS}{AS}{F}{AE}", "character 47: the document ends between spans"),
        (f"{BOS}{AS}{F}{EOS}", "character 34: <|end_of_text|> is not legal at slot 0 of an audio frame"),
        (f"{BOS}{AS}{AE}{EOS}", "character 32: <|audio_end|> is not legal right after <|audio_start|>"),
        (f"{BOS}{TS}{TE}{EOS}", "character 31: <|text_end|> is not legal right after <|text_start|>"),
        (f"{BOS}{TS}a{AS}{F}{AE}{EOS}", "character 32: <|audio_start|> is not legal inside a text span"),
        (f"{BOS}{TS}a{TE}a{EOS}", "character 44: text is not legal between spans"),
        (f"{BOS}a{TS}a{TE}{EOS}", "character 18: <|text_start|> is not legal inside bare text"),
        (f"{BOS}{F}{EOS}", "character 17: a code of codebook 0 is not legal right after <|begin_of_text|>"),
        (f"{BOS}{TS}a\ue001{TE}{EOS}", "character 32: a code of codebook 0 is not legal inside a text span"),
        (f"{BOS}{AS}{F}\ue000{AE}{EOS}", "character 35: <|audio_end|> is not legal at slot 1 of an audio frame"),
        (f"{BOS}{AS}{F[::-1]}{AE}{EOS}", "character 32: a code of codebook 1 is not legal right after <|audio_start|>"),
        (f"{BOS}{AS}{F}\ue001\ue001{AE}{EOS}", "character 35: a code of codebook 0 is not legal at slot 1 of"),
        (f"{BOS}{AS}\ue000\ue008{AE}{EOS}", "character 33: U+E008 is no code of 2 codebooks"),
        (f"{BOS}{AS}a{F}{AE}{EOS}", "character 32: U+0061 is no code of 2 codebooks"),
        (f"{BOS}{AS}{F}a{F}{AE}{EOS}", "character 34: U+0061 is no code of 2 codebooks"),
        (f"{BOS}{TS}a\ud800{TE}{EOS}", "character 32: half a surrogate pair"),
        (f"{BOS}{TS}é{TE}{EOS}", "character 31: the tokenizer has no ids for this text"),
        (f"{BOS}é{EOS}", "character 17: the tokenizer has no ids for this text"),
    ],
)
def test_malformed(string, reason, letters):
    good = f"{BOS}{TS}ab{TE}{AS}{F}{AE}{EOS}"
    (alone,) = to_ids([string], SMALL, letters)
    assert isinstance(alone, str)
    assert alone.startswith(reason)
    first, found, last = to_ids([good, string, good], SMALL, letters)
    assert found == alone
    assert first.tolist() == last.tolist() == [34, 36, 0, 1, 37, 38, 40, 47, 39, 35]


def test_a_marker_does_not_begin_in_one_document_and_end_in_the_next(letters):
    assert all(isinstance(d, str) for d in to_ids([f"{BOS}a<|end_of", "_text|>"], SMALL, letters))


PARTS = st.sampled_from(
    [BOS, EOS, *MARKERS, F, F + F, "\ue000", "\ue004", "\ue008", "a", " b-", "é", "<|", "\ud800", "\0"]
)
AUDIO, WORDS = st.sampled_from([F, F * 3]), st.sampled_from(["a", " b", "<|text_", "zz z"])
SPANS = st.lists(
    st.one_of(AUDIO.map(lambda a: AS + a + AE), WORDS.map(lambda t: TS + t + TE), st.sampled_from([AS + AE, F])),
    max_size=4,
).map("".join)
ANY = st.one_of(
    st.text(max_size=20),
    st.lists(PARTS, max_size=8).map("".join),
    st.builds(lambda inner: BOS + inner + EOS, st.one_of(SPANS, st.lists(PARTS, max_size=5).map("".join), st.text())),
)


def slowly(string: str, space: TokenSpace, slots: int, tokenizer: TextTokenizer) -> list[int] | None:
    """Ids by the definition, item by item; None where `space.check` says no or a text has no ids."""
    markers = {BOS: space.bos, EOS: space.eos} | {m: space.text_size + i for i, m in enumerate(MARKERS)}
    audio = f"[\ue000-{chr(0xE000 + space.codebooks * space.entries - 1)}]"
    pattern = f"{'|'.join(map(re.escape, markers))}|{audio}"
    ids, after = [], 0
    for found in [*re.finditer(pattern, string), None]:
        words = string[after : found.start() if found else None]
        if re.search("[\ud800-\udfff]", words) or (words and not tokenizer.encode(words)):
            return None
        ids += tokenizer.encode(words)
        if found:
            ids.append(markers.get(found[0]) or ord(found[0]) - 0xE000 + space.audio_base)
            after = found.end()
    return ids if space.check(np.array(ids, np.int64), slots) is None else None


@settings(max_examples=400)
@given(st.lists(ANY, max_size=6), st.sampled_from([0, 1, 2]), st.sampled_from([1, 30, 2**17]))
def test_any_strings(letters, some, codebooks, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strings, "CHARACTERS_AT_ONCE", at_once)
        made = to_ids(some, SMALL, letters, codebooks)
    assert len(made) == len(some)
    for string, found in zip(some, made, strict=True):
        wanted = slowly(string, SMALL, codebooks or 2, letters)
        if wanted is None:
            assert isinstance(found, str)
            assert re.match(r"character \d+: ", found)
        else:
            assert not isinstance(found, str)
            assert found.tolist() == wanted


@settings(max_examples=100)
@given(st.lists(ANY, max_size=4), st.integers(2, 4))
def test_more_codebooks_than_the_space(letters, some, entries):
    """What is left of a document of 4 codebooks when 2 are taken is what the whole of it says."""
    narrow, wide = (TokenSpace(36, 34, 35, n, entries) for n in (2, 4))
    frames = "".join(chr(0xE000 + entries * k + 1) for k in range(4))
    some = [*(s.replace(F, frames) for s in some), BOS + AS + frames + AE + EOS]
    for whole, cut in zip(to_ids(some, wide, letters), to_ids(some, narrow, letters, 4), strict=True):
        if isinstance(whole, str):
            assert cut == whole
        else:
            assert cut.tolist() == whole[whole < wide.audio_base + 2 * entries].tolist()
            assert narrow.check(cut) is None


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.lists(st.text(max_size=20), max_size=3))
def test_a_store_comes_back(text, seed, texts):
    """Ids to strings to ids, for cleaned texts of any kind."""
    space = text.space(4, 16)
    rng = np.random.default_rng(seed)
    made = []
    for spoken in texts:
        ids = text.encode(clean_text(spoken, space))
        audio = space.audio_ids(rng.integers(0, 16, (int(rng.integers(1, 4)), 4)))
        if ids:
            made.append([space.bos, space.text_start, *ids, space.text_end, space.audio_start, *audio,
                         space.audio_end, space.eos])  # fmt: skip
            made.append([space.bos, *ids, space.eos])
    back = to_ids([to_string(np.array(d), space, text) for d in made], space, text)
    assert [b if isinstance(b, str) else b.tolist() for b in back] == made


def test_each_text_is_tokenised_once(letters, monkeypatch):
    seen: list[str] = []
    encode = letters.encode_batch
    monkeypatch.setattr(letters, "encode_batch", lambda texts: seen.extend(texts) or encode(texts))
    monkeypatch.setattr(strings, "CHARACTERS_AT_ONCE", 10)
    orders = [f"{TS}abc{TE}{AS}{F}{AE}", f"{AS}{F}{AE}{TS}abc{TE}"]
    to_ids([BOS + order + EOS for order in orders * 3], SMALL, letters)
    assert seen == ["abc"]
