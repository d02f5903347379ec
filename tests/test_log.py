"""What is said: with time and rank in files, plain on a terminal, and nothing breaks where nobody reads it."""

import io
import re

import pytest

from megatron_soda.log import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("world", "rank"), [("1", ""), ("4", r" \[rank 3\]")])
def test_in_a_file(monkeypatch, capsys, world, rank):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "3")
    log.info("step 1")
    log.warning("careful")
    said = capsys.readouterr()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d{rank} step 1\n", said.out)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d{rank} warning: careful\n", said.err)


def test_on_a_terminal(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    log.info("step 1")
    log.warning("careful")
    assert (out.getvalue(), err.getvalue()) == ("step 1\n", "warning: careful\n")


def test_a_pipe_that_is_closed(monkeypatch):
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    log.info("to nobody")
