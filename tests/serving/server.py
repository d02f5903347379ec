"""`soda serve` in a thread, with the tiny model of tests/exported.py and its fake codec."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_soda.codecs import description
from megatron_soda.inference.own import open_studio
from megatron_soda.inference.studio import Studio
from tests.exported import FakeCodec

NEEDED = ("starlette", "uvicorn", "python_multipart", "httpx")


def need_packages() -> None:
    for name in NEEDED:
        pytest.importorskip(name, reason=f"{name} is not installed (the extras `serve` and `dev`)")


@dataclass
class Served:
    studio: Studio
    url: str
    worker: Any  # serving.work.Worker


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    import uvicorn

    from megatron_soda.serving import app, run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(description, "_load", lambda *_: FakeCodec())
        studio, workers = open_studio(folder), []
        worker = app.Worker
        patch.setattr(app, "Worker", lambda: workers.append(worker()) or workers[0])
        made = app.build_app(studio)
    listening = run.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(made, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(studio, f"http://127.0.0.1:{listening.getsockname()[1]}", workers[0])
    finally:
        server.should_exit = True
        thread.join()


class Gate:
    """Stops every generation before its `after`-th token until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        from megatron_soda.serving import answers

        self.reached, self.open, self.tokens = threading.Event(), threading.Event(), 0
        plain = answers.answer

        def slow(studio: Any, task: Any, materials: Any, chance: Any, on_token: Any) -> Any:
            self.tokens = 0

            def counted(row: int, token: int) -> None:
                self.tokens += 1
                if self.tokens == after:
                    self.reached.set()
                    assert self.open.wait(20), "the gate stayed shut"
                on_token(row, token)

            return plain(studio, task, materials, chance, counted)

        monkeypatch.setattr(answers, "answer", slow)
