"""Speech-to-speech translation: partners, the figures against a loop, and models that know everything or nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_soda.codecs.description import read_description
from megatron_soda.data.units import write_units
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import likelihood, translations
from megatron_soda.evaluation.bench import Bench
from megatron_soda.evaluation.compare import compare
from megatron_soda.evaluation.run import evaluate
from megatron_soda.evaluation.suites import s2st
from megatron_soda.evaluation.suites.s2st import SpeechTranslation
from megatron_soda.evaluation.translations import Pair, Side, Written
from megatron_soda.files import write_json
from megatron_soda.inference import decoder, sample
from megatron_soda.inference.task import Prompt
from tests.evaluation.toys import Toy
from tests.exported import CONTEXT

WORDS = {"es": ("uno", "dos", "tres", "seis"), "en": ("one", "two", "three", "six")}


def side(language: str, name: str, text: int = 3, audio: int = 8) -> Side:
    value = sum(map(ord, name))
    return Side(np.full(text, value), np.full(audio, value), name, language)


def test_partners_have_other_words_in_the_same_languages_and_sources_as_long():
    own = Pair("own", side("es", "own"), side("en", "OWN"))
    others = [
        Pair("same source", side("es", "own"), side("en", "X")),
        Pair("same target", side("es", "x"), side("en", "OWN")),
        Pair("other languages", side("en", "a"), side("es", "A")),
        Pair("shorter", side("es", "b", audio=4), side("en", "B")),
        Pair("other text lengths", side("es", "c", text=4), side("en", "C")),
        Pair("longest", side("es", "d", audio=40), side("en", "D")),
        Pair("longer", side("es", "e", audio=12), side("en", "E")),
    ]
    found = {pair.id: other for pair, other in s2st.with_partners([own, *others], 0, 100)}
    assert found["own"].id == "longer"
    assert found["own"].source.audio.tolist() == [ord("e")] * 8
    assert (found["own"].source.said, len(found["own"].source.text)) == ("e", 3)
    assert not {"other languages", "longest"} & set(found)


def test_partners_leave_room_for_the_translation():
    pairs = [Pair(name, side("es", name, text=n), side("en", name.upper())) for name, n in [("a", 3), ("b", 9)]]
    rooms = {longest: [own.id for own, _ in s2st.with_partners(pairs, 0, longest)] for longest in (37, 38, 44)}
    assert rooms == {37: ["b"], 38: ["a", "b"], 44: ["a", "b"]}


def more_rows(exported, pairs: int = 8) -> list[dict]:
    """Pairs in both directions whose sounds start with the code of their word, and one pair that is too long."""
    rng, rows = np.random.default_rng(4), []
    for i in range(pairs + 1):
        for language in ("es", "en")[:: 1 if i % 2 else -1]:
            codes = rng.integers(0, 16, (CONTEXT if i == pairs else 3 + (i // 2) % 2, 4))
            codes[0, 0] = i // 2 % 4
            text = WORDS[language][i // 2 % 4]
            names = {"id": f"{i}-{language}", "recording": f"r{i}", "prompt": f"p{i}", "language": language}
            rows.append({**exported.rows[0], **names, "codes": codes, "text": text})
    data = exported.run / "data"
    write_units(data / "test.parquet", rows, codec=read_description(data))
    return rows


def test_figures_are_those_of_a_loop_over_documents(exported, monkeypatch):
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 300)
    more_rows(exported)
    bench = Bench(exported.recipe(), exported.folder)
    result = SpeechTranslation().measure(bench)
    assert (result["pairs"], result["left_out"]) == (8, 1)
    chosen = s2st.with_partners(translations.pairs_of(bench), bench.recipe.seed, CONTEXT + 1)
    assert [own.id for own, _ in chosen] == [entry["id"] for entry in result["texts"]]
    space, scorer = bench.model.space, likelihood.Likelihood(bench.model, 4)
    sums = {part: np.zeros(3) for part in s2st.PARTS}

    def nats(given: Pair, texts: Pair, target: Side) -> tuple[float, float]:
        sound, words = [space.audio_start, *given.source.audio, space.audio_end], []
        for one in (texts.source, texts.target):
            words += [space.text_start, *one.text, space.text_end]
        ids = np.array([space.bos, *sound, *words, space.audio_start, *target.audio, space.audio_end, space.eos])
        (found,) = next(scorer.nats([ids.astype(np.int32)], ["all"]))
        text, at = 0.0, len(sound) + 1
        for position, token in enumerate(words, start=at):
            text += found[position - 1] if token < space.text_size else 0.0
        at += len(words)
        return text, float(found[at : at + len(target.audio)].sum())

    for own, other in chosen:
        text, audio = nats(own, own, own.target)
        mixed_text, mixed_audio = nats(other, own, own.target)
        sums["audio"] += audio, nats(other, other, own.target)[1], len(own.target.audio)
        sums["audio_own_texts"] += audio, mixed_audio, len(own.target.audio)
        sums["text"] += text, mixed_text, len(own.source.text) + len(own.target.text)
    for part, (right, wrong, count) in sums.items():
        row = result[part]
        assert row["tokens"] == count
        assert (row["right_nats"], row["wrong_nats"]) == pytest.approx((right / count, wrong / count), abs=1e-5)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    figures = result["items"]["figures"]  # what soda compare pairs
    for part in sums:
        for given in ("right", "wrong"):
            figure = figures[f"{part}_{given}"]
            assert len(figure["sums"]) == len(result["items"]["names"]) == len(chosen)
            assert sum(figure["sums"]) / sum(figure["counts"]) == pytest.approx(result[part][f"{given}_nats"])
    write_json(exported.run / "a.json", {"s2st": result})
    differences, refused = compare(exported.run / "a.json", exported.run / "a.json")
    assert not refused
    assert {"audio_gain", "errors_chain"} <= {one.figure for one in differences}
    # What a random model writes is legal, complete and wrong.
    assert result["errors"]["chain"] == {"share": 1.0, "low": 1.0, "high": 1.0, "count": 8}
    assert set(result["retrieval"]) == {"en-es", "es-en"}
    assert all(row["choices"] == 4 for row in result["retrieval"].values())
    named = {row.name: row for row in SpeechTranslation().rows(result)}
    assert named["audio"].interval == (-result["audio"]["gain_high"], -result["audio"]["gain_low"])
    assert (named["errors_chain"].value, named["retrieval_es-en"].count) == (1.0, 4)


def test_sums_of_a_document_from_different_tokens_on(exported):
    bench = Bench(exported.recipe(), exported.folder)
    document = bench.data[0].document(0)
    (nats,) = next(likelihood.Likelihood(bench.model, 4).nats([document], ["all"]))
    for _ in range(2):  # computed, then kept
        sums = likelihood.class_sums(bench, "some", [document] * 3, 4, [1, 4, 9]).sum(1)
        assert sums == pytest.approx([nats.sum(), nats[3:].sum(), nats[8:].sum()])


def test_a_model_that_translates_is_right_and_one_that_knows_nothing_is_not(exported, monkeypatch):
    """The translator writes the word of the first code it hears; the translation's first code is that of the word that
    it wrote."""
    more_rows(exported)
    bench, s = Bench(exported.recipe(), exported.folder), exported.space
    text = bench.model.text

    def word_of(ids: list[int], language: str) -> str:
        return WORDS[language][(ids[2] - s.audio_base) % 16]

    def knows(ids: list[int]) -> np.ndarray:
        logits = np.zeros(s.size)
        if ids[-1] == s.audio_start and s.text_end in ids:
            *_, at = [i for i, token in enumerate(ids) if token == s.text_start]
            said = text.decode(token for token in ids[at:] if token < s.text_size)
            code = next(i for words in WORDS.values() for i, word in enumerate(words) if said.endswith(word))
            logits[s.audio_base + code] = 20.0
        return logits

    def knows_nothing(ids: list[int]) -> np.ndarray:
        return np.zeros(s.size)

    def write(_: object, constraint: object, prompts: list[Prompt], temperature: float) -> list[SimpleNamespace]:
        assert temperature == 0
        found = []
        for prompt in prompts:
            said, source = text.decode(t for t in prompt.ids if t < s.text_size), prompt.ids[-1] == s.text_start
            language = "en" if said.endswith("<language>en</language>") else "es"
            if source:
                language = languages[tuple(prompt.ids[2:6])]
            word = word_of(prompt.ids, language) if bench.model.key == "knows" else "?"
            more = text.encode((f"<language>{language}</language>" if source else "") + word)
            found.append(SimpleNamespace(ids=[*prompt.ids, *more, s.text_end]))
        return found

    languages = {tuple(p.source.audio[:4].tolist()): p.source.language for p in translations.pairs_of(bench)}
    monkeypatch.setattr(sample, "sample", write)
    monkeypatch.setattr(decoder, "Decoder", lambda model: SimpleNamespace(context=CONTEXT))
    for logits, share, missed in ((knows, 0.0, 0.0), (knows_nothing, 1.0, 0.75)):
        bench.model.model, bench.model.key = Toy(s, logits), logits.__name__
        result = SpeechTranslation().measure(bench)
        assert [result["errors"][part]["share"] for part in s2st.TEXTS] == [share] * 3
        assert {row["missed"] for row in result["retrieval"].values()} == {missed}
        gains = result["audio"]["gain_low"], result["audio_own_texts"]["gain"]
        assert gains[0] > 0.1 if share == 0 else gains[0] == pytest.approx(0, abs=1e-6)
        assert gains[1] == pytest.approx(0, abs=1e-6)  # this one listens to its texts only
        assert result["texts"][0]["written"] == (result["texts"][0]["texts"] if share == 0 else ["?", "?"])


def test_texts_are_written_once(exported, monkeypatch):
    more_rows(exported)
    bench = Bench(exported.recipe(), exported.folder)
    pairs = translations.pairs_of(bench)
    first = translations.write_texts(bench, pairs[:3])  # a batch
    original, batches = translations._write, []
    monkeypatch.setattr(translations, "_write", lambda *given: batches.append(given[-1]) or original(*given))
    every = translations.write_texts(bench, pairs)  # goes on after an interruption
    assert [len(some) for some in batches] == [3, 2]
    assert every[:3] == first
    assert translations.write_texts(bench, pairs) == every
    assert len(batches) == 2
    translations.write_texts(bench, [*pairs[:2], Pair("other", pairs[2].source, side("fr", "o"))])  # another language
    assert len(batches) == 3


def test_scores_that_are_equal_share_the_choice():
    scores = np.array([[3.0, 1, 1], [2, 2, 1], [1, 0, 0]])
    assert s2st._missed(scores).tolist() == [0, 0.5, 1]


def test_texts_that_leave_no_room_are_not_matched():
    def pair(audio: int, written: int) -> tuple[Pair, Written]:
        return Pair("p", side("es", "a"), side("en", "A", audio=audio)), Written(("", ""), [0] * written)

    some = [pair(20, 77), pair(4, 78)]
    assert s2st._fitting(some, 100) == some[:1]


def test_what_cannot_be_measured_is_refused(exported):
    rows = more_rows(exported)
    data = exported.run / "data"
    codec = read_description(data)
    alone = [row for row in rows if row["language"] == "en"]
    write_units(data / "test.parquet", [*alone, *({**row, "language": ""} for row in rows)], codec=codec)
    with pytest.raises(SodaError, match="the test split has no recording of two utterances"):
        evaluate(exported.recipe("suite=[s2st]"), exported.folder)
    write_units(data / "test.parquet", rows[:4], codec=codec)
    with pytest.raises(SodaError, match="none of the 2 pairs that fit the model's context"):
        evaluate(exported.recipe("suite=[s2st]"), exported.folder)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(translations, "AT_ONCE", 3)
