"""Who is behind is found out from signs of life in a store; the clocks are the test's own."""

import threading
import time

import pytest

from megatron_soda.parallel import watch
from megatron_soda.parallel.one_node import loopback_store
from megatron_soda.parallel.watch import PATIENCE, SILENCE, Place, Watch


class EndedError(Exception):
    """Instead of the end of the process."""


@pytest.fixture
def ranks(monkeypatch, capsys):
    """Four watches on one store, all in the middle of step 8, and a clock for them."""
    server = loopback_store()
    made = [Watch(server.clone(), rank, 4) for rank in range(4)]
    for rank, one in enumerate(made):
        one.host = f"host-{rank // 2}"

    def end(code: int):
        raise EndedError

    monkeypatch.setattr(watch.os, "_exit", end)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    place = Place()
    place.step, place.part = 7, "forward_backward"
    monkeypatch.setattr(watch, "place", place)
    yield made
    monkeypatch.undo()


def tick(ranks, seconds: float, silent=(), moving: bool = True, beat: float = SILENCE / 12) -> None:
    """Lets time pass. `silent` ranks do nothing; with `moving` the main threads get on."""
    until = ranks[0].ticked + seconds
    while (now := ranks[0 if 0 not in silent else 1].ticked + beat) <= until:
        if moving:
            watch.place.moved = now
        for one in ranks:
            if one.rank not in silent:
                one.tick(now)


def test_all_alive(ranks):
    tick(ranks, 5 * SILENCE)


@pytest.mark.parametrize("gone", [1, 3])
def test_a_silent_rank_is_named_with_its_place(ranks, capsys, gone):
    tick(ranks, SILENCE)
    tick(ranks, SILENCE - SILENCE / 6, [gone])  # not yet
    with pytest.raises(EndedError):
        tick(ranks, SILENCE / 2, [gone])
    said = capsys.readouterr().err
    assert f"error on rank 0 (host-0): rank {gone} (host-{gone // 2}, process " in said
    assert "has given no sign of life for 6" in said
    assert "last seen at step 8, forward_backward, in " in said
    cause = ranks[2].cause()
    assert cause is not None
    assert cause["rank"] == 0


def test_the_others_look_at_rank_0(ranks, capsys, monkeypatch):
    tick(ranks, SILENCE)
    with pytest.raises(EndedError):
        tick(ranks, 3 * SILENCE, [0])
    assert "error on rank 1 (host-0): rank 0 (host-0, process " in capsys.readouterr().err
    watch.place.moved -= SILENCE
    for local_rank in ("0", "1"):  # the other ones end, too; it is said once on each host
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(EndedError):
            ranks[2].tick(ranks[2].ticked + 1)
        assert ("error on rank 1 (host-0): rank 0" in capsys.readouterr().err) == (local_rank == "0")


@pytest.mark.parametrize("part", ["starting", "validate", "save"])
def test_starting_saving_and_validating_may_take_longer(ranks, part):
    watch.place.part = part
    tick(ranks, SILENCE)
    tick(ranks, PATIENCE - SILENCE, [2])
    with pytest.raises(EndedError):
        tick(ranks, 2 * SILENCE, [2])


def test_a_first_step_may_take_longer(ranks):
    watch.place.step = 0
    tick(ranks, SILENCE)
    tick(ranks, 2 * SILENCE, [2])


def test_a_job_that_was_stopped_as_a_whole_goes_on(ranks):
    tick(ranks, SILENCE)
    for one in ranks:
        one.tick(one.ticked + 10 * PATIENCE)
    tick(ranks, SILENCE)


def test_a_rank_that_is_done_is_not_missed(ranks):
    tick(ranks, SILENCE)
    ranks[3]._publish(0.0, done=True)
    tick(ranks, 3 * SILENCE, [3])


def test_main_threads_that_do_not_move(ranks, capsys):
    """All ranks live, and one is in no collective: a warning says so once, and the end comes ten times later."""
    tick(ranks, SILENCE)
    ranks[2]._report = lambda: {
        "rank": 2,
        "host": "host-1",
        "pid": 1,
        "step": 7,
        "part": "data",
        "at": "in read (a.py:1)",
    }
    for rank in (0, 1, 3):
        here = {
            "rank": rank,
            "host": "h",
            "pid": 1,
            "step": 7,
            "part": "between",
            "at": "waiting in all_reduce (b.py:2)",
        }
        ranks[rank]._report = lambda here=here: here
    tick(ranks, SILENCE + SILENCE / 2, moving=False)
    said = capsys.readouterr().err
    assert said.count("warning: nothing has progressed for 6") == 1
    assert (
        "Rank 2 (host-1): step 8, data, in read (a.py:1). Ranks 0 (h), 1 (h), 3 (h): step 8, between, waiting" in said
    )
    with pytest.raises(EndedError):
        tick(ranks, 10 * SILENCE, moving=False)
    assert "error on rank 0 (host-0): nothing has progressed for 6" in capsys.readouterr().err


def test_a_step_that_is_always_slow_is_no_fault(ranks, capsys):
    watch.place.longest = SILENCE
    tick(ranks, 9 * SILENCE, moving=False)
    assert capsys.readouterr().err == ""


def test_the_first_failure_is_the_cause(ranks):
    assert ranks[2].cause() is None
    assert ranks[2].fail("the disk is full")["rank"] == 2
    assert ranks[1].fail("Connection closed by peer") == {"rank": 2, "host": "host-1", "message": "the disk is full"}


def test_where_names_the_collective_and_our_line():
    """Not a helper inside the collective, nor what lies between the two; and no collective where there is none."""
    names: dict = {}
    for file, code in (
        ("/lib/torch/distributed/c10d.py", "def _manager(done):\n    while not done: sleep(0.01)"),
        ("/lib/python3/contextlib.py", "def __exit__(done): _manager(done)"),
        ("/lib/megatron/core/distributed/buffers.py", "def start_grad_sync(done): __exit__(done)"),
        ("/src/megatron_soda/training/step.py", "def _finalize(done): start_grad_sync(done)"),
        ("/src/megatron_soda/data/store.py", "def read(done):\n    while not done: sleep(0.01)"),
    ):
        exec(compile(code, file, "exec"), names)
    names["sleep"] = time.sleep
    for function, where in (
        ("_finalize", "waiting in start_grad_sync (step.py:1, _finalize)"),
        ("read", "in read (store.py:2, read)"),
    ):
        done: list = []
        thread = threading.Thread(target=names[function], args=(done,))
        thread.start()
        time.sleep(0.1)
        assert watch._where(thread.ident) == where
        done.append(True)
        thread.join()
    assert watch._where(None) == "at its end"


def test_the_slowest_part_is_of_whole_steps():
    place = Place()
    place.moved -= 100
    place.move("forward_backward")
    assert place.longest == 0  # of the start
    place.step = 1
    place.moved -= 20
    with place.of("data"):
        assert 20 < place.longest < 21
        assert place.part == "data"
    assert place.part == "forward_backward"
    assert place.patience == pytest.approx(max(SILENCE, 200), rel=0.1)
    with place.of("save"):
        place.moved -= 500
        assert place.patience == PATIENCE
    assert place.longest < 21
