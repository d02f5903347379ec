"""What lies in a checkpoint's folder: damaged, hostile, of an older version, too large for the disk."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from tests.distributed.test_checkpoint import FLAT, SAVES, folders, train_heard
from tests.distributed.test_layouts import losses, train
from tests.helpers import run_tool


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def reseal(folder: Path) -> None:
    """What a stranger can do too: a manifest that agrees with what they wrote."""
    from megatron_soda.training.checkpoint import manifest_of

    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder)))


# ---- hostile


class _Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def tensor_with(content: bytes, folder: Path) -> None:
    """Puts `content` where the first tensor of the index lies."""
    index = json.loads((folder / "index.json").read_text())
    chunk = next(iter(index["tensors"].values()))["chunks"][0]
    path = folder / chunk["file"]
    chunk["start"], chunk["bytes"] = path.stat().st_size, len(content)
    path.write_bytes(path.read_bytes() + content)
    (folder / "index.json").write_text(json.dumps(index))


def saved_by_torch(value: object) -> bytes:
    import io

    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_pickles_beside_the_index_are_never_opened(pool, data, saved, run, tmp_path):
    """.metadata and common.pt may hold anything: every one of these would leave a mark if anybody read it."""
    mark = tmp_path / "mark"
    shutil.rmtree(step(run, 12))
    folder = step(run, 9)
    (folder / ".metadata").write_bytes(pickle.dumps(_Runs(mark)))
    (folder / "common.pt").write_bytes(saved_by_torch({"more": _Runs(mark)}))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    (folder / "__0_9.metadata").write_bytes(pickle.dumps(_Runs(mark)))
    reseal(folder)
    pool.run(2, train, str(run), str(data), SAVES)
    assert losses(run) == losses(saved)
    assert not mark.exists()
    pickle.loads((step(run, 9) / ".metadata").read_bytes())
    assert mark.exists()  # so the trap was one


def test_a_tensor_that_is_a_program_is_not_run(pool, data, run, tmp_path):
    mark = tmp_path / "mark"
    shutil.rmtree(step(run, 12))
    tensor_with(saved_by_torch(_Runs(mark)), step(run, 9))
    reseal(step(run, 9))
    with pytest.raises(RuntimeError, match=r"step_00000009: cannot be loaded .*[Ww]eights.only"):
        pool.run(2, train, str(run), str(data), SAVES)
    assert not mark.exists()


# ---- damaged


@pytest.mark.parametrize("damage", ["cut", "another digit", "gone", "index cut", "manifest names another folder"])
def test_what_describes_a_checkpoint_is_checked_too(pool, data, saved, run, damage):
    folder = step(run, 12)
    described = folder / ("index.json" if damage == "index cut" else "checkpoint.json")
    text = described.read_text()
    if damage == "another digit":
        described.write_text(text.replace('"samples": 96', '"samples": 97'))
        assert described.read_text() != text
    elif damage == "gone":
        described.unlink()
    elif damage == "manifest names another folder":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["../step_00000009/checkpoint.json"] = manifest["checkpoint.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        described.write_text(text[:-9])
    out = pool.run(2, train_heard, str(run), str(data), SAVES)[0]
    assert "step_00000012 is damaged and not used" in out
    assert "from step 9" in out
    assert losses(run) == losses(saved)


def test_damaged_checkpoints_are_not_counted_as_kept(pool, data, run):
    """With the two newest damaged, the one that was resumed from and those written since stay."""
    keep = [*FLAT, "checkpoint.save_every=2", "checkpoint.keep_last=2"]
    for number in (9, 12):
        victim = step(run, number) / "__0_0.distcp"
        victim.write_bytes(victim.read_bytes()[:-1])
    pool.run(2, train, str(run), str(data), [*keep, "training.steps=8"])
    assert folders(run) == [6, 8, 9, 12]  # 3 is not needed; 9 and 12 lie ahead
    pool.run(2, train, str(run), str(data), [*keep, "training.steps=11"])
    assert folders(run) == [8, 10, 11, 12]  # 8 was resumed from, 9 is behind us now
    out = pool.run(1, train_heard, str(run), str(data), [*keep, "training.steps=12"])[0]
    assert "step_00000012 is damaged" in out
    assert "from step 11" in out
    assert folders(run) == [11, 12]


def test_a_damaged_one_that_cannot_be_seen_by_its_size(pool, data, run):
    """A flipped bit: the checkpoint counts as kept, but never in place of what was just written or resumed from."""
    for number in (9, 12):
        victim = step(run, number) / "__0_0.distcp"
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(bytes(content))
    keep = [*FLAT, "checkpoint.save_every=2", "checkpoint.keep_last=1", "training.steps=8"]
    pool.run(2, train, str(run), str(data), keep)
    assert folders(run) == [6, 8, 9, 12]


# ---- older, and elsewhere


def test_a_checkpoint_without_an_index(pool, data, saved, run):
    """An older version's: not used, but for the tool that says what it trusts."""
    for number in (3, 6, 9):
        shutil.rmtree(step(run, number))
    folder = step(run, 12)
    (folder / "index.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps({k: v for k, v in manifest.items() if k not in ("index.json", "checkpoint.json")})
    )
    more = [*SAVES, "training.steps=15"]
    with pytest.raises(RuntimeError, match="every checkpoint is damaged"):
        pool.run(1, train, str(run), str(data), more)
    ((status, said, _),) = pool.run(1, run_tool, "index_checkpoint.py", str(folder))
    assert status == 0
    assert said == f"{folder}: {len(json.loads((folder / 'index.json').read_text())['tensors'])} tensors indexed\n"
    pool.run(2, train, str(run), str(data), more)
    straight = saved.parent / "straight"
    pool.run(2, train, str(straight), str(data), more)
    assert losses(run) == losses(straight)


def train_with_a_full_disk(run: str, data: str, overrides: list[str], rank: int) -> list[str]:
    """On a rank of the pool: what the error says when the disk of one rank is full at the second save; and whether
    threads or processes are left."""
    import errno
    import threading
    from unittest import mock

    import psutil
    import torch.distributed as dist

    from megatron_soda.errors import SodaError
    from megatron_soda.training import checkpoint_files

    write, files = checkpoint_files._Checked.write, set()

    def failing(self, data):
        files.add(self.file.name)
        if dist.get_rank() == rank and ".step_00000006" in self.file.name:
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.failure
        return write(self, data)

    with mock.patch.object(checkpoint_files._Checked, "write", failing), pytest.raises(SodaError) as error:
        train(run, data, overrides)
    assert files
    threads = [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")]
    return [str(error.value), *threads, *(child.name() for child in psutil.Process().children(recursive=True))]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_on_all(pool, data, tmp_path, rank, asynchronous):
    overrides = [*FLAT, "parallel.tensor=2", f"checkpoint.async_save={asynchronous}"]  # so that both ranks write
    heard = pool.run(2, train_with_a_full_disk, str(tmp_path), str(data), overrides, rank)
    for said, *left in heard:
        assert f"step_00000006: cannot write the checkpoint: rank {rank}: " in said
        assert "the disk is full" in said
        assert left == []
    assert folders(tmp_path) == [3]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def train_and_count(run: str, data: str, overrides: list[str]) -> list[str]:
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    train(run, data, overrides)
    return [child.name() for child in psutil.Process().children(recursive=True) if child.pid not in before]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_saving_starts_no_process(pool, data, tmp_path, asynchronous):
    """A signal to the process group would end it amid a save, and it would outlive a trainer that is killed."""
    overrides = [*FLAT, f"checkpoint.async_save={asynchronous}"]
    assert pool.run(2, train_and_count, str(tmp_path), str(data), overrides) == [[], []]
