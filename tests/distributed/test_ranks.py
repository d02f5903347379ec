"""What ranks of one job share: the run folder, a clock that only goes forward, and a store for each attempt."""

import itertools
import json
import os
import socket
from unittest import mock

import pytest

from megatron_soda.errors import SodaError
from megatron_soda.files import locked
from megatron_soda.parallel.one_node import loopback_store
from tests.helpers import small_recipe


def run(recipe, clock_set_back: bool = False) -> bool:
    """On a rank of the pool: trains. `clock_set_back`: every look at the time of day is a minute before the last."""
    from megatron_soda.training.trainer import train

    with mock.patch("time.time", side_effect=itertools.count(1.7e9, -60.0 if clock_set_back else 60.0)):
        return train(recipe)


def refusal(recipe) -> str:
    from megatron_soda.training.trainer import train

    with pytest.raises(SodaError) as error:
        train(recipe)
    return str(error.value)


def test_a_run_folder_that_another_job_trains_in(pool, data, tmp_path):
    folder = tmp_path / "run"
    recipe = small_recipe(folder, data, "training.steps=2")
    folder.mkdir()
    with locked(folder):
        for said in pool.run(2, refusal, recipe):
            assert said.startswith(f"{folder}: another soda is at work on it (process {os.getpid()} on ")
            assert socket.gethostname() in said
    assert pool.run(2, run, recipe) == [True, True]
    assert pool.run(2, run, recipe) == [True, True]  # the lock is given back


def test_speeds_when_the_clock_is_set_back(pool, data, tmp_path):
    pool.run(2, run, small_recipe(tmp_path / "run", data, "training.steps=4"), True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    assert len(speeds) == 4
    assert min(speeds) > 0
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    assert seconds == sorted(seconds)
    assert min(seconds) > 0
    assert json.loads((tmp_path / "run" / "timings.json").read_text())["train"]["seconds"] > 0


def rendezvous_twice() -> list[bytes]:
    """What a second attempt finds where the first one wrote."""

    from megatron_soda.parallel import ranks

    server = loopback_store()  # torchrun's, for all attempts
    kept = dict(os.environ)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port), TORCHELASTIC_USE_AGENT_STORE="True")
    found = []
    try:
        for attempt in ("0", "1"):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = attempt
            store = ranks.rendezvous_store(2)
            found.append(store.check(["address"]))
            store.set("address", attempt)
            found.append(store.get("address").decode())
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return found


def test_attempts_do_not_read_each_other(pool):
    assert pool.run(1, rendezvous_twice) == [[False, "0", False, "1"]]
