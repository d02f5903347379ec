"""Results that are kept: whole lines only, and one writer at a time."""

import threading

from megatron_soda.evaluation.kept import Kept


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "kept.jsonl"
    opened = threading.Event()

    def second() -> None:
        opened.set()
        with Kept(path, "key") as kept:  # waits for the first
            assert kept.values == {"a": 1, "b": 2}
            kept.add("c", 3)

    with Kept(path, "key") as first:
        first.add("a", 1)
        other = threading.Thread(target=second)
        other.start()
        opened.wait()
        other.join(0.2)
        assert other.is_alive(), "it did not wait"
        first.add("b", 2)
    other.join()
    with Kept(path, "key") as kept:
        assert kept.values == {"a": 1, "b": 2, "c": 3}


def test_half_a_line_and_another_key(tmp_path):
    path = tmp_path / "kept.jsonl"
    with Kept(path, "key") as kept:
        kept.add("a", 1)
    path.write_bytes(path.read_bytes() + b'["b", ')
    with Kept(path, "key") as kept:
        assert kept.values == {"a": 1}
        kept.add("c", 3)
    with Kept(path, "key") as kept:
        assert kept.values == {"a": 1, "c": 3}
    with Kept(path, "another") as kept:
        assert kept.values == {}
