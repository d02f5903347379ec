"""`soda serve --vllm`, and what vLLM is told to load. That runs in tests/full/test_vllm.py."""

import ast
import importlib.util
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_soda import cli
from megatron_soda.serving.slots import PROCESSOR

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("serving/vllm.py", "serving/slots.py", "vocab.py")  # what runs in vLLM's environment


def soda(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soda", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command(exported, monkeypatch, capsys):
    """Needs none of the packages of our own server."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert soda(monkeypatch, "serve", str(exported.folder), "--vllm", "--port", "9000") == 0
    program, verb, folder, *flags = shlex.split(capsys.readouterr().out)
    assert [program, verb] == ["vllm", "serve"]
    assert Path(folder).is_absolute()
    assert Path(folder).samefile(exported.folder)
    wanted = {"host": "127.0.0.1", "port": "9000", "served-model-name": "tiny", "dtype": "float32"}
    assert flags == [f"--{name}={value}" for name, value in {**wanted, "logits-processors": PROCESSOR}.items()]


def test_the_folder_is_checked(exported, monkeypatch, capsys):
    weights = exported.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert soda(monkeypatch, "serve", str(exported.folder), "--vllm") == 2
    found = capsys.readouterr()
    assert "model.safetensors: has other bytes than were exported" in found.err
    assert not found.out


@pytest.mark.parametrize("option", [("--codec", "mimi"), ("--weights", "int8")])
def test_what_vllm_does_not_have(exported, monkeypatch, capsys, option):
    assert soda(monkeypatch, "serve", str(exported.folder), "--vllm", *option) == 2
    assert "leave them out" in capsys.readouterr().err


def test_what_vllm_loads_is_there():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.logits_processors"]
    for target in (*points.values(), PROCESSOR):
        module, name = target.split(":")
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_it_needs_no_other_part_of_this_package():
    for path in ALONE:
        tree = ast.parse((ROOT / "megatron_soda" / path).read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert {node.module for node in froms if node.level} <= {"vocab", "slots"}
        names = {(node.module or "").split(".")[0] for node in froms if not node.level}
        names |= {
            one.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names
        }
        assert names <= {*sys.stdlib_module_names, "numpy", "torch", "vllm"}
