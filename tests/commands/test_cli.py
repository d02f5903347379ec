"""The command as a user meets it: help with examples, and errors that are messages."""

import json
import os
import signal
import sys
import time
import zlib

import pytest

from megatron_soda import cli, train
from megatron_soda.files import write_sealed
from tests.helpers import write_data

COMMANDS = "prepare validate inspect convert-store train export import evaluate generate report doctor".split()
COMMANDS += "reproduce transcribe speak continue translate serve".split()


def soda(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soda", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(monkeypatch, capsys, command):
    assert soda(monkeypatch, command, "--help") == 0
    out = capsys.readouterr().out
    assert "soda" in out
    assert command == "doctor" or "Examples" in out
    assert soda(monkeypatch, "--help") == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "none.yaml"], "none.yaml: cannot read the recipe"),
        (["prepare", "none.txt"], "not a folder, and not a recipe"),
        (["evaluate", "empty"], "no recipe.yaml in it"),
        (["train", "none.yaml", "training.stepz=1"], "none.yaml"),
        (["prepare", "R", "training.stepz=1"], "Did you mean training.steps?"),
        (["train", "R", "parallel.tensor=3"], "parallel.tensor=3 does not divide"),
        (["train", "R", "parallel.tensor=2"], "1 processes cannot be arranged"),
        (["train", "R"], "train.json: no such file. Run `soda prepare`"),
        (["train", "R", "training.backend=transformer_engine", "data.path=D"], "needs a CUDA device"),
        (["export", "R"], "no checkpoint in it"),
        (["generate", "R"], "no checkpoint in it"),
        (["import", "nowhere", "run=run"], "nowhere: no such folder"),
        (["import", "empty", "run=run"], "empty: no config.json in it"),
        (["import", "empty"], "give a run folder: run=runs/NAME"),
        (["report", "R"], "run"),
        (["transcribe", "a.wav", "--model", "nowhere"], "nowhere: no such folder; give a run or a model"),
        (["speak", "hello", "--model", "empty"], "empty: no recipe.yaml in it"),
        (["speak", "hello", "--model", "empty", "--voice-text", "x"], "give it with --voice FILE"),
        (["continue", "a.wav", "--seconds", "1", "--model", "theirs"], "First: soda import theirs run=runs/NAME"),
        (["translate", "a.wav", "--to", "English!", "--model", "R"], "--to English!: not a language's code"),
        (["prepare", "R", "prepare.speech=nowhere"], "nowhere"),
        (["prepare", "R", "prepare.codec=mimi", "prepare.codec_path=nowhere", "prepare.speech=D"], "D"),
    ],
)
def test_mistakes_are_messages(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: run\ndata: {sequence_length: 32}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    if "data.path=D" in arguments:
        write_data(tmp_path / "D")
    status = soda(monkeypatch, *[str(recipe) if a == "R" else a for a in arguments])
    err = capsys.readouterr().err
    assert status == 2
    assert "error: " in err
    assert message in err
    assert "Traceback" not in err


def test_validate_exit_status(monkeypatch, capsys, tmp_path):
    write_data(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}\n")
    assert soda(monkeypatch, "validate", str(recipe)) == 0
    assert soda(monkeypatch, "validate", str(recipe), "overlap_parameters=true") == 2
    assert "it needs parallel.distributed_optimizer=true" in capsys.readouterr().err
    with (tmp_path / "data" / "valid.bin").open("r+b") as file:
        file.truncate(10)
    assert soda(monkeypatch, "validate", str(recipe)) == 1
    assert "valid.bin: 10 bytes, but the index says" in capsys.readouterr().out


def test_stores_on_the_command_line(monkeypatch, capsys, tmp_path):
    store = str(write_data(tmp_path / "data") / "valid")
    assert soda(monkeypatch, "validate", store) == 0
    assert "train" not in capsys.readouterr().out
    assert soda(monkeypatch, "convert-store", store, "compact") == 0
    assert (tmp_path / "data" / "valid.frames").is_file()
    assert (tmp_path / "data" / "train.bin").is_file()
    assert soda(monkeypatch, "convert-store", str(tmp_path / "data"), "compact") == 0
    assert not list((tmp_path / "data").glob("*.bin"))
    assert soda(monkeypatch, "validate", str(tmp_path / "data")) == 0
    assert soda(monkeypatch, "inspect", store, "--document", "3", "--count", "1") == 0
    assert "document 3" in capsys.readouterr().out
    for arguments, message in (
        (("inspect", store, "--document", "40"), "there is no document 40"),
        (("inspect", str(tmp_path / "no")), "no.json: no such file"),
        (("convert-store", store, "zip"), "compact"),
        (("validate", str(tmp_path / "nothing")), "not a folder"),
        (("validate", "."), "no recipe.yaml in it"),
        (("convert-store", "/", "compact"), "no recipe.yaml in it"),
        (("inspect", "."), "not a store's name"),
        (("validate", store, "seed=1"), "settings only apply to a recipe"),
    ):
        assert soda(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_is_prepared_and_not_trained(monkeypatch, capsys, tmp_path):
    """Training writes recipe.yaml; the stores are there before."""
    write_data(tmp_path / "run" / "data")
    for target in (tmp_path / "run", tmp_path / "run" / "data"):
        assert soda(monkeypatch, "validate", str(target)) == 0
        assert "train: " in capsys.readouterr().out
        assert soda(monkeypatch, "convert-store", str(target), "compact") == 0
        assert (tmp_path / "run" / "data" / "train.frames").is_file()
        assert soda(monkeypatch, "convert-store", str(target), "megatron") == 0
    (tmp_path / "run" / "recipe.yaml").write_text(f"data: {{path: {write_data(tmp_path / 'other', 7)}}}\n")
    assert soda(monkeypatch, "convert-store", str(tmp_path / "run"), "compact") == 0  # as its recipe says
    assert (tmp_path / "run" / "data" / "train.bin").is_file()
    assert (tmp_path / "other" / "train.frames").is_file()


def test_train_refuses_a_damaged_store_and_one_with_foreign_ids(monkeypatch, capsys, tmp_path):
    write_data(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}\ndata: {{sequence_length: 32}}\ntraining: {{global_batch_size: 4, steps: 2}}\n")
    data = (tmp_path / "data" / "train.bin").read_bytes()
    foreign = b"\xff\xff\xff\x7f" * (len(data) // 4)
    (tmp_path / "data" / "train.bin").write_bytes(foreign)
    assert soda(monkeypatch, "train", str(recipe)) == 2
    assert "train.bin: its bytes have changed since it was written" in capsys.readouterr().err
    meta = json.loads((tmp_path / "data" / "train.json").read_text())
    files = {**meta["files"], "bin": {"bytes": len(foreign), "crc32": f"{zlib.crc32(foreign):08x}"}}
    write_sealed(tmp_path / "data" / "train.json", {**meta, "files": files})  # as if they had been written so
    assert soda(monkeypatch, "train", str(recipe)) == 2
    assert "holds an id outside" in capsys.readouterr().err
    write_sealed(tmp_path / "data" / "train.json", meta)
    (tmp_path / "data" / "train.bin").write_bytes(data[:-4])
    assert soda(monkeypatch, "train", str(recipe)) == 2
    assert "train.bin" in capsys.readouterr().err
    meta = json.loads((tmp_path / "data" / "valid.json").read_text())
    (tmp_path / "data" / "train.bin").write_bytes(data)
    write_sealed(tmp_path / "data" / "valid.json", {**meta, "space": {**meta["space"], "bos": 5}})
    assert soda(monkeypatch, "train", str(recipe)) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_a_learning_rate_that_makes_nan_is_a_message(monkeypatch, capsys, tmp_path):
    write_data(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}\ndata: {{sequence_length: 32}}\ntraining: {{global_batch_size: 4}}\n")
    assert soda(monkeypatch, "train", str(recipe), "learning_rate=1e30", "clip_grad=0") == 2
    assert "Run again with a lower optimizer.learning_rate (now 1e+30)" in capsys.readouterr().err


def test_doctor(monkeypatch, capsys):
    assert soda(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    for part in ("Transformer Engine", "apex", "DALI", "csrc", "torch", "megatron-core"):
        assert part in out


def test_torchrun_entry_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 0
    assert "torchrun" in capsys.readouterr().out


@pytest.fixture
def handlers():
    """Puts signal handlers back that a command sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


LONG = {
    "prepare": "data_prep.prepare.prepare",
    "validate": "megatron_soda.data.validate.validate",
    "convert-store": "megatron_soda.data.convert.convert_stores",
    "export": "megatron_soda.hf.export.export",
    "import": "megatron_soda.hf.importing.import_model",
    "evaluate": "megatron_soda.commands.evaluate.model_folder",
    "generate": "megatron_soda.commands.generate.model_folder",
    "report": "megatron_soda.report.build_report",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("command", LONG)
def test_a_signal_ends_a_command_with_a_sentence(monkeypatch, capsys, tmp_path, handlers, command, number):
    cleaned = []

    def work(*_, **__):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            cleaned.append(command)

    write_data(tmp_path / "data", 4)
    (tmp_path / "recipe.yaml").write_text("name: small\n")
    monkeypatch.setattr(LONG[command], work)
    more = ["compact"] if command == "convert-store" else []
    assert soda(monkeypatch, command, str(tmp_path), *more) == 130
    assert cleaned == [command]
    said = capsys.readouterr().err
    assert "Interrupted after" in said
    assert ("to resume" in said) == (command in ("prepare", "evaluate"))
    assert "Traceback" not in said


def test_nohup_is_respected(monkeypatch, tmp_path, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    (tmp_path / "recipe.yaml").write_text("name: small\n")
    monkeypatch.setattr(LONG["report"], lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    assert soda(monkeypatch, "report", str(tmp_path)) == 0
