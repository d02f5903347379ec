"""Each layout of a likelihood benchmark is read as it is meant, or refused by name."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_soda.audio.reading import read_audio
from megatron_soda.errors import SodaError
from megatron_soda.evaluation.pair_files import SALMON, language_pairs, salmon_pairs, story_pairs
from tests.evaluation.pair_folders import LevelCodec, codes_of, flat, gold, hub, salmon_hub, samples, text
from tests.exported import RATE


def heard(sound) -> list[int]:
    return LevelCodec().encode([read_audio(sound, RATE)])[0][:, 0].tolist()


LAYOUTS = {
    "ZeroSpeech words": (lambda f: language_pairs(gold(f, "words"), "words"), 8),
    "ZeroSpeech sentences": (lambda f: language_pairs(gold(f, "sentences"), "sentences"), 8),
    "Parquet words": (lambda f: language_pairs(hub(f, "words"), "words"), 4),
    "Parquet sentences": (lambda f: language_pairs(hub(f, "sentences"), "sentences"), 4),
    "numbered words": (lambda f: language_pairs(flat(f, 12), "words"), 12),
    "numbered sentences": (lambda f: language_pairs(flat(f, 12, "+"), "sentences"), 12),
    "labelled stories": (lambda f: story_pairs(flat(f, 4, "_", ("correct", "incorrect"))), 4),
    "labelled the other way": (lambda f: story_pairs(flat(f, 4, "_", ("true-positive", "a negative"))), 4),
    "SALMon": (lambda f: salmon_pairs(samples(f, SALMON)), 32),
    "SALMon's Parquet": (lambda f: salmon_pairs(salmon_hub(f, SALMON)), 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_right_side_is_the_positive_one(tmp_path, layout):
    read, count = LAYOUTS[layout]
    pairs = read(tmp_path / "set")
    assert len(pairs) == count == len({pair.name for pair in pairs})
    assert [pair.name for pair in pairs] == sorted(pair.name for pair in pairs)
    all_codes = [[tuple(codes_of(n, right)) for n in range(40)] for right in (True, False)]
    for pair in pairs:
        positive, negative = heard(pair.positive.sound), heard(pair.negative.sound)
        number = all_codes[0].index(tuple(positive))
        assert tuple(negative) in all_codes[1]
        assert not any(code % 2 for code in positive)
        if "SALMon" not in layout:
            item = number // 10 if "ZeroSpeech" in layout else number
            assert (pair.positive.text, pair.negative.text) == (text(item, True), text(item, False))
            assert negative == codes_of(number, False)


def test_tasks_and_groups(tmp_path):
    words = language_pairs(gold(tmp_path / "w", "words"), "words")
    assert [(pair.name, pair.group) for pair in words[:3]] == [("0 A", "0"), ("0 B", "0"), ("1 A", "1")]
    assert [pair.task for pair in words[::2]] == ["out of vocabulary", "1 to 5", "21 to 100", "over 100"]
    sentences = language_pairs(gold(tmp_path / "s", "sentences"), "sentences")
    assert [(p.name, p.group, p.task) for p in sentences[:3:2]] == [
        ("s 0 A", "s 0", "agreement"),
        ("s 1 A", "s 1", "islands"),
    ]
    own = salmon_pairs(samples(tmp_path / "own", ["another speaker", "reversed"], 2))
    assert [(pair.name, pair.task) for pair in own[1:3]] == [
        ("another speaker 1", "another speaker"),
        ("reversed 0", "reversed"),
    ]


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(re.sub(old, new, path.read_text(), count=1, flags=re.MULTILINE))


def wuggy(folder: Path) -> None:
    language_pairs(folder, "words")


def one_wav(folder: Path) -> Path:
    return sorted(folder.rglob("*.wav"))[0]


REFUSED = {
    "no layout": (lambda f: f.mkdir(), wuggy, r"set: no pairs in it: neither gold\.csv nor Parquet files nor wav"),
    "a test set without answers": (
        lambda f: (gold(f, "words") / "dev" / "gold.csv").unlink(),
        wuggy,
        r"no gold\.csv says which are right \(ZeroSpeech's test sets have none\)",
    ),
    "two layouts": (
        lambda f: [hub(f, "words"), flat(f / "in"), [p.rename(f / p.name) for p in (f / "in").iterdir()]],
        wuggy,
        "set: holds both Parquet files and wav files, so it is not clear",
    ),
    "dev and test": (
        lambda f: gold(f, "words") and (f / "dev").rename(f / "test") and gold(f, "words"),
        wuggy,
        r"holds several: .*dev/gold\.csv, .*test/gold\.csv\. Link the folder of one",
    ),
    "other columns": (
        lambda f: gold(f, "sentences"),
        wuggy,
        r"no gold\.csv in it has the columns id, file",
    ),
    "a wav is missing": (
        lambda f: one_wav(gold(f, "words")).unlink(),
        wuggy,
        r"incomplete: 1 recordings are missing: .*\.wav",
    ),
    "half a pair": (
        lambda f: edit(gold(f, "words") / "dev/gold.csv", r"^0,.*,A,1,.*\n", ""),
        wuggy,
        r"gold\.csv: incomplete: only one side of 1 pairs: 0 A",
    ),
    "two right ones": (
        lambda f: edit(gold(f, "words") / "dev/gold.csv", r"^(0,.*,A),0,", r"\1,1,"),
        wuggy,
        r"gold\.csv: line \d+: pair 0 A has two rows with correct=1",
    ),
    "neither right nor wrong": (
        lambda f: edit(gold(f, "words") / "dev/gold.csv", r"^(0,.*,A),0,", r"\1,no,"),
        wuggy,
        r"gold\.csv: line \d+: correct is 'no', not 0 or 1",
    ),
    "a short line": (
        lambda f: edit(gold(f, "words") / "dev/gold.csv", r"^(0,[^,]*),.*\n", r"\1\n"),
        wuggy,
        r"gold\.csv: line \d+: nothing in column voice",
    ),
    "no such frequency": (
        lambda f: edit(gold(f, "words") / "dev/gold.csv", r"^(0,\w*,A,1),oov,", r"\1,rare,"),
        wuggy,
        "frequency 'rare' is neither a number nor oov",
    ),
    "other Parquet columns": (
        lambda f: hub(f, "sentences"),
        wuggy,
        r"train-0\.parquet: no column positive_word; it",
    ),
    "which is right is not said": (
        lambda f: flat(f, 4, "_", ("a", "b")),
        story_pairs,
        r"0_a\.wav: ambiguous: 0_b\.wav has the same number, and neither name says which",
    ),
    "an odd one": (
        lambda f: (flat(f) / "7_x.wav").unlink(),
        story_pairs,
        "incomplete: 7 wav files, so one has no",
    ),
    "one number thrice": (
        lambda f: (flat(f, 4, "_", ("correct", "incorrect")) / "0_correct.wav").rename(f / "1_more.wav"),
        story_pairs,
        r"incomplete: numbers whose files are not two: 0 \(1\), 1 \(3\)",
    ),
    "not numbered": (
        lambda f: (flat(f) / "7_x.wav").rename(f / "x.wav"),
        wuggy,
        r"x\.wav: the name does not begin",
    ),
    "SALMon, half": (
        lambda f: (samples(f, SALMON) / "rir_consistency/sample_2_0.wav").unlink(),
        salmon_pairs,
        "incomplete: only one side of 1 pairs: rir_consistency/sample_2",
    ),
    "SALMon without two tasks": (
        lambda f: samples(f, SALMON[:6]),
        salmon_pairs,
        "SALMon has 8 tasks, and sentiment_consistency, speaker_consistency are missing",
    ),
    "SALMon, other names": (
        lambda f: (samples(f, SALMON) / "rir_consistency/sample_2_0.wav").rename(f / "rir_consistency/2.wav"),
        salmon_pairs,
        r"rir_consistency/2\.wav: not named sample_NUMBER_0\.wav",
    ),
    "SALMon twice": (
        lambda f: [salmon_hub(f, SALMON), samples(f, SALMON)],
        salmon_pairs,
        "holds both Parquet files and folders of wav files",
    ),
    "one id twice": (
        lambda f: [hub(f, "words"), (f / "train-9.parquet").write_bytes((f / "train-0.parquet").read_bytes())],
        wuggy,
        "holds several pairs named 0, 2$",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_by_name(tmp_path, fault):
    make, read, message = REFUSED[fault]
    make(tmp_path / "set")
    with pytest.raises(SodaError, match=message) as caught:
        read(tmp_path / "set")
    assert str(tmp_path / "set") in str(caught.value)


def test_levels_survive_the_file():
    assert np.array_equal(LevelCodec().encode([np.full(640, 0.25, np.float32)]), [[[4, 5, 6, 7]]])
