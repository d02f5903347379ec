"""Parts of evaluation while training. As a whole: tests/distributed/test_evaluations.py."""

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_soda.data.store import Store
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import during
from megatron_soda.evaluation.bench import Bench
from megatron_soda.evaluation.suites.nll import kept_unigram, unigram
from megatron_soda.tokenizer import data_tokenizer
from megatron_soda.training import evaluations


def test_stores_are_read_through_except_while_training(exported, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(exported.run / "data", data)
    ids = bytearray((data / "train.bin").read_bytes())
    ids[0] ^= 1
    (data / "train.bin").write_bytes(ids)
    recipe = exported.recipe(f"data.path={data}")
    assert Bench(recipe, exported.folder, training=tmp_path).data[1].size
    with pytest.raises(SodaError, match="has changed since it was written"):
        _ = Bench(recipe, exported.folder).data


def test_tokens_are_counted_once(exported, tmp_path):
    store = Store(exported.run / "data" / "train")
    first = kept_unigram(store, tmp_path)
    assert np.array_equal(first, unigram(store))
    with mock.patch.object(Store, "read", side_effect=AssertionError):
        assert np.array_equal(kept_unigram(store, tmp_path), first)
    kept_unigram(Store(exported.run / "data" / "test"), tmp_path)
    paths = sorted(tmp_path.glob("unigram-*"))
    assert len(paths) == 2
    for path in paths:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SodaError, match="not a table of token frequencies; remove it"):
        kept_unigram(store, tmp_path)


def test_an_imported_run_needs_no_test_store(exported, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(exported.run / "data", data)
    for path in data.glob("test.*"):
        path.rename(path.with_name(path.name.replace("test", "valid")))
    recipe = exported.recipe(f"run={run}", f"data.path={data}", "evaluate.split=valid")
    with pytest.raises(SodaError, match=r"test\.json"):
        during.check(recipe)
    shutil.copytree(exported.folder, run / "imported")
    during.check(recipe)
    assert during._untrained(recipe).text.fingerprint == data_tokenizer(run / "imported").fingerprint


WAITS = """
import time
from megatron_soda.training.stop import end_with
end_with({parent})
print("waits", flush=True)
time.sleep(60)
"""
STARTS = """
import os, subprocess, sys
command = [sys.executable, "-c", {waits!r}.replace("PARENT", str(os.getpid()))]
process = subprocess.Popen(command, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
process.wait()
"""


def test_it_ends_if_the_trainer_is_gone():
    code = WAITS.format(parent=os.getpid() + 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=50)
    assert (done.returncode, done.stdout) == (1, b"")


def test_it_ends_when_the_trainer_is_killed():
    code = STARTS.format(waits=WAITS.format(parent="PARENT"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    watched = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    ended = bool(select.select([watched], [], [], 20)[0])
    os.close(watched)
    assert ended


@pytest.mark.parametrize(("number", "signalled"), [(signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_a_signal_to_stop_is_told_from_a_failure(exported, number, signalled):
    evaluation = evaluations.Evaluation(exported.recipe(), 1, starts=True)
    evaluation._process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    evaluation._process.send_signal(number)
    evaluation._process.communicate()
    assert evaluation.was_signalled() == signalled


def test_its_process_gets_the_trainers_path_and_no_rank(tmp_path, monkeypatch):
    (tmp_path / "megatron_soda").mkdir()
    (tmp_path / "megatron_soda" / "__init__.py").write_text("raise ImportError('another package')")
    monkeypatch.setattr(sys, "path", [str(Path(evaluations.__file__).parents[2]), *sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_SCRATCH", "here")
    monkeypatch.setattr(
        evaluations, "_MAIN", evaluations._MAIN.replace("sys.exit(main())", "import os; print(os.environ)")
    )
    with Path("said").open("w") as output:
        assert evaluations._start([], output).wait() == 0
    said = Path("said").read_text()
    assert "LOCAL_SCRATCH" in said
    assert "LOCAL_RANK" not in said
