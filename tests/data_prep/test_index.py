"""The index: shards of a fixed size, recordings together, ids once."""

import pytest

from data_prep.index import Index, make_index, read_index, sample
from data_prep.utterance import Reject, Utterance
from megatron_soda.audio.sound import Sound


def utterance(id: str, recording: str = "", prompt: str = "") -> Utterance:
    return Utterance(id, Sound(f"{id}.wav", name="ü", start=0.5), f"text of {id}", "s", "en", prompt, recording)


def index(folder, items, size=4) -> tuple[Index, list[Reject]]:
    rejects: list[Reject] = []
    made = make_index(items, folder / "index", shard_size=size, reject=rejects.append)
    return made, rejects


def test_shards_hold_all_in_order(tmp_path):
    items = [utterance(f"u{i}") for i in range(1030)]
    made, rejects = index(tmp_path, items, size=2)  # more shards than one file takes
    assert [u for shard in made.shards for u, _ in read_index(shard)] == items
    assert [shard.count for shard in made.shards] == [2] * 515
    assert (made.utterances, made.cut_recordings, rejects) == (1030, 0, [])
    assert len({shard.path for shard in made.shards}) == 3
    assert len({shard.key for shard in made.shards}) == 515


def test_two_of_one_id_and_rejects_of_the_source(tmp_path):
    made, rejects = index(tmp_path, [utterance("a"), Reject("x", "bad"), utterance("b"), utterance("a")])
    assert [u.id for shard in made.shards for u, _ in read_index(shard)] == ["a", "b"]
    assert [r.reason for r in rejects] == ["bad", "duplicate id: 'a'"]


def test_a_recording_stays_in_one_shard(tmp_path):
    items = [utterance(f"{r}-{i}", recording=r) for r, n in (("a", 3), ("b", 6), ("c", 1)) for i in range(n)]
    made, _ = index(tmp_path, items, size=4)
    assert [[u.recording for u, _ in read_index(s)] for s in made.shards] == [["a"] * 3 + ["b"] * 6, ["c"]]


def test_recordings_that_are_cut_are_counted(tmp_path):
    endless = [utterance(f"{i}", recording="r") for i in range(100)]
    made, _ = index(tmp_path, endless, size=4)
    assert [s.count for s in made.shards] == [32, 32, 32, 4]
    assert made.cut_recordings == 3
    torn = [utterance("1", "r"), utterance("2", "q"), utterance("3", "r")]
    assert index(tmp_path, torn)[0].cut_recordings == 1


def test_a_changed_file_changes_the_key_of_its_shard_alone(tmp_path):
    items = []
    for i in range(8):
        (tmp_path / f"{i}.wav").write_bytes(b"x")
        items.append(Utterance(f"u{i}", Sound(str(tmp_path / f"{i}.wav")), "t"))
    before = [s.key for s in index(tmp_path, items)[0].shards]
    assert [s.key for s in index(tmp_path, items)[0].shards] == before
    (tmp_path / "6.wav").write_bytes(b"yy")
    after = [s.key for s in index(tmp_path, items)[0].shards]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_sample_does_not_depend_on_the_order(tmp_path):
    items = [utterance(f"u{i}") for i in range(50)]
    some = [u.id for u, _ in sample(index(tmp_path, items)[0].shards, 10, lambda u: u.id != "u7")]
    assert len(some) == 10
    assert some == [u.id for u, _ in sample(index(tmp_path, items[::-1])[0].shards, 10, lambda u: u.id != "u7")]


@pytest.mark.full
def test_memory_does_not_grow(tmp_path):
    import tracemalloc

    def peak(count: int) -> int:
        tracemalloc.start()
        index(tmp_path, (utterance(f"u{i:07d}") for i in range(count)), size=100)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1000)
    small, large = peak(2_000), peak(20_000)
    assert large - small < 18_000 * 40  # a shard of 100 has some 300 bytes in the list of shards


def test_ids_of_any_characters(tmp_path):
    items = [utterance("a/b\n\"'\\ü\U0001f600\0")]
    assert [u for s in index(tmp_path, items)[0].shards for u, _ in read_index(s)] == items


def test_no_utterances(tmp_path):
    assert index(tmp_path, [])[0].shards == []
