"""What a rank says when it ends, and what it leaves for torchrun's table: the first failure, once on each host."""

import json
import os
import socket
import threading
from types import SimpleNamespace

import pytest

from megatron_soda import train
from megatron_soda.errors import SodaError

HOST = socket.gethostname()
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:30345. GLHF!")


@pytest.fixture
def fail(monkeypatch, tmp_path, capsys):
    """Has rank 1 of two fail with an error, after the failure of rank 0 if one is given: exit status, what is said,
    what torchrun is told."""

    def failing(error: Exception, before: dict | None = None, speaks: bool = False):
        watch = SimpleNamespace(
            current=SimpleNamespace(
                over=threading.Event(),
                rank=1,
                cause=lambda seconds: before,
                fail=lambda text: before or {"rank": 1, "host": HOST, "message": text},
                speaks=lambda cause: cause["rank"] == 1 or speaks,
            )
        )
        monkeypatch.setitem(train.sys.modules, "megatron_soda.parallel.watch", watch)
        for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        status = train._failed(error, True)
        assert watch.current.over.is_set()  # nobody is to wait for signs of life
        told = json.loads((tmp_path / "error.json").read_text())["message"]
        assert told["message"] == told["extraInfo"]["py_callstack"]
        assert int(told["extraInfo"]["timestamp"]) > 1_700_000_000
        return status, capsys.readouterr().err, told["message"]

    return failing


def test_its_own_error(fail):
    said = f"error on rank 1 ({HOST}): the disk is full"
    assert fail(SodaError("the disk is full")) == (2, f"{said}\n", said)


def test_the_same_error_on_all_ranks_is_said_by_the_first(fail):
    before = {"rank": 0, "host": "node-a", "message": "another model"}
    status, said, told = fail(SodaError("another model"), before)
    assert (status, said, told) == (2, "", "error on rank 0 (node-a): another model")
    assert fail(SodaError("another model"), before, speaks=True)[1] == "error on rank 0 (node-a): another model\n"


def test_another_error_than_the_first_is_said_too(fail):
    status, said, _ = fail(SodaError("no such file"), {"rank": 0, "host": "node-a", "message": "another model"})
    assert (status, said) == (2, f"error on rank 1 ({HOST}): no such file\n")


@pytest.mark.parametrize(
    "error",
    [LOST, SodaError(f"cannot write the checkpoint ({LOST})"), ConnectionResetError(104, "Connection reset by peer")],
)
def test_a_rank_that_lost_another_does_not_bury_why(fail, error):
    before = {"rank": 0, "host": "node-a", "message": "the disk is full"}
    status, said, told = fail(error, before, speaks=True)
    assert (status, said) == (1, "error on rank 0 (node-a): the disk is full\n")
    assert told == "error on rank 0 (node-a): the disk is full"
    assert fail(error, before)[1] == ""  # where rank 0 has said it itself
    status, said, _ = fail(error)  # killed, so that it could not say anything
    assert status == 1
    assert said.startswith(f"error on rank 1 ({HOST}): another rank ended, and did not say why (")
    assert "by peer" in said
    assert said.count("\n") == 1


def test_a_defect_keeps_its_traceback(fail):
    try:
        raise KeyError("x")
    except KeyError as error:
        status, said, told = fail(error)
    assert status == 1
    assert "Traceback (most recent call last)" in said
    assert said.endswith(f"error on rank 1 ({HOST}): KeyError: 'x'\n")
    assert told == f"error on rank 1 ({HOST}): KeyError: 'x'"


def test_one_process_names_no_rank(monkeypatch, capsys):
    monkeypatch.delitem(train.sys.modules, "megatron_soda.parallel.watch", raising=False)
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert train.run(os.devnull + "/none.yaml", []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
