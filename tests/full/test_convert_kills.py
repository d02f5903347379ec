"""soda convert-store, killed at every step that changes a name: the store is whole, and the next run ends the job."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_soda.data.store import Store, write_store
from tests.helpers import SPACE, documents

pytestmark = pytest.mark.full

KILLED = """
import os, sys
from pathlib import Path
from megatron_soda.data.convert import convert_stores

left = int(sys.argv[3])

def dying(name):
    original = getattr(os, name)

    def step(*arguments, **more):
        global left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        return original(*arguments, **more)

    setattr(os, name, step)

for name in ("replace", "unlink", "fsync"):
    dying(name)
convert_stores(Path(sys.argv[1]), ["s"], sys.argv[2], None)
"""


@pytest.mark.parametrize(("old", "new"), [("megatron", "compact"), ("compact", "megatron")])
def test_killed_anywhere(tmp_path, old, new):
    made = documents(30)
    stream = np.concatenate(made)
    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        write_store(folder / "s", made, SPACE, old, codec="c")
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), new, str(steps)], capture_output=True)
        store = Store(folder / "s")
        store.check_index()
        assert np.array_equal(store.read(0, store.size), stream)
        assert store.meta["codec"] == "c"
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        subprocess.run([sys.executable, "-c", KILLED, str(folder), new, "1000"], check=True, capture_output=True)
        store = Store(folder / "s")
        assert store.format == new
        assert np.array_equal(store.read(0, store.size), stream)
        assert {path.name for path in folder.iterdir()} == {"s.json", ".lock", *(p.name for p in store.files.values())}
    assert steps > 10
