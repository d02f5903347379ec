"""A full disk is recognised, whichever library was writing. (Whole commands: tests/full/test_faults.py.)"""

import errno
import os
import sqlite3
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from megatron_soda.errors import SodaError, is_disk_full, user_message
from megatron_soda.files import atomic_path

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),  # Arrow's
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    sqlite3.OperationalError("database or disk is full"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    assert user_message(error).startswith("the disk is full.")
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(SodaError, match=r"file: the disk is full\. Nothing was changed"),
        atomic_path(tmp_path / "file"),
    ):
        raise error
    assert (tmp_path / "file").read_text() == "old"


def test_what_does_not_say_so_is_judged_by_the_room_that_is_left(tmp_path, monkeypatch):
    silent = RuntimeError("System error.")
    assert not is_disk_full(silent, tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    assert is_disk_full(silent, tmp_path)
    assert not is_disk_full(silent)
    assert not is_disk_full(FileNotFoundError(errno.ENOENT, "No such file"), tmp_path)


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "Input/output error")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        user_message(error)
