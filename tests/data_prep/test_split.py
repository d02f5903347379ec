"""The split: nothing that is the same in any way stands on two sides, in any order of the input."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.interleave import text_first
from data_prep.prepare import prepare
from data_prep.split import ID, SIDES, Groups, by_share, keys_of
from data_prep.utterance import prompt_key
from megatron_soda.config import Recipe, load_recipe
from megatron_soda.data.store import Store
from megatron_soda.data.validate import validate
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import data_tokenizer, document_string
from tests.voices import voice

ALL = ("recording", "prompt", "text", "audio")


def divided(folder: Path, utterances: list[list[str]], valid: float, test: float) -> list[str]:
    """The side of each utterance, given as its keys; the last is its own."""
    groups = Groups(folder / "groups.sqlite")
    for keys in utterances:
        groups.add(keys)
    groups.divide(valid, test)
    sides = [groups.side(keys[-1:]) for keys in utterances]
    assert [groups.side(keys[:1]) for keys in utterances] == sides
    assert sum(groups.counts().values()) == len(components(utterances))
    groups.close()
    assert not list(folder.glob("*.sqlite"))
    return sides


def components(utterances: list[list[str]]) -> list[set[str]]:
    """Joins sets of keys that meet, until none do: slow, and without a union-find."""
    found: list[set[str]] = []
    for keys in utterances:
        meeting = [one for one in found if one & set(keys)]
        found = [one for one in found if not one & set(keys)] + [set(keys).union(*meeting)]
    return found


made_up = st.lists(st.tuples(*(st.integers(0, 12) for _ in range(3))), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(made_up, st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([0.0, 0.05, 0.3]), st.randoms())
def test_sides_are_of_whole_groups_whatever_the_order(tmp_path_factory, shared, valid, test, shuffle):
    folder = tmp_path_factory.mktemp("split")
    # 0: has none of that kind
    utterances = [
        [*(f"{kind}\0{value}" for kind, value in zip("rpt", values, strict=True) if value), f"{ID}\0{number}"]
        for number, values in enumerate(shared)
    ]
    sides = divided(folder, utterances, valid, test)
    groups = components(utterances)
    of_group = [{side for keys, side in zip(utterances, sides, strict=True) if keys[-1] in group} for group in groups]
    assert all(len(one) == 1 for one in of_group)
    counts = Counter(side for one in of_group for side in one)
    for side, share in (("test", test), ("valid", valid)):
        assert counts[side] == max(round(share * len(groups)), 1 if share and len(groups) >= 3 else 0)
    mixed = list(zip(utterances, sides, strict=True))
    shuffle.shuffle(mixed)
    assert divided(folder, [keys for keys, _ in mixed], valid, test) == [side for _, side in mixed]


def test_a_group_that_is_larger_than_a_side_trains(tmp_path):
    for seed in range(5):
        large = [[f"r\0{seed}", f"{ID}\0{i}"] for i in range(60)]
        small = [[f"{ID}\0small {seed} {i}"] for i in range(40)]
        sides = divided(tmp_path, large + small, 0.1, 0.1)
        assert set(sides[:60]) == {"train"}
        assert Counter(sides[60:])["test"] == Counter(sides[60:])["valid"] == 4


def test_large_and_small_groups_are_held_out_alike(tmp_path):
    """Of many keys the smallest hash is a small one: that must not decide."""
    rng = random.Random(0)
    utterances, of_large = [], []
    for number in range(400):
        size = 8 if number % 2 else 1
        of_large += [size == 8] * size
        utterances += [[f"r\0{number}", f"t\0{rng.random()}", f"{ID}\0{number} {i}"] for i in range(size)]
    sides = divided(tmp_path, utterances, 0.2, 0.2)
    held = [large for side, large in zip(sides, of_large, strict=True) if side != "train"]
    assert 0.3 < sum(held) / 8 / 160 < 0.7


def test_memory_does_not_grow(tmp_path):
    import tracemalloc

    def peak(count: int) -> int:
        tracemalloc.start()
        groups = Groups(tmp_path / "groups.sqlite")
        for i in range(count):
            groups.add([f"text\0{i % 900}", f"recording\0{i // 7}", f"{ID}\0{i}"])
        groups.divide(0.1, 0.1)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        groups.close()
        return size

    peak(500)
    assert peak(8000) - peak(1000) < 50_000


def test_what_utterances_share():
    one = keys_of(ALL, id="1", recording="r", prompt="p", text="Hello, World!", audio="a")
    assert one == ["recording\0r", "prompt\0p", "text\0hello world", "audio\0a", "id\0001"]
    assert keys_of(ALL, id="2", text="hello  world") == ["text\0hello world", "id\0002"]
    assert keys_of(["recording"], id="3", text="x") == keys_of(ALL, id="3", text="?!") == ["id\0003"]


def test_by_share():
    sides = Counter(by_share(str(i), 0.1, 0.2) for i in range(5000))
    assert sides["valid"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert sides["test"] / 5000 == pytest.approx(0.2, abs=0.02)
    assert {by_share(str(i), 0, 0) for i in range(100)} == {"train"}


# ---- through `soda prepare`


def write_corpus(folder: Path, rows: list[dict]) -> Path:
    """A manifest; `voice` is the seed of the sound."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        name = f"clip_{number:03d}.wav"
        soundfile.write(folder / name, voice(row["voice"], 0.5 + 0.1 * (row["voice"] % 7)), 24_000)
        row["audio"] = name
    (folder / "manifest.jsonl").write_text(
        "".join(json.dumps({key: value for key, value in row.items() if key != "voice"}) + "\n" for row in rows)
    )
    return folder


def recipe(run: Path, speech: Path, *overrides: str) -> Recipe:
    some = ["prepare.workers=1", "prepare.text_pieces=300", "prepare.valid_share=0.2", "prepare.test_share=0.2"]
    return load_recipe(None, [f"run={run}", f"prepare.speech={speech}", *some, *overrides])


def held(data: Path) -> dict[str, list[dict]]:
    """The utterances of each side, as they were prepared."""
    from megatron_soda.data.units import read_units

    rows = {row["id"]: row for row in read_units(sorted((data / "units").glob("*.parquet")))}
    found = {side: [row["id"] for row in read_units([data / f"{side}.parquet"])] for side in ("valid", "test")}
    found["train"] = sorted(set(rows) - set(found["valid"]) - set(found["test"]))
    return {side: [rows[id] for id in ids] for side, ids in found.items()}


def leaks(data: Path) -> list[tuple[str, str, str]]:
    """What stands on two sides: (kind, one id, the other)."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    found = []
    for side, rows in held(data).items():
        for row in rows:
            for kind, value in {
                "recording": row["recording"],
                "prompt": row["prompt"],
                "text": prompt_key(row["text"], ""),
                "audio": row["codes"].tobytes(),
            }.items():
                if value:
                    before = first.setdefault((kind, value), (side, row["id"]))
                    if before[0] != side:
                        found.append((kind, before[1], row["id"]))
    return found


def corpus(seed: int) -> list[dict]:
    """Recordings of a few sentences; prompts, texts and sounds that come back here and there."""
    rng = random.Random(seed)
    rows = []
    for number in range(90):
        row = {"voice": number, "text": f"sentence {number} says {number * number}"}
        row["recording"] = f"r{number // 2}" if number % 3 else ""
        row["prompt"] = f"p{number // 3}" if rng.random() < 0.2 else ""
        if rows and rng.random() < 0.15:
            row["text"] = rng.choice(rows)["text"].upper() + "!"
        if rows and rng.random() < 0.15:
            row["voice"] = rng.choice(rows)["voice"]
        rows.append({key: value for key, value in row.items() if value != ""})
    return rows


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_leaks_and_validate_agrees(tmp_path, seed):
    rows = corpus(seed)
    speech = write_corpus(tmp_path / "speech", rows)
    prepare(recipe(tmp_path / "run", speech))
    assert leaks(tmp_path / "run" / "data") == []
    assert validate(tmp_path / "run" / "data")
    texts = defaultdict(list)
    for row in rows:
        texts[prompt_key(row["text"], "")].append(row)
    assert any(len(some) > 1 for some in texts.values())  # or it shows nothing
    # Without what is shared they do: the same corpus, split by recordings alone.
    prepare(recipe(tmp_path / "loose", speech, "prepare.split_by=[recording]"))
    kinds = {kind for kind, *_ in leaks(tmp_path / "loose" / "data")}
    assert kinds & {"text", "prompt", "audio"}
    assert "recording" not in kinds


def test_the_order_of_the_input_changes_no_side(tmp_path):
    speech = write_corpus(tmp_path / "speech", corpus(2))
    prepare(recipe(tmp_path / "one", speech))
    lines = (speech / "manifest.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (speech / "manifest.jsonl").write_text("".join(lines))
    prepare(recipe(tmp_path / "two", speech, "prepare.shard_size=7"))
    one, two = (held(tmp_path / run / "data") for run in ("one", "two"))
    for side in SIDES:
        assert {row["id"] for row in one[side]} == {row["id"] for row in two[side]}


def test_documents_that_are_the_same_are_there_once(tmp_path, capsys):
    """Clips under several names, orders that make the same documents, texts that are the same once cleaned."""
    rows = [{"voice": number % 30, "text": f"sentence {number % 30}"} for number in range(40)]
    speech = write_corpus(tmp_path / "speech", rows)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}\nline\u200b {i}\nline {i} \n" for i in range(60)))
    summary = prepare(
        recipe(
            tmp_path / "run",
            speech,
            "prepare.orders=[audio-first,asr,audio-only]",
            f"prepare.text=[{text}]",
            "prepare.text_share=0.3",
        )
    )
    assert validate(tmp_path / "run" / "data")
    spoken = 30 * 2  # of 40 * 3
    documents = [
        tuple(store.document(i).tolist())
        for store in (Store(tmp_path / "run" / "data" / side) for side in SIDES)
        for i in range(len(store))
    ]
    with_sound = [ids for ids in documents if store_space(tmp_path).audio_start in ids]
    assert len(with_sound) == len(set(with_sound)) == spoken
    assert len(documents) == len(set(documents)) == sum(summary["documents"].values())
    assert summary["duplicates"] >= 40 * 3 - spoken
    assert f"{summary['duplicates']} documents left out" in capsys.readouterr().err


def store_space(folder: Path):
    return Store(folder / "run" / "data" / "train").space


def test_a_text_that_is_spoken_too_is_on_the_side_of_that(tmp_path):
    rows = [{"voice": number, "text": f"Sentence number {number}."} for number in range(40)]
    speech = write_corpus(tmp_path / "speech", rows)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"sentence number {i}\n" for i in range(40)) + "".join(f"other {i}\n" for i in range(900)))
    run = recipe(tmp_path / "run", speech, f"prepare.text=[{text}]", "prepare.text_share=0.9")
    prepare(run)
    data = tmp_path / "run" / "data"
    tokenizer = data_tokenizer(data)
    spoken = {prompt_key(row["text"], ""): side for side, some in held(data).items() for row in some}
    found = 0
    for side in SIDES:
        store = Store(data / side)
        for i in range(len(store)):
            ids = store.document(i)
            if store.space.audio_start not in ids:
                key = prompt_key(tokenizer.decode(ids[1:-1]), "")
                found += key in spoken
                assert spoken.get(key, side) == side
    assert found >= 20


def test_a_corpus_that_hangs_together_says_why(tmp_path):
    rows = [
        {"voice": 2 * r + i, "text": "Yes." if i else f"sentence {r}", "recording": f"r{r}"}
        for r in range(20)
        for i in (0, 1)
    ]
    speech = write_corpus(tmp_path / "speech", rows)
    for dry in (True, False):
        with pytest.raises(SodaError, match=r"no document is left .* 40 of 40 are linked.* out of prepare\.split_by"):
            prepare(recipe(tmp_path / "run", speech), dry_run=dry)
    prepare(recipe(tmp_path / "run", speech, "prepare.split_by=[recording,prompt,audio]"))
    assert validate(tmp_path / "run" / "data")
    with pytest.raises(SodaError, match="documents are whole recordings"):
        recipe(tmp_path / "run", speech, "prepare.split_by=[text]")
    with pytest.raises(SodaError, match="split_by"):
        recipe(tmp_path / "run", speech, "prepare.split_by=[recording,sentence]")
    assert np.all([Store(tmp_path / "run" / "data" / side).size for side in SIDES])


def test_the_three_forms_of_segments_give_identical_bytes(tmp_path):
    speech = tmp_path / "speech"
    speech.mkdir()
    soundfile.write(speech / "long.wav", np.concatenate([voice(i, 1.3) for i in range(20)]), 24_000)
    made = set()
    for first, second in (("start", "end"), ("start", "duration"), ("offset", "duration")):
        rows = []
        for i in range(20):
            start, length = round(1.3 * i, 1), 1.1
            last = round(start + length, 1) if second == "end" else length
            rows.append({"audio": "long.wav", "text": f"sentence {i}", first: start, second: last})
        (speech / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = tmp_path / first / second
        prepare(recipe(run, speech))
        assert validate(run / "data")
        made.add(tuple((run / "data" / f"{side}.bin").read_bytes() for side in SIDES))
        table = pq.read_table(run / "data" / "units" / "part-000000.parquet")
        made.add(tuple(map(str, table.to_pylist())))
    assert len(made) == 2


def test_what_to_do_about_ids_that_are_none(tmp_path):
    rows = [{"voice": i, "text": f"sentence {i}", "id": f"speaker {i % 2}"} for i in range(10)]
    speech = write_corpus(tmp_path / "speech", rows)
    with pytest.raises(SodaError, match=r"duplicate id: 8.*prepare\.columns=\{id: null\}"):
        prepare(recipe(tmp_path / "run", speech))
    assert prepare(recipe(tmp_path / "run", speech, "prepare.columns={id: null}"))["utterances"] == 10
    with pytest.raises(SodaError, match="not for speech=asterisk"):
        prepare(recipe(tmp_path / "none", Path("asterisk"), "prepare.columns={id: null}"))


def test_little_speech_beside_a_released_corpus(tmp_path):
    """Two utterances alone cannot be split; beside a corpus that is on all sides they need not."""
    rows = [{"voice": i, "text": f"sentence {i}"} for i in range(14)]
    large = recipe(tmp_path / "large", write_corpus(tmp_path / "much", rows))
    prepare(large)
    store = Store(large.data_folder / "train")
    tokenizer = data_tokenizer(large.data_folder)
    rng = np.random.default_rng(0)
    documents = [
        text_first([(tokenizer.encode(f"line {i}"), rng.integers(0, 2048, (5, 8)))], store.space) for i in range(60)
    ]
    strings = [document_string(ids, store.space, tokenizer) for ids in documents]
    pq.write_table(pa.table({"text": strings}), tmp_path / "c.parquet")
    little = write_corpus(tmp_path / "little", rows[:2])
    more = [f"prepare.released=[{tmp_path}/c.parquet]", f"prepare.tokenizer={tokenizer.path}"]
    with pytest.raises(SodaError, match="too little usable input to split"):
        prepare(recipe(tmp_path / "alone", little))
    prepare(recipe(tmp_path / "both", little, *more))
    assert validate(tmp_path / "both" / "data")
